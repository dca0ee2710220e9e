"""Keywords of the functions: the options of the command line, with values as they are typed there or Python objects."""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypedDict, TypeVar

from prunectl.commands._command import RENAMED
from prunectl.errors import PrunectlError, UsageError
from prunectl.units import parse_ratio, parse_size

AnyPath = str | os.PathLike[str]
Ratio = float | str
"""0.8, or "80%" as on the command line."""
Size = int | str
"""400000, or "400KB" as on the command line."""
Names = str | Sequence[str]
"""One name, or several."""
LayerRatios = Mapping[str, Ratio] | Sequence[str | tuple[str, Ratio]]
"""`{"fc*": 0.9}`, `[("fc*", "90%")]`, or `["fc*=90%"]` as on the command line."""
Code = str | Callable[..., Any]
"""A class or a function, or its name as on the command line: "net.py:Net"."""
Metrics = Code | tuple[Code, str] | Sequence[Code | tuple[Code, str]]
"""Names and functions of metrics; a function that comes first needs its direction: `(function, "max")`."""
Data = Any
"""A SPEC as on the command line, arrays, `(x, y)`, a torch Dataset or DataLoader, a `tf.data.Dataset`, a function."""


class SelectionOptions(TypedDict, total=False):
    """Which weights are pruned, how they are ranked, and the pattern of the zeros."""

    strategy: str
    param: Names
    scope: str
    pattern: str
    policy: str
    layers: str
    exclude: Names
    layer: LayerRatios


class ChannelOptions(TypedDict, total=False):
    """Options of `prune` for ``pattern="channel"`` only."""

    min_channels: int
    round_to: int
    max_ratio: Ratio
    target_params: int | str
    target_flops: int | str
    dead: bool
    allow_empty: bool


class PruneOptions(SelectionOptions, ChannelOptions, total=False):
    """Options of `prune` that determine the weights it writes; each has the default of the command line."""

    sparsity: Ratio | None
    blocks: int | None
    compression: float | None
    target_gzip: Size | None
    target_packed: Size | None
    seed: int
    nan: str
    pack: bool
    data: Data
    samples: int
    batch_size: int
    loss: Code
    builder: Code
    custom_objects: str | Mapping[str, Any]
    input: Names
    repair: bool | str
    repair_steps: int | None
    cluster: str


class RunOptions(TypedDict, total=False):
    """Options of `prune` for files only: a search, masks for later training, a manifest, a recipe, or parts."""

    max_drop: str
    metric: Code | tuple[Code, str]
    tried: AnyPath | None
    wrap: bool
    schedule: str
    schedule_param: Names
    initial_sparsity: Ratio
    begin: str | int
    end: str | int
    frequency: int | None
    power: float | None
    manifest: AnyPath | None
    recipe: AnyPath | None
    join: bool
    on: str


class FilePruneOptions(PruneOptions, RunOptions, total=False):
    """All options of `prune` but `part`, whose result has another type."""


class PartOptions(FilePruneOptions, total=False):
    """All options of `prune`."""

    part: str


class CodeOptions(TypedDict, total=False):
    """The code of a network that is not in its file, and whether code in the file may run."""

    builder: Code
    custom_objects: str | Mapping[str, Any]
    trust: bool


class FinetuneOptions(SelectionOptions, CodeOptions, total=False):
    """Options of `finetune`; each has the default of the command line."""

    data: Data
    val: Data
    val_split: Ratio
    epochs: int | None
    steps: int | None
    batch_size: int
    lr: float | None
    lr_schedule: str
    warmup: str | int
    optimizer: str
    loss: Code
    metric: Metrics
    clip: float | None
    freeze: Names
    distill: AnyPath
    distill_builder: Code
    distill_share: float
    temperature: float
    early_stop: int | None
    keep: str
    recalibrate: bool
    train_step: Code
    precision: str
    device: str
    compile: bool
    shard: bool
    workers: int
    seed: int
    sparsity: Ratio | None
    schedule: str
    schedule_param: Names
    initial_sparsity: Ratio
    begin: str | int
    end: str | int
    frequency: int | None
    power: float | None
    mask: str
    keep_wrappers: bool
    checkpoint_dir: AnyPath | None
    resume: bool
    logdir: AnyPath | None


class LookOptions(CodeOptions, total=False):
    """Options of `inspect` beside those of its signature: dependency groups, and sensitivity to pruning."""

    groups: bool
    input: Names
    sensitivity: bool
    data: Data
    samples: int
    batch_size: int
    loss: Code


