"""`prunectl prune`: weights, weights behind wrappers, or whole channels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._command import given_on_command_line, make_command, option_group, option_name
from prunectl.commands._requests import (
    CHANNEL_LIMITS,
    BuildCommand,
    Mode,
    OutputOptions,
    check_options,
    request_options,
)
from prunectl.errors import UsageError
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PruningMethod
from prunectl.pruning.masks import NonFinitePolicy
from prunectl.pruning.plan import Scope
from prunectl.pruning.prune import prune
from prunectl.pruning.request import OPTIONS, PruneRequest, check, parse_request, read_manifest, write_manifest
from prunectl.reporting.prune import prune_report
from prunectl.reporting.report import Report

_NOT_IN_RECIPE = frozenset(
    {"model", "output", "dry_run", "manifest", "recipe", "force", "in_place", "trust", "allow_empty"}
)
"""What a recipe leaves open."""
_DEFAULT = PruneRequest()
_SCOPE, _NAN = Scope(_DEFAULT.scope), NonFinitePolicy(_DEFAULT.nan)
_much = option_group("How much")
_which = option_group("Which weights")
_later = option_group("Wrappers for later training")
_cut = option_group("Channels (--pattern channel)")
_data = option_group("With data")


@dataclass(frozen=True, kw_only=True)
class Prune(OutputOptions):
    """Zero the least important weights of MODEL; everything else stays as it was, byte for byte.

    [dim]$[/] prunectl prune model.h5 -o pruned.h5 --sparsity 80%

    [dim]$[/] prunectl prune model.pt -o small.pt -s 0.9 --scope global --pack

    [dim]$[/] prunectl prune model.onnx -o fast.onnx --pattern 2:4 --exclude fc2

    [dim]$[/] prunectl prune model.pt -o few.pt -s 50% --cluster 16

    [dim]$[/] prunectl prune model.onnx -o within.onnx --max-drop 1pp --data test.npz

    [dim]$[/] prunectl prune model.onnx -o thin.onnx --pattern channel -s 50%

    [dim]$[/] prunectl prune net.pt -o thin.pt --pattern channel -s 50% --model net.py:Net --input 1,1,8,8

    [dim]$[/] prunectl prune model.keras -o small.keras -s 80% --strategy obs --data train.npz --repair

    [dim]$[/] prunectl prune model.h5 -o wrapped.h5 -s 80% --schedule polynomial --end 2000
    """

    model: Annotated[str, typer.Argument(metavar="MODEL", help="File or folder; - is standard input.")]
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Where to; - is standard output.")] = ""
    sparsity: Annotated[str, _much("-s", "--sparsity", metavar="RATIO", help="Share of zeros, 0.8 or 80%.")] = ""
    compression: Annotated[float | None, _much(metavar="X", min=1, help="All parameters over those kept.")] = None
    target_gzip: Annotated[str, _much(metavar="SIZE", help="As sparse as this gzipped size needs.")] = ""
    target_packed: Annotated[str, _much(metavar="SIZE", help="As sparse as this packed size needs.")] = ""
    max_drop: Annotated[str, _much(metavar="DROP", help="As much as costs 0.5pp of a metric on --data.")] = ""
    metric: Annotated[str, _much(metavar="NAME", help="Of --max-drop: accuracy, loss, f.py:fn:max …")] = ""
    tried: Annotated[Path | None, _much(metavar="DIR", help="Keep what --max-drop tries, and go on from it.")] = None
    strategy: Annotated[str, _which(metavar="NAME", help="What goes first.")] = _DEFAULT.strategy
    param: Annotated[list[str] | None, _which(metavar="K=V", help="A parameter of the strategy.")] = None
    scope: Annotated[Scope, _which(help="Ranked in each layer, or over all.")] = _SCOPE
    pattern: Annotated[str, _which(metavar="PATTERN", help="2:4, block:1x4, block:4x4:max or channel.")] = ""
    cluster: Annotated[str, _which(metavar="K[:START]", help="Leave K distinct values in each tensor.")] = ""
    policy: Annotated[str, _which(metavar="NAME", help="Which tensors.")] = _DEFAULT.policy
    only: Annotated[str, _which(metavar="GLOB", help="Only these tensors, whatever the policy.")] = ""
    exclude: Annotated[list[str] | None, _which(metavar="GLOB", help="Not these; may be repeated.")] = None
    layer: Annotated[list[str] | None, _which(metavar="GLOB=R", help="A ratio of their own; the last wins.")] = None
    seed: Annotated[int, _which(help="Decides what is random.")] = _DEFAULT.seed
    nan: Annotated[NonFinitePolicy, _which(help="What becomes of NaN and infinity.")] = _NAN
    min_channels: Annotated[int | None, _cut(help="So many stay in each layer.  [default: 2]", min=1)] = None
    round_to: Annotated[int | None, _cut(help="What stays is a multiple of this.", min=1)] = None
    max_ratio: Annotated[str, _cut(metavar="RATIO", help="No layer loses more than this.")] = ""
    params: Annotated[str, _cut(metavar="-R|N", help="So many parameters less, -50%, or left, 1.5M.")] = ""
    flops: Annotated[str, _cut(metavar="-R|N", help="The same of operations.")] = ""
    latency: Annotated[bool, _cut("--latency", help="Time both networks in their runtime.")] = False
    dead: Annotated[bool, _cut("--dead", help="Only channels that make no difference.")] = False
    allow_empty: Annotated[bool, _cut("--allow-empty", help="Write it even if no channel goes.")] = False
    data: Annotated[str, _data(metavar="SPEC", help="What strategies, --max-drop and cuts look at: train.npz …")] = ""
    samples: Annotated[int, _data(help="How many examples of it.", min=1)] = _DEFAULT.samples
    batch_size: Annotated[int, _data(help="How many at a time.", min=1)] = _DEFAULT.batch_size
    repair: Annotated[bool, _data("--repair", help="Fit what stays anew, to make up for what goes.")] = False
    loss: Annotated[str, _data(metavar="NAME", help="What gradients are taken of; else as the file says.")] = ""
    build: Annotated[str, _data("--model", metavar="MOD:FN", help="Builds the model, for weights alone.")] = ""
    custom_objects: Annotated[str, _data(metavar="MOD:DICT", help="Explains custom Keras layers.")] = ""
    trust: Annotated[bool, _data("--trust", help="Let code that comes with the file run.")] = False
    inputs: Annotated[list[str] | None, _cut("--input", metavar="SHAPE", help="What goes in: 1,3,224,224 …")] = None
    wrap: Annotated[bool, _later("--wrap", help="Write the framework's pruning wrappers.")] = False
    schedule: Annotated[str, _later(metavar="NAME", help="Prune later, along this curve (Keras 2).")] = ""
    schedule_param: Annotated[list[str] | None, _later(metavar="K=V", help="A parameter of the schedule.")] = None
    initial_sparsity: Annotated[str, _later(metavar="RATIO", help="Where it begins.")] = ""
    begin: Annotated[str, _later(metavar="STEP", help="When: a step is a batch.")] = ""
    end: Annotated[str, _later(metavar="STEP", help="Until when.")] = ""
    frequency: Annotated[int | None, _later(metavar="STEPS", help="From one turn to the next.", min=1)] = None
    power: Annotated[float | None, _later(help="Of the polynomial.  [default: 3]")] = None
    pack: Annotated[bool, typer.Option("--pack", help="Compress the output inside its container.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would come of it; write nothing.")] = False
    manifest: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep a record of the run.")] = None
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Repeat the run of a manifest.")] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the input.")] = False

    def run(self, ctx: typer.Context) -> int:
        """Prune the model in the mode that its options select, and show what came of it."""
        return self.write(ctx.obj, select_mode(ctx, self, self._request(ctx)))

    def _request(self, ctx: typer.Context) -> PruneRequest:
        """The request of a recipe, or of the options."""
        if self.recipe is None:
            return parse_request(request_options(ctx, self, OPTIONS))
        typed = [name for name in ctx.params if name not in _NOT_IN_RECIPE and given_on_command_line(ctx, name)]
        if typed:
            raise UsageError(f"--recipe says all that decides the result: leave out {option_name(ctx, typed[0])}")
        return read_manifest(self.recipe, is_trusted=self.trust)


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
        check(request)
        return mode
    return partial(_prune_weights, request, check(request), options)


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
        write_manifest(options.manifest, result)
    return prune_report(replace(result, before=replace(result.before, path=options.model)), target_name(destination))


def load(function: str) -> Any:
    """Import a function by its name: pruning by weights alone loads nothing of the other modes."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def target_name(destination: Destination | None) -> str:
    """Where the result goes, for a report; empty for a dry run."""
    return str(destination.target) if destination is not None else ""


command = make_command(Prune, BuildCommand)
