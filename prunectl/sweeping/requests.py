"""Requests of `prune` and `finetune` for a trial of a sweep."""

from __future__ import annotations

from dataclasses import replace

from prunectl.analysis.patterns import CHANNEL
from prunectl.channels.config import parse_config
from prunectl.channels.importance import RequiredData
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.pruning.request import PruneRequest, check, check_shape, resolve_method
from prunectl.pruning.schedules import CURVES
from prunectl.pruning.strategies import Requires
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial
from prunectl.training.backend import STATISTIC_OF_STRATEGY, LoadOptions, TrainOptions
from prunectl.training.request import FinetuneRequest, ScheduleOptions, parse_metrics


def needs_data(request: PruneRequest) -> bool:
    """Whether pruning, reconstruction or output matching needs calibration data."""
    if request.pattern == CHANNEL:
        measure = parse_config(request).importance
        return request.is_matched or (measure is not None and measure.needs is not RequiredData.NOTHING)
    is_repaired = request.is_repaired or request.is_matched
    return is_repaired or resolve_method(request).strategy.needs not in {Requires.NOTHING, Requires.TRAINING}


ONE_SHOT = "constant"
"""The schedule that prunes before the first training step."""


def pruning_of(config: SweepConfig, trial: Trial) -> PruneRequest:
    """The prune request of a trial."""
    needs_data_here = looks_at_data(trial)
    return replace(
        _pruning_request(trial),
        policy=config.policy,
        only=config.only,
        exclude=config.exclude,
        seed=config.seed,
        data=config.data if needs_data_here else "",
        samples=config.samples if needs_data_here else SAMPLES,
        batch_size=config.batch_size if needs_data_here else BATCH_SIZE,
        loss=config.loss if needs_data_here else "",
        model=config.model,
        custom_objects=config.custom_objects,
    )


def training_of(config: SweepConfig, trial: Trial) -> FinetuneRequest:
    """The finetune request of a trial; zeros of a one-shot pruning are kept."""
    is_pruned = trial == BASELINE or is_one_shot(trial)
    pruning = PruneRequest(seed=config.seed) if is_pruned else pruning_of(config, trial)
    return FinetuneRequest(
        data=config.data,
        val=config.val,
        val_split=config.val_split,
        epochs=config.epochs,
        batch_size=config.batch_size,
        means=TrainOptions(
            loss=config.loss,
            optimizer=config.optimizer,
            lr=config.lr,
            seed=config.seed,
            **parse_metrics((config.metric,)),
        ),
        origin=LoadOptions(config.model, config.custom_objects, config.is_trusted, config.seed),
        pruning=pruning,
        ramping=ScheduleOptions() if is_pruned else ScheduleOptions(name=trial.schedule),
    )


def looks_at_data(trial: Trial) -> bool:
    """Whether the trial prunes with calibration data before any training."""
    if trial == BASELINE or _needs_training_scores(trial):
        return False
    return needs_data(_pruning_request(trial))


def is_one_shot(trial: Trial) -> bool:
    """Whether `prune` prunes the trial before training (channels, or with calibration data), not `finetune`."""
    return trial.pattern == CHANNEL or looks_at_data(trial)


def check_variant(config: SweepConfig, trial: Trial) -> None:
    """Refuse a variant whose options contradict each other."""
    trains = bool(config.epochs)
    if trains:
        find("schedule", trial.schedule, CURVES)
    if trial.pattern == CHANNEL:
        if trains and trial.schedule != ONE_SHOT:
            raise UsageError(
                f"the schedule {trial.schedule} cannot be used with channels, which are removed before training"
            )
        check_channels(pruning_of(config, trial))
        return
    if trains and looks_at_data(trial) and trial.schedule != ONE_SHOT:
        raise UsageError(
            f"the schedule {trial.schedule} cannot be used with {trial.strategy}, which prunes before training",
            hint=f"use --schedules {ONE_SHOT}",
        )
    pruning = pruning_of(config, trial)
    if not trains or trial.strategy not in STATISTIC_OF_STRATEGY or looks_at_data(trial):
        check(pruning)
    elif trial.schedule == ONE_SHOT:
        raise UsageError(
            f"the schedule {ONE_SHOT} prunes before training, which the strategy {trial.strategy} needs",
            hint="use --schedules polynomial",
        )
    else:
        check_shape(pruning)


def check_channels(pruning: PruneRequest) -> None:
    """Refuse channel pruning of models that could not be evaluated afterwards."""
    parse_config(pruning)
    if pruning.model:
        raise UsageError(
            "a state dict with removed channels no longer fits its model class, so it cannot be evaluated",
            hint="export the network to ONNX with prunectl export, and search that file",
        )


def _needs_training_scores(trial: Trial) -> bool:
    is_later = trial.schedule not in {"", ONE_SHOT}
    return trial.pattern != CHANNEL and is_later and trial.strategy in STATISTIC_OF_STRATEGY


def _pruning_request(trial: Trial) -> PruneRequest:
    """The options of a trial that decide how weights are ranked, and how many are pruned."""
    return PruneRequest(
        sparsity=trial.sparsity,
        strategy=trial.strategy,
        params=tuple(filter(None, trial.params.split(","))),
        scope=trial.scope,
        pattern=trial.pattern,
        # A placeholder: this request is also used to find out whether data is needed.
        data="any",
    )