class EvaluateOptions(CodeOptions, total=False):
    """Options of `evaluate`, each the same as in `finetune`."""

    metric: Metrics
    loss: Code
    batch_size: int
    seed: int
    device: str


class ExportOptions(CodeOptions, total=False):
    """Options of `export`; each has the default of the command line."""

    to: str
    opset: int | None
    input: Names
    data: Data
    samples: int | None
    batch_size: int | None
    seed: int | None
    atol: float | None
    rtol: float | None
    half: bool
    bf16: bool
    int8: bool
    sparse: bool
    pack: bool
    code: bool
    metadata: Names | Mapping[str, str]
    card: AnyPath | None
    shard_size: Size


class SweepOptions(TypedDict, total=False):
    """Options of `sweep`, whose trials run in separate processes; each has the default of the command line."""

    val: str
    val_split: Ratio
    batch_size: int
    samples: int
    metric: str
    strategies: Names
    scopes: Names
    patterns: Names
    param: Names
    sparsities: Ratio | Sequence[Ratio]
    schedules: Names
    max_drop: str
    policy: str
    layers: str
    exclude: Names
    epochs: int
    lr: float | None
    optimizer: str
    loss: str
    seed: int
    jobs: int
    on: str
    builder: str
    custom_objects: str
    trust: bool


_TAKE_A_WORD = "to nan on policy scope pattern device loss metric keep repair strategy schedule schedules precision"
_NO_VALUE = "and|or|for|that|is|may|can|must|need|needs|cannot|does|works|trains"
_OPTION = re.compile(
    rf"""--([a-z][a-z0-9-]+)  # an option, and what may be its value:
    (?:[ ](  # text in quotes, a placeholder, what has a digit, a dot, a colon or a percent sign, or one of its choices
        '[^']*' | \d[\w.%:,]*(?<![,.:]) | [^\s;]*[.:%][^\s;]*[^\s,;.:] | [A-Z]{{2,}}\b
        | (?:{"|".join(rf"(?<=--{name}[ ])" for name in _TAKE_A_WORD.split())})(?!(?:{_NO_VALUE})\b)[a-z][a-z0-9-]*
    ))?""",
    re.VERBOSE,
)
_A_COMMAND = re.compile(r"\bprunectl [a-z]")
_OTHERS = frozenset(
    ("force", "in_place", "trust", "manifest", "against", "fail_on", "config", "baseline", "update_baseline", "reason")
)
"""Keywords that are not in the classes above."""


@contextmanager
def as_keywords() -> Generator[None]:
    """Turn the options in an error into keywords, `--data train.npz` into `data='train.npz'`, and add its hint."""
    try:
        yield
    except PrunectlError as error:
        error.message, error.hint = _in_keywords(error.message), "\n".join(map(_in_keywords, error.hint.split("\n")))
        error.did_you_mean = tuple(map(_in_keywords, error.did_you_mean))
        error.args = (error.message,)
        if error.did_you_mean:
            error.add_note(f"did you mean: {', '.join(error.did_you_mean)}?")
        if error.hint:
            error.add_note(f"hint: {error.hint}")
        raise


def _in_keywords(text: str) -> str:
    text = text if _A_COMMAND.search(text) else _OPTION.sub(_in_keyword, text)
    return _OBJECT.sub(r"\1", _OBJECT_AND_DIRECTION.sub(r'(\1, "\2")', text))


_OBJECT = re.compile(r"\bprunectl\.api\.in_memory:(\w+)")
"""The registered name of an object in memory, of which an error shows the last part alone."""
_OBJECT_AND_DIRECTION = re.compile(rf"'{_OBJECT.pattern}:(max|min)'")


def _in_keyword(match: re.Match[str]) -> str:
    name, value = match[1].replace("-", "_"), match[2]
    kinds = (SelectionOptions, PartOptions, FinetuneOptions, ExportOptions, SweepOptions)
    hint = next((kind.__annotations__[name] for kind in kinds if name in kind.__annotations__), None)
    if hint is None and name not in _OTHERS:
        return match[0]
    if value is None:
        return name
    is_plain = value.startswith("'") or (value.isalpha() and value.isupper()) or re.fullmatch(r"\d+|0?\.\d+", value)
    return f"{name}={value if is_plain else repr(value)}"


_RATIOS = frozenset({"sparsity", "initial_sparsity", "max_ratio", "val_split"})
_SIZES = frozenset({"target_gzip", "target_packed", "shard_size"})
_AMOUNTS = frozenset({"target_params", "target_flops"})
"""Targets of channel pruning: a count, or a change such as `-50%`."""
Value = TypeVar("Value")


