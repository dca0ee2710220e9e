"""Which weights are zero at a step? Decided at the turns of a schedule, kept in between."""

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
    """How much moves when: a share of the kept weights that falls along half a cosine."""

    begin: int
    end: int
    frequency: int
    share: float = 0.3

    def share_at(self, step: int) -> float:
        """The share of the kept weights that is exchanged."""
        done = min(max((step - self.begin) / max(self.end - self.begin, 1), 0.0), 1.0)
        return self.share * (1.0 + math.cos(math.pi * done)) / 2.0

    def prunes_at(self, step: int) -> bool:
        """Whether masks are updated at a step."""
        return self.begin < step < self.end and (step - self.begin) % self.frequency == 0


def regrow_masks(
    masks: Mapping[str, Mask], weights: Mapping[str, Array], gradients: Mapping[str, Array], share: float
) -> dict[str, Mask]:
    """Masks with the same number of zeros in each tensor."""
    return {name: _exchanged(mask, weights[name], gradients.get(name), share) for name, mask in masks.items()}


def _exchanged(mask: Mask, weights: Array, gradient: Array | None, share: float) -> Mask:
    if gradient is None:
        return mask
    flat = mask.reshape(-1).copy()
    kept, free = np.flatnonzero(flat), np.flatnonzero(~flat)
    count = min(round(share * kept.size), free.size)
    if not count:
        return mask
    by_size = np.argsort(np.abs(weights.reshape(-1)[kept]), kind="stable")
    # What was just dropped may come back at once, as in the paper: its gradient decides.
    gone = kept[by_size[:count]]
    candidates = np.sort(np.concatenate([free, gone]))
    by_gradient = np.argsort(-np.abs(gradient.reshape(-1)[candidates]), kind="stable")
    flat[gone] = False
    flat[candidates[by_gradient[:count]]] = True
    return np.asarray(flat.reshape(mask.shape))


@dataclass(frozen=True, slots=True)
class PruningConfig:
    """What decides the masks."""

    model: ModelFile
    choice: Selection
    selection: PlanCriteria
    method: PruningMethod
    schedule: Schedule | None
    """None keeps the masks that there are at the beginning."""
    evidence: GradientStatistic = GradientStatistic.NONE
    regrowth: RigLSchedule | None = None
    has_others: bool = True
    """Whether tensors without a sparsity of their own are pruned, too."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are pruned."""
        return tuple(tensor.name for tensor in self.choice.tensors)


@dataclass(slots=True)
class MaskScheduler:
    """Updates the masks along a schedule."""

    rules: PruningConfig
    masks: dict[str, Mask] = field(default_factory=dict)
    """What stays, by tensor; empty before the first update."""
    first: Mapping[str, Mask] = field(default_factory=dict)
    """The masks of what was zero in the file: it stays zero, unless it may regrow."""
    last_updated: int = -1

    def begin(self, network: TrainableModel) -> None:
        """Put the masks that there are on, and begin to watch."""
        if self.masks:
            network.mask(self.masks)
        if self._watched is not GradientStatistic.NONE:
            network.watch(self._watched, self.rules.names)

    def maybe_update(self, network: TrainableModel, step: int) -> bool:
        """Update the masks before the batch of a step is trained on, if it is time; returns whether it was."""
        if not self._is_update(step) or step == self.last_updated:
            return False
        weights = network.weights(self.rules.names)
        if step:
            _check_finite(weights, step)
        statistics = network.evidence() if self._watched is not GradientStatistic.NONE else {}
        _check_finite({f"the gradient of {name}": array for name, array in statistics.items()}, step)
        if self.rules.schedule is not None:
            self.masks = self._cut(step, weights, statistics)
        growth = self.rules.regrowth
        if growth is not None and self.masks and step and step < growth.end:
            self.masks = regrow_masks(self.masks, weights, statistics, growth.share_at(step))
        network.mask(self.masks)
        if self._watched is not GradientStatistic.MOVEMENT:
            network.forget()
        self.last_updated = step
        return True

    @property
    def _watched(self) -> GradientStatistic:
        return GradientStatistic.GRADIENT if self.rules.regrowth is not None else self.rules.evidence

    def _is_update(self, step: int) -> bool:
        schedule, growth = self.rules.schedule, self.rules.regrowth
        if growth is not None and growth.prunes_at(step):
            return True
        # A ramp whose end lies between two turns gets one more there, or it would never reach its sparsity.
        return schedule is not None and (schedule.prunes_at(step) or step == schedule.last_update_step)

    def _cut(self, step: int, weights: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Mask]:
        rules, schedule = self.rules, self.rules.schedule
        assert schedule is not None
        method = rules.method
        if rules.evidence is not GradientStatistic.NONE and statistics:
            method = replace(method, strategy=with_gradient_scores(method.strategy, statistics, self.masks))
        sparsity = schedule.sparsity_at(step)
        choice = scale_targets(rules.choice, sparsity, schedule.final)
        plan = planning.make_plan(choice, rules.selection, sparsity if rules.has_others else 0.0)
        masks = engine.keep_masks(rules.model, plan, method, choice, weights)
        if rules.regrowth is None:
            masks = {name: mask & self.first[name] if name in self.first else mask for name, mask in masks.items()}
        return masks

    @property
    def zeros(self) -> int:
        """How many weights the masks hold at zero."""
        return sum(int(mask.size - np.count_nonzero(mask)) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)


