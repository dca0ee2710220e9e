"""A point in the words of `prune` and of `finetune`."""

from __future__ import annotations

from dataclasses import replace

from prunectl.channels.cutting import cutting_of
from prunectl.errors import UsageError
from prunectl.measuring.patterns import CHANNELS
from prunectl.plugins import find
from prunectl.pruning import request as pruning
from prunectl.pruning.curves import CURVES
from prunectl.pruning.request import Request as Pruning
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import BASE, Point
from prunectl.sweeping.pruned import looks
from prunectl.training.asked import asked as asked_of
from prunectl.training.evidence import WATCHED
from prunectl.training.network import Means, Origin
from prunectl.training.request import Ramping
from prunectl.training.request import Request as Training

AT_ONCE = "constant"
"""The schedule that prunes before the first step."""


def pruning_of(choices: Choices, point: Point) -> Pruning:
    """Return what `prune` is asked for."""
    does_look = looks_at_data(point)
    return replace(
        _plain(point),
        policy=choices.policy,
        only=choices.only,
        exclude=choices.exclude,
        seed=choices.seed,
        data=choices.data if does_look else "",
        samples=choices.samples if does_look else pruning.SAMPLES,
        batch_size=choices.batch_size if does_look else pruning.BATCH_SIZE,
        loss=choices.loss if does_look else "",
        model=choices.model,
        custom_objects=choices.custom_objects,
    )


def training_of(choices: Choices, point: Point) -> Training:
    """Return what `finetune` is asked for; what was pruned before keeps its zeros."""
    is_pruned = point == BASE or is_pruned_before(point)
    asked = Pruning(seed=choices.seed) if is_pruned else pruning_of(choices, point)
    return Training(
        data=choices.data,
        val=choices.val,
        val_split=choices.val_split,
        epochs=choices.epochs,
        batch_size=choices.batch_size,
        means=Means(
            loss=choices.loss,
            optimizer=choices.optimizer,
            lr=choices.lr,
            seed=choices.seed,
            **asked_of((choices.metric,)),
        ),
        origin=Origin(choices.model, choices.custom_objects, choices.is_trusted, choices.seed),
        pruning=asked,
        ramping=Ramping() if is_pruned else Ramping(name=point.schedule),
    )


def looks_at_data(point: Point) -> bool:
    """Whether weights go by what data does in the model before there is any training."""
    if point == BASE or _is_watching(point):
        return False
    return looks(_plain(point))


def is_pruned_before(point: Point) -> bool:
    """Whether it is pruned before there is any training, by other means than those of training."""
    return point.pattern == CHANNELS or looks_at_data(point)


def check_way(choices: Choices, point: Point) -> None:
    """Refuse a way that contradicts itself."""
    trains = bool(choices.epochs)
    if trains:
        find("schedule", point.schedule, CURVES)
    if point.pattern == CHANNELS:
        if trains and point.schedule != AT_ONCE:
            raise UsageError(f"channels are cut before training: they have no schedule {point.schedule}")
        check_cut(pruning_of(choices, point))
        return
    if trains and looks_at_data(point) and point.schedule != AT_ONCE:
        raise UsageError(
            f"the strategy {point.strategy} prunes once, before training: it has no schedule {point.schedule}",
            hint=f"sweep it with --schedules {AT_ONCE}",
        )
    asked = pruning_of(choices, point)
    if not trains or point.strategy not in WATCHED or looks_at_data(point):
        pruning.check(asked)
    elif point.schedule == AT_ONCE:
        raise UsageError(
            f"the strategy {point.strategy} watches training, and the schedule {AT_ONCE} prunes before there is any",
            hint="such as --schedules polynomial",
        )
    else:
        pruning.check_shape(asked)


def check_cut(asked: Pruning) -> None:
    """Refuse channels of what could not be judged once they are cut."""
    cutting_of(asked)
    if asked.model:
        raise UsageError(
            "weights alone that lost channels fit no class but their own, so that they cannot be judged",
            hint="search the same network as ONNX, which prunectl export writes",
        )


def _is_watching(point: Point) -> bool:
    is_later = point.schedule not in {"", AT_ONCE}
    return point.pattern != CHANNELS and is_later and point.strategy in WATCHED


def _plain(point: Point) -> Pruning:
    """Return how weights are ranked, and how much of them goes."""
    return Pruning(
        sparsity=point.sparsity,
        strategy=point.strategy,
        params=tuple(filter(None, point.params.split(","))),
        scope=point.scope,
        pattern=point.pattern,
        # Asked before it is known whether there is a need for any.
        data="any",
    )
