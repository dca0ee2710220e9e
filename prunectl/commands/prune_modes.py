"""The ways to prune: weights, weights behind wrappers, whole channels; each from what was typed to a report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._command import option_name
from prunectl.errors import UsageError
from prunectl.pruning import manifest as manifests
from prunectl.pruning import request as requests
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.reporting.prune import prune_report
from prunectl.reporting.report import Report
from prunectl.units import parse_ratio

if TYPE_CHECKING:
    from prunectl.commands.wrap_options import WrapOptions

PruneMode = Callable[[Path, Destination | None], Report]
_OF_WRAPPERS = (
    *("wrap", "schedule", "schedule_param", "initial_sparsity", "begin", "end", "frequency", "power"),
    *("custom_objects", "trust", "build"),
)
"""Options that mean something for wrappers, or for nothing."""
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
    wrappers: WrapOptions | None = None
    if any(said[name] for name in _OF_WRAPPERS):
        looks_at_data = is_cut or bool(asked.data or said["max_drop"])
        wrappers = _load("prunectl.commands.wrap_options:wrap_options")(ctx, looks_at_data=looks_at_data)
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
            raise UsageError(f"{option_name(ctx, name)} {why}")


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
