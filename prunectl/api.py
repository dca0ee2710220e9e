"""The commands as functions: the options of the command line as keywords, the report's values as the result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from prunectl.analysis import inspect as inspection
from prunectl.analysis import patterns, sizes
from prunectl.analysis.inspect import InspectOptions
from prunectl.analysis.sizes import CodecName
from prunectl.analysis.stats import ModelStats
from prunectl.channels.prune import ChannelPruneResult
from prunectl.exporting import export as exporting
from prunectl.exporting import request as export_request
from prunectl.exporting.compare import ExportResult
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.pruning import request as prune_request
from prunectl.pruning import strip as stripping
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strip import Stripped
from prunectl.sweeping.requests import prune_by_request
from prunectl.training import finetune as training
from prunectl.training import request as finetune_request
from prunectl.training.finetune import FinetuneResult
from prunectl.training.quiet import host_settings

AnyPath = str | os.PathLike[str]


class SelectionOptions(TypedDict, total=False):
    """Which weights are pruned, by what, and in what shape."""

    strategy: str
    param: Sequence[str]
    scope: str
    pattern: str
    policy: str
    only: str
    exclude: Sequence[str]
    layer: Sequence[tuple[str, float]]


class ChannelOptions(TypedDict, total=False):
    """What `prune` takes with ``pattern="channel"`` only."""

    min_channels: int
    round_to: int
    max_ratio: float
    params: str
    flops: str
    dead: bool
    allow_empty: bool


class PruneOptions(SelectionOptions, ChannelOptions, total=False):
    """The options of `prune` that decide the numbers in its output; each has the default of the command line."""

    sparsity: float | None
    compression: float | None
    target_gzip: int | None
    target_packed: int | None
    seed: int
    nan: str
    pack: bool
    data: str
    samples: int
    batch_size: int
    loss: str
    model: str
    custom_objects: str
    input: Sequence[str]
    repair: bool
    cluster: str


class FinetuneOptions(SelectionOptions, total=False):
    """The options of `finetune`; each has the default of the command line."""

    data: str
    val: str
    val_split: float
    epochs: int | None
    steps: int | None
    batch_size: int
    lr: float | None
    lr_schedule: str
    warmup: str | int
    optimizer: str
    loss: str
    metric: Sequence[str]
    clip: float | None
    freeze: Sequence[str]
    distill: AnyPath
    distill_model: str
    distill_share: float
    temperature: float
    early_stop: int | None
    keep: str
    recalibrate: bool
    step: str
    precision: str
    device: str
    compile: bool
    shard: bool
    workers: int
    seed: int
    sparsity: float | None
    schedule: str
    schedule_param: Sequence[str]
    initial_sparsity: float
    begin: str | int
    end: str | int
    frequency: int | None
    power: float | None
    mask: str
    keep_wrappers: bool
    checkpoint_dir: AnyPath | None
    resume: bool
    logdir: AnyPath | None
    model: str
    custom_objects: str
    trust: bool


class ExportOptions(TypedDict, total=False):
    """The options of `export`; each has the default of the command line."""

    to: str
    opset: int | None
    input: Sequence[str]
    data: str
    samples: int | None
    batch_size: int | None
    seed: int | None
    atol: float | None
    rtol: float | None
    model: str
    custom_objects: str
    trust: bool
    half: bool
    bf16: bool
    int8: bool
    sparse: bool
    pack: bool
    code: bool
    metadata: Sequence[str]
    card: AnyPath | None


def inspect(
    model: AnyPath, *, layers: str = "", pattern: str = "", flops: bool = False, zeros: bool = True
) -> ModelStats:
    """Measure what is in a model file."""
    options = InspectOptions(layers=layers, pattern=pattern, has_flops=flops, has_zeros=zeros)
    return inspection.inspect_model(open_model(Path(model)), options, patterns.parse(pattern) if pattern else None)


def size(model: AnyPath, *, codec: str = "gzip", level: int | None = None) -> ModelStats:
    """Measure how big a model is: as it is, packed, and compressed."""
    return sizes.measure(open_model(Path(model)), sizes.get_codec(CodecName(codec), level))


@host_settings()
def prune(
    model: AnyPath,
    output: AnyPath | None,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    trust: bool = False,
    **options: Unpack[PruneOptions],
) -> Pruned | ChannelPruneResult:
    """Zero the least important weights of a model; without an output nothing is written.

    The options are those of the command line: ``sparsity=0.8``, ``scope="global"``, ``exclude=["fc*"]`` …; with
    ``pattern="channel"`` channels are cut out, and ``flops="-50%"`` is one of them.
    """
    is_cut = options.get("pattern") == patterns.CHANNEL
    limits: dict[str, Any] = {
        name: value for name, value in options.items() if is_cut and name in ChannelOptions.__annotations__
    }
    request = prune_request.parse_request({name: value for name, value in options.items() if name not in limits})
    destination = _destination(output, force=force, in_place=in_place)
    return prune_by_request(Path(model), request, destination, is_trusted=trust, limits=limits)


def strip(
    model: AnyPath,
    output: AnyPath | None,
    *,
    only: Iterable[str] = (),
    half: bool = False,
    pack: bool = False,
    force: bool = False,
    in_place: bool = False,
) -> Stripped:
    """Drop what a model does not need to predict; without an output nothing is written."""
    parts = frozenset(map(StripPart, only)) or frozenset(StripPart)
    destination = _destination(output, force=force, in_place=in_place)
    return stripping.strip(Path(model), StripOptions(parts, to_half=half), destination, is_packed=pack)


@host_settings()
def finetune(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    **options: Unpack[FinetuneOptions],
) -> FinetuneResult:
    """Train a model with its zeros kept, or prune it while it trains.

    The options are those of the command line: ``data="train.npz"``, ``sparsity=0.8``, ``schedule="cosine"`` …
    """
    destination = Destination(Path(output), is_forced=force, is_in_place=in_place)
    return training.finetune(Path(model), finetune_request.parse_request(options), destination)


@host_settings()
def export(
    model: AnyPath, output: AnyPath, /, *, force: bool = False, **options: Unpack[ExportOptions]
) -> ExportResult:
    """Write a model in another format, run beside its source before it is kept.

    The options are those of the command line: ``to="onnx"``, ``opset=18``, ``input=["x:?,3,8,8"]``, ``half=True`` …
    """
    request = export_request.parse_request(options)
    return exporting.export(Path(model), request, Destination(Path(output), is_forced=force))


def _destination(path: AnyPath | None, *, force: bool, in_place: bool) -> Destination | None:
    return None if path is None else Destination(Path(path), is_forced=force, is_in_place=in_place)


__all__ = ["PruneRequest", "export", "finetune", "inspect", "prune", "size", "strip"]
