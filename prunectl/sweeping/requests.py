"""A point in the words of `prune` and of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.analysis.patterns import CHANNEL
from prunectl.calibration import prune as calibrating
from prunectl.channels import prune as cutting
from prunectl.channels.config import parse_config
from prunectl.channels.importance import RequiredData as Sees
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning import prune as pruning
from prunectl.pruning import request
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest, resolve_method
from prunectl.pruning.request import PruneRequest as Pruning
from prunectl.pruning.schedules import CURVES
from prunectl.pruning.strategies import Requires
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial
from prunectl.training.backend import WATCHED, Means, ModelOrigin
from prunectl.training.request import FinetuneRequest as Training
from prunectl.training.request import Ramping
from prunectl.training.request import asked as asked_of


def needs_data(request: PruneRequest) -> bool:
    """Whether weights or channels go, or are fitted anew, by what data does in the model."""
    if request.pattern == CHANNEL:
        measure = parse_config(request).measure
        return measure is not None and measure.needs is not Sees.NOTHING
    return request.is_repaired or resolve_method(request).strategy.needs not in {Requires.NOTHING, Requires.TRAINING}


def prune_to(
    path: Path, request: PruneRequest, output: Destination, *, is_trusted: bool, limits: Mapping[str, Any] | None = None
) -> None:
    """Write what a request asks for; limits are about channels."""
    if request.pattern == CHANNEL:
        # A small step may be less than a channel.
        cutting.prune_channels(path, request, output, is_trusted=is_trusted, allow_empty=True, **(limits or {}))
    elif request.data:
        calibrating.prune(path, request, output, is_trusted=is_trusted)
    else:
        pruning.prune(path, request, output)


ONE_SHOT = "constant"
"""The schedule that prunes before the first step."""


def pruning_of(choices: SweepConfig, point: Trial) -> Pruning:
    """Return what `prune` is asked for."""
    needs_data_here = looks_at_data(point)
    return replace(
        _pruning_request(point),
        policy=choices.policy,
        only=choices.only,
        exclude=choices.exclude,
        seed=choices.seed,
        data=choices.data if needs_data_here else "",
        samples=choices.samples if needs_data_here else request.SAMPLES,
        batch_size=choices.batch_size if needs_data_here else request.BATCH_SIZE,
        loss=choices.loss if needs_data_here else "",
        model=choices.model,
        custom_objects=choices.custom_objects,
    )


def training_of(choices: SweepConfig, point: Trial) -> Training:
    """Return what `finetune` is asked for; what was pruned before keeps its zeros."""
    is_pruned = point == BASELINE or is_one_shot(point)
    pruning = Pruning(seed=choices.seed) if is_pruned else pruning_of(choices, point)
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
        origin=ModelOrigin(choices.model, choices.custom_objects, choices.is_trusted, choices.seed),
        pruning=pruning,
        ramping=Ramping() if is_pruned else Ramping(name=point.schedule),
    )


def looks_at_data(point: Trial) -> bool:
    """Whether weights go by what data does in the model before there is any training."""
    if point == BASELINE or _needs_training_scores(point):
        return False
    return needs_data(_pruning_request(point))


def is_one_shot(point: Trial) -> bool:
    """Whether it is pruned before there is any training, by other means than those of training."""
    return point.pattern == CHANNEL or looks_at_data(point)


def check_variant(choices: SweepConfig, point: Trial) -> None:
    """Refuse a way that contradicts itself."""
    trains = bool(choices.epochs)
    if trains:
        find("schedule", point.schedule, CURVES)
    if point.pattern == CHANNEL:
        if trains and point.schedule != ONE_SHOT:
            raise UsageError(f"channels are cut before training: they have no schedule {point.schedule}")
        check_channels(pruning_of(choices, point))
        return
    if trains and looks_at_data(point) and point.schedule != ONE_SHOT:
        raise UsageError(
            f"the strategy {point.strategy} prunes once, before training: it has no schedule {point.schedule}",
            hint=f"sweep it with --schedules {ONE_SHOT}",
        )
    pruning = pruning_of(choices, point)
    if not trains or point.strategy not in WATCHED or looks_at_data(point):
        request.check(pruning)
    elif point.schedule == ONE_SHOT:
        raise UsageError(
            f"the strategy {point.strategy} watches training, and the schedule {ONE_SHOT} prunes before there is any",
            hint="such as --schedules polynomial",
        )
    else:
        request.check_shape(pruning)


def check_channels(pruning: Pruning) -> None:
    """Refuse channels of what could not be judged once they are cut."""
    parse_config(pruning)
    if pruning.model:
        raise UsageError(
            "weights alone that lost channels fit no class but their own, so that they cannot be judged",
            hint="search the same network as ONNX, which prunectl export writes",
        )


def _needs_training_scores(point: Trial) -> bool:
    is_later = point.schedule not in {"", ONE_SHOT}
    return point.pattern != CHANNEL and is_later and point.strategy in WATCHED


def _pruning_request(point: Trial) -> Pruning:
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
