"""Parser of budgets; every error names its file and line."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from prunectl.analysis import patterns
from prunectl.analysis.patterns import NMPattern
from prunectl.checks.config import ConfigFile, KeyPath
from prunectl.checks.schema import BUDGET, DROP, LATENCY, LAYER, LEVELS, SPEEDUP, TOP, KeySpec, MetricUnit, ValueType
from prunectl.errors import UsageError
from prunectl.formats.base import close_matches
from prunectl.formats.detect import url_error
from prunectl.formats.registry import resolve
from prunectl.training.max_drop import MaxDrop, parse_drop
from prunectl.units import parse_duration, parse_ratio, parse_size


class OnMissing(StrEnum):
    """What to do with a model that has no baseline."""

    WARN = "warn"
    FAIL = "fail"
    CREATE = "create"


@dataclass(frozen=True, slots=True)
class Limit:
    """Bounds beyond which a check warns or fails."""

    name: str
    metric: MetricUnit
    line: int
    fail: float | None
    warn: float | None = None


@dataclass(frozen=True, slots=True)
class LocatedValue:
    """A text value with its line."""

    value: str
    line: int


@dataclass(frozen=True, slots=True)
class MaxDropRule:
    """How much worse the metric of a model may be than that of another, evaluated on data."""

    limit: Limit
    data: str
    against: str
    metric: str = ""
    model: str = ""
    custom_objects: str = ""
    batch_size: int = 32


@dataclass(frozen=True, slots=True)
class LatencyRule:
    """The longest time of a run, or the lowest speed-up over another model, measured as `bench` does."""

    limit: Limit
    against: str = ""
    batch_size: int | None = None
    threads: int = 1
    seconds: float = 5.0
    input: str = ""
    data: str = ""
    model: str = ""
    custom_objects: str = ""


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """Limits on the tensors that a selector matches."""

    selector: str
    line: int
    limits: tuple[Limit, ...]
    pattern: LocatedValue | None
    message: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the models that some globs match."""

    name: str
    line: int
    paths: tuple[str, ...]
    limits: tuple[Limit, ...]
    growth: tuple[Limit, ...]
    """Limits on growth in bytes or as a share (see `metric`); at most one of each."""
    pattern: LocatedValue | None
    keep_zeros: LocatedValue | None
    drop: MaxDropRule | None
    latency: tuple[LatencyRule, ...]
    layers: tuple[LayerBudget, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Budgets:
    """A parsed file of budgets."""

    path: Path
    baseline: str
    on_missing: OnMissing
    budgets: tuple[Budget, ...]

    @property
    def folder(self) -> Path:
        """The folder that the paths of budgets are relative to."""
        return self.path.parent


MAX_DROP = "max-drop"
DROP_EXAMPLE = '{fail = "0.5pp", data = "test.npz", against = "dense.h5"}'


def parse_max_drop(table: dict[str, Any], line: int, batch_size: int | None) -> MaxDropRule:
    """Parse a max-drop table whose keys are valid."""
    levels = {level: _drop_level(table[level]) for level in LEVELS if level in table}
    if not levels:
        raise UsageError("a drop needs fail, warn or both", hint=f"write {MAX_DROP} = {DROP_EXAMPLE}")
    if len({level.is_points for level in levels.values()}) > 1:
        raise UsageError("fail and warn are in different units", hint="write both in pp, or both as numbers")
    if len(levels) == len(LEVELS) and levels["warn"].amount > levels["fail"].amount:
        raise UsageError("the fail limit is stricter than the warn limit", hint="write the larger drop as fail")
    if batch_size is not None and batch_size < 1:
        raise UsageError("batch-size must be at least 1")
    metric = MetricUnit.POINTS if all(level.is_points for level in levels.values()) else MetricUnit.NUMBER
    bounds = {level: levels[level].amount if level in levels else None for level in LEVELS}
    texts = {
        name.replace("-", "_"): table.get(name, "") for name in ("data", "against", "metric", "model", "custom-objects")
    }
    return MaxDropRule(Limit(MAX_DROP, metric, line, **bounds), batch_size=batch_size or 32, **texts)


def _drop_level(value: Any) -> MaxDrop:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f"{value!r} is not a drop", hint='write "0.5pp" (percentage points), or 0.01 of a loss')
    return parse_drop(str(value))


