"""What `prune` is asked about wrappers: pruned later by a schedule, or written with masks now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from prunectl.commands._command import option_name
from prunectl.commands.prune_modes import OPENING_OPTIONS, SCHEDULE_OPTIONS
from prunectl.errors import UsageError
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.training.backend import LoadOptions
from prunectl.training.request import MOST_FREQUENCY, PointUnit, default_update_interval, parse_time_point
from prunectl.training.wrap.schedules import has_tfmot_class
from prunectl.units import parse_ratio


@dataclass(frozen=True, slots=True)
class WrapOptions:
    """What is asked of wrappers."""

    ramp: SparsitySchedule | None
    """How weights are pruned later; none if they are pruned now."""
    origin: LoadOptions


def wrap_options(ctx: typer.Context, *, looks_at_data: bool) -> WrapOptions | None:
    """The options about wrappers; None if no wrappers are to be written."""
    params = ctx.params
    if params["schedule"] or params["wrap"]:
        if looks_at_data:
            raise UsageError("wrappers are written by strategies that look at weights alone", hint="leave out --data")
        if params["manifest"] is not None:
            raise UsageError("a manifest repeats a run to the same bytes, and frameworks write wrappers as they like")
        ramp = _ramp(params) if params["schedule"] else None
        _reject_wrap_options(ctx, () if ramp is not None else SCHEDULE_OPTIONS, "a schedule", "--schedule NAME")
        return WrapOptions(ramp, LoadOptions(custom_objects=params["custom_objects"], is_trusted=params["trust"]))
    _reject_wrap_options(ctx, SCHEDULE_OPTIONS, "a schedule", "--schedule NAME")
    if not looks_at_data:
        # A recipe may name code as well, which is trusted or not.
        names = tuple(name for name in OPENING_OPTIONS if name != "trust" or params["recipe"] is None)
        _reject_wrap_options(ctx, names, "models that are opened, as for wrappers or data", "--wrap or --data SPEC")
    return None


def _reject_wrap_options(ctx: typer.Context, names: tuple[str, ...], subject: str, hint: str) -> None:
    for name in names:
        if ctx.params[name]:
            raise UsageError(f"{option_name(ctx, name)} is about {subject}", hint=f"add {hint}")


def _ramp(params: dict[str, Any]) -> SparsitySchedule:
    name, begin, end = params["schedule"], _step("--begin", params["begin"] or "0"), None
    if params["end"]:
        end = _step("--end", params["end"])
    elif name != "constant":
        raise UsageError(
            f"the schedule {name} needs an end, a number of batches", hint="such as --end 2000, or finetune --schedule"
        )
    length = (end or 0) - begin
    ramp = SparsitySchedule(
        name,
        parse_ratio(params["sparsity"]) if params["sparsity"] else 0.0,
        begin,
        end,
        parse_ratio(params["initial_sparsity"]) if params["initial_sparsity"] else 0.0,
        params["frequency"] or _frequency(length),
        _params(params),
    )
    if has_tfmot_class(ramp) and name != "constant" and length % ramp.frequency:
        # tfmot prunes at whole turns only, and would stop short of the sparsity that was asked for.
        reached = begin + length // ramp.frequency * ramp.frequency
        raise UsageError(
            f"every {ramp.frequency} steps from {begin}, the last turn is at {reached}: --end {end} is never reached",
            hint=f"--end {reached + ramp.frequency}, or leave out --frequency",
        )
    return ramp


def _step(option: str, text: str) -> int:
    point = parse_time_point(text)
    if point.unit is not PointUnit.STEPS:
        raise UsageError(
            f"{option} {text} depends on how long training takes, which a file does not know",
            hint="write a number of steps, one for each batch, or give the schedule to prunectl finetune",
        )
    return int(point.amount)


def _frequency(length: int) -> int:
    """The largest number of steps between pruning steps that divides the length, and leaves enough pruning steps."""
    if length <= 0:
        return MOST_FREQUENCY
    return next(steps for steps in range(default_update_interval(length), 0, -1) if length % steps == 0)


def _params(params: dict[str, Any]) -> tuple[str, ...]:
    schedule_params = tuple(params["schedule_param"] or ())
    return schedule_params if params["power"] is None else (*schedule_params, f"power={params['power']!r}")
