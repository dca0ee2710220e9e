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


class Metric(StrEnum):
    """What the numbers of a limit count."""

    BYTES = "bytes"
    COUNT = "count"
    RATIO = "ratio"


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
        return self.is_limit or self.kind is Kind.PATTERN or self.name in {"keep-zeros", "layer"}


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
    Key("layer", Kind.TABLES, "Limits on single tensors."),
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
