"""Gradual pruning: masks are updated at the pruning steps of a schedule, and held in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from prunectl.analysis.patterns import NMPattern
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.pruning import engine
from prunectl.pruning import plan as planning
from prunectl.pruning import request as requests
from prunectl.pruning.engine import PruningMethod
from prunectl.pruning.masks import Mask
from prunectl.pruning.plan import PlanCriteria, Selection
from prunectl.pruning.schedules import Schedule, SparsitySchedule
from prunectl.pruning.strategies import Requires
from prunectl.training.backend import STATISTIC_OF_STRATEGY, GradientStatistic, TrainableModel, with_gradient_scores
from prunectl.training.config import DivergedError, TrainConfig
from prunectl.training.request import (
    FinetuneRequest,
    MaskMode,
    ScheduleOptions,
    default_update_interval,
    parse_time_point,
)


@dataclass(frozen=True, slots=True)
class RigLSchedule:
    """When RigL (Evci et al. 2020) exchanges weights, and how many: a share that falls along half a cosine."""

    begin: int
    end: int
    frequency: int
    share: float = 0.3

    def share_at(self, step: int) -> float:
        """The share of the kept weights that is exchanged at a step."""
        done = min(max((step - self.begin) / max(self.end - self.begin, 1), 0.0), 1.0)
        return self.share * (1.0 + math.cos(math.pi * done)) / 2.0

    def prunes_at(self, step: int) -> bool:
        """Whether masks are updated at a step."""
        return self.begin < step < self.end and (step - self.begin) % self.frequency == 0


def regrow_masks(
    masks: Mapping[str, Mask], weights: Mapping[str, Array], gradients: Mapping[str, Array], share: float
) -> dict[str, Mask]:
    """RigL's update: prune the smallest kept weights of each tensor, and regrow as many with the largest gradients."""
    return {name: _exchange(mask, weights[name], gradients.get(name), share) for name, mask in masks.items()}


def _exchange(mask: Mask, weights: Array, gradient: Array | None, share: float) -> Mask:
    if gradient is None:
        return mask
    flat = mask.reshape(-1).copy()
    kept, pruned = np.flatnonzero(flat), np.flatnonzero(~flat)
    count = min(round(share * kept.size), pruned.size)
    if not count:
        return mask
    by_magnitude = np.argsort(np.abs(weights.reshape(-1)[kept]), kind="stable")
    # As in the paper, a weight that was just pruned may regrow at once if its gradient is large.
    dropped = kept[by_magnitude[:count]]
    candidates = np.sort(np.concatenate([pruned, dropped]))
    by_gradient = np.argsort(-np.abs(gradient.reshape(-1)[candidates]), kind="stable")
    flat[dropped] = False
    flat[candidates[by_gradient[:count]]] = True
    return np.asarray(flat.reshape(mask.shape))


@dataclass(frozen=True, slots=True)
class PruningConfig:
    """Everything that determines the masks: tensors, method and schedule."""

    model: ModelFile
    choice: Selection
    selection: PlanCriteria
    method: PruningMethod
    schedule: Schedule | None
    """None keeps the initial masks."""
    statistic: GradientStatistic = GradientStatistic.NONE
    regrowth: RigLSchedule | None = None
    has_others: bool = True
    """Whether tensors without a sparsity of their own are pruned too."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are pruned."""
        return tuple(tensor.name for tensor in self.choice.tensors)


@dataclass(slots=True)
class MaskScheduler:
    """Updates the masks along a schedule."""

    rules: PruningConfig
    masks: dict[str, Mask] = field(default_factory=dict)
    """Keep masks by tensor; empty before the first update."""
    initial: Mapping[str, Mask] = field(default_factory=dict)
    """Masks of the zeros in the file: they stay zero, unless weights may regrow."""
    last_updated: int = -1

    def begin(self, network: TrainableModel) -> None:
        """Apply the initial masks, and start to accumulate gradient statistics if the method needs them."""
        if self.masks:
            network.mask(self.masks)
        if self._statistic is not GradientStatistic.NONE:
            network.track_gradients(self._statistic, self.rules.names)

    def maybe_update(self, network: TrainableModel, step: int) -> bool:
        """Update the masks before the batch of a step, if an update is due; returns whether it was."""
        if not self._is_update(step) or step == self.last_updated:
            return False
        weights = network.weights(self.rules.names)
        if step:
            _check_finite(weights, step)
        statistics = network.gradient_statistics() if self._statistic is not GradientStatistic.NONE else {}
        _check_finite({f"the gradient of {name}": array for name, array in statistics.items()}, step)
        if self.rules.schedule is not None:
            self.masks = self._new_masks(step, weights, statistics)
        growth = self.rules.regrowth
        if growth is not None and self.masks and step and step < growth.end:
            self.masks = regrow_masks(self.masks, weights, statistics, growth.share_at(step))
        network.mask(self.masks)
        if self._statistic is not GradientStatistic.MOVEMENT:
            network.reset_gradient_statistics()
        self.last_updated = step
        return True

    @property
    def _statistic(self) -> GradientStatistic:
        return GradientStatistic.GRADIENT if self.rules.regrowth is not None else self.rules.statistic

    def _is_update(self, step: int) -> bool:
        schedule, growth = self.rules.schedule, self.rules.regrowth
        if growth is not None and growth.prunes_at(step):
            return True
        # If the schedule ends between two pruning steps, an update at the end brings it to its final sparsity.
        return schedule is not None and (schedule.prunes_at(step) or step == schedule.last_update_step)

    def _new_masks(self, step: int, weights: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Mask]:
        rules, schedule = self.rules, self.rules.schedule
        assert schedule is not None
        method = rules.method
        if rules.statistic is not GradientStatistic.NONE and statistics:
            method = replace(method, strategy=with_gradient_scores(method.strategy, statistics, self.masks))
        sparsity = schedule.sparsity_at(step)
        choice = scale_targets(rules.choice, sparsity, schedule.final)
        plan = planning.make_plan(choice, rules.selection, sparsity if rules.has_others else 0.0)
        masks = engine.keep_masks(rules.model, plan, method, choice, weights)
        if rules.regrowth is None:
            masks = {name: mask & self.initial[name] if name in self.initial else mask for name, mask in masks.items()}
        return masks

    @property
    def zeros(self) -> int:
        """The number of weights that the masks hold at zero."""
        return sum(int(mask.size - np.count_nonzero(mask)) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)


