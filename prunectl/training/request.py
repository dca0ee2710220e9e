"""The finetune request: options of the command line, and the points in time that they name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

from prunectl.errors import UsageError
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import PruneRequest, default_scope
from prunectl.pruning.strategies import parse_literal
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.config import LR_SCHEDULES

DEFAULT_EPOCHS = 3
INPUT = "input"
"""The teacher that is the model itself, as it came."""


class MaskMode(StrEnum):
    """What becomes of zeros between two mask updates."""

    KEEP = "keep"
    REGROW = "regrow"


class KeepWeights(StrEnum):
    """Whose weights are written."""

    BEST = "best"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """A schedule whose points in time are still words."""

    name: str = ""
    """A curve; empty keeps the zeros that there are, or is polynomial where there is a sparsity."""
    initial: float = 0.0
    begin: str = "0"
    end: str = ""
    frequency: int | None = None
    params: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """Every choice of a run."""

    data: str
    val: str = ""
    val_split: float = 0.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    means: TrainOptions = field(default_factory=TrainOptions)
    origin: LoadOptions = field(default_factory=LoadOptions)
    pruning: PruneRequest = field(default_factory=PruneRequest)
    ramping: ScheduleOptions = field(default_factory=ScheduleOptions)
    mask: MaskMode = MaskMode.KEEP
    keep: KeepWeights = KeepWeights.BEST
    rate: str = "constant"
    warmup: str = "0"
    early_stop: int | None = None
    frozen: tuple[str, ...] = ()
    """Selectors of what stays as it is."""
    distill: str = ""
    distill_model: str = ""
    """What builds the teacher, for one that holds weights alone; else what builds the model."""
    is_recalibrated: bool = False
    keeps_wrappers: bool = False
    workers: int = 1
    """Threads that read ahead."""
    checkpoint_dir: Path | None = None
    is_resumed: bool = False
    logdir: Path | None = None

    @property
    def prunes(self) -> bool:
        """Whether weights become zero in this run, beside those that are."""
        return self.pruning.sparsity is not None or bool(self.pruning.layers) or bool(self.pruning.pattern)

    @property
    def needs_targets(self) -> bool:
        """Whether anything is learned from targets: a teacher may be all that there is."""
        return not self.means.custom_step and not (self.distill and self.means.teacher_share == 1)

    @property
    def choices(self) -> dict[str, Any]:
        """What decides the numbers in the output; a run is resumed only with the same."""
        free = {"checkpoint_dir", "is_resumed", "logdir", "workers", "keeps_wrappers"}
        values = {name: value for name, value in asdict(self).items() if name not in free}
        known_later = {"example", "frozen", "is_evaluated", "arrays"}
        for part in ("means", "origin"):
            values[part] = {name: value for name, value in values[part].items() if name not in known_later}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def resolve_teacher(request: FinetuneRequest, model: Path) -> FinetuneRequest:
    """A request whose teacher is a path, also where it is the model as it came."""
    return replace(request, distill=str(model)) if request.distill == INPUT else request


def learn_from_teacher(request: FinetuneRequest, model: Path | None) -> FinetuneRequest:
    """The same for data without targets: all that is learned from is a teacher, or the model before it is pruned."""
    teacher = request.distill or (str(model) if model is not None and request.prunes else "")
    if not teacher or not request.needs_targets:
        return request
    return replace(request, distill=teacher, means=replace(request.means, teacher_share=1.0))


def check(request: FinetuneRequest) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    if request.val and request.val_split:
        raise UsageError("--val and --val-split cannot be used together")
    if request.val_split and not 0 < request.val_split < 1:
        raise UsageError(f"--val-split must be between 0 and 1, not {request.val_split:g}")
    if request.rate not in LR_SCHEDULES:
        raise UsageError(
            f"{request.rate} is not a known learning-rate schedule", hint=f"known: {', '.join(LR_SCHEDULES)}"
        )
    if request.is_resumed and request.checkpoint_dir is None:
        raise UsageError("--resume needs --checkpoint-dir", hint="add --checkpoint-dir DIR")
    if request.early_stop is not None and not (request.val or request.val_split):
        raise UsageError("--early-stop needs validation data", hint="add --val or --val-split")
    if request.distill_model and not request.distill:
        raise UsageError("--distill-builder needs a teacher", hint="add --distill TEACHER")
    if not request.prunes:
        _check_unpruned(request)
    for option, value in (
        ("--epochs", request.epochs),
        ("--steps", request.steps),
        ("--early-stop", request.early_stop),
    ):
        if value is not None and value < 0:
            raise UsageError(f"{option} cannot be negative")


def _check_unpruned(request: FinetuneRequest) -> None:
    """Refuse what is about pruning where nothing is pruned."""
    ramping, pruning = request.ramping, request.pruning
    if request.mask is MaskMode.REGROW:
        # Which turns there are is said by the same word.
        ramping = replace(ramping, frequency=None)
    if ramping != ScheduleOptions():
        raise UsageError("a schedule needs a final sparsity", hint="add --sparsity 80%")
    if pruning.strategy != "magnitude" or pruning.params or pruning.scope != "layer":
        raise UsageError(
            "--strategy, --param and --scope need a sparsity: without one, finetune keeps the zeros of the file",
            hint="add --sparsity 80%, or leave out --strategy, --param and --scope",
        )


MAX, MIN, LOSS = "max", "min", "loss"


class MetricOptions(TypedDict):
    """The part of `Means` that is about metrics."""

    metrics: tuple[str, ...]
    """What is measured beside the loss."""
    decides: str
    """The first that was named; it may be the loss."""
    goal: str
    """`max` or `min`, where the user says it."""


def parse_metrics(texts: Iterable[str]) -> MetricOptions:
    """What `accuracy`, `loss`, `./file.py:score:max` … ask for; the first of them decides."""
    parts = [_parted(text.strip()) for text in texts if text.strip()]
    for name, goal in parts[1:]:
        if goal:
            raise UsageError(
                f"{name} cannot have max or min: only the first metric, {parts[0][0]}, selects the best epoch",
                hint=f"leave out :{goal}, or put this metric first",
            )
    decides, goal = parts[0] if parts else ("", "")
    return MetricOptions(metrics=tuple(name for name, _ in parts if name != LOSS), decides=decides, goal=goal)


def _parted(text: str) -> tuple[str, str]:
    """A name, and what stands behind it of the direction; `./file.py:max` is a function called max."""
    name, _, goal = text.rpartition(":")
    return (name, goal) if goal in {MAX, MIN} and name and not name.endswith(".py") else (text, "")


def _fields(same: str, **others: str) -> dict[str, str]:
    return {**{name: name for name in same.split()}, **others}


_PARTS: Mapping[str, Mapping[str, str]] = {
    "": _fields(
        "data val val_split epochs steps batch_size mask keep warmup early_stop distill checkpoint_dir workers logdir",
        distill_builder="distill_model",
        lr_schedule="rate",
        freeze="frozen",
        recalibrate="is_recalibrated",
        keep_wrappers="keeps_wrappers",
        resume="is_resumed",
    ),
    "means": _fields(
        "loss optimizer lr clip precision device seed temperature",
        compile="is_compiled",
        shard="is_sharded",
        train_step="custom_step",
        distill_share="teacher_share",
    ),
    "origin": _fields("custom_objects seed", builder="model", trust="is_trusted"),
    "pruning": _fields(
        "sparsity strategy scope pattern policy exclude seed", param="params", layers="only", layer="layers"
    ),
    "ramping": _fields("begin end frequency", schedule="name", initial_sparsity="initial", schedule_param="params"),
}
"""The fields that options decide, for each part of a request; a checkpoint calls some of them otherwise."""
OPTION_OF_FIELD = {
    f"{part}.{field}" if part else field: option
    for part, options in _PARTS.items()
    for option, field in options.items()
}
OPTIONS = ("metric", "power", *dict.fromkeys(OPTION_OF_FIELD.values()))
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("warmup", "begin", "end", "distill"), str),
    "scope": str,
    **dict.fromkeys(("checkpoint_dir", "logdir"), Path),
    **dict.fromkeys(("param", "exclude", "freeze", "schedule_param"), tuple),
    "layer": lambda pairs: tuple(map(tuple, pairs)),
    "mask": MaskMode,
    "keep": KeepWeights,
}


def parse_request(options: Mapping[str, Any], *, is_searched: bool = False) -> FinetuneRequest:
    """Parse options, by the names of the command line; those that are not given, or None, have their defaults.

    Where the sparsity is searched for, it is none of the options.
    """
    if unknown := sorted(options.keys() - {*OPTIONS}):
        raise UsageError(
            f"finetune has no option {unknown[0]}", did_you_mean=tuple(get_close_matches(unknown[0], OPTIONS))
        )
    if not options.get("data"):
        raise UsageError("no training data is given", hint="add --data train.npz")
    given = {
        name: _PARSERS[name](value) if name in _PARSERS else value
        for name, value in options.items()
        if value is not None
    }
    parts = {
        part: {field: given[name] for name, field in names.items() if name in given} for part, names in _PARTS.items()
    }
    pruning = parts["pruning"]
    if pruning.get("scope", Scope.AUTO) == Scope.AUTO:
        # Weights that regrow do so in the layer in which others went.
        is_by_layer = bool(given.get("layer")) or given.get("mask") is MaskMode.REGROW
        is_by_layer |= "sparsity" not in given and not is_searched
        strategy = pruning.get("strategy", PruneRequest().strategy)
        pruning["scope"] = default_scope(strategy, pruning.get("pattern", ""), is_by_layer=is_by_layer)
    if "power" in given:
        parts["ramping"]["params"] = (*given.get("schedule_param", ()), f"power={given['power']:g}")
    return FinetuneRequest(
        means=TrainOptions(**parts["means"], **parse_metrics(given.get("metric", ()))),
        origin=LoadOptions(**parts["origin"]),
        pruning=PruneRequest(**parts["pruning"]),
        ramping=ScheduleOptions(**parts["ramping"]),
        **parts[""],
    )


DEFAULT_OPTIMIZER = "adam"


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer as it is typed, `sgd:momentum=0.9,weight_decay=1e-4`, before its framework looks it up."""

    name: str
    settings: Mapping[str, Any]

    def resolve(
        self, classes: Mapping[str, Any], settings_of: Callable[[Any], Collection[str]], rate: str
    ) -> tuple[Any, dict[str, Any]]:
        """The class and its settings; the learning rate may be called `lr` or `learning_rate`, whoever trains."""
        key = self.name.strip().lower().replace("-", "").replace("_", "")
        if key not in classes:
            raise UsageError(
                f"{self.name} is not a known optimizer",
                did_you_mean=tuple(get_close_matches(key, classes, n=3, cutoff=0.5)),
                hint=f"known: {', '.join(sorted(classes))}",
            )
        known = settings_of(classes[key])
        settings = {rate if name in {"lr", "learning_rate"} else name: value for name, value in self.settings.items()}
        for name in settings:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no setting {name}",
                    did_you_mean=tuple(get_close_matches(name, known, n=3, cutoff=0.5)),
                    hint=f"settings: {', '.join(sorted(known))}",
                )
        return classes[key], settings

    def construct(self, cls: Any, *args: Any, **settings: Any) -> Any:
        """The optimizer, whose own refusals are the user's to mend."""
        try:
            return cls(*args, **settings)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.name} does not accept these settings: {error}") from error


