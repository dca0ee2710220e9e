"""Networks that prune by themselves, as those of tfmot do: their masks are read back."""

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
    """How a network is to prune itself."""

    schedules: Mapping[str, Schedule]
    """By tensor; a step is a batch, the first is 1."""
    pattern: NMPattern | BlockPattern | None = None
    pool: Pooling = Pooling.AVG
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """What is zero already."""
    step: int = 0
    """How many steps were made before."""
    is_all: bool = True
    """Whether it must be able to prune every one of them."""
    logdir: Path | None = None


@runtime_checkable
class NativePruner(Protocol):
    """What such a network can do beside being trained."""

    def prune_by(self, native: NativePruning) -> frozenset[str]:
        """Get ready to prune, and return what will be pruned; nothing, and nothing changed, if it cannot be done."""

    def masks(self) -> dict[str, Mask]:
        """What stays at the moment."""

    def end_epoch(self) -> None:
        """Do what is done between epochs."""


@dataclass(slots=True)
class NativeMaskScheduler(MaskScheduler):
    """Knows the masks that a network makes for itself."""

    source: Any = None
    """The network, as one that prunes by itself."""
    per_epoch: int = 1
    last: int = 0
    """The step at which training ends."""
    is_stale: bool = False
    """Whether the network has made masks that were not read yet."""
    is_settled: bool = False

    def begin(self, network: TrainableModel) -> None:
        """Leave the masks to the network, which has them already."""

    def maybe_update(self, network: TrainableModel, step: int) -> bool:
        """Follow what the network does; once it has taken its last turn, see to the exact number of zeros."""
        schedule = self.rules.schedule
        assert schedule is not None
        if step and step != self.last_updated and (step % self.per_epoch == 0 or step == self.last):
            self.source.end_epoch()
        self.last_updated = step
        is_over = step >= schedule.last_update_step and step > 0
        if is_over and not self.is_settled:
            # tfmot keeps what is as great as its threshold, and so all that ties with it; and it rounds what it keeps
            # where we round what goes: of an odd half a weight, it may drop one fewer.
            self._look()
            exact = self._cut(step, network.weights(self.rules.names), {})
            self.masks = {name: mask & exact[name] if name in exact else mask for name, mask in self.masks.items()}
            network.mask(self.masks)
            self.is_settled = True
        # The batch of this step is tfmot's next one.
        self.is_stale = schedule.prunes_at(step + 1) or step + 1 == schedule.last_update_step
        return is_over

    def _look(self) -> None:
        self.masks = self.source.masks()
        self.is_stale = False

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        if self.is_stale:
            self._look()
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)


def make_mask_scheduler(
    network: TrainableModel,
    rules: PruningConfig,
    request: FinetuneRequest,
    config: TrainConfig,
    *,
    first: Mapping[str, Mask],
    saved: SavedPruning | None,
) -> MaskScheduler:
    """What keeps the masks: the network itself where it can, else our own."""
    if isinstance(network, NativePruner):
        resumed = _resume(network, rules, request, first, saved) if not request.prunes else None
        resumed = resumed or _start(network, rules, request, first)
        if resumed is not None:
            resumed.per_epoch, resumed.last = config.steps_per_epoch, config.steps
            return resumed
    return MaskScheduler(rules, dict(first), first)