def _check_finite(weights: Mapping[str, Array], step: int) -> None:
    """Raise if training made values NaN or infinite."""
    for name, array in weights.items():
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise DivergedError(
                f"training diverged: {name} is NaN or infinite after step {step}",
                hint="try a lower --lr, --clip 1, or scaled data (?norm=unit)",
            )


def scale_targets(choice: Selection, sparsity: float, final: float) -> Selection:
    """Scale the sparsities of single layers by the progress of the schedule towards its final sparsity."""
    share = sparsity / final if final else 1.0
    return replace(choice, layer_ratios={name: ratio * share for name, ratio in choice.layer_ratios.items()})


_REGROWS_UNTIL = 0.75
_RAMP_UNTIL = "75%"


def make_pruning_config(model: ModelFile, request: FinetuneRequest, config: TrainConfig) -> PruningConfig:
    """Resolve what determines the masks in a training run."""
    pruning = request.pruning
    if request.prunes:
        requests.check_shape(pruning)
    method = requests.resolve_method(pruning)
    statistic = STATISTIC_OF_STRATEGY.get(pruning.strategy, GradientStatistic.NONE)
    if method.strategy.needs is not Requires.NOTHING and statistic is GradientStatistic.NONE:
        raise UsageError(
            f"the strategy {pruning.strategy} cannot be used during training",
            hint=f"use prunectl prune --strategy {pruning.strategy} --data …, then finetune, which keeps its zeros; "
            f"for finetune: {', '.join(STATISTIC_OF_STRATEGY)}",
        )
    selection = replace(method.criteria, exclude=(*method.criteria.exclude, *request.frozen))
    choice = planning.select_tensors(model, selection)
    schedule = None
    if request.prunes:
        pattern = selection.pattern
        is_grouped = isinstance(pattern, NMPattern)
        # Without a global sparsity, the schedule rises to 1: it is the progress of the layers with ratios of their own.
        final = pattern.zeros / pattern.group if isinstance(pattern, NMPattern) else pruning.sparsity
        ramping = replace(request.ramping, name=request.ramping.name or ("constant" if is_grouped else "polynomial"))
        schedule = make_schedule(ramping, 1.0 if final is None else final, config)
        if statistic is not GradientStatistic.NONE and schedule.prunes_at(0) and schedule.sparsity_at(0) > 0:
            raise UsageError(
                f"the strategy {pruning.strategy} needs training, but the schedule prunes before the first step",
                hint="start pruning later: --begin 10%",
            )
    growth = None
    if request.mask is MaskMode.REGROW:
        growth = RigLSchedule(0, int(_REGROWS_UNTIL * config.steps), _frequency(request.ramping, config.steps))
    has_others = pruning.sparsity is not None or not pruning.layers
    return PruningConfig(model, choice, selection, method, schedule, statistic, growth, has_others=has_others)


def make_schedule(ramping: ScheduleOptions, final: float, config: TrainConfig) -> Schedule:
    """Convert a schedule's time points to steps."""
    begin = parse_time_point(ramping.begin).step(config.steps, config.steps_per_epoch)
    if ramping.end:
        end: int | None = parse_time_point(ramping.end).step(config.steps, config.steps_per_epoch)
    else:
        # The steps after the schedule let the network recover.
        default = parse_time_point(_RAMP_UNTIL).step(config.steps, config.steps_per_epoch)
        end = None if ramping.name == "constant" else max(default, begin)
    for name, step in (("begin", begin), ("end", end or 0)):
        if step > config.steps:
            raise UsageError(
                f"the schedule would {name} at step {step}, but training has only {config.steps} steps",
                hint=f"a step is one batch; write --{name} as a share (75%) or in epochs (2ep), or train longer",
            )
    frequency = _frequency(ramping, (config.steps if end is None else end) - begin)
    return SparsitySchedule(ramping.name, final, begin, end, ramping.initial, frequency, ramping.params)


def _frequency(ramping: ScheduleOptions, steps: int) -> int:
    return ramping.frequency or default_update_interval(steps)


def masks_of_zeros(choice: Selection, weights: dict[str, Array]) -> dict[str, Mask]:
    """Masks of the zeros in the weights; empty if no weight is zero."""
    masks = {tensor.name: np.asarray(weights[tensor.name] != 0) for tensor in choice.tensors}
    return masks if any(not mask.all() for mask in masks.values()) else {}
