"""`prunectl prune`: weights, weights behind wrappers, or whole channels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.analysis.patterns import CHANNEL, LAYERS
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.commands._command import (
    STDIN,
    builder_option,
    custom_objects_option,
    given_on_command_line,
    make_command,
    option_group,
    option_name,
    resolve_model,
)
from prunectl.commands._requests import (
    CHANNEL_LIMITS,
    BuildCommand,
    Mode,
    ModelArgument,
    OutputOption,
    OutputOptions,
    check_options,
    request_options,
)
from prunectl.errors import UsageError
from prunectl.formats.detect import URL, without_secrets
from prunectl.formats.registry import open_model
from prunectl.pruning import BATCH_SIZE, MATCHED_BATCH_SIZE, MATCHED_SAMPLES, SAMPLES
from prunectl.pruning.destination import Destination
from prunectl.pruning.masks import NonFinitePolicy
from prunectl.pruning.plan import Scope
from prunectl.pruning.prune import prune
from prunectl.pruning.request import OPTIONS, PruneRequest, Repair, check, parse_request
from prunectl.reporting.prune import part_report, prune_report, wrap_report
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter

_NOT_IN_RECIPE = frozenset(
    {
        "model",
        "output",
        "dry_run",
        "manifest",
        "recipe",
        "force",
        "in_place",
        "trust",
        "allow_empty",
        "part",
        "join",
        "on",
    }
)
"""Options that can be used beside a recipe."""
_DEFAULT = PruneRequest()
_NAN = NonFinitePolicy(_DEFAULT.nan)
_much = option_group("How much to prune")
_which = option_group("What to prune")
_later = option_group("Masks and schedules for later training")
_cut = option_group("Channels (--pattern channel)")
_data = option_group("Data and model code")
_many = option_group("Many machines (folders of shards)")


@dataclass(frozen=True, kw_only=True)
class Prune(OutputOptions):
    """Set the least important weights of MODEL to zero, or remove whole channels.

    Weights of all layers are ranked together unless --scope or a pattern says otherwise. Plain pruning changes no other
    byte of the file; channels, --repair, --strategy obs and --cluster change more. Accuracy is measured only with
    --max-drop.

    [dim]$[/] prunectl prune model.h5 -o small.h5 -s 80%

    [dim]$[/] prunectl prune model.onnx -o best.onnx --max-drop 1pp --data test.npz

    [dim]$[/] prunectl prune model.onnx -o fast.onnx --pattern 2:4 --exclude fc2

    [dim]$[/] prunectl prune model.onnx -o thin.onnx --pattern channel -s 50%
    """

    model: ModelArgument
    output: OutputOption = ""
    sparsity: Annotated[
        str,
        _much(
            "-s",
            "--sparsity",
            metavar="RATIO",
            help="Share of zeros to reach, e.g. 80%; with --pattern channel, of channels to remove.",
        ),
    ] = ""
    blocks: Annotated[
        int | None,
        _much(metavar="N", help="With --pattern layers: how many blocks to remove.", min=1),
    ] = None
    compression: Annotated[
        float | None, _much(metavar="X", min=1, help="All parameters over the kept ones: 4 keeps 25 %.")
    ] = None
    target_gzip: Annotated[str, _much(metavar="SIZE", help="Prune down to this gzip size, e.g. 400KB.")] = ""
    target_packed: Annotated[str, _much(metavar="SIZE", help="Prune down to this size with --pack, e.g. 1MB.")] = ""
    max_drop: Annotated[
        str,
        _much(
            metavar="DROP", help="Find the highest sparsity that costs at most this on --data, e.g. 1pp of accuracy."
        ),
    ] = ""
    metric: Annotated[str, _much(metavar="NAME", help="Metric of --max-drop: accuracy, loss, f.py:fn:max.")] = ""
    tried: Annotated[Path | None, _much(metavar="DIR", help="Folder for the trials of --max-drop, to resume.")] = None
    strategy: Annotated[str, _which(metavar="NAME", help="How weights are ranked: magnitude, lamp, obs …")] = (
        _DEFAULT.strategy
    )
    param: Annotated[list[str] | None, _which(metavar="K=V", help="Parameter of the strategy, e.g. damp=0.01.")] = None
    scope: Annotated[
        Scope,
        _which(help="Rank weights in each layer, over all layers, or by ERK; auto: global, layer for patterns."),
    ] = Scope.AUTO
    pattern: Annotated[str, _which(metavar="PATTERN", help="Shape of the zeros: 2:4, block:1x4, channel, layers.")] = ""
    cluster: Annotated[str, _which(metavar="K[:START]", help="Cluster weights to K values per tensor, e.g. 16.")] = ""
    policy: Annotated[str, _which(metavar="NAME", help="Which tensors: skip-first-last; xnnpack for ARM, WASM …")] = (
        _DEFAULT.policy
    )
    layers: Annotated[str, _which(metavar="GLOB", help="Prune only the kernels of these, e.g. 'conv*'.")] = ""
    exclude: Annotated[
        list[str] | None, _which(metavar="GLOB", help="Never prune these tensors, e.g. fc2; repeatable.")
    ] = None
    layer: Annotated[
        list[str] | None, _which(metavar="GLOB=R", help="Sparsity for some layers: 'fc*=90%'; repeatable.")
    ] = None
    seed: Annotated[int, _which(help="Seed of all random choices.")] = _DEFAULT.seed
    nan: Annotated[NonFinitePolicy, _which(help="NaN and infinite weights: refuse, zero or keep.")] = _NAN
    min_channels: Annotated[int | None, _cut(help="Fewest channels to keep in a layer.  [default: 2]", min=1)] = None
    round_to: Annotated[int | None, _cut(help="Keep a multiple of this many channels, e.g. 8.", min=1)] = None
    max_ratio: Annotated[str, _cut(metavar="RATIO", help="Largest share to remove from a layer, e.g. 70%.")] = ""
    target_params: Annotated[str, _cut(metavar="-R|N", help="Parameters to reach: -50% (half), or 1.5M.")] = ""
    target_flops: Annotated[str, _cut(metavar="-R|N", help="FLOPs per input to reach: -50% (half), or 20M.")] = ""
    latency: Annotated[bool, _cut("--latency", help="Measure latency before and after, for one input.")] = False
    dead: Annotated[bool, _cut("--dead", help="Remove only channels that change no output.")] = False
    allow_empty: Annotated[
        bool,
        _much("--allow-empty", help="Write the model even if nothing is left of a tensor, or no channel is removed."),
    ] = False
    data: Annotated[str, _data(metavar="SPEC", help="Calibration or evaluation data, e.g. train.npz.")] = ""
    samples: Annotated[
        int | None,
        _data(help=f"Examples to use.  [default: {SAMPLES}; --repair outputs: {MATCHED_SAMPLES}]", min=1),
    ] = None
    batch_size: Annotated[
        int | None,
        _data(
            help=f"Examples per batch.  [default: {BATCH_SIZE}; "
            f"to match outputs {MATCHED_BATCH_SIZE} (tokens: {BATCH_SIZE})]",
            min=1,
        ),
    ] = None
    repair: Annotated[
        Repair | None,
        _data(help="Refit kept weights: each layer by least squares (the default), or train to match dense outputs."),
    ] = None
    repair_steps: Annotated[
        int | None, _data(metavar="N", help="Maximum training steps of --repair outputs.  [default: 2000]", min=1)
    ] = None
    loss: Annotated[str, _data(metavar="NAME", help="Loss for gradients, e.g. mse; else the file's.")] = ""
    builder: Annotated[str, builder_option(_data)] = ""
    custom_objects: Annotated[str, custom_objects_option(_data)] = ""
    trust: Annotated[bool, _data("--trust", help="Allow code in MODEL or the recipe to run.")] = False
    inputs: Annotated[
        list[str] | None, _cut("--input", metavar="SHAPE", help="Input shape with batch, e.g. 1,3,224,224.")
    ] = None
    wrap: Annotated[bool, _later("--wrap", help="Also write masks, as tfmot or torch.nn.utils.prune do.")] = False
    schedule: Annotated[str, _later(metavar="NAME", help="Let later training prune: polynomial … (Keras 2).")] = ""
    schedule_param: Annotated[
        list[str] | None, _later(metavar="K=V", help="Parameter of the schedule, e.g. power=2.")
    ] = None
    initial_sparsity: Annotated[str, _later(metavar="RATIO", help="Sparsity at --begin, e.g. 50%.")] = ""
    begin: Annotated[str, _later(metavar="STEP", help="First pruning step; a step is one batch.")] = ""
    end: Annotated[str, _later(metavar="STEP", help="Step that reaches the final sparsity, e.g. 2000.")] = ""
    frequency: Annotated[
        int | None, _later(metavar="STEPS", help="Steps between two pruning steps, e.g. 100.", min=1)
    ] = None
    power: Annotated[float | None, _later(help="Exponent of the polynomial.  [default: 3]")] = None
    part: Annotated[str, _many(metavar="I/N", help="Prune only part I of N of the shards, e.g. 3/8.")] = ""
    join: Annotated[bool, _many("--join", help="Complete OUT once all its parts are written.")] = False
    on: Annotated[str, _many(metavar="ray[:ADDRESS]", help="Prune all parts on a Ray cluster, and join them.")] = ""
    pack: Annotated[bool, typer.Option("--pack", help="Compress inside the file; it loads as before.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report the result, but write nothing.")] = False
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a record of the run (for --recipe, verify).")
    ] = None
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Repeat the run that this manifest records.")] = (
        None
    )
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")] = False
    in_place: Annotated[bool, typer.Option("--in-place", help="Overwrite MODEL itself, instead of --output.")] = False

    @contextmanager
    def _source(self, reporter: Reporter) -> Generator[Path]:
        with resolve_model(self.model, reporter.note, is_read_whole=not self.is_streamed) as path:
            yield path

    @contextmanager
    def _destination(self, model: Path, suffix: str | None) -> Generator[Destination | None]:
        if not URL.match(self.output) or self.dry_run:
            with super()._destination(model, suffix) as destination:
                yield destination
            return
        upload = load("prunectl.formats.remote:uploading")
        begun = load("prunectl.pruning.ledger:BEGUN") if self.is_streamed else ""
        with upload(self.output, is_forced=self.force, begun=begun) as target:
            yield Destination(target, is_forced=self.force, url=self.output)

    @property
    def has_parts(self) -> bool:
        """Whether a part of a folder is pruned, or all parts are joined or run on a cluster."""
        return bool(self.part or self.on) or self.join

    @property
    def is_streamed(self) -> bool:
        """Whether a folder of shards that is read from or written to a URL is pruned shard by shard."""
        is_whole = self.force or self.dry_run or self.in_place or self.pack or self.output == STDIN
        modes = (self.max_drop, self.data, self.recipe, self.wrap, self.schedule, self.target_gzip, self.target_packed)
        is_cut = self.pattern in {CHANNEL, LAYERS} or (self.manifest is not None and URL.match(self.output))
        return self.has_parts or not (is_whole or any(modes) or is_cut)

    def run(self, ctx: typer.Context) -> int:
        """Prune the model in the mode that its options select, and show the report."""
        request = self._request(ctx)
        if request.data:
            load("prunectl.training.loop:retain_freed_memory")()
        return self.write(ctx.obj, select_mode(ctx, self, request))

    def _request(self, ctx: typer.Context) -> PruneRequest:
        """The request of a recipe, or of the options."""
        if self.recipe is None:
            named = {"strategy": self.strategy} if given_on_command_line(ctx, "strategy") else {}
            typed_options = {**request_options(ctx, self, OPTIONS), **named}
            return parse_request(typed_options, is_by_layer=self.wrap or bool(self.schedule))
        typed = [name for name in ctx.params if name not in _NOT_IN_RECIPE and given_on_command_line(ctx, name)]
        if typed:
            option = option_name(ctx, typed[0])
            raise UsageError(
                f"{option} cannot be used with --recipe, which sets it already", hint=f"leave out {option}"
            )
        request: PruneRequest = load("prunectl.pruning.manifest:read_manifest")(self.recipe, is_trusted=self.trust)
        return request


PruneMode = Callable[[Path, Destination | None], Any]
"""Prunes the model at a path to a destination, and returns the result type of its mode."""


def selected_modes(options: Prune, request: PruneRequest) -> Mode:
    """The modes that the options select."""
    modes = {
        Mode.SEARCH: bool(options.max_drop),
        Mode.CHANNELS: request.pattern == CHANNEL,
        Mode.BLOCKS: request.pattern == LAYERS,
        Mode.WRAPPERS: options.wrap or bool(options.schedule),
        Mode.SCHEDULE: bool(options.schedule),
        Mode.DATA: bool(request.data),
        Mode.RECIPE: options.recipe is not None,
        Mode.PART: bool(options.part),
        Mode.PARTS: options.has_parts,
        Mode.JOIN: options.join,
        Mode.REMOTE_MODEL: bool(URL.match(options.model)),
        Mode.REMOTE_PARTS: options.has_parts and bool(URL.match(options.output)),
    }
    return reduce(or_, (mode for mode, is_selected in modes.items() if is_selected), Mode.NONE)


def select_mode(
    ctx: typer.Context, options: Prune, request: PruneRequest
) -> Callable[[Path, Destination | None], Report]:
    """The mode that the options select, with its report; conflicts are rejected before a file is opened."""
    check_options(ctx, options, selected_modes(options, request))
    limits = {CHANNEL_LIMITS[name]: value for name, value in request_options(ctx, options, CHANNEL_LIMITS).items()}
    if options.max_drop:
        search: Callable[[Path, Destination | None], Report] = load("prunectl.commands.max_drop:search_mode")(
            ctx.obj, options, request, limits
        )
        return search
    mode = build_mode(options, request, limits, ctx.obj.progress)
    return lambda path, destination: report_of(mode(path, destination), options, request, destination)


def build_mode(
    options: Prune, request: PruneRequest, limits: Mapping[str, Any], meter: ProgressFactory = no_progress
) -> PruneMode:
    """The mode for a given sparsity or size; limits are about channels."""
    if request.pattern == CHANNEL:
        return partial(_prune_channels, request, options, limits, meter=meter)
    if request.pattern == LAYERS:
        return partial(_prune_blocks, request, options)
    if options.wrap or options.schedule:
        wrap: PruneMode = load("prunectl.commands.wrap_options:wrap_mode")(options, request)
        check(request, allow_empty=options.allow_empty)
        return wrap
    if options.has_parts:
        return partial(_prune_parts, request, options, meter)
    settings: Any = {
        "method": check(request, allow_empty=options.allow_empty),
        "meter": meter,
        "allow_empty": options.allow_empty,
    }
    run: Callable[..., Any] = partial(prune, **settings)
    if request.data:
        run = partial(load("prunectl.calibration.prune:prune"), is_trusted=options.trust, **settings)
    return partial(_prune_weights, run, request, options)


def report_of(result: Any, options: Prune, request: PruneRequest, destination: Destination | None) -> Report:
    """The report on the result of a mode; also writes the manifest, as the output is in its place by then."""
    if options.manifest is not None and destination is not None:
        destination.then.append(partial(load("prunectl.pruning.manifest:write_manifest"), options.manifest, result))
    output = without_secrets(destination.url) or str(destination.target) if destination is not None else ""
    if options.wrap or options.schedule:
        return wrap_report(result, output)
    if options.part:
        return part_report(replace(result, source=without_secrets(options.model)), output)
    result = replace(result, before=replace(result.before, path=without_secrets(options.model)))
    if destination is not None and destination.url:
        result = replace(result, after=replace(result.after, path=output))
    structured = {CHANNEL: "channels_report", LAYERS: "blocks_report"}.get(request.pattern)
    draw: Callable[[Any, str], Report] = (
        load(f"prunectl.reporting.structured:{structured}") if structured else prune_report
    )
    return draw(result, output)


def _prune_channels(
    request: PruneRequest,
    options: Prune,
    limits: Mapping[str, Any],
    path: Path,
    destination: Destination | None,
    *,
    meter: ProgressFactory,
) -> Any:
    cuts = importlib.import_module("prunectl.channels.prune")
    if options.recipe is not None:
        limits = {**limits, **cuts.limits_in(options.recipe)}
    return cuts.prune_channels(
        path,
        request,
        destination,
        meter,
        has_digests=options.manifest is not None,
        is_trusted=options.trust,
        has_latency="latency" in limits,
        allow_empty=options.allow_empty,
        **{name: value for name, value in limits.items() if name != "latency"},
    )


def _prune_blocks(request: PruneRequest, options: Prune, path: Path, destination: Destination | None) -> Any:
    influence = load("prunectl.calibration.outputs:block_influence") if request.data else None
    measure = influence and partial(influence, request=request, is_trusted=options.trust)
    prune_blocks = load("prunectl.pruning.blocks:prune_blocks")
    return prune_blocks(path, request, destination, has_digests=options.manifest is not None, measure=measure)


def _prune_parts(
    request: PruneRequest, options: Prune, meter: ProgressFactory, path: Path, destination: Destination | None
) -> Any:
    """Prune a part of the shards of a folder, all of them on a cluster, or join all parts."""
    assert destination is not None
    parts = importlib.import_module("prunectl.pruning.parts")
    if bool(options.part) + options.join + bool(options.on) > 1:
        raise UsageError(
            "only one of --part, --join and --on can be used", hint="--on does all; --join goes after the last --part"
        )
    if request.data or request.is_packed or request.target_gzip or request.target_packed:
        raise UsageError("the recipe cannot be used with --part, --join or --on: it needs the whole model at once")
    if options.on:
        load("prunectl.sweeping.workers:check")(options.on)
        check(request, allow_empty=options.allow_empty)
        begun = load("prunectl.pruning.ledger:Ledger").of(destination.target)
        count = begun.task()["parts"] if begun.is_begun else None
        parts.check(path, request, destination, count or 1)
        job = {"model": options.model, "output": destination.url or str(destination.target), "request": asdict(request)}
        load("prunectl.sweeping.ray_workers:prune_parts")(
            options.on.partition(":")[2],
            {**job, "allow_empty": options.allow_empty},
            count,
        )
    if options.part:
        check(request, allow_empty=options.allow_empty)
        part = load("prunectl.pruning.ledger:parse_part")(options.part)
        return parts.prune_part(path, request, destination, part, meter=meter, allow_empty=options.allow_empty)
    # Without options, --join uses those of the parts.
    own = request if request != PruneRequest() else None
    has_digests = options.manifest is not None
    return parts.join(path, own, destination, has_digests=has_digests, is_trusted=options.trust)


def _prune_weights(
    run: Callable[..., Any], request: PruneRequest, options: Prune, path: Path, destination: Destination | None
) -> Any:
    if destination is not None and (URL.match(options.model) or destination.url):
        model = open_model(path)
        if model.format == "shards" and model.folder is not None and options.is_streamed:
            run = partial(load("prunectl.pruning.parts:prune_whole"), allow_empty=options.allow_empty)
        elif URL.match(options.model):
            load("prunectl.formats.remote:fetch")(path, lambda _: None)
    return run(path, request, destination, has_digests=options.manifest is not None)


def load(function: str) -> Any:
    """Import a function by its name, so that pruning by weights alone does not load the modules of other modes."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


command = make_command(Prune, BuildCommand)
