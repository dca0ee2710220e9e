"""Who makes the masks: the network itself, where what is asked for is what it does, or we?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prunectl.measuring.patterns import ZerosOf
from prunectl.pruning.plan import Choice, Scope
from prunectl.pruning.schedules import Ramp, Schedule
from prunectl.pruning.selection import Mask
from prunectl.training.course import Course
from prunectl.training.evidence import Evidence
from prunectl.training.keeper import Keeper, Rules
from prunectl.training.native import Native, NativeKeeper, SelfPruning
from prunectl.training.network import Network
from prunectl.training.request import MaskMode, Request
from prunectl.training.wrap.kept import Kept
from prunectl.training.wrap.schedules import Begun


def keeper_of(
    network: Network, rules: Rules, request: Request, course: Course, *, first: Mapping[str, Mask], held: Kept | None
) -> Keeper:
    """Return what keeps the masks: the network itself where it can, else our own."""
    if isinstance(network, SelfPruning):
        found = _goes_on(network, rules, request, first, held) if not request.prunes else None
        found = found or _begins(network, rules, request, first)
        if found is not None:
            found.per_epoch, found.last = course.steps_per_epoch, course.steps
            return found
    return Keeper(rules, dict(first), first)


def _begins(network: SelfPruning, rules: Rules, request: Request, first: Mapping[str, Mask]) -> NativeKeeper | None:
    """Return a keeper for what the user asks, if it is what tfmot does."""
    schedule, asked = rules.schedule, request.pruning
    if schedule is None or first or asked.strategy != "magnitude" or asked.params or asked.scope != Scope.LAYER:
        return None
    if request.mask is not MaskMode.KEEP or rules.evidence is not Evidence.NONE or request.means.is_compiled:
        return None
    if isinstance(rules.wish.pattern, ZerosOf):
        # tfmot makes its groups in the first step, and never again.
        if not (isinstance(schedule, Ramp) and schedule.curve == "constant" and schedule.begin == 0):
            return None
    driven = driven_by(schedule)
    if driven is None:
        return None
    schedules: dict[str, Schedule] = {}
    for name in rules.names:
        final = rules.choice.own.get(name, schedule.final if rules.has_others else 0.0)
        if final >= 1.0 or not isinstance(driven, Ramp):
            return None
        if final:
            share = final / schedule.final if schedule.final else 1.0
            schedules[name] = replace(driven, final=final, initial=min(driven.initial * share, 1.0))
    native = Native(schedules, rules.wish.pattern, rules.method.pool, logdir=request.logdir)
    pruned = network.prune_by(native)
    return NativeKeeper(replace(rules, schedule=driven), source=network) if pruned else None


def _goes_on(
    network: SelfPruning, rules: Rules, request: Request, first: Mapping[str, Mask], held: Kept | None
) -> NativeKeeper | None:
    """Return a keeper for the schedule that the file was trained under, if it is not at its end."""
    if held is None or not held.schedules or not _is_under_way(held, bool(first)) or request.means.is_compiled:
        return None
    if request.mask is not MaskMode.KEEP:
        return None
    driven = {layer: _from_here(schedule, held.step) for layer, schedule in held.schedules.items()}
    tensors = [tensor for tensor in rules.model.tensors if tensor.layer in driven and tensor.is_float]
    schedules = {tensor.name: driven[tensor.layer] for tensor in tensors}
    native = Native(schedules, held.block, held.pool, first, held.step, is_all=False, logdir=request.logdir)
    pruned = network.prune_by(native)
    if not pruned:
        return None
    chosen = tuple(tensor for tensor in tensors if tensor.name in pruned)
    own = {tensor.name: schedules[tensor.name].final for tensor in chosen}
    longest = max((schedules[tensor.name] for tensor in chosen), key=lambda schedule: schedule.last_turn)
    going = replace(
        rules,
        schedule=Begun(longest, held.step),
        choice=Choice(chosen, (), own),
        wish=replace(rules.wish, pattern=held.block),
        method=replace(rules.method, pattern=held.block, pool=held.pool),
    )
    masks = {name: mask for name, mask in first.items() if name in pruned}
    return NativeKeeper(going, masks, source=network)


def driven_by(schedule: Schedule) -> Schedule | None:
    """Return a schedule whose last turn tfmot will not miss: it counts from 1, and at whole turns alone."""
    if not isinstance(schedule, Ramp):
        return None
    if schedule.curve == "constant" or schedule.last_turn < 1:
        # One turn is enough: what is zero then stays the smallest.
        begin = max(schedule.begin, 1)
        return replace(schedule, curve="constant", begin=begin, end=begin, frequency=1, params=())
    return schedule


def _is_under_way(held: Kept, has_zeros: bool) -> bool:
    """Whether any schedule still has a turn to take, beside those that change nothing."""
    for schedule in held.schedules.values():
        if schedule.last_turn > max(held.step, 0):
            return True
        forever = isinstance(schedule, Ramp) and schedule.end is None
        if forever and not has_zeros and schedule.final:
            return True
    return False


def _from_here(schedule: Schedule, step: int) -> Schedule:
    """Return a constant schedule without an end with its next turn, which is the only one that changes something."""
    if isinstance(schedule, Ramp) and schedule.curve == "constant" and schedule.end is None:
        first = max(step + 1, schedule.begin)
        late = -(first - schedule.begin) % schedule.frequency
        return replace(schedule, begin=first + late, end=first + late)
    return schedule