def _check_finite(weights: Mapping[str, Array], step: int) -> None:
    """Tell a training that went astray from a file that holds such numbers."""
    for name, array in weights.items():
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise DivergedError(
                f"training diverged: {name} is NaN or infinite after step {step}",
                hint="try a lower --lr, --clip 1, or scaled data (?norm=unit)",
            )


def scale_targets(choice: Selection, sparsity: float, final: float) -> Selection:
    """A choice whose layers with a sparsity of their own are as far on their way to it as the rest."""
    share = sparsity / final if final else 1.0
    return replace(choice, layer_ratios={name: ratio * share for name, ratio in choice.layer_ratios.items()})


_REGROWS_UNTIL = 0.75
_RAMP_UNTIL = "75%"


def make_pruning_config(model: ModelFile, request: FinetuneRequest, config: TrainConfig) -> PruningConfig:
    """What decides the masks of a training."""
    pruning = request.pruning
    if request.prunes:
        requests.check_shape(pruning)
    method = requests.resolve_method(pruning)
    evidence = STATISTIC_OF_STRATEGY.get(pruning.strategy, GradientStatistic.NONE)
    if method.strategy.needs is not Requires.NOTHING and evidence is GradientStatistic.NONE:
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
        # A layer with a ratio of its own is as far on its way as the others: of the whole way if there are no others.
        final = pattern.zeros / pattern.group if isinstance(pattern, NMPattern) else pruning.sparsity
        ramping = replace(request.ramping, name=request.ramping.name or ("constant" if is_grouped else "polynomial"))
        schedule = make_schedule(ramping, 1.0 if final is None else final, config)
        if evidence is not GradientStatistic.NONE and schedule.prunes_at(0) and schedule.sparsity_at(0) > 0:
            raise UsageError(
                f"the strategy {pruning.strategy} needs training, but the schedule prunes before the first step",
                hint="start pruning later: --begin 10%",
            )
    growth = None
    if request.mask is MaskMode.REGROW:
        growth = RigLSchedule(0, int(_REGROWS_UNTIL * config.steps), _frequency(request.ramping, config.steps))
    has_others = pruning.sparsity is not None or not pruning.layers
    return PruningConfig(model, choice, selection, method, schedule, evidence, growth, has_others=has_others)


def make_schedule(ramping: ScheduleOptions, final: float, config: TrainConfig) -> Schedule:
    """A schedule with its points in steps."""
    begin = parse_time_point(ramping.begin).step(config.steps, config.steps_per_epoch)
    if ramping.end:
        end: int | None = parse_time_point(ramping.end).step(config.steps, config.steps_per_epoch)
    else:
        # What is left afterwards is for the network to recover in.
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
    """Masks of the zeros that there are; none where there are none."""
    masks = {tensor.name: np.asarray(weights[tensor.name] != 0) for tensor in choice.tensors}
    return masks if any(not mask.all() for mask in masks.values()) else {}
