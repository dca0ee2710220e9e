"""Reads a table of budgets, and says file and line of what it cannot mean."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from prunectl.analysis import patterns
from prunectl.analysis.patterns import NMPattern
from prunectl.checks.config import ConfigFile
from prunectl.checks.schema import BUDGET, DROP, LAYER, LEVELS, TOP, KeySpec, MetricUnit, ValueType
from prunectl.errors import UsageError
from prunectl.formats.registry import resolve
from prunectl.formats.selectors import close_matches
from prunectl.training.evaluation.max_drop import MaxDrop, max_drop


class OnMissing(StrEnum):
    """What it means that a baseline does not know a model."""

    WARN = "warn"
    FAIL = "fail"
    CREATE = "create"


@dataclass(frozen=True, slots=True)
class Limit:
    """From where on it warns, from where on it says no."""

    name: str
    metric: MetricUnit
    line: int
    fail: float | None
    warn: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something that is kept or not, with nothing to count towards."""

    value: str
    line: int


@dataclass(frozen=True, slots=True)
class MaxDropRule:
    """How much worse a model may be than another, judged on data by a framework."""

    limit: Limit
    data: str
    against: str
    metric: str = ""
    model: str = ""
    custom_objects: str = ""
    batch_size: int = 32


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """Limits on the tensors that a selector matches."""

    selector: str
    line: int
    limits: tuple[Limit, ...]
    pattern: Wanted | None
    message: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the models that some globs match."""

    name: str
    line: int
    paths: tuple[str, ...]
    limits: tuple[Limit, ...]
    growth: tuple[Limit, ...]
    """In bytes or as a share, which the metric says; at most one of each."""
    pattern: Wanted | None
    keep_zeros: Wanted | None
    drop: MaxDropRule | None
    layers: tuple[LayerBudget, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Budgets:
    """A file of budgets, understood."""

    path: Path
    baseline: str
    on_missing: OnMissing
    budgets: tuple[Budget, ...]

    @property
    def folder(self) -> Path:
        """Where its paths begin."""
        return self.path.parent


NAME = "max-drop"
EXAMPLE = '{fail = "0.5pp", data = "test.npz", against = "dense.h5"}'


def drop_of(table: dict[str, Any], line: int, batch_size: int | None) -> MaxDropRule:
    """Return what a table with known keys asks for."""
    levels = {level: _level(table[level]) for level in LEVELS if level in table}
    if not levels:
        raise UsageError("a drop has a level", hint=f"write {NAME} = {EXAMPLE}")
    if len({one.is_points for one in levels.values()}) > 1:
        raise UsageError("fail and warn are in different units", hint="write both in pp, or both as numbers")
    if len(levels) == len(LEVELS) and levels["warn"].amount > levels["fail"].amount:
        raise UsageError("it would fail before it warns")
    if batch_size is not None and batch_size < 1:
        raise UsageError("batch-size is at least 1")
    metric = MetricUnit.POINTS if all(one.is_points for one in levels.values()) else MetricUnit.NUMBER
    bounds = {level: levels[level].amount if level in levels else None for level in LEVELS}
    texts = {
        name.replace("-", "_"): table.get(name, "") for name in ("data", "against", "metric", "model", "custom-objects")
    }
    return MaxDropRule(Limit(NAME, metric, line, **bounds), batch_size=batch_size or 32, **texts)


def _level(value: Any) -> MaxDrop:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f"{value!r} is no drop", hint='write "0.5pp" (percentage points), or 0.01 of a loss')
    return max_drop(str(value))


BASELINE = "prunectl-baseline.json"
_METRICS = {ValueType.SIZE: MetricUnit.BYTES, ValueType.COUNT: MetricUnit.COUNT, ValueType.RATIO: MetricUnit.RATIO}
_COUNT = re.compile(r"\d+(?:\.\d+)?\s*[kmgt]?", re.IGNORECASE)
Place = tuple[str | int, ...]
Said = TypeVar("Said")
Understood = TypeVar("Understood")


@dataclass(frozen=True, slots=True)
class Words:
    """How sizes and ratios are written."""

    size: Callable[[str], int]
    ratio: Callable[[str], float]


def read(found: ConfigFile, words: Words) -> Budgets:
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
    found: ConfigFile
    words: Words

    def slip(self, what: str, *place: str | int, **more: Any) -> UsageError:
        return UsageError(f"{self.found.place(*place)}: {what}", **more)

    def check(self, table: dict[str, Any], keys: tuple[KeySpec, ...], place: Place) -> None:
        """Refuse keys that are not known, and the lack of those that must be there."""
        known = [key.name for key in keys]
        for name in table:
            if name not in known:
                raise self.slip(
                    f"there is no key {name!r} here",
                    *place,
                    name,
                    did_you_mean=close_matches(name, known),
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
            drop=self._drop(table, (*place, NAME)),
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

    def _check_limits(self, table: dict[str, Any], keys: tuple[KeySpec, ...], place: Place) -> None:
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

    def _drop(self, table: dict[str, Any], spot: Place) -> MaxDropRule | None:
        if NAME not in table:
            return None
        inner = table[NAME]
        if not isinstance(inner, dict):
            raise self.slip(f"{NAME} is a table", *spot, hint=f"write {NAME} = {EXAMPLE}")
        self.check(inner, DROP, spot)
        for key in DROP:
            if key.kind is ValueType.TEXT:
                self.text(inner, key.name, spot)
        size = inner.get("batch-size")
        number = int(self._number(size, ValueType.COUNT, (*spot, "batch-size"))) if size is not None else None
        return self._understood(lambda it: drop_of(it, self.found.line(*spot), number), inner, spot)

    def _pattern(self, table: dict[str, Any], place: Place) -> Wanted | None:
        wanted = self._wanted(table, "min-nm", place)
        if wanted is not None and not isinstance(self._understood(patterns.parse, wanted.value, place), NMPattern):
            raise self.slip(f"{wanted.value!r} is not N:M", *place, "min-nm", hint='write min-nm = "2:4"')
        return wanted

    def _limits(self, table: dict[str, Any], keys: tuple[KeySpec, ...], place: Place) -> tuple[Limit, ...]:
        return tuple(
            Limit(key.name, _METRICS[key.kind], self.found.line(*place, key.name), **self._levels(table, key, place))
            for key in keys
            if key.is_limit and key.kind in _METRICS and key.name in table
        )

    def _levels(self, table: dict[str, Any], key: KeySpec, place: Place) -> dict[str, float | None]:
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
                    f"there is no level {level!r}",
                    *spot,
                    level,
                    did_you_mean=close_matches(level, LEVELS),
                    hint="fail, warn",
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
        found: dict[MetricUnit, dict[str, float]] = {}
        for level, value in levels.items():
            metric = (
                MetricUnit.RATIO if isinstance(value, float) or str(value).rstrip().endswith("%") else MetricUnit.BYTES
            )
            kind = ValueType.RATIO if metric is MetricUnit.RATIO else ValueType.SIZE
            found.setdefault(metric, {})[level] = self._number(value, kind, spot)
        for numbers in found.values():
            self._check_order(numbers, spot, is_floor=False)
        line = self.found.line(*spot)
        return tuple(
            Limit("max-growth", metric, line, numbers.get("fail"), numbers.get("warn"))
            for metric, numbers in found.items()
        )

    def _number(self, value: Any, kind: ValueType, spot: Place) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.slip(f"{value!r} is not a {kind}", *spot)
        if kind is ValueType.RATIO:
            return self._understood(self.words.ratio, str(value), spot)
        if isinstance(value, float) or (kind is ValueType.COUNT and not _COUNT.fullmatch(str(value).strip())):
            raise self.slip(f"{value!r} is not a {kind}", *spot, hint="write 1000000 or '1M'")
        return self._understood(self.words.size, str(value), spot)

    def _understood(self, parse: Callable[[Said], Understood], said: Said, spot: Place) -> Understood:
        try:
            return parse(said)
        except UsageError as error:
            raise self.slip(error.message, *spot, hint=error.hint) from error


def select_budgets(budgets: Budgets, names: list[str]) -> list[Budget]:
    """Return the budgets that names or globs mean; all of them if there are none."""
    known = [budget.name for budget in budgets.budgets]
    for name in names:
        if not any(_matches(one, name) for one in known):
            raise UsageError(
                f"{budgets.path} has no budget {name!r}",
                did_you_mean=close_matches(name, known),
                hint=f"budgets: {', '.join(known)}",
            )
    return [one for one in budgets.budgets if not names or any(_matches(one.name, name) for name in names)]


def expand_globs(folder: Path, budget: Budget) -> tuple[list[str], list[str]]:
    """Return the paths that a budget is about, from a folder, and its globs that match nothing."""
    found: dict[str, None] = {}
    empty = []
    for pattern in budget.paths:
        paths = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        # The prefix of a checkpoint is the name of no file.
        paths = paths or ([pattern] if resolve(folder / pattern).exists() else [])
        found.update(dict.fromkeys(Path(path).as_posix() for path in paths))
        empty += [] if paths else [pattern]
    return list(found), empty


def _matches(budget: str, name: str) -> bool:
    return budget == name or fnmatchcase(budget, name)
