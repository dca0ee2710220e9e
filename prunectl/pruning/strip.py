"""Stripping, from a file to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats, measure_stats
from prunectl.analysis.tensor_io import bitwise_equal, count_zeros
from prunectl.errors import WorkError
from prunectl.formats.base import PARAMETRIZATION, Capability, ModelFile, RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.registry import by_name, load, open_model, require
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination


@dataclass(frozen=True, slots=True)
class Stripped:
    """What went, and what is left."""

    removed: tuple[RemovedItem, ...]
    before: ModelStats
    after: ModelStats


def strip(path: Path, wish: StripOptions, output: Destination | None, *, is_packed: bool) -> Stripped:
    """Write a model again without what it does not need to predict; without an output, into a scratch file."""
    model = open_model(path)
    # What has nothing to strip may still be packed.
    require(model, Capability.PACK if is_packed else Capability.STRIP)
    row = by_name(model.format)
    outputs.check(model, output)
    with outputs.staging_dir(model, output) as (folder, target):
        places = outputs.staged_paths(model, folder, target)
        removed: tuple[RemovedItem, ...] = ()
        if row.stripper:
            removed = load(row.stripper)(model, wish, places)
        else:
            load(row.writer)(model, places, ())
        written = places.get(model.path, folder / target.name)
        if is_packed:
            outputs.pack(written, folder)
        found = open_model(written)
        _verify(model, found, wish, frozenset(thing.name for thing in removed))
        before, after = surveyed(model), surveyed(found)
    return Stripped(removed, before, replace(after, path=str(target)) if output is not None else after)


def _verify(model: ModelFile, found: ModelFile, wish: StripOptions, removed: frozenset[str]) -> None:
    """Hold what was written against the input: nothing is left that should go, and nothing else has changed."""
    left = [wrapper for wrapper in found.about.wrappers if wrapper.kind != PARAMETRIZATION]
    if StripPart.MASKS in wish.parts and left:
        raise WorkError(f"{model.path} came out with wrappers still around {left[0].layer}")
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    known = {tensor.name: tensor for tensor in model.tensors}
    for tensor in found.tensors:
        old = known.get(tensor.name)
        if old is None or tensor.layer in wrapped:
            continue
        if tensor.name in removed and tensor.role == Role.OPTIMIZER and count_zeros(found, tensor) == tensor.size:
            # Where a graph still asks for the state of an optimizer, it gets zeros.
            continue
        if old.shape != tensor.shape or not bitwise_equal(model, old, found, tensor):
            raise WorkError(f"{tensor.name} of {model.path} came out with other numbers than it had")


def surveyed(model: ModelFile) -> ModelStats:
    """Return what is in a model; its compressed size, too, if it is small."""
    if model.nbytes <= outputs.BIG_BYTES:
        return measure(model, get_codec(CodecName.GZIP, None))
    return measure_stats(model, model.tensors, has_channels=False)
