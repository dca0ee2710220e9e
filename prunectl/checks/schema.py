"""Schema of the config file: one table of keys for parser, JSON schema and SARIF."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ValueType(StrEnum):
    """Type of the value of a key."""

    TEXT = "text"
    PATHS = "paths"
    SIZE = "size"
    COUNT = "count"
    RATIO = "ratio"
    GROWTH = "growth"
    PATTERN = "pattern"
    CHOICE = "choice"
    TABLES = "tables"
    TABLE = "table"
    DROP = "drop"
    TIME = "time"
    NUMBER = "number"


class MetricUnit(StrEnum):
    """Unit of the numbers of a limit."""

    BYTES = "bytes"
    COUNT = "count"
    RATIO = "ratio"
    POINTS = "points"
    """Percentage points, as a fraction: 0.005 is half a percentage point."""
    NUMBER = "number"
    SECONDS = "seconds"
    FACTOR = "factor"


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key of the config, and the values that it takes."""

    name: str
    kind: ValueType
    summary: str
    """Description of the key, in one sentence."""
    is_limit: bool = False
    """Whether the value is a limit, which may also be written as `{fail = …, warn = …}`."""
    choices: tuple[str, ...] = ()
    is_required: bool = False

    @property
    def is_gate(self) -> bool:
        """Whether the key sets a limit, by its value or by keys inside it."""
        return (
            self.is_limit or self.kind in {ValueType.PATTERN, ValueType.TABLE} or self.name in {"keep-zeros", "layer"}
        )


LEVELS = ("fail", "warn")

TOP = (
    KeySpec("baseline", ValueType.TEXT, "The JSON file of recorded sizes; a relative path starts at this file."),
    KeySpec(
        "on-missing",
        ValueType.CHOICE,
        "What to do about a model that the baseline lacks.",
        choices=("warn", "fail", "create"),
    ),
    KeySpec("budget", ValueType.TABLES, "Limits for one or more models."),
)

BUDGET = (
    KeySpec("name", ValueType.TEXT, "The name of the budget; by default its path."),
    KeySpec("path", ValueType.PATHS, "Globs of model paths, relative to this file.", is_required=True),
    KeySpec("message", ValueType.TEXT, "A message to print when a limit is exceeded."),
    KeySpec("max-raw", ValueType.SIZE, "Bytes on disk.", is_limit=True),
    KeySpec("max-gzip", ValueType.SIZE, "Bytes compressed with zlib at level 6.", is_limit=True),
    KeySpec("max-packed", ValueType.SIZE, "Bytes packed with the container's own compression.", is_limit=True),
    KeySpec("max-params", ValueType.COUNT, "Parameters, counting tied ones once.", is_limit=True),
    KeySpec("max-flops", ValueType.COUNT, "Floating-point operations for one input.", is_limit=True),
    KeySpec("min-sparsity", ValueType.RATIO, "Sparsity: the share of zeros among the prunable weights.", is_limit=True),
    KeySpec(
        "min-nm",
        ValueType.PATTERN,
        "A pattern such as 2:4 that every prunable tensor must follow if its inputs divide into groups.",
    ),
    KeySpec("max-growth", ValueType.GROWTH, "Growth of the compressed size since the baseline.", is_limit=True),
    KeySpec("keep-zeros", ValueType.TEXT, "A model whose zeros in prunable weights must still be zero."),
    KeySpec("max-drop", ValueType.TABLE, "How much worse a metric may be than that of another model."),
    KeySpec("max-latency", ValueType.TABLE, "The longest median time of a run, measured as bench does."),
    KeySpec(
        "min-speedup", ValueType.TABLE, "How many times as fast as another model it must be, measured as bench does."
    ),
    KeySpec("layer", ValueType.TABLES, "Limits on single tensors."),
)

DROP = (
    KeySpec("fail", ValueType.DROP, "The largest drop allowed: 0.5pp of a share, or 0.01 of a loss."),
    KeySpec("warn", ValueType.DROP, "The largest drop without a warning."),
    KeySpec("data", ValueType.TEXT, "The data to evaluate both models on, such as test.npz.", is_required=True),
    KeySpec("against", ValueType.TEXT, "The model to compare with.", is_required=True),
    KeySpec("metric", ValueType.TEXT, "The metric, such as accuracy or ./f.py:fn:max; by default that of the file."),
    KeySpec("model", ValueType.TEXT, "The function that builds the model of a state dict: net.py:Net."),
    KeySpec("custom-objects", ValueType.TEXT, "A dictionary of custom Keras layers: layers.py:OBJECTS."),
    KeySpec("batch-size", ValueType.COUNT, "Examples in a batch; by default 32."),
)

