"""The ways to prune: weights, weights behind wrappers, whole channels; each from what was typed to a report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from prunectl.commands.options import spelled
from prunectl.commands.wrap_requests import Wrappers, wrappers_of
from prunectl.errors import UsageError
from prunectl.measuring.patterns import CHANNELS
from prunectl.pruning import manifest as manifests
from prunectl.pruning import request as requests
from prunectl.pruning.output import Output
from prunectl.pruning.prune import prune
from prunectl.pruning.request import Request
from prunectl.reporting.prune_report import prune_report
from prunectl.reporting.report import Report
from prunectl.units import parse_ratio

Way = Callable[[Path, Output | None], Report]
_LIMITS = ("min_channels", "round_to", "max_ratio", "params", "flops", "dead", "latency")


def way_of(ctx: typer.Context, asked: Request) -> Way:
    """Return the way that was asked for, and refuse what does not go with it before a file is opened."""
    if ctx.params["max_drop"]:
        way: Way = _named("prunectl.commands.max_drop_prune:way_within")(ctx, asked)
        return way
    _refuse(ctx, ("metric", "tried"), "is about what a drop is judged by: add --max-drop 0.5pp")
    return settled(ctx, asked)


def settled(ctx: typer.Context, asked: Request) -> Way:
    """Return the way where it is said how much goes."""
    said = ctx.params
    is_cut = asked.pattern == CHANNELS
    if is_cut:
        _refuse(ctx, ("wrap", "schedule"), "does not go with channels that are cut out")
    # A network that is cut is opened, as one that looks at data is.
    wrappers = wrappers_of(ctx, looks_at_data=is_cut or bool(asked.data or said["max_drop"]))
    if is_cut:
        return partial(_channels, asked, said)
    _refuse(ctx, (*_LIMITS, "allow_empty", "inputs"), "is about channels: add --pattern channel")
    requests.check(asked)
    if wrappers is not None and asked.cluster:
        raise UsageError("--cluster does not go with wrappers: training would part the clusters again")
    if wrappers is not None:
        return partial(_wrapped, asked, wrappers)
    return partial(_weights, asked, said)


def _refuse(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if ctx.params[name]:
            raise UsageError(f"{spelled(ctx, name)} {why}")


def limits_of(said: dict[str, Any]) -> dict[str, Any]:
    """Return the limits on channels that were typed."""
    limits = {name: said[name] for name in _LIMITS if said[name]}
    if "max_ratio" in limits:
        limits["max_ratio"] = parse_ratio(limits["max_ratio"])
    return limits


def _channels(asked: Request, said: dict[str, Any], path: Path, place: Output | None) -> Report:
    manifests_of_cuts = importlib.import_module("prunectl.channels.manifest")
    limits = limits_of(said)
    if said["recipe"] is not None:
        limits |= manifests_of_cuts.limits_in(Path(said["recipe"]))
    how = {"is_trusted": said["trust"], "has_latency": limits.pop("latency", False), "allow_empty": said["allow_empty"]}
    manifest = Path(said["manifest"]) if said["manifest"] is not None else None
    found = _named("prunectl.channels.prune:prune_channels")(
        path, asked, place, has_digests=manifest is not None, **how, **limits
    )
    if manifest is not None and place is not None:
        manifests_of_cuts.write(manifest, found, limits)
    found = replace(found, before=replace(found.before, path=said["model"]))
    return _report("prunectl.reporting.channels_report:channels_report", found, place)


def _wrapped(asked: Request, wrappers: Wrappers, path: Path, place: Output | None) -> Report:
    found = _named("prunectl.training.wrap.prune:prune_wrapped")(path, asked, wrappers.ramp, wrappers.origin, place)
    return _report("prunectl.reporting.wrap_report:wrap_report", found, place)


def _weights(asked: Request, said: dict[str, Any], path: Path, place: Output | None) -> Report:
    manifest = Path(said["manifest"]) if said["manifest"] is not None else None
    run: Callable[..., Any] = prune
    if asked.data:
        run = partial(_named("prunectl.calibrating.prune:prune"), is_trusted=said["trust"])
    found = run(path, asked, place, has_digests=manifest is not None)
    if manifest is not None and place is not None:
        manifests.write(manifest, found)
    return prune_report(replace(found, before=replace(found.before, path=said["model"])), _name(place))


def _named(what: str) -> Any:
    """Return a function by its name: to prune by weights alone does without what the other ways bring."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def _report(reporter: str, found: Any, place: Output | None) -> Report:
    report: Report = _named(reporter)(found, _name(place))
    return report


def _name(place: Output | None) -> str:
    return str(place.target) if place is not None else ""