MAX_LATENCY, MIN_SPEEDUP = "max-latency", "min-speedup"
_MEASURED = {MAX_LATENCY: (LATENCY, MetricUnit.SECONDS), MIN_SPEEDUP: (SPEEDUP, MetricUnit.FACTOR)}
EXAMPLES = {MAX_LATENCY: '"5ms"', MIN_SPEEDUP: '{fail = 1.2, against = "dense.onnx"}'}
BASELINE = "prunectl-baseline.json"
_METRICS = {ValueType.SIZE: MetricUnit.BYTES, ValueType.COUNT: MetricUnit.COUNT, ValueType.RATIO: MetricUnit.RATIO}
_COUNT = re.compile(r"\d+(?:\.\d+)?\s*[kmgt]?", re.IGNORECASE)
Raw = TypeVar("Raw")
Parsed = TypeVar("Parsed")


def read(config: ConfigFile) -> Budgets:
    """The budgets of a file."""
    parser = _BudgetParser(config)
    parser.check(config.table, TOP, ())
    top = config.table
    choice = top.get("on-missing", OnMissing.WARN)
    if choice not in list(OnMissing):
        raise parser.error(f"{choice!r} must be warn, fail or create", "on-missing")
    tables = parser.tables(top, "budget", ())
    if not tables:
        raise UsageError(f"{config.path} has no [[budget]]", hint="write some with: prunectl init")
    budgets = tuple(parser.budget(table, ("budget", index)) for index, table in enumerate(tables))
    return Budgets(config.path, parser.text(top, "baseline", ()) or BASELINE, OnMissing(choice), budgets)