def parse_keywords(command: str, known: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as requests take them: text is parsed, and None stands for the default.

    An unknown name is a UsageError, as for the command; a value of a wrong type is a TypeError that names the keyword.
    """
    hints = typing.get_type_hints(known)
    parsed = {}
    for typed, value in options.items():
        name = _present_name(command, typed, hints)
        if name not in hints:
            names = [*hints]
            raise UsageError(
                f"{command} has no option {name}",
                did_you_mean=tuple(get_close_matches(name, names)),
                hint=f"help(prunectl.{command}) has them all",
            )
        if value is None:
            continue
        check_type(name, value, hints[name])
        parsed[name] = _parse(name, _plain(value), hints[name])
    return parsed


def _present_name(command: str, name: str, known: Collection[str]) -> str:
    """The current name of an option; its old name gives a warning."""
    renamed = RENAMED.get("finetune" if command == "evaluate" else command, {})
    new = renamed.get(f"--{name.replace('_', '-')}", "").removeprefix("--").replace("-", "_")
    if new not in known:
        return name
    warnings.warn(
        f"{name} is now called {new}: the next version of prunectl.{command} will not know the old name",
        FutureWarning,
        stacklevel=_depth_of_caller(),
    )
    return new


def _depth_of_caller() -> int:
    """The `stacklevel` of a warning for which it shows the first line outside of prunectl."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None and str(frame.f_globals["__name__"]).partition(".")[0] in {"prunectl", "contextlib"}:
        frame, depth = frame.f_back, depth + 1
    return depth


def parse_text(name: str, parse: Callable[[str], Value], text: str) -> Value:
    """Parse text as the command line does; an error names the keyword."""
    try:
        return parse(text)
    except UsageError as error:
        is_named = f"--{name.replace('_', '-')}" in error.message
        message = error.message if is_named else f"{name}: {error.message}"
        raise UsageError(message, hint=error.hint, did_you_mean=error.did_you_mean) from error


def ratio(name: str, value: Ratio) -> float:
    """A share, as a number or as text."""
    return parse_text(name, parse_ratio, value) if isinstance(value, str) else value


def names(value: Names) -> tuple[str, ...]:
    """Names as a tuple; a single string is one name."""
    return (value,) if isinstance(value, str) else tuple(value)


def _parse(name: str, value: Any, hint: Any) -> Any:
    if name in _RATIOS:
        return ratio(name, value)
    if name in _SIZES and isinstance(value, str):
        return parse_text(name, parse_size, value)
    if name in _AMOUNTS:
        return str(value)
    if name == "layer":
        return tuple(map(_layer_ratio, value.items() if isinstance(value, Mapping) else names(value)))
    if name == "metadata" and isinstance(value, Mapping):
        return tuple(f"{key}={text}" for key, text in value.items())
    if hint == Names or name == "metadata":
        return names(value)
    return value


def _layer_ratio(item: str | tuple[str, Ratio]) -> tuple[str, float]:
    if not isinstance(item, str):
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str):
            raise TypeError(f"layer must be pairs of a pattern and a ratio, such as ('fc*', 0.9), not {item!r}")
        return item[0], ratio("layer", item[1])
    pattern, sign, text = item.rpartition("=")
    if not sign or not pattern:
        raise UsageError(f"layer: {item!r} is not a pattern and a ratio", hint="write layer={'fc*': '90%'}")
    return pattern, ratio("layer", text)


def _plain(value: Any) -> Any:
    """A NumPy number as a Python number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuse a value of a type that a keyword does not take."""
    allowed = _flat(hint)
    if Any not in allowed and not any(_is_of(value, kind) for kind in allowed):
        wanted = dict.fromkeys(_TITLES.get(typing.get_origin(kind) or kind, "") for kind in allowed)
        raise TypeError(
            f"{name} must be {' or '.join(filter(None, wanted))}, not {type(value).__name__}: {value!r:.80}"
        )


_TITLES: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    os.PathLike: "a path",
    Sequence: "a list",
    Mapping: "a dict",
    tuple: "a pair",
    Callable: "a function",
    types.NoneType: "None",
}


def _flat(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return tuple(kind for part in typing.get_args(hint) for kind in _flat(part))
    return (hint,)


def _is_of(value: object, kind: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    if kind in {int, float}:
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return isinstance(value, kind)
