"""Networks that prune themselves, with tfmot's wrappers: prunectl reads their masks instead of setting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.pruning.masks import Mask, Pooling
from prunectl.pruning.plan import Scope, Selection
from prunectl.pruning.schedules import Schedule, SparsitySchedule
from prunectl.training.backend import GradientStatistic, TrainableModel
from prunectl.training.config import TrainConfig
from prunectl.training.mask_schedule import MaskScheduler, PruningConfig
from prunectl.training.request import FinetuneRequest, MaskMode
from prunectl.training.wrap import ResumedSchedule, SavedPruning


@dataclass(frozen=True, slots=True)
class NativePruning:
    """The settings by which a network prunes itself."""

    schedules: Mapping[str, Schedule]
    """Schedules by tensor; steps are batches, counted from 1."""
    pattern: NMPattern | BlockPattern | None = None
    pool: Pooling = Pooling.AVG
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """Masks of the weights that are already zero."""
    step: int = 0
    """The number of steps of an earlier run."""
    is_all: bool = True
    """Whether all tensors must be prunable; otherwise some suffice."""
    logdir: Path | None = None


@runtime_checkable
class NativePruner(Protocol):
    """The additional methods of a network that can prune itself."""

    def prune_by(self, native: NativePruning) -> frozenset[str]:
        """Prepare to prune; returns the names of the tensors that will be pruned. If it cannot, nothing changes."""

    def masks(self) -> dict[str, Mask]:
        """The current keep masks."""

    def end_epoch(self) -> None:
        """Finish an epoch: apply the masks, and write summaries."""


@dataclass(slots=True)
class NativeMaskScheduler(MaskScheduler):
    """Follows the masks of a network that prunes itself."""

    source: Any = None
    """The network, as a `NativePruner`."""
    per_epoch: int = 1
    last: int = 0
    """The last step of training."""
    is_stale: bool = False
    """Whether the network has updated its masks since they were last read."""
    is_settled: bool = False

    def begin(self, network: TrainableModel) -> None:
        """Do nothing: the network has its masks already."""

    def maybe_update(self, network: TrainableModel, step: int) -> bool:
        """Follow the network's pruning; after its last pruning step, correct the masks to the exact number of zeros."""
        schedule = self.rules.schedule
        assert schedule is not None
        if step and step != self.last_updated and (step % self.per_epoch == 0 or step == self.last):
            self.source.end_epoch()
        self.last_updated = step
        is_over = step >= schedule.last_update_step and step > 0
        if is_over and not self.is_settled:
            # tfmot keeps all weights that tie with its threshold. It also rounds the number of kept weights, where we
            # round the number of pruned ones: at a half, it may prune one weight fewer.
            self._read_masks()
            exact = self._new_masks(step, network.weights(self.rules.names), {})
            self.masks = {name: mask & exact[name] if name in exact else mask for name, mask in self.masks.items()}
            network.mask(self.masks)
            self.is_settled = True
        # tfmot counts steps from 1, so this batch is its step + 1.
        self.is_stale = schedule.prunes_at(step + 1) or step + 1 == schedule.last_update_step
        return is_over

    def _read_masks(self) -> None:
        self.masks = self.source.masks()
        self.is_stale = False

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        if self.is_stale:
            self._read_masks()
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)


def make_mask_scheduler(
    network: TrainableModel,
    rules: PruningConfig,
    request: FinetuneRequest,
    config: TrainConfig,
    *,
    initial: Mapping[str, Mask],
    saved: SavedPruning | None,
) -> MaskScheduler:
    """The mask scheduler: the network's own pruning if it can prune itself so, else ours."""
    if isinstance(network, NativePruner):
        resumed = _resume(network, rules, request, initial, saved) if not request.prunes else None
        resumed = resumed or _start(network, rules, request, initial)
        if resumed is not None:
            resumed.per_epoch, resumed.last = config.steps_per_epoch, config.steps
            return resumed
    return MaskScheduler(rules, dict(initial), initial)