def _start(
    network: NativePruner, rules: PruningConfig, request: FinetuneRequest, first: Mapping[str, Mask]
) -> NativeMaskScheduler | None:
    """A scheduler for what the user asks, if it is what tfmot does."""
    schedule, pruning = rules.schedule, request.pruning
    if schedule is None or first or pruning.strategy != "magnitude" or pruning.params or pruning.scope != Scope.LAYER:
        return None
    if request.mask is not MaskMode.KEEP or rules.evidence is not GradientStatistic.NONE or request.means.is_compiled:
        return None
    if isinstance(rules.selection.pattern, NMPattern):
        # tfmot makes its groups in the first step, and never again.
        if not (isinstance(schedule, SparsitySchedule) and schedule.curve == "constant" and schedule.begin == 0):
            return None
    driven = as_tfmot_schedule(schedule)
    if driven is None:
        return None
    schedules: dict[str, Schedule] = {}
    for name in rules.names:
        final = rules.choice.layer_ratios.get(name, schedule.final if rules.has_others else 0.0)
        if final >= 1.0 or not isinstance(driven, SparsitySchedule):
            return None
        if final:
            share = final / schedule.final if schedule.final else 1.0
            schedules[name] = replace(driven, final=final, initial=min(driven.initial * share, 1.0))
    native = NativePruning(schedules, rules.selection.pattern, rules.method.pool, logdir=request.logdir)
    pruned = network.prune_by(native)
    return NativeMaskScheduler(replace(rules, schedule=driven), source=network) if pruned else None


def _resume(
    network: NativePruner,
    rules: PruningConfig,
    request: FinetuneRequest,
    first: Mapping[str, Mask],
    saved: SavedPruning | None,
) -> NativeMaskScheduler | None:
    """A scheduler for the schedule that the file was trained under, if it is not at its end."""
    if saved is None or not saved.schedules or not _is_under_way(saved, bool(first)) or request.means.is_compiled:
        return None
    if request.mask is not MaskMode.KEEP:
        return None
    driven = {layer: _from_here(schedule, saved.step) for layer, schedule in saved.schedules.items()}
    tensors = [tensor for tensor in rules.model.tensors if tensor.layer in driven and tensor.is_float]
    schedules = {tensor.name: driven[tensor.layer] for tensor in tensors}
    native = NativePruning(schedules, saved.block, saved.pool, first, saved.step, is_all=False, logdir=request.logdir)
    pruned = network.prune_by(native)
    if not pruned:
        return None
    chosen = tuple(tensor for tensor in tensors if tensor.name in pruned)
    own = {tensor.name: schedules[tensor.name].final for tensor in chosen}
    longest = max((schedules[tensor.name] for tensor in chosen), key=lambda schedule: schedule.last_update_step)
    selection = replace(rules.selection, pattern=saved.block)
    going = replace(
        rules,
        schedule=ResumedSchedule(longest, saved.step),
        choice=Selection(chosen, (), own),
        selection=selection,
        method=replace(rules.method, criteria=selection, pool=saved.pool),
    )
    masks = {name: mask for name, mask in first.items() if name in pruned}
    return NativeMaskScheduler(going, masks, source=network)


def as_tfmot_schedule(schedule: Schedule) -> Schedule | None:
    """A schedule whose last turn tfmot will not miss: it counts from 1, and at whole turns alone."""
    if not isinstance(schedule, SparsitySchedule):
        return None
    if schedule.curve == "constant" or schedule.last_update_step < 1:
        # One turn is enough: what is zero then stays the smallest.
        begin = max(schedule.begin, 1)
        return replace(schedule, curve="constant", begin=begin, end=begin, frequency=1, params=())
    return schedule


def _is_under_way(saved: SavedPruning, has_zeros: bool) -> bool:
    """Whether any schedule still has a turn to take, beside those that change nothing."""
    for schedule in saved.schedules.values():
        if schedule.last_update_step > max(saved.step, 0):
            return True
        forever = isinstance(schedule, SparsitySchedule) and schedule.end is None
        if forever and not has_zeros and schedule.final:
            return True
    return False


def _from_here(schedule: Schedule, step: int) -> Schedule:
    """A constant schedule without an end with its next turn, which is the only one that changes something."""
    if isinstance(schedule, SparsitySchedule) and schedule.curve == "constant" and schedule.end is None:
        first = max(step + 1, schedule.begin)
        late = -(first - schedule.begin) % schedule.frequency
        return replace(schedule, begin=first + late, end=first + late)
    return schedule
