"""A point in the words of `prune` and of `finetune`."""

from __future__ import annotations

from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning import request as pruning
from prunectl.pruning.curves import CURVES
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import Request as Pruning
from prunectl.pruning.strategies import Needs
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import BASE, Point, grid, ways
from prunectl.training.evidence import WATCHED
from prunectl.training.network import Means, Origin
from prunectl.training.request import Ramping
from prunectl.training.request import Request as Training

AT_ONCE = "constant"
"""The schedule that prunes before the first step."""


def pruning_of(choices: Choices, point: Point) -> Pruning:
    """Return what `prune` is asked for."""
    looks = looks_at_data(point)
    return Pruning(
        sparsity=point.sparsity,
        strategy=point.strategy,
        scope=point.scope,
        policy=choices.policy,
        only=choices.only,
        exclude=choices.exclude,
        seed=choices.seed,
        data=choices.data if looks else "",
        samples=choices.samples if looks else pruning.SAMPLES,
        batch_size=choices.batch_size if looks else pruning.BATCH_SIZE,
        loss=choices.loss if looks else "",
        model=choices.model,
        custom_objects=choices.custom_objects,
    )


def training_of(choices: Choices, point: Point) -> Training:
    """Return what `finetune` is asked for; what was pruned before keeps its zeros."""
    is_pruned = point == BASE or looks_at_data(point)
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
            metrics=(choices.metric,) if choices.metric else (),
            seed=choices.seed,
        ),
        origin=Origin(choices.model, choices.custom_objects, choices.is_trusted, choices.seed),
        pruning=asked,
        ramping=Ramping() if is_pruned else Ramping(name=point.schedule),
    )


def looks_at_data(point: Point) -> bool:
    """Whether weights go by what data does in the model before there is any training."""
    if point == BASE or (point.schedule not in {"", AT_ONCE} and point.strategy in WATCHED):
        return False
    needs = pruning.method_of(Pruning(strategy=point.strategy)).strategy.needs
    return needs not in {Needs.NOTHING, Needs.TRAINING}


def check(choices: Choices) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    if choices.val and choices.val_split:
        raise UsageError("--val and --val-split exclude each other")
    if choices.schedules != (AT_ONCE,) and not choices.epochs:
        raise UsageError("a schedule needs training", hint="add --epochs 3, or leave out --schedules")
    for scope in choices.scopes:
        if scope not in set(Scope):
            raise UsageError(f"no scope is called {scope}", hint=f"known: {', '.join(Scope)}")
    for way in ways(choices):
        _check_way(choices, Point(*way, 0.5))
    for point in grid(choices)[1:]:
        if not 0 <= point.sparsity < 1:
            raise UsageError(f"a sparsity is a share from 0 up to 1, not {point.sparsity:g}", hint="write 0.8 or 80%")


def _check_way(choices: Choices, point: Point) -> None:
    trains = bool(choices.epochs)
    if trains:
        find("schedule", point.schedule, CURVES)
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
