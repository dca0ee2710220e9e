"""The modes of `prune`: weights, weights behind wrappers, whole channels."""

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
SCHEDULE_OPTIONS = ("schedule_param", "initial_sparsity", "begin", "end", "frequency", "power")
OPENING_OPTIONS = ("custom_objects", "trust", "build")
"""What a model needs that is opened in its framework, to be wrapped or to look at data."""
_LIMITS = ("min_channels", "round_to", "max_ratio", "params", "flops", "dead", "latency")


def select_mode(ctx: typer.Context, request: PruneRequest) -> PruneMode:
    """The mode that the options select; conflicts are rejected before a file is opened."""
    if ctx.params["max_drop"]:
        mode: PruneMode = _load("prunectl.commands.max_drop:search_mode")(ctx, request)
        return mode
    _reject_options(ctx, ("metric", "tried"), "is about what a drop is judged by: add --max-drop 0.5pp")
    return build_mode(ctx, request)


def build_mode(ctx: typer.Context, request: PruneRequest) -> PruneMode:
    """The mode for a given sparsity or size."""
    params = ctx.params
    is_cut = request.pattern == CHANNEL
    if is_cut:
        _reject_options(ctx, ("wrap", "schedule"), "does not go with channels that are cut out")
    # A network that is cut is opened, as one that looks at data is.
    wrappers: WrapOptions | None = None
    if any(params[name] for name in ("wrap", "schedule", *SCHEDULE_OPTIONS, *OPENING_OPTIONS)):
        looks_at_data = is_cut or bool(request.data or params["max_drop"])
        wrappers = _load("prunectl.commands.wrap_options:wrap_options")(ctx, looks_at_data=looks_at_data)
    if is_cut:
        return partial(_prune_channels, request, params)
    _reject_options(ctx, (*_LIMITS, "allow_empty", "inputs"), "is about channels: add --pattern channel")
    requests.check(request)
    if wrappers is not None and request.cluster:
        raise UsageError("--cluster does not go with wrappers: training would part the clusters again")
    if wrappers is not None:
        return partial(_prune_wrapped, request, wrappers)
    return partial(_prune_weights, request, params)


def _reject_options(ctx: typer.Context, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if ctx.params[name]:
            raise UsageError(f"{option_name(ctx, name)} {reason}")


def channel_limits(params: dict[str, Any]) -> dict[str, Any]:
    """The limits on channels among the options."""
    limits = {name: params[name] for name in _LIMITS if params[name]}
    if "max_ratio" in limits:
        limits["max_ratio"] = parse_ratio(limits["max_ratio"])
    return limits


def _prune_channels(
    request: PruneRequest, params: dict[str, Any], path: Path, destination: Destination | None
) -> Report:
    manifests_of_cuts = importlib.import_module("prunectl.channels.manifest")
    limits = channel_limits(params)
    if params["recipe"] is not None:
        limits |= manifests_of_cuts.limits_in(Path(params["recipe"]))
    options = {
        "is_trusted": params["trust"],
        "has_latency": limits.pop("latency", False),
        "allow_empty": params["allow_empty"],
    }
    manifest = Path(params["manifest"]) if params["manifest"] is not None else None
    result = _load("prunectl.channels.prune:prune_channels")(
        path, request, destination, has_digests=manifest is not None, **options, **limits
    )
    if manifest is not None and destination is not None:
        manifests_of_cuts.write(manifest, result, limits)
    result = replace(result, before=replace(result.before, path=params["model"]))
    return _report("prunectl.reporting.channels:channels_report", result, destination)


def _prune_wrapped(request: PruneRequest, wrappers: WrapOptions, path: Path, destination: Destination | None) -> Report:
    result = _load("prunectl.training.wrap.prune:prune_wrapped")(
        path, request, wrappers.ramp, wrappers.origin, destination
    )
    return _report("prunectl.reporting.prune:wrap_report", result, destination)


def _prune_weights(
    request: PruneRequest, params: dict[str, Any], path: Path, destination: Destination | None
) -> Report:
    manifest = Path(params["manifest"]) if params["manifest"] is not None else None
    run: Callable[..., Any] = prune
    if request.data:
        run = partial(_load("prunectl.calibration.prune:prune"), is_trusted=params["trust"])
    result = run(path, request, destination, has_digests=manifest is not None)
    if manifest is not None and destination is not None:
        manifests.write(manifest, result)
    return prune_report(replace(result, before=replace(result.before, path=params["model"])), _target_name(destination))


def _load(function: str) -> Any:
    """Import a function by its name: pruning by weights alone loads nothing of the other modes."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _report(reporter: str, result: Any, destination: Destination | None) -> Report:
    report: Report = _load(reporter)(result, _target_name(destination))
    return report


def _target_name(destination: Destination | None) -> str:
    return str(destination.target) if destination is not None else ""
