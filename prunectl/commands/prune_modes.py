"""The modes of `prune`: weights, weights behind wrappers, whole channels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._requests import CHANNEL_LIMITS, Mode, check_options, request_options
from prunectl.pruning import manifest as manifests
from prunectl.pruning import request as requests
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PruningMethod
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.reporting.prune import prune_report
from prunectl.reporting.report import Report

if TYPE_CHECKING:
    from prunectl.commands.prune import Prune

PruneMode = Callable[[Path, Destination | None], Report]


def select_mode(ctx: typer.Context, options: Prune, request: PruneRequest) -> PruneMode:
    """The mode that the options select; conflicts are rejected before a file is opened."""
    modes = {
        Mode.SEARCH: bool(options.max_drop),
        Mode.CHANNELS: request.pattern == CHANNEL,
        Mode.WRAPPERS: options.wrap or bool(options.schedule),
        Mode.SCHEDULE: bool(options.schedule),
        Mode.DATA: bool(request.data),
        Mode.RECIPE: options.recipe is not None,
    }
    check_options(ctx, options, reduce(or_, (mode for mode, is_selected in modes.items() if is_selected), Mode.NONE))
    limits = request_options(ctx, options, CHANNEL_LIMITS)
    if options.max_drop:
        mode: PruneMode = load("prunectl.commands.max_drop:search_mode")(ctx.obj, options, request, limits)
        return mode
    return build_mode(options, request, limits)


def build_mode(options: Prune, request: PruneRequest, limits: Mapping[str, Any]) -> PruneMode:
    """The mode for a given sparsity or size; limits are about channels."""
    if request.pattern == CHANNEL:
        return partial(_prune_channels, request, options, limits)
    if options.wrap or options.schedule:
        mode: PruneMode = load("prunectl.commands.wrap_options:wrap_mode")(options, request)
        requests.check(request)
        return mode
    return partial(_prune_weights, request, requests.check(request), options)


def _prune_channels(
    request: PruneRequest, options: Prune, limits: Mapping[str, Any], path: Path, destination: Destination | None
) -> Report:
    cuts = importlib.import_module("prunectl.channels.prune")
    if options.recipe is not None:
        limits = {**limits, **cuts.limits_in(options.recipe)}
    has_latency, limits = "latency" in limits, {name: limits[name] for name in limits if name != "latency"}
    result = cuts.prune_channels(
        path,
        request,
        destination,
        has_digests=options.manifest is not None,
        is_trusted=options.trust,
        has_latency=has_latency,
        allow_empty=options.allow_empty,
        **limits,
    )
    if options.manifest is not None and destination is not None:
        cuts.write_manifest(options.manifest, result, limits)
    result = replace(result, before=replace(result.before, path=options.model))
    report: Report = load("prunectl.reporting.channels:channels_report")(result, target_name(destination))
    return report


def _prune_weights(
    request: PruneRequest, method: PruningMethod, options: Prune, path: Path, destination: Destination | None
) -> Report:
    run: Callable[..., Any] = prune
    if request.data:
        run = partial(load("prunectl.calibration.prune:prune"), is_trusted=options.trust)
    result = run(path, request, destination, has_digests=options.manifest is not None, method=method)
    if options.manifest is not None and destination is not None:
        manifests.write(options.manifest, result)
    return prune_report(replace(result, before=replace(result.before, path=options.model)), target_name(destination))


def load(function: str) -> Any:
    """Import a function by its name: pruning by weights alone loads nothing of the other modes."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def target_name(destination: Destination | None) -> str:
    """Where the result goes, for a report; empty for a dry run."""
    return str(destination.target) if destination is not None else ""
