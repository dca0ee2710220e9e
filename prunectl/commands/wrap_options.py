"""`prune` with wrappers: weights are pruned later by a schedule, or written with masks now."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from prunectl.commands.prune import Prune, PruneMode
from prunectl.errors import UsageError
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.training.backend import LoadOptions
from prunectl.training.request import MOST_FREQUENCY, PointUnit, default_update_interval, parse_time_point
from prunectl.training.wrap import has_tfmot_class
from prunectl.units import parse_ratio

if TYPE_CHECKING:
    from prunectl.training.wrap.prune import WrapResult


def wrap_mode(options: Prune, request: PruneRequest) -> PruneMode:
    """The mode that writes wrappers; without a schedule, weights are pruned now."""
    ramp = _ramp(options, request) if options.schedule else None
    origin = LoadOptions(custom_objects=options.custom_objects, is_trusted=options.trust)

    def run(path: Path, destination: Destination | None) -> WrapResult:
        # Frameworks are imported only after the options have been checked.
        wrapping = importlib.import_module("prunectl.training.wrap.prune")
        result: WrapResult = wrapping.prune_wrapped(
            path, request, ramp, origin, destination, allow_empty=options.allow_empty
        )
        return result

    return run


def _ramp(options: Prune, request: PruneRequest) -> SparsitySchedule:
    name, begin, end = options.schedule, _step("--begin", options.begin or "0"), None
    if options.end:
        end = _step("--end", options.end)
    elif name != "constant":
        raise UsageError(
            f"the schedule {name} needs --end, a number of steps", hint="add --end 2000, or use finetune --schedule"
        )
    length = (end or 0) - begin
    params = tuple(options.schedule_param or ())
    ramp = SparsitySchedule(
        name,
        request.sparsity or 0.0,
        begin,
        end,
        parse_ratio(options.initial_sparsity) if options.initial_sparsity else 0.0,
        options.frequency or _frequency(length),
        params if options.power is None else (*params, f"power={options.power!r}"),
    )
    if has_tfmot_class(ramp) and name != "constant" and length % ramp.frequency:
        # tfmot prunes every `frequency` steps only, and would otherwise end short of the final sparsity.
        reached = begin + length // ramp.frequency * ramp.frequency
        raise UsageError(
            f"with a pruning step every {ramp.frequency} steps from {begin}, the last is at {reached}, not {end}",
            hint=f"write --end {reached + ramp.frequency}, or leave out --frequency",
        )
    return ramp


def _step(option: str, text: str) -> int:
    point = parse_time_point(text)
    if point.unit is not PointUnit.STEPS:
        raise UsageError(
            f"{option} {text} depends on the length of the training, which a file does not record",
            hint="write a number of steps (batches), or use prunectl finetune --schedule",
        )
    return int(point.amount)


def _frequency(length: int) -> int:
    """The largest number of steps between pruning steps that divides the length, and leaves enough pruning steps."""
    if length <= 0:
        return MOST_FREQUENCY
    return next(steps for steps in range(default_update_interval(length), 0, -1) if length % steps == 0)
