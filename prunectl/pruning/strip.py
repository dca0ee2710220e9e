"""Stripping, from a file to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats, measure_stats
from prunectl.analysis.tensor_io import ProgressFactory, bitwise_equal, count_zeros, no_progress
from prunectl.errors import WorkError
from prunectl.formats.base import (
    PARAMETRIZATION,
    WEIGHTS,
    Capability,
    ModelFile,
    RemovedItem,
    Role,
    StripOptions,
    StripPart,
)
from prunectl.formats.folder import training_state
from prunectl.formats.registry import by_name, load, open_model, require
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination


@dataclass(frozen=True, slots=True)
class Stripped:
    """What was removed, and statistics before and after."""

    removed: tuple[RemovedItem, ...]
    before: ModelStats
    after: ModelStats
    notes: tuple[str, ...] = ()
    """What of the folder of the model was not copied."""


def strip(
    path: Path,
    options: StripOptions,
    output: Destination | None,
    *,
    is_packed: bool,
    meter: ProgressFactory = no_progress,
) -> Stripped:
    """Write a copy without what inference does not need; without an output, into a scratch file."""
    model = open_model(path)
    require(model, Capability.PACK if is_packed else Capability.WRITE)
    # What has nothing to strip is copied, whatever the format.
    if options.to_half or model.about.wrappers or any(tensor.role not in WEIGHTS for tensor in model.tensors):
        require(model, Capability.STRIP)
    row = by_name(model.format)
    outputs.check(model, output)
    state = training_state(model) if outputs.is_folder(model, output) else {}
    left_out = {path: part for path, part in state.items() if part in options.parts}
    with outputs.staging_dir(model, output, left_out) as (folder, target):
        staged = outputs.staged_paths(model, folder, target)
        removed: tuple[RemovedItem, ...] = ()
        if row.stripper:
            removed = load(row.stripper)(model, options, staged)
        else:
            load(row.writer)(model, staged, ())
        written = staged.get(model.path, folder / target.name)
        if is_packed:
            outputs.pack(written, folder)
        result = open_model(written)
        _verify(model, result, options, frozenset(thing.name for thing in removed))
        before, after = stats_for_report(model, meter), stats_for_report(result, meter)
    if model.folder is not None:
        sizes = {path: (model.folder / path).stat().st_size for path in left_out}
        removed += tuple(RemovedItem(str(path), left_out[path], size) for path, size in sizes.items())
    shown = replace(after, path=str(target)) if output is not None else after
    return Stripped(removed, before, shown, outputs.notes_on_folder(model, output))


def _verify(model: ModelFile, result: ModelFile, options: StripOptions, removed: frozenset[str]) -> None:
    """Verify that nothing is left that should be removed, and that no other tensor has changed."""
    wrappers_left = [wrapper for wrapper in result.about.wrappers if wrapper.kind != PARAMETRIZATION]
    if StripPart.MASKS in options.parts and wrappers_left:
        raise WorkError(
            f"the output of {model.path} still has a wrapper around {wrappers_left[0].layer}; nothing was written"
        )
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    before = {tensor.name: tensor for tensor in model.tensors}
    for tensor in result.tensors:
        original = before.get(tensor.name)
        if original is None or tensor.layer in wrapped:
            continue
        if tensor.name in removed and tensor.role == Role.OPTIMIZER and count_zeros(result, tensor) == tensor.size:
            # Where a graph still asks for the state of an optimizer, it gets zeros.
            continue
        if original.shape != tensor.shape or not bitwise_equal(model, original, result, tensor):
            raise WorkError(f"{tensor.name} of {model.path} has different values in the output; nothing was written")


def stats_for_report(model: ModelFile, meter: ProgressFactory = no_progress) -> ModelStats:
    """Statistics of a model, with its gzip size if it is small."""
    if model.nbytes <= outputs.BIG_BYTES:
        return measure(model, get_codec(CodecName.GZIP, None), meter)
    with meter(f"measuring {model.path.name}", model.nbytes) as bar:
        return measure_stats(model, model.tensors, has_channels=False, tick=bar.advance)