def _start(
    network: NativePruner, rules: PruningConfig, request: FinetuneRequest, initial: Mapping[str, Mask]
) -> NativeMaskScheduler | None:
    """A scheduler for the user's options, if tfmot supports all of them."""
    schedule, pruning = rules.schedule, request.pruning
    if schedule is None or initial or pruning.strategy != "magnitude" or pruning.params or pruning.scope != Scope.LAYER:
        return None
    if request.mask is not MaskMode.KEEP or rules.statistic is not GradientStatistic.NONE or request.means.is_compiled:
        return None
    if isinstance(rules.selection.pattern, NMPattern):
        # tfmot chooses its N:M masks in the first step only.
        if not (isinstance(schedule, SparsitySchedule) and schedule.curve == "constant" and schedule.begin == 0):
            return None
    tfmot_schedule = as_tfmot_schedule(schedule)
    if tfmot_schedule is None:
        return None
    schedules: dict[str, Schedule] = {}
    for name in rules.names:
        final = rules.choice.layer_ratios.get(name, schedule.final if rules.has_others else 0.0)
        if final >= 1.0 or not isinstance(tfmot_schedule, SparsitySchedule):
            return None
        if final:
            share = final / schedule.final if schedule.final else 1.0
            schedules[name] = replace(tfmot_schedule, final=final, initial=min(tfmot_schedule.initial * share, 1.0))
    native = NativePruning(schedules, rules.selection.pattern, rules.method.pool, logdir=request.logdir)
    pruned = network.prune_by(native)
    return NativeMaskScheduler(replace(rules, schedule=tfmot_schedule), source=network) if pruned else None


def _resume(
    network: NativePruner,
    rules: PruningConfig,
    request: FinetuneRequest,
    initial: Mapping[str, Mask],
    saved: SavedPruning | None,
) -> NativeMaskScheduler | None:
    """A scheduler that resumes the schedule saved in the file, unless it has ended."""
    if saved is None or not saved.schedules or not _is_under_way(saved, bool(initial)) or request.means.is_compiled:
        return None
    if request.mask is not MaskMode.KEEP:
        return None
    remaining = {layer: _remaining(schedule, saved.step) for layer, schedule in saved.schedules.items()}
    tensors = [tensor for tensor in rules.model.tensors if tensor.layer in remaining and tensor.is_float]
    schedules = {tensor.name: remaining[tensor.layer] for tensor in tensors}
    native = NativePruning(schedules, saved.block, saved.pool, initial, saved.step, is_all=False, logdir=request.logdir)
    pruned = network.prune_by(native)
    if not pruned:
        return None
    chosen = tuple(tensor for tensor in tensors if tensor.name in pruned)
    own = {tensor.name: schedules[tensor.name].final for tensor in chosen}
    longest = max((schedules[tensor.name] for tensor in chosen), key=lambda schedule: schedule.last_update_step)
    selection = replace(rules.selection, pattern=saved.block)
    resumed_rules = replace(
        rules,
        schedule=ResumedSchedule(longest, saved.step),
        choice=Selection(chosen, (), own),
        selection=selection,
        method=replace(rules.method, criteria=selection, pool=saved.pool),
    )
    masks = {name: mask for name, mask in initial.items() if name in pruned}
    return NativeMaskScheduler(resumed_rules, masks, source=network)


def as_tfmot_schedule(schedule: Schedule) -> Schedule | None:
    """An equivalent schedule for tfmot, which counts steps from 1; None if there is none."""
    if not isinstance(schedule, SparsitySchedule):
        return None
    if schedule.curve == "constant" or schedule.last_update_step < 1:
        # One pruning step is enough: zeroed weights stay the smallest.
        begin = max(schedule.begin, 1)
        return replace(schedule, curve="constant", begin=begin, end=begin, frequency=1, params=())
    return schedule


def _is_under_way(saved: SavedPruning, has_zeros: bool) -> bool:
    """Whether any schedule still has a pruning step that would change the masks."""
    for schedule in saved.schedules.values():
        if schedule.last_update_step > max(saved.step, 0):
            return True
        forever = isinstance(schedule, SparsitySchedule) and schedule.end is None
        if forever and not has_zeros and schedule.final:
            return True
    return False


def _remaining(schedule: Schedule, step: int) -> Schedule:
    """Limit an endless constant schedule to its next pruning step; later ones would change nothing."""
    if isinstance(schedule, SparsitySchedule) and schedule.curve == "constant" and schedule.end is None:
        first = max(step + 1, schedule.begin)
        delay = -(first - schedule.begin) % schedule.frequency
        return replace(schedule, begin=first + delay, end=first + delay)
    return schedule
