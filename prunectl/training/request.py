"""The finetune request: parsing and checks of its options, optimizers and points in time."""

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
"""The value of `--distill` that makes the unpruned model its own teacher."""


class MaskMode(StrEnum):
    """Whether pruned weights stay zero or regrow between two mask updates."""

    KEEP = "keep"
    REGROW = "regrow"


class KeepWeights(StrEnum):
    """Which epoch's weights are written."""

    BEST = "best"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """A pruning schedule as typed, with its time points unparsed."""

    name: str = ""
    """The curve; if empty, polynomial where a sparsity is given, and else only the zeros of the file are kept."""
    initial: float = 0.0
    begin: str = "0"
    end: str = ""
    frequency: int | None = None
    params: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """All options of a finetuning run."""

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
    """Selectors of the tensors that are not trained."""
    distill: str = ""
    distill_model: str = ""
    """The function that builds a teacher whose file holds only weights; if empty, the one that builds the model."""
    is_recalibrated: bool = False
    keeps_wrappers: bool = False
    workers: int = 1
    """Number of threads that read batches ahead."""
    checkpoint_dir: Path | None = None
    is_resumed: bool = False
    logdir: Path | None = None

    @property
    def prunes(self) -> bool:
        """Whether this run prunes weights beyond the zeros of the file."""
        return self.pruning.sparsity is not None or bool(self.pruning.layers) or bool(self.pruning.pattern)

    @property
    def needs_targets(self) -> bool:
        """Whether training needs targets: it needs none if a teacher gives the whole loss, or with a custom step."""
        return not self.means.custom_step and not (self.distill and self.means.teacher_share == 1)

    @property
    def choices(self) -> dict[str, Any]:
        """The options that affect the result, for JSON; a run can be resumed only with the same ones."""
        ignored = {"checkpoint_dir", "is_resumed", "logdir", "workers", "keeps_wrappers"}
        values = {name: value for name, value in asdict(self).items() if name not in ignored}
        resolved_later = {"example", "frozen", "is_evaluated", "arrays"}
        for part in ("means", "origin"):
            values[part] = {name: value for name, value in values[part].items() if name not in resolved_later}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def resolve_teacher(request: FinetuneRequest, model: Path) -> FinetuneRequest:
    """The request with its teacher as a path, also for `--distill input`."""
    return replace(request, distill=str(model)) if request.distill == INPUT else request


def learn_from_teacher(request: FinetuneRequest, model: Path | None) -> FinetuneRequest:
    """The request for data without targets: the loss is distillation alone, from the teacher or the unpruned model."""
    teacher = request.distill or (str(model) if model is not None and request.prunes else "")
    if not teacher or not request.needs_targets:
        return request
    return replace(request, distill=teacher, means=replace(request.means, teacher_share=1.0))


def check(request: FinetuneRequest) -> None:
    """Refuse contradictory options before a file is opened."""
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
    """Refuse pruning options where nothing is pruned."""
    ramping, pruning = request.ramping, request.pruning
    if request.mask is MaskMode.REGROW:
        # Regrowth uses --frequency too.
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
    """The fields of `TrainOptions` about metrics."""

    metrics: tuple[str, ...]
    """The metrics besides the loss."""
    decides: str
    """The metric named first, which may be the loss."""
    goal: str
    """`max` or `min`, if the user gives it."""


def parse_metrics(texts: Iterable[str]) -> MetricOptions:
    """Parse metrics such as `accuracy`, `loss` or `./file.py:score:max`; the first selects the best epoch."""
    metrics = [_split_direction(text.strip()) for text in texts if text.strip()]
    for name, goal in metrics[1:]:
        if goal:
            raise UsageError(
                f"{name} cannot have max or min: only the first metric, {metrics[0][0]}, selects the best epoch",
                hint=f"leave out :{goal}, or put this metric first",
            )
    decides, goal = metrics[0] if metrics else ("", "")
    return MetricOptions(metrics=tuple(name for name, _ in metrics if name != LOSS), decides=decides, goal=goal)


def _split_direction(text: str) -> tuple[str, str]:
    """Split a metric into name and direction; `./file.py:max` is a function called max."""
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
"""For each part of a request, the field that each option sets; checkpoints store the names of the fields."""
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
    """Parse options by their command-line names; missing or None options have their defaults.

    If the sparsity is being searched for (`is_searched`), it is not among the options.
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
        # Weights regrow in the layer in which others are pruned.
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
    """An optimizer as typed, `sgd:momentum=0.9,weight_decay=1e-4`, before its framework looks it up."""

    name: str
    settings: Mapping[str, Any]

    def resolve(
        self, classes: Mapping[str, Any], settings_of: Callable[[Any], Collection[str]], rate: str
    ) -> tuple[Any, dict[str, Any]]:
        """The class and its settings; `lr` and `learning_rate` both set the learning rate, in every framework."""
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
        """Construct the optimizer; settings that it rejects are the user's error."""
        try:
            return cls(*args, **settings)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.name} does not accept these settings: {error}") from error


def parse_optimizer(text: str) -> OptimizerSpec:
    """Parse `--optimizer`; commas in parentheses do not separate settings: `adam:betas=(0.9,0.99)`."""
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
"""The maximum default interval, in steps, between two mask updates, as in tfmot."""
_FEWEST_UPDATES = 20
"""The default interval is shortened to allow at least so many mask updates, if there are enough steps."""


class PointUnit(StrEnum):
    """The unit of a time point."""

    STEPS = "steps"
    PERCENT = "%"
    EPOCHS = "ep"


@dataclass(frozen=True, slots=True)
class TimePoint:
    """A point in training, before the number of steps is known."""

    amount: float
    unit: PointUnit

    def step(self, steps: int, steps_per_epoch: int) -> int:
        """The number of the step; one step is one batch."""
        # Round before the floor: 0.29 * 100 is 28.999999999999996.
        if self.unit is PointUnit.PERCENT:
            return math.floor(round(self.amount * steps / 100, 6))
        if self.unit is PointUnit.EPOCHS:
            return math.floor(round(self.amount * steps_per_epoch, 6))
        return int(self.amount)


def parse_time_point(text: str) -> TimePoint:
    """Parse a time point such as 2000, 20% or 3ep."""
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
    """The default number of steps between two mask updates, for a schedule of `steps` steps."""
    return max(min(MOST_FREQUENCY, steps // _FEWEST_UPDATES), 1)
