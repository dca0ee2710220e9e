"""Every key of the file of budgets: what it is called, what it takes, what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a key takes."""

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


class Metric(StrEnum):
    """What the numbers of a limit count."""

    BYTES = "bytes"
    COUNT = "count"
    RATIO = "ratio"
    POINTS = "points"
    """Of a share: 0.005 is half a percentage point."""
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and what may stand behind it."""

    name: str
    kind: Kind
    line: str
    """What it is for, in one sentence."""
    is_limit: bool = False
    """Whether it can say no, and so takes `{fail = …, warn = …}` as well."""
    choices: tuple[str, ...] = ()
    is_required: bool = False

    @property
    def is_gate(self) -> bool:
        """Whether it asks for anything, itself or by what is in it."""
        return self.is_limit or self.kind in {Kind.PATTERN, Kind.TABLE} or self.name in {"keep-zeros", "layer"}


LEVELS = ("fail", "warn")

TOP = (
    Key("baseline", Kind.TEXT, "The JSON file of earlier sizes, beside this file unless it says where."),
    Key("on-missing", Kind.CHOICE, "What a model without a baseline means.", choices=("warn", "fail", "create")),
    Key("budget", Kind.TABLES, "What some models must keep to."),
)

BUDGET = (
    Key("name", Kind.TEXT, "What the budget is called; else its path."),
    Key("path", Kind.PATHS, "Globs of the models, from the folder of this file.", is_required=True),
    Key("message", Kind.TEXT, "What to tell who goes over it."),
    Key("max-raw", Kind.SIZE, "Bytes on disk.", is_limit=True),
    Key("max-gzip", Kind.SIZE, "Bytes compressed, by zlib at level 6.", is_limit=True),
    Key("max-packed", Kind.SIZE, "Bytes packed by the container's own compression.", is_limit=True),
    Key("max-params", Kind.COUNT, "Parameters, tied ones once.", is_limit=True),
    Key("max-flops", Kind.COUNT, "Floating-point operations for one input.", is_limit=True),
    Key("min-sparsity", Kind.RATIO, "Share of zeros among the prunable weights.", is_limit=True),
    Key("min-nm", Kind.PATTERN, "A pattern such as 2:4 that every prunable tensor follows whose inputs divide."),
    Key("max-growth", Kind.GROWTH, "Growth of the compressed size over the baseline's.", is_limit=True),
    Key("keep-zeros", Kind.TEXT, "A model whose zeros, in prunable weights, must be zeros here."),
    Key("max-drop", Kind.TABLE, "How much worse it may be on some data than another model."),
    Key("layer", Kind.TABLES, "Limits on single tensors."),
)

DROP = (
    Key("fail", Kind.DROP, "The most that may be lost: 0.5pp of a share, or 0.01 of a loss."),
    Key("warn", Kind.DROP, "From where on it warns."),
    Key("data", Kind.TEXT, "What both are judged by, such as test.npz.", is_required=True),
    Key("against", Kind.TEXT, "The model that it is held against.", is_required=True),
    Key("metric", Kind.TEXT, "What decides, such as accuracy, or ./f.py:fn:max; else as the file says."),
    Key("model", Kind.TEXT, "What builds both, for weights alone: net.py:Net."),
    Key("custom-objects", Kind.TEXT, "What explains custom Keras layers: layers.py:OBJECTS."),
    Key("batch-size", Kind.COUNT, "Examples in a batch; else 32."),
)

LAYER = (
    Key("name", Kind.TEXT, "A glob, or re:… of tensors or layers.", is_required=True),
    Key("message", Kind.TEXT, "What to tell who goes over it."),
    Key("max-params", Kind.COUNT, "Parameters of the tensor.", is_limit=True),
    Key("max-flops", Kind.COUNT, "Floating-point operations of the tensor for one input.", is_limit=True),
    Key("min-sparsity", Kind.RATIO, "Share of zeros in the tensor.", is_limit=True),
    Key("max-sparsity", Kind.RATIO, "Share of zeros in the tensor: more of them, and it has collapsed.", is_limit=True),
    Key("min-nm", Kind.PATTERN, "A pattern such as 2:4 that the tensor follows."),
)