_MEASUREMENT = (
    KeySpec("batch-size", ValueType.COUNT, "Examples in a batch; by default 1, or what the model was saved for."),
    KeySpec("threads", ValueType.COUNT, "Threads of the runtime; by default 1."),
    KeySpec("seconds", ValueType.NUMBER, "The longest time to measure; by default 5."),
    KeySpec("input", ValueType.TEXT, "The shape of an input that the model leaves open: x:1,3,224,224."),
    KeySpec("data", ValueType.TEXT, "The data to take inputs from; by default random ones."),
    KeySpec("model", ValueType.TEXT, "The function that builds the model of a state dict: net.py:Net."),
    KeySpec("custom-objects", ValueType.TEXT, "A dictionary of custom Keras layers: layers.py:OBJECTS."),
)

LATENCY = (
    KeySpec("fail", ValueType.TIME, "The longest time allowed: 5ms."),
    KeySpec("warn", ValueType.TIME, "The longest time without a warning."),
    *_MEASUREMENT,
)

SPEEDUP = (
    KeySpec("fail", ValueType.NUMBER, "The lowest speed-up allowed: 1.2."),
    KeySpec("warn", ValueType.NUMBER, "The lowest speed-up without a warning."),
    KeySpec("against", ValueType.TEXT, "The model to compare with.", is_required=True),
    *_MEASUREMENT,
)

LAYER = (
    KeySpec("name", ValueType.TEXT, "A glob or re:REGEX that matches tensors or layers.", is_required=True),
    KeySpec("message", ValueType.TEXT, "A message to print when a limit is exceeded."),
    KeySpec("max-params", ValueType.COUNT, "Parameters of the tensor.", is_limit=True),
    KeySpec("max-flops", ValueType.COUNT, "Floating-point operations of the tensor for one input.", is_limit=True),
    KeySpec("min-sparsity", ValueType.RATIO, "Share of zeros in the tensor.", is_limit=True),
    KeySpec(
        "max-sparsity",
        ValueType.RATIO,
        "The largest share of zeros in the tensor.",
        is_limit=True,
    ),
    KeySpec("min-nm", ValueType.PATTERN, "A pattern such as 2:4 that the tensor must follow."),
)


FILE = "budgets.schema.json"
_SIZE = r"^\d+(\.\d+)?\s*([kKmMgGtT]?i?[bB]?)$"
_RATIO = r"^(\d+(\.\d+)?|\.\d+)\s*%?$"
_TYPES: dict[ValueType, Any] = {
    ValueType.TEXT: {"type": "string", "minLength": 1},
    ValueType.PATHS: {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        ]
    },
    ValueType.SIZE: {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE}]},
    ValueType.COUNT: {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[kKmMgGtT]?$"}]
    },
    ValueType.RATIO: {
        "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string", "pattern": _RATIO}],
    },
    ValueType.GROWTH: {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"{_SIZE}|{_RATIO}"}],
    },
    ValueType.DROP: {
        "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^(\d+(\.\d+)?|\.\d+)\s*(pp)?$"}],
    },
    ValueType.PATTERN: {"type": "string", "pattern": r"^[1-9]\d*:[1-9]\d*$"},
    ValueType.TIME: {"type": "string", "pattern": r"^(\d+(\.\d+)?|\.\d+)\s*(s|ms|us|µs)$"},
    ValueType.NUMBER: {"type": "number", "minimum": 0},
}


def schema() -> dict[str, Any]:
    """The schema of `prunectl.toml`, and of `[tool.prunectl]`."""
    tables = {"layer": LAYER, "max-drop": DROP, "max-latency": LATENCY, "min-speedup": SPEEDUP}
    inner = {name: _table(keys, {}) for name, keys in tables.items()}
    # max-latency may also be just a time.
    inner["max-latency"] = {"anyOf": [_TYPES[ValueType.TIME], inner["max-latency"]]}
    table = _table(TOP, {"budget": _table(BUDGET, inner)})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Budgets of prunectl", **table}


def as_text() -> str:
    """The text of the JSON schema that is installed with the package, `budgets.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"


def _table(keys: tuple[KeySpec, ...], inner: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key.name for key in keys if key.is_required],
        "properties": {key.name: {"description": key.summary, **_type(key, inner)} for key in keys},
    }


def _type(key: KeySpec, inner: dict[str, Any]) -> dict[str, Any]:
    if key.kind is ValueType.TABLES:
        return {"type": "array", "items": inner[key.name]}
    if key.kind is ValueType.TABLE:
        table: dict[str, Any] = inner[key.name]
        return table
    if key.kind is ValueType.CHOICE:
        return {"enum": list(key.choices)}
    plain: dict[str, Any] = _TYPES[key.kind]
    if not key.is_limit:
        return plain
    levels = {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "properties": dict.fromkeys(LEVELS, plain),
    }
    return {"anyOf": [*plain["anyOf"], levels]}
