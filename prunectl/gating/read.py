"""Reads a table of budgets, and says file and line of what it cannot mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from prunectl.errors import UsageError
from prunectl.formats.names import nearest
from prunectl.gating.budget import Budget, Budgets, Drop, LayerBudget, Limit, OnMissing, Wanted
from prunectl.gating.find import Found
from prunectl.gating.keys import BUDGET, DROP, LAYER, LEVELS, TOP, Key, Kind, Metric
from prunectl.gating.read_drop import EXAMPLE, drop_of
from prunectl.gating.read_drop import NAME as MAX_DROP
from prunectl.measuring import patterns
from prunectl.measuring.patterns import ZerosOf

BASELINE = "prunectl-baseline.json"
_METRICS = {Kind.SIZE: Metric.BYTES, Kind.COUNT: Metric.COUNT, Kind.RATIO: Metric.RATIO}
_COUNT = re.compile(r"\d+(?:\.\d+)?\s*[kmgt]?", re.IGNORECASE)
Place = tuple[str | int, ...]
Said = TypeVar("Said")
Understood = TypeVar("Understood")


@dataclass(frozen=True, slots=True)
class Words:
    """How sizes and ratios are written."""

    size: Callable[[str], int]
    ratio: Callable[[str], float]


def read(found: Found, words: Words) -> Budgets:
    """Return the budgets of a file."""
    reading = _Reading(found, words)
    reading.check(found.table, TOP, ())
    top = found.table
    choice = top.get("on-missing", OnMissing.WARN)
    if choice not in list(OnMissing):
        raise reading.slip(f"{choice!r} is not warn, fail or create", "on-missing")
    tables = reading.tables(top, "budget", ())
    if not tables:
        raise UsageError(f"{found.path} has no [[budget]]", hint="prunectl init writes some, in a file of their own")
    budgets = tuple(reading.budget(table, ("budget", at)) for at, table in enumerate(tables))
    return Budgets(found.path, reading.text(top, "baseline", ()) or BASELINE, OnMissing(choice), budgets)


@dataclass(frozen=True, slots=True)
class _Reading:
    found: Found
    words: Words

    def slip(self, what: str, *place: str | int, **more: Any) -> UsageError:
        return UsageError(f"{self.found.place(*place)}: {what}", **more)

    def check(self, table: dict[str, Any], keys: tuple[Key, ...], place: Place) -> None:
        """Refuse keys that are not known, and the lack of those that must be there."""
        known = [key.name for key in keys]
        for name in table:
            if name not in known:
                raise self.slip(
                    f"there is no key {name!r} here",
                    *place,
                    name,
                    did_you_mean=nearest(name, known),
                    hint=f"keys: {', '.join(known)}",
                )
        for key in keys:
            if key.is_required and key.name not in table:
                raise self.slip(f"{key.name!r} is missing: {key.line[0].lower()}{key.line[1:]}", *place)

    def tables(self, table: dict[str, Any], name: str, place: Place) -> list[dict[str, Any]]:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.slip(f"{name} is a list of tables", *place, name, hint=f"write [[{name}]]")
        return value

    def text(self, table: dict[str, Any], name: str, place: Place) -> str:
        value = table.get(name, "")
        if not isinstance(value, str) or (name in table and not value.strip()):
            raise self.slip(f"{name} is a text, not {value!r}", *place, name)
        return value

    def budget(self, table: dict[str, Any], place: Place) -> Budget:
        self.check(table, BUDGET, place)
        paths = self._paths(table["path"], (*place, "path"))
        self._check_limits(table, BUDGET, place)
        return Budget(
            name=self.text(table, "name", place) or ", ".join(paths),
            line=self.found.line(*place),
            paths=paths,
            limits=self._limits(table, BUDGET, place),
            growth=self._growth(table, (*place, "max-growth")),
            pattern=self._pattern(table, place),
            keep_zeros=self._wanted(table, "keep-zeros", place),
            drop=self._drop(table, (*place, MAX_DROP)),
            layers=tuple(
                self._layer(layer, (*place, "layer", at)) for at, layer in enumerate(self.tables(table, "layer", place))
            ),
            message=self.text(table, "message", place),
        )

    def _layer(self, table: dict[str, Any], place: Place) -> LayerBudget:
        self.check(table, LAYER, place)
        self._check_limits(table, LAYER, place)
        return LayerBudget(
            selector=self.text(table, "name", place),
            line=self.found.line(*place),
            limits=self._limits(table, LAYER, place),
            pattern=self._pattern(table, place),
            message=self.text(table, "message", place),
        )

    def _check_limits(self, table: dict[str, Any], keys: tuple[Key, ...], place: Place) -> None:
        """Refuse a budget that anything would keep to."""
        if not any(key.is_gate and key.name in table for key in keys):
            raise self.slip("there is no limit in it", *place, hint="such as max-gzip = '400KB'")

    def _paths(self, value: Any, place: Place) -> tuple[str, ...]:
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise self.slip("path is a glob, or a list of them", *place)
        return tuple(paths)

    def _wanted(self, table: dict[str, Any], name: str, place: Place) -> Wanted | None:
        return Wanted(self.text(table, name, place), self.found.line(*place, name)) if name in table else None

    def _drop(self, table: dict[str, Any], spot: Place) -> Drop | None:
        if MAX_DROP not in table:
            return None
        inner = table[MAX_DROP]
        if not isinstance(inner, dict):
            raise self.slip(f"{MAX_DROP} is a table", *spot, hint=f"write {MAX_DROP} = {EXAMPLE}")
        self.check(inner, DROP, spot)
        for key in DROP:
            if key.kind is Kind.TEXT:
                self.text(inner, key.name, spot)
        size = inner.get("batch-size")
        number = int(self._number(size, Kind.COUNT, (*spot, "batch-size"))) if size is not None else None
        return self._understood(lambda it: drop_of(it, self.found.line(*spot), number), inner, spot)

    def _pattern(self, table: dict[str, Any], place: Place) -> Wanted | None:
        wanted = self._wanted(table, "min-nm", place)
        if wanted is not None and not isinstance(self._understood(patterns.parse, wanted.value, place), ZerosOf):
            raise self.slip(f"{wanted.value!r} is not N:M", *place, "min-nm", hint='write min-nm = "2:4"')
        return wanted

    def _limits(self, table: dict[str, Any], keys: tuple[Key, ...], place: Place) -> tuple[Limit, ...]:
        return tuple(
            Limit(key.name, _METRICS[key.kind], self.found.line(*place, key.name), **self._levels(table, key, place))
            for key in keys
            if key.is_limit and key.kind in _METRICS and key.name in table
        )

    def _levels(self, table: dict[str, Any], key: Key, place: Place) -> dict[str, float | None]:
        spot = (*place, key.name)
        levels = self._by_level(table[key.name], spot)
        numbers = {level: self._number(value, key.kind, spot) for level, value in levels.items()}
        self._check_order(numbers, spot, is_floor=key.name.startswith("min-"))
        return {level: numbers.get(level) for level in LEVELS}

    def _by_level(self, value: Any, spot: Place) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {"fail": value}
        for level in value:
            if level not in LEVELS:
                raise self.slip(
                    f"there is no level {level!r}", *spot, level, did_you_mean=nearest(level, LEVELS), hint="fail, warn"
                )
        if not value:
            raise self.slip("a limit has a level", *spot, hint='write {fail = "2%", warn = "0.5%"}')
        return value

    def _check_order(self, numbers: dict[str, float], spot: Place, *, is_floor: bool) -> None:
        if (
            len(numbers) == len(LEVELS)
            and (numbers["warn"] < numbers["fail"]) is is_floor
            and len({*numbers.values()}) > 1
        ):
            raise self.slip("it would fail before it warns", *spot)

    def _growth(self, table: dict[str, Any], spot: Place) -> tuple[Limit, ...]:
        """Return the limits on growth: the two levels may be a size and a share."""
        if "max-growth" not in table:
            return ()
        levels = self._by_level(table["max-growth"], spot)
        found: dict[Metric, dict[str, float]] = {}
        for level, value in levels.items():
            metric = Metric.RATIO if isinstance(value, float) or str(value).rstrip().endswith("%") else Metric.BYTES
            kind = Kind.RATIO if metric is Metric.RATIO else Kind.SIZE
            found.setdefault(metric, {})[level] = self._number(value, kind, spot)
        for numbers in found.values():
            self._check_order(numbers, spot, is_floor=False)
        line = self.found.line(*spot)
        return tuple(
            Limit("max-growth", metric, line, numbers.get("fail"), numbers.get("warn"))
            for metric, numbers in found.items()
        )

    def _number(self, value: Any, kind: Kind, spot: Place) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.slip(f"{value!r} is not a {kind}", *spot)
        if kind is Kind.RATIO:
            return self._understood(self.words.ratio, str(value), spot)
        if isinstance(value, float) or (kind is Kind.COUNT and not _COUNT.fullmatch(str(value).strip())):
            raise self.slip(f"{value!r} is not a {kind}", *spot, hint="write 1000000 or '1M'")
        return self._understood(self.words.size, str(value), spot)

    def _understood(self, parse: Callable[[Said], Understood], said: Said, spot: Place) -> Understood:
        try:
            return parse(said)
        except UsageError as error:
            raise self.slip(error.message, *spot, hint=error.hint) from error
