"""`prunectl inspect`: what is in this file?"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunectl.analysis.inspect import InspectOptions, SortKey, bytes_read, inspect_model
from prunectl.analysis.stats import ModelStats
from prunectl.commands._command import (
    builder_option,
    custom_objects_option,
    given_on_command_line,
    inspect_each,
    make_command,
    option_group,
    option_name,
)
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.detect import URL
from prunectl.formats.extents import REMOTE
from prunectl.formats.registry import open_model, uncollected
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.reporting.inspect import add_channel_groups, inspect_report
from prunectl.reporting.reporter import Reporter
from prunectl.units import nbytes

if TYPE_CHECKING:
    from prunectl.analysis.patterns import SparsityMap
    from prunectl.calibration.sensitivity import Sensitivity

_OPENING = ("builder", "custom_objects", "trust")
_MOST_COUNTED = 64 << 30
"""Zeros are counted by default in models up to this size in bytes: reading more takes a disk minutes."""
_ABOUT_DATA = ("samples", "batch_size", "loss", *_OPENING)


_data = option_group("Sensitivity to pruning, and model code")


def inspect(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Model files or folders; - reads standard input.")
    ],
    *,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Show only these tensors: 'conv*', or re:REGEX.")] = "",
    sort: Annotated[SortKey | None, typer.Option(help="Sort by this column; largest first, names A to Z.")] = None,
    pattern: Annotated[
        str, typer.Option(metavar="PATTERN", help="Measure how far zeros follow 2:4, block:1x4 or channel.")
    ] = "",
    hist: Annotated[bool, typer.Option("--hist", help="Show a histogram of weight magnitudes.")] = False,
    flops: Annotated[bool, typer.Option("--flops", help="Show the FLOPs of each layer for one input.")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor on a terminal, not one row per layer.")
    ] = False,
    zeros: Annotated[
        bool,
        typer.Option("--zeros/--no-zeros", help="Count zeros (by default up to 64 GiB); --no-zeros skips this."),
    ] = True,
    groups: Annotated[bool, typer.Option("--groups", help="Show dependency groups: channels cut together.")] = False,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="SHAPE", help="Input shape for --groups, e.g. 1,3,224,224.")
    ] = None,
    sensitivity: Annotated[
        bool, _data("--sensitivity", help="Prune each tensor alone, and measure the damage.")
    ] = False,
    data: Annotated[str, _data(metavar="SPEC", help="Calibration data for --sensitivity, e.g. train.npz.")] = "",
    samples: Annotated[int, _data(help="Examples of --data to use.", min=1)] = SAMPLES,
    batch_size: Annotated[int, _data(help="Examples per batch.", min=1)] = BATCH_SIZE,
    builder: Annotated[str, builder_option(_data)] = "",
    custom_objects: Annotated[str, custom_objects_option(_data)] = "",
    loss: Annotated[str, _data(metavar="NAME", help="Loss to measure, e.g. mse; else the file's.")] = "",
    trust: Annotated[bool, _data("--trust", help="Allow code stored in MODEL to run.")] = False,
) -> int:
    """Show what a model file contains: layers, sparsity, and bytes that inference does not need.

    Needs no framework and runs no code from the file, except with --data, and with --groups for PyTorch.

    [dim]$[/] prunectl inspect model.h5

    [dim]$[/] prunectl inspect model.pt --sort sparsity --pattern 2:4

    [dim]$[/] prunectl inspect model.onnx --flops

    [dim]$[/] prunectl inspect model.keras --sensitivity --data train.npz
    """
    _check(ctx, data=data, is_measured=sensitivity, inputs=inputs, groups=groups)
    if (sensitivity or groups) and any(map(URL.match, models)):
        raise UsageError("--sensitivity and --groups need a file, not a URL", hint="download the model first")
    reporter: Reporter = ctx.obj
    parsed = importlib.import_module("prunectl.analysis.patterns").parse(pattern) if pattern else None
    options = InspectOptions(layers, sort, pattern, hist, flops, zeros, has_digest=reporter.is_json)
    request = {"data": data, "samples": samples, "batch_size": batch_size, "loss": loss}
    request |= {"model": builder, "custom_objects": custom_objects}
    sensitivities: list[Sensitivity] = []
    groups_found: list[Any] = []
    maps: list[tuple[SparsityMap, ...]] = []

    reads_all = given_on_command_line(ctx, "zeros") or bool(parsed) or hist or sort is SortKey.SPARSITY

    def seen(path: Path) -> ModelStats:
        model = open_model(path)
        read = bytes_read(model, options)
        takes_long = read > _MOST_COUNTED or any(file in REMOTE for file in model.files)
        own = replace(options, has_zeros=zeros and (reads_all or not takes_long))
        with uncollected():
            stats = inspect_model(model, own, parsed, reporter.progress)
        if own.has_zeros != zeros:
            note = f"Zeros were not counted, as that would read {nbytes(read)}: add --zeros to count them."
            stats = replace(stats, advice=(note, *stats.advice))
        if groups:
            # Imported by name, as below, since a plain `inspect` does not need them.
            origin = importlib.import_module("prunectl.training.backend").LoadOptions(
                builder, custom_objects, is_trusted=trust, inputs=tuple(inputs or ())
            )
            groups_found.append(importlib.import_module("prunectl.channels.groups").channel_groups(model, origin))
        if sensitivity:
            sensitivities.append(_measured(model, request, layers=layers, is_trusted=trust, meter=reporter.progress))
        # Only the HTML page has pictures.
        patterns = importlib.import_module("prunectl.analysis.patterns") if reporter.html is not None else None
        maps.append(patterns.sparsity_maps(model, stats) if patterns is not None else ())
        return stats

    surveys, failures = inspect_each(models, seen, reporter.note)
    report = inspect_report(
        surveys,
        failures,
        has_flops=flops,
        # --layers asks for these tensors.
        lists_tensors=tensors or bool(layers),
        is_sorted=sort is not None and sort is not SortKey.NAME,
    )
    masks = {survey.path: shown for survey, shown in zip(surveys, maps, strict=True)}
    report = replace(report, sparsity_maps=masks)
    if sensitivity:
        report = importlib.import_module("prunectl.reporting.sensitivity").add_sensitivity(report, sensitivities)
    if groups:
        report = add_channel_groups(report, groups_found)
    return reporter.show(report)


def _measured(model: ModelFile, options: dict[str, Any], **settings: Any) -> Sensitivity:
    # By name: these import everything that opens data and trains models, which a plain `inspect` does not need.
    run = importlib.import_module("prunectl.calibration.sensitivity").sensitivity
    request = importlib.import_module("prunectl.pruning.request").PruneRequest(**options)
    result: Sensitivity = run(model, request, **settings)
    return result


def _check(ctx: typer.Context, *, data: str, is_measured: bool, inputs: list[str] | None, groups: bool) -> None:
    """Refuse options that would have no effect."""
    if data and not is_measured:
        raise UsageError("--data needs --sensitivity", hint="add --sensitivity, or leave out --data")
    if inputs and not groups:
        raise UsageError("--input needs --groups", hint="add --groups, or leave out --input")
    typed = [name for name in _ABOUT_DATA if given_on_command_line(ctx, name) and not (groups and name in _OPENING)]
    if typed and not data:
        raise UsageError(
            f"{option_name(ctx, typed[0])} needs --data",
            hint="add --sensitivity --data train.npz",
        )


command = make_command(inspect)