def parse_optimizer(text: str) -> OptimizerSpec:
    """The optimizer that is typed; a comma in parentheses separates nothing: `adam:betas=(0.9,0.99)`."""
    name, _, rest = (text or DEFAULT_OPTIMIZER).partition(":")
    settings = {}
    for setting in filter(str.strip, re.split(r",(?![^(\[]*[)\]])", rest)):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UsageError(
                f"{key!r} in --optimizer {name} is not a setting", hint=f"write {name}:key=value,key=value"
            )
        settings[key] = parse_literal(value)
    return OptimizerSpec(name, settings)


_POINT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|ep|epochs?|steps?)?")


MOST_FREQUENCY = 100
"""Steps between two mask updates of a long schedule, as in tfmot."""
_FEWEST_UPDATES = 20
"""At least so many mask updates are made, however short the schedule is."""


class PointUnit(StrEnum):
    """What a point is counted in."""

    STEPS = "steps"
    PERCENT = "%"
    EPOCHS = "ep"


@dataclass(frozen=True, slots=True)
class TimePoint:
    """A point in the course of training, before it is known how long that is."""

    amount: float
    unit: PointUnit

    def step(self, steps: int, steps_per_epoch: int) -> int:
        """The step that it is; one step is one batch."""
        # Rounded before it is cut off: 0.29 * 100 is 28.999999999999996.
        if self.unit is PointUnit.PERCENT:
            return math.floor(round(self.amount * steps / 100, 6))
        if self.unit is PointUnit.EPOCHS:
            return math.floor(round(self.amount * steps_per_epoch, 6))
        return int(self.amount)


def parse_time_point(text: str) -> TimePoint:
    """The point that is meant."""
    match = _POINT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a time", hint="write 2000 (steps), 20% (of all steps) or 3ep (epochs)")
    amount, suffix = float(match[1]), match[2] or "steps"
    unit = PointUnit.PERCENT if suffix == "%" else PointUnit.EPOCHS if suffix.startswith("ep") else PointUnit.STEPS
    if unit is PointUnit.STEPS and not amount.is_integer():
        raise UsageError(f"{text!r} is not a whole number of steps", hint="for a share of all steps write 20%")
    if unit is PointUnit.PERCENT and amount > 100:
        raise UsageError(f"{text} is more than 100 % of the steps")
    return TimePoint(amount, unit)


def default_update_interval(steps: int) -> int:
    """The default number of steps between two mask updates of a schedule of so many."""
    return max(min(MOST_FREQUENCY, steps // _FEWEST_UPDATES), 1)
