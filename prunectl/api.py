"""The commands as functions: the same words as arguments, the report that the command prints as the result."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunectl.analysis import inspect as analysis_inspect
from prunectl.analysis import patterns, sizes
from prunectl.analysis.inspect import InspectOptions
from prunectl.analysis.sizes import CodecName
from prunectl.analysis.stats import ModelStats
from prunectl.calibration import prune as calibrating
from prunectl.channels import prune as cutting
from prunectl.channels.prune import ChannelPruneResult
from prunectl.exporting import export as exporting
from prunectl.exporting import request as exporting_words
from prunectl.exporting.compare import ExportResult
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.pruning import prune as pruning
from prunectl.pruning import request as requests
from prunectl.pruning import strip as stripping
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strip import Stripped
from prunectl.training import finetune as training
from prunectl.training.finetune import Finetuned
from prunectl.training.request import request_of

_FIELDS = {"pack": "is_packed", "input": "inputs", "param": "params", "repair": "is_repaired", "layer": "layers"}
"""Words of the command line that a request has another name for."""
_OF_CHANNELS = frozenset({"min_channels", "round_to", "max_ratio", "params", "flops", "dead", "allow_empty"})
AnyPath = str | os.PathLike[str]


def inspect(
    model: AnyPath, *, layers: str = "", pattern: str = "", flops: bool = False, zeros: bool = True
) -> ModelStats:
    """Return what is in a model file."""
    options = InspectOptions(layers=layers, pattern=pattern, has_flops=flops, has_zeros=zeros)
    return analysis_inspect.inspect_model(
        open_model(Path(model)), options, patterns.parse(pattern) if pattern else None
    )


def size(model: AnyPath, *, codec: str = "gzip", level: int | None = None) -> ModelStats:
    """Return how big a model is: as it is, packed, and compressed."""
    return sizes.measure(open_model(Path(model)), sizes.get_codec(CodecName(codec), level))


def prune(
    model: AnyPath,
    output: AnyPath | None,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    trust: bool = False,
    **words: Any,
) -> Pruned | ChannelPruneResult:
    """Zero the least important weights of a model; without an output nothing is written.

    The words are those of the command line: ``sparsity=0.8``, ``scope="global"``, ``exclude=["fc*"]`` …; with
    ``pattern="channel"`` channels are cut out, and ``flops="-50%"`` is one of them.
    """
    is_cut = words.get("pattern") == patterns.CHANNEL
    own = {word: words.pop(word) for word in _OF_CHANNELS & words.keys()} if is_cut else {}
    said = {_FIELDS.get(word, word): list(value) if _is_list(value) else value for word, value in words.items()}
    request = requests.from_json(said)
    place = _output(output, force=force, in_place=in_place)
    if is_cut:
        return cutting.prune_channels(Path(model), request, place, is_trusted=trust, **own)
    requests.check(request)
    if request.data:
        return calibrating.prune(Path(model), request, place, is_trusted=trust)
    return pruning.prune(Path(model), request, place)


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
    destination = _output(output, force=force, in_place=in_place)
    return stripping.strip(Path(model), StripOptions(parts, is_half=half), destination, is_packed=pack)


def finetune(
    model: AnyPath, output: AnyPath, /, *, force: bool = False, in_place: bool = False, **words: Any
) -> Finetuned:
    """Train a model with its zeros kept, or prune it while it trains.

    The words are those of the command line: ``data="train.npz"``, ``sparsity=0.8``, ``schedule="cosine"`` …
    """
    place = Destination(Path(output), is_forced=force, is_in_place=in_place)
    return training.finetune(Path(model), request_of(words), place)


def export(model: AnyPath, output: AnyPath, /, *, force: bool = False, **words: Any) -> ExportResult:
    """Write a model in another format, run beside its source before it is kept.

    The words are those of the command line: ``to="onnx"``, ``opset=18``, ``input=["x:?,3,8,8"]``, ``half=True`` …
    """
    return exporting.export(Path(model), exporting_words.request_of(words), Destination(Path(output), is_forced=force))


def _output(path: AnyPath | None, *, force: bool, in_place: bool) -> Destination | None:
    return None if path is None else Destination(Path(path), is_forced=force, is_in_place=in_place)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


__all__ = ["PruneRequest", "export", "finetune", "inspect", "prune", "size", "strip"]