@dataclass(frozen=True, slots=True)
class _BudgetParser:
    config: ConfigFile

    def error(self, message: str, *path: str | int, **more: Any) -> UsageError:
        return UsageError(f"{self.config.location(*path)}: {message}", **more)

    def check(self, table: dict[str, Any], keys: tuple[KeySpec, ...], path: KeyPath) -> None:
        """Refuse unknown keys, and the lack of required ones."""
        names = [key.name for key in keys]
        for name in table:
            if name not in names:
                raise self.error(
                    f"unknown key {name!r}",
                    *path,
                    name,
                    did_you_mean=close_matches(name, names),
                    hint=f"keys: {', '.join(names)}",
                )
        for key in keys:
            if key.is_required and key.name not in table:
                raise self.error(f"{key.name!r} is missing: {key.summary[0].lower()}{key.summary[1:]}", *path)

    def tables(self, table: dict[str, Any], name: str, path: KeyPath) -> list[dict[str, Any]]:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"{name} must be a list of tables", *path, name, hint=f"write [[{name}]]")
        return value

    def text(self, table: dict[str, Any], name: str, path: KeyPath) -> str:
        value = table.get(name, "")
        if not isinstance(value, str) or (name in table and not value.strip()):
            raise self.error(f"{name} must be a string, not {value!r}", *path, name)
        return value

    def budget(self, table: dict[str, Any], path: KeyPath) -> Budget:
        self.check(table, BUDGET, path)
        paths = self._paths(table["path"], (*path, "path"))
        self._check_limits(table, BUDGET, path)
        return Budget(
            name=self.text(table, "name", path) or ", ".join(paths),
            line=self.config.line(*path),
            paths=paths,
            limits=self._limits(table, BUDGET, path),
            growth=self._growth(table, (*path, "max-growth")),
            pattern=self._pattern(table, path),
            keep_zeros=self._located(table, "keep-zeros", path),
            drop=self._max_drop(table, (*path, MAX_DROP)),
            latency=tuple(self._latency(table, name, (*path, name)) for name in _MEASURED if name in table),
            layers=tuple(
                self._layer(layer, (*path, "layer", index))
                for index, layer in enumerate(self.tables(table, "layer", path))
            ),
            message=self.text(table, "message", path),
        )

    def _layer(self, table: dict[str, Any], path: KeyPath) -> LayerBudget:
        self.check(table, LAYER, path)
        self._check_limits(table, LAYER, path)
        return LayerBudget(
            selector=self.text(table, "name", path),
            line=self.config.line(*path),
            limits=self._limits(table, LAYER, path),
            pattern=self._pattern(table, path),
            message=self.text(table, "message", path),
        )

    def _check_limits(self, table: dict[str, Any], keys: tuple[KeySpec, ...], path: KeyPath) -> None:
        """Refuse a budget without any limit."""
        if not any(key.is_gate and key.name in table for key in keys):
            raise self.error("it has no limit", *path, hint="add one, such as max-gzip = '400KB'")

    def _paths(self, value: Any, path: KeyPath) -> tuple[str, ...]:
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise self.error("path must be a glob or a list of globs", *path)
        for name in paths:
            if (error := url_error(name)) is not None:
                raise self.error(error.message, *path, hint=error.hint)
        return tuple(paths)

    def _located(self, table: dict[str, Any], name: str, path: KeyPath) -> LocatedValue | None:
        return LocatedValue(self.text(table, name, path), self.config.line(*path, name)) if name in table else None

    def _max_drop(self, table: dict[str, Any], path: KeyPath) -> MaxDropRule | None:
        if MAX_DROP not in table:
            return None
        inner = table[MAX_DROP]
        if not isinstance(inner, dict):
            raise self.error(f"{MAX_DROP} must be a table", *path, hint=f"write {MAX_DROP} = {DROP_EXAMPLE}")
        self.check(inner, DROP, path)
        for key in DROP:
            if key.kind is ValueType.TEXT:
                self.text(inner, key.name, path)
        size = inner.get("batch-size")
        number = int(self._number(size, ValueType.COUNT, (*path, "batch-size"))) if size is not None else None
        return self._parse_value(lambda table: parse_max_drop(table, self.config.line(*path), number), inner, path)

    def _latency(self, table: dict[str, Any], name: str, path: KeyPath) -> LatencyRule:
        """Parse max-latency, which may be just a time, or min-speedup."""
        keys, metric = _MEASURED[name]
        inner = {"fail": table[name]} if isinstance(table[name], str) and name == MAX_LATENCY else table[name]
        if not isinstance(inner, dict):
            raise self.error(f"{name} must be a table", *path, hint=f"write {name} = {EXAMPLES[name]}")
        self.check(inner, keys, path)
        levels = {
            level: self._parse_value(parse_duration, str(inner[level]), path)
            if name == MAX_LATENCY
            else self._positive(inner[level], path)
            for level in LEVELS
            if level in inner
        }
        if not levels:
            raise self.error("a limit needs fail, warn or both", *path, hint=f"write {name} = {EXAMPLES[name]}")
        self._check_order(levels, path, is_floor=name != MAX_LATENCY)
        limit = Limit(name, metric, self.config.line(*path), levels.get("fail"), levels.get("warn"))
        options: dict[str, Any] = {
            key.name.replace("-", "_"): self.text(inner, key.name, path)
            for key in keys
            if key.kind is ValueType.TEXT and key.name in inner
        }
        for count in ("batch-size", "threads"):
            if count in inner:
                options[count.replace("-", "_")] = number = int(self._number(inner[count], ValueType.COUNT, path))
                if number < 1:
                    raise self.error(f"{count} must be at least 1", *path)
        if "seconds" in inner:
            options["seconds"] = self._positive(inner["seconds"], path)
        return LatencyRule(limit, **options)

    def _positive(self, value: Any, path: KeyPath) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{value!r} is not a number above 0", *path)
        return float(value)

    def _pattern(self, table: dict[str, Any], path: KeyPath) -> LocatedValue | None:
        pattern = self._located(table, "min-nm", path)
        if pattern is not None and not isinstance(self._parse_value(patterns.parse, pattern.value, path), NMPattern):
            raise self.error(f"{pattern.value!r} is not N:M", *path, "min-nm", hint='write min-nm = "2:4"')
        return pattern

    def _limits(self, table: dict[str, Any], keys: tuple[KeySpec, ...], path: KeyPath) -> tuple[Limit, ...]:
        return tuple(
            Limit(key.name, _METRICS[key.kind], self.config.line(*path, key.name), **self._levels(table, key, path))
            for key in keys
            if key.is_limit and key.kind in _METRICS and key.name in table
        )

    def _levels(self, table: dict[str, Any], key: KeySpec, path: KeyPath) -> dict[str, float | None]:
        path = (*path, key.name)
        levels = self._by_level(table[key.name], path)
        numbers = {level: self._number(value, key.kind, path) for level, value in levels.items()}
        self._check_order(numbers, path, is_floor=key.name.startswith("min-"))
        return {level: numbers.get(level) for level in LEVELS}

    def _by_level(self, value: Any, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {"fail": value}
        for level in value:
            if level not in LEVELS:
                raise self.error(
                    f"unknown level {level!r}",
                    *path,
                    level,
                    did_you_mean=close_matches(level, LEVELS),
                    hint="levels: fail, warn",
                )
        if not value:
            raise self.error("a limit needs fail, warn or both", *path, hint='write {fail = "2%", warn = "0.5%"}')
        return value

    def _check_order(self, numbers: dict[str, float], path: KeyPath, *, is_floor: bool) -> None:
        if (
            len(numbers) == len(LEVELS)
            and (numbers["warn"] < numbers["fail"]) is is_floor
            and len({*numbers.values()}) > 1
        ):
            raise self.error("the fail limit is stricter than the warn limit", *path)

    def _growth(self, table: dict[str, Any], path: KeyPath) -> tuple[Limit, ...]:
        """The limits on growth; of `fail` and `warn`, one may be a size and the other a share."""
        if "max-growth" not in table:
            return ()
        levels = self._by_level(table["max-growth"], path)
        by_metric: dict[MetricUnit, dict[str, float]] = {}
        for level, value in levels.items():
            metric = (
                MetricUnit.RATIO if isinstance(value, float) or str(value).rstrip().endswith("%") else MetricUnit.BYTES
            )
            kind = ValueType.RATIO if metric is MetricUnit.RATIO else ValueType.SIZE
            by_metric.setdefault(metric, {})[level] = self._number(value, kind, path)
        for numbers in by_metric.values():
            self._check_order(numbers, path, is_floor=False)
        line = self.config.line(*path)
        return tuple(
            Limit("max-growth", metric, line, numbers.get("fail"), numbers.get("warn"))
            for metric, numbers in by_metric.items()
        )

    def _number(self, value: Any, kind: ValueType, path: KeyPath) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.error(f"{value!r} is not a {kind}", *path)
        if kind is ValueType.RATIO:
            return self._parse_value(parse_ratio, str(value), path)
        if isinstance(value, float) or (kind is ValueType.COUNT and not _COUNT.fullmatch(str(value).strip())):
            raise self.error(f"{value!r} is not a {kind}", *path, hint="write 1000000 or '1M'")
        return self._parse_value(parse_size, str(value), path)

    def _parse_value(self, parse: Callable[[Raw], Parsed], raw: Raw, path: KeyPath) -> Parsed:
        try:
            return parse(raw)
        except UsageError as error:
            raise self.error(error.message, *path, hint=error.hint) from error


def select_budgets(budgets: Budgets, names: Sequence[str]) -> list[Budget]:
    """Budgets that names or globs match; all if there are none."""
    budget_names = [budget.name for budget in budgets.budgets]
    for name in names:
        if not any(_matches(budget, name) for budget in budget_names):
            raise UsageError(
                f"{budgets.path} has no budget {name!r}",
                did_you_mean=close_matches(name, budget_names),
                hint=f"budgets: {', '.join(budget_names)}",
            )
    return [budget for budget in budgets.budgets if not names or any(_matches(budget.name, name) for name in names)]


def expand_globs(folder: Path, budget: Budget) -> tuple[list[str], list[str]]:
    """Paths that a budget's globs match, relative to a folder, and the globs that match nothing."""
    matches: dict[str, None] = {}
    empty = []
    for pattern in budget.paths:
        paths = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        # The prefix that names a TensorFlow checkpoint is not a file itself.
        paths = paths or ([pattern] if resolve(folder / pattern).exists() else [])
        matches.update(dict.fromkeys(Path(path).as_posix() for path in paths))
        empty += [] if paths else [pattern]
    return list(matches), empty


def _matches(budget: str, name: str) -> bool:
    return budget == name or fnmatchcase(budget, name)
