"""The ways to prune: weights, weights behind wrappers, whole channels; each from what was typed to a report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._command import spelled
from prunectl.errors import UsageError
from prunectl.pruning import manifest as manifests
from prunectl.pruning import request as requests
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.reporting.prune import prune_report
from prunectl.reporting.report import Report
from prunectl.training.backend import ModelOrigin
from prunectl.training.request import MOST_FREQUENCY, PointUnit, parse_point, usual_frequency
from prunectl.training.wrap.schedules import is_tfmots
from prunectl.units import parse_ratio

_SCHEDULE_OPTIONS = ("schedule_param", "initial_sparsity", "begin", "end", "frequency", "power")
_WRAP_OPTIONS = ("custom_objects", "trust", "build")


@dataclass(frozen=True, slots=True)
class WrapOptions:
    """What is asked of wrappers."""

    ramp: SparsitySchedule | None
    """How weights are pruned later; none if they are pruned now."""
    origin: ModelOrigin


def wrap_options(ctx: typer.Context, *, looks_at_data: bool) -> WrapOptions | None:
    """Return what was asked of wrappers; None if they were not asked for."""
    said = ctx.params
    if said["schedule"] or said["wrap"]:
        if looks_at_data:
            raise UsageError("wrappers are written by strategies that look at weights alone", hint="leave out --data")
        if said["manifest"] is not None:
            raise UsageError("a manifest repeats a run to the same bytes, and frameworks write wrappers as they like")
        ramp = _ramp(said) if said["schedule"] else None
        _refuse_wrap_options(ctx, () if ramp is not None else _SCHEDULE_OPTIONS, "a schedule", "--schedule NAME")
        return WrapOptions(ramp, ModelOrigin(custom_objects=said["custom_objects"], is_trusted=said["trust"]))
    _refuse_wrap_options(ctx, _SCHEDULE_OPTIONS, "a schedule", "--schedule NAME")
    if not looks_at_data:
        # A recipe may name code as well, which is trusted or not.
        names = tuple(name for name in _WRAP_OPTIONS if name != "trust" or said["recipe"] is None)
        _refuse_wrap_options(ctx, names, "models that are opened, as for wrappers or data", "--wrap or --data SPEC")
    return None


def _refuse_wrap_options(ctx: typer.Context, names: tuple[str, ...], what: str, hint: str) -> None:
    for name in names:
        if ctx.params[name]:
            raise UsageError(f"{spelled(ctx, name)} is about {what}", hint=f"add {hint}")


def _ramp(said: dict[str, Any]) -> SparsitySchedule:
    name, begin, end = said["schedule"], _step("--begin", said["begin"] or "0"), None
    if said["end"]:
        end = _step("--end", said["end"])
    elif name != "constant":
        raise UsageError(
            f"the schedule {name} needs an end, a number of batches", hint="such as --end 2000, or finetune --schedule"
        )
    length = (end or 0) - begin
    ramp = SparsitySchedule(
        name,
        parse_ratio(said["sparsity"]) if said["sparsity"] else 0.0,
        begin,
        end,
        parse_ratio(said["initial_sparsity"]) if said["initial_sparsity"] else 0.0,
        said["frequency"] or _frequency(length),
        _params(said),
    )
    if is_tfmots(ramp) and name != "constant" and length % ramp.frequency:
        # tfmot prunes at whole turns only, and would stop short of the sparsity that was asked for.
        reached = begin + length // ramp.frequency * ramp.frequency
        raise UsageError(
            f"every {ramp.frequency} steps from {begin}, the last turn is at {reached}: --end {end} is never reached",
            hint=f"--end {reached + ramp.frequency}, or leave out --frequency",
        )
    return ramp


def _step(option: str, text: str) -> int:
    point = parse_point(text)
    if point.unit is not PointUnit.STEPS:
        raise UsageError(
            f"{option} {text} depends on how long training takes, which a file does not know",
            hint="write a number of steps, one for each batch, or give the schedule to prunectl finetune",
        )
    return int(point.amount)


def _frequency(length: int) -> int:
    """Return the longest way from turn to turn that divides the whole way, and leaves enough turns."""
    if length <= 0:
        return MOST_FREQUENCY
    return next(steps for steps in range(usual_frequency(length), 0, -1) if length % steps == 0)


def _params(said: dict[str, Any]) -> tuple[str, ...]:
    found = tuple(said["schedule_param"] or ())
    return found if said["power"] is None else (*found, f"power={said['power']!r}")


PruneMode = Callable[[Path, Destination | None], Report]
_LIMITS = ("min_channels", "round_to", "max_ratio", "params", "flops", "dead", "latency")


def select_mode(ctx: typer.Context, asked: PruneRequest) -> PruneMode:
    """Return the way that was asked for, and refuse what does not go with it before a file is opened."""
    if ctx.params["max_drop"]:
        way: PruneMode = _load("prunectl.commands.max_drop:way_within")(ctx, asked)
        return way
    _refuse_options(ctx, ("metric", "tried"), "is about what a drop is judged by: add --max-drop 0.5pp")
    return build_mode(ctx, asked)


def build_mode(ctx: typer.Context, asked: PruneRequest) -> PruneMode:
    """Return the way where it is said how much goes."""
    said = ctx.params
    is_cut = asked.pattern == CHANNEL
    if is_cut:
        _refuse_options(ctx, ("wrap", "schedule"), "does not go with channels that are cut out")
    # A network that is cut is opened, as one that looks at data is.
    wrappers = wrap_options(ctx, looks_at_data=is_cut or bool(asked.data or said["max_drop"]))
    if is_cut:
        return partial(_prune_channels, asked, said)
    _refuse_options(ctx, (*_LIMITS, "allow_empty", "inputs"), "is about channels: add --pattern channel")
    requests.check(asked)
    if wrappers is not None and asked.cluster:
        raise UsageError("--cluster does not go with wrappers: training would part the clusters again")
    if wrappers is not None:
        return partial(_prune_wrapped, asked, wrappers)
    return partial(_prune_weights, asked, said)


def _refuse_options(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if ctx.params[name]:
            raise UsageError(f"{spelled(ctx, name)} {why}")


def channel_limits(said: dict[str, Any]) -> dict[str, Any]:
    """Return the limits on channels that were typed."""
    limits = {name: said[name] for name in _LIMITS if said[name]}
    if "max_ratio" in limits:
        limits["max_ratio"] = parse_ratio(limits["max_ratio"])
    return limits


def _prune_channels(asked: PruneRequest, said: dict[str, Any], path: Path, place: Destination | None) -> Report:
    manifests_of_cuts = importlib.import_module("prunectl.channels.manifest")
    limits = channel_limits(said)
    if said["recipe"] is not None:
        limits |= manifests_of_cuts.limits_in(Path(said["recipe"]))
    how = {"is_trusted": said["trust"], "has_latency": limits.pop("latency", False), "allow_empty": said["allow_empty"]}
    manifest = Path(said["manifest"]) if said["manifest"] is not None else None
    found = _load("prunectl.channels.prune:prune_channels")(
        path, asked, place, has_digests=manifest is not None, **how, **limits
    )
    if manifest is not None and place is not None:
        manifests_of_cuts.write(manifest, found, limits)
    found = replace(found, before=replace(found.before, path=said["model"]))
    return _report("prunectl.reporting.channels:channels_report", found, place)


def _prune_wrapped(asked: PruneRequest, wrappers: WrapOptions, path: Path, place: Destination | None) -> Report:
    found = _load("prunectl.training.wrap.prune:prune_wrapped")(path, asked, wrappers.ramp, wrappers.origin, place)
    return _report("prunectl.reporting.prune:wrap_report", found, place)


def _prune_weights(asked: PruneRequest, said: dict[str, Any], path: Path, place: Destination | None) -> Report:
    manifest = Path(said["manifest"]) if said["manifest"] is not None else None
    run: Callable[..., Any] = prune
    if asked.data:
        run = partial(_load("prunectl.calibration.prune:prune"), is_trusted=said["trust"])
    found = run(path, asked, place, has_digests=manifest is not None)
    if manifest is not None and place is not None:
        manifests.write(manifest, found)
    return prune_report(replace(found, before=replace(found.before, path=said["model"])), _name(place))


def _load(what: str) -> Any:
    """Return a function by its name: to prune by weights alone does without what the other ways bring."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def _report(reporter: str, found: Any, place: Destination | None) -> Report:
    report: Report = _load(reporter)(found, _name(place))
    return report


def _name(place: Destination | None) -> str:
    return str(place.target) if place is not None else ""
