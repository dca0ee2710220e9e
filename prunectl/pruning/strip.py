"""Strip what inference does not need from a model file; consolidate checkpoints of many ranks as safetensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats, measure_stats
from prunectl.analysis.tensor_io import ProgressFactory, bitwise_equal, blocks, count_zeros, no_progress
from prunectl.errors import InputError, UsageError, WorkError, abbreviated, some_tensors
from prunectl.formats import atomic, extents, scratch
from prunectl.formats.base import (
    WEIGHTS,
    Capability,
    CopyChoice,
    ModelFile,
    RemovedItem,
    Role,
    StripOptions,
    StripPart,
    Tensor,
    dtype_name,
)
from prunectl.formats.extents import BLOCK_BYTES, BYTE, Extent, raw_bytes
from prunectl.formats.folder import Companions, companions, copy_companions, files_in, training_state
from prunectl.formats.patch import HALF, HALVED, to_float16
from prunectl.formats.pipeline import split_files
from prunectl.formats.registry import SUFFIXES, by_name, load, open_model, require
from prunectl.formats.safetensors import CODES, SafetensorsEntry, by_width, write_entries
from prunectl.pruning import destination as outputs
from prunectl.pruning.averages import Keep, choose
from prunectl.pruning.destination import Destination


@dataclass(frozen=True, slots=True)
class Stripped:
    """What was removed, and statistics before and after."""

    removed: tuple[RemovedItem, ...]
    before: ModelStats
    after: ModelStats
    notes: tuple[str, ...] = ()
    """Notes for the user, such as on files of the folder that were not copied."""


def strip(
    path: Path,
    options: StripOptions,
    output: Destination | None,
    *,
    is_packed: bool,
    keep: Keep | None = None,
    is_asked: bool = False,
    meter: ProgressFactory = no_progress,
) -> Stripped:
    """Write a copy without what inference does not need; without an output, into a scratch file.

    If the file holds the weights twice, one copy is kept. With `is_asked`, the user has to choose which.
    """
    model = open_model(path)
    copies = choose(model, keep, is_asked=is_asked and StripPart.TRAINING in options.parts)
    options = replace(options, copies=copies)
    if by_name(model.format).is_of_ranks:
        return _consolidate(model, options, output, is_packed=is_packed, meter=meter)
    require(model, Capability.PACK if is_packed else Capability.WRITE)
    # A file with nothing to strip is copied, even if its format cannot be stripped.
    if options.to_half or model.about.wrappers or any(tensor.role not in WEIGHTS for tensor in model.tensors):
        require(model, Capability.STRIP)
    row = by_name(model.format)
    outputs.check(model, output)
    _check_in_place(model, options, output)
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
        # In the known format, since stripped parts of one model could be taken for a collection of models.
        result = load(row.opener)(written) if model.has_neighbours else open_model(written)
        original = model if copies is None else replace(model, tensors=_as_kept(model, copies))
        _verify(original, result, options, frozenset(item.name for item in removed))
        before, after = stats_for_report(model, meter), stats_for_report(result, meter)
    removed += _files_left_out(model, left_out)
    shown = replace(after, path=str(target)) if output is not None else after
    notes = (*_note_lacking(copies), *_notes_on_folder(model, result, output))
    return Stripped(removed, before, shown, notes)


def _check_in_place(model: ModelFile, options: StripOptions, output: Destination | None) -> None:
    """Refuse to strip a folder in place if files would have to be removed: in place only weights are changed."""
    if not model.has_neighbours or output is None or not output.is_in_place:
        return
    _, removed = split_files(model, options)
    if removed:
        raise UsageError(
            f"--in-place cannot be used: {abbreviated(removed[0].name)} would be left in {model.path}",
            hint="write -o OUT",
        )


def _notes_on_folder(model: ModelFile, result: ModelFile, output: Destination | None) -> tuple[str, ...]:
    """Notes on the files beside the weights in the output, and on files of the folder that were not copied."""
    notes = outputs.notes_on_folder(model, output)
    # Removed files are not mentioned in the notes of the output; links are missing there and noted from the input.
    if not notes or not model.has_neighbours:
        return notes
    return (*result.about.notes, *Companions((), (), files_in(model.path).links).notes(model.path))


def _as_kept(model: ModelFile, copies: CopyChoice) -> tuple[Tensor, ...]:
    """The expected tensors of the output: under their new names, with the values of the kept copy."""
    return tuple(replace(tensor, name=name) for name, tensor in copies.kept(model.tensors).items())


def _note_lacking(copies: CopyChoice | None) -> tuple[str, ...]:
    if copies is None or not copies.lacking:
        return ()
    is_single = len(copies.lacking) == 1
    has, stayed = ("has", "stayed as it was") if is_single else ("have", "stayed as they were")
    return (f"{some_tensors(copies.lacking)} {has} no counterpart under {copies.other}, and {stayed}.",)


def _files_left_out(model: ModelFile, left_out: Mapping[Path, StripPart]) -> tuple[RemovedItem, ...]:
    folder = model.folder or model.path.parent
    return tuple(RemovedItem(str(path), part, extents.file_bytes(folder / path)) for path, part in left_out.items())


_WEIGHTS, _SUFFIX, _CHECKPOINT = "model.safetensors", ".safetensors", ".ckpt"


def _consolidate(
    model: ModelFile, options: StripOptions, output: Destination | None, *, is_packed: bool, meter: ProgressFactory
) -> Stripped:
    """Write the weights of a checkpoint of many ranks as safetensors: a file, or a folder with the companion files."""
    folder = model.folder or model.path.parent
    is_file = output is not None and (output.to_stdout or output.target.suffix.lower() == _SUFFIX)
    tensors = model.tensors if options.copies is None else _as_flat(model, options.copies)
    weights = tuple(tensor for tensor in tensors if tensor.role in WEIGHTS)
    _check_consolidation(model, options, output, is_packed=is_packed)
    source = replace(model, folder=None if is_file else folder)
    left_out = training_state(source)
    with _staged_weights(source, output, left_out) as written:
        entries = sorted((_entry(model, tensor, options) for tensor in weights), key=by_width)
        write_entries(written, {"__metadata__": {"format": "pt"}}, entries)
        result = open_model(written)
        _compare(entries, result)
        before = measure_stats(model, model.tensors, has_zeros=False)
        after = stats_for_report(result, meter)
    before = replace(before, path=str(model.folder or model.path))
    if not options.to_half:
        # The values are the same, so that their zeros are counted only once.
        before = replace(before, params=replace(after.params, prunable=before.params.prunable))
    shown = after if output is None else replace(after, path=str(output.target))
    removed = (*_removed_of_ranks(model), *_files_left_out(source, left_out))
    notes = (*model.about.notes, *_note_lacking(options.copies), *companions(source).notes(folder))
    return Stripped(removed, before, shown, notes)


def _as_flat(model: ModelFile, copies: CopyChoice) -> tuple[Tensor, ...]:
    """The kept copy, under the names that the class of the network expects, without the prefix of its entry."""
    home = f"{copies.home.partition('.')[0]}."
    kept = copies.kept(model.tensors)
    return tuple(replace(tensor, name=name.removeprefix(home)) for name, tensor in kept.items())


def _check_consolidation(
    model: ModelFile, options: StripOptions, output: Destination | None, *, is_packed: bool
) -> None:
    """Refuse options that cannot be used with a checkpoint of many ranks, before any work begins."""
    source = model.folder or model.path
    ranks = f"{source} is a checkpoint of many ranks, whose weights alone are written, as safetensors"
    if is_packed:
        raise UsageError(f"--pack cannot be used: {ranks}, which have no compression", hint="leave out --pack")
    if not {StripPart.OPTIMIZER, StripPart.TRAINING} <= options.parts:
        raise UsageError(f"--only cannot be used: {ranks}", hint="leave out --only")
    if output is not None and output.is_in_place:
        raise UsageError(f"--in-place cannot be used: {ranks}", hint="write -o OUT")
    suffixes = (SUFFIXES - {_SUFFIX}) | {_CHECKPOINT}
    if output is not None and not output.to_stdout and output.target.suffix.lower() in suffixes:
        # An exported file is not a Lightning checkpoint.
        is_checkpoint = output.target.suffix.lower() == _CHECKPOINT
        target = output.target.with_suffix(".pt") if is_checkpoint else output.target
        raise UsageError(f"-o {output.target}: {ranks}", hint=f"prunectl export {source} -o {target}")
    for tensor in model.tensors:
        if tensor.role is Role.MASK:
            raise InputError(
                f"{source} holds the mask {abbreviated(tensor.name)}, which cannot be applied to the parts of ranks",
                hint="call torch.nn.utils.prune.remove before it is saved",
            )
        if tensor.role in WEIGHTS and dtype_name(tensor.dtype) not in CODES:
            raise InputError(f"{abbreviated(tensor.name)} of {source} is {tensor.dtype}, which safetensors cannot hold")
    if not any(tensor.role in WEIGHTS for tensor in model.tensors):
        raise InputError(f"{source} holds no weights")
    if output is not None:
        folder = None if output.target.suffix.lower() == _SUFFIX else source
        apart = replace(model, files=(model.path,), folder=folder)
        atomic.check_target(apart, output.target, is_forced=output.is_forced, is_in_place=False)


@contextmanager
def _staged_weights(
    source: ModelFile, output: Destination | None, left_out: Mapping[Path, StripPart]
) -> Generator[Path]:
    """Yield the path to write weights to; they and the companion files appear at the output at the end."""
    if output is None:
        with scratch.temporary_folder() as folder, extents.unchanged(source.states):
            yield folder / _WEIGHTS
        return
    with (
        atomic.atomic_replace(output.target, may_replace=output.is_forced, model=source) as folder,
        extents.unchanged(source.states),
    ):
        if source.folder is None:
            yield folder / output.target.name
            return
        inside = folder / output.target.name
        inside.mkdir()
        yield inside / _WEIGHTS
        copy_companions(source, inside, left_out)


def _entry(model: ModelFile, tensor: Tensor, options: StripOptions) -> SafetensorsEntry:
    if options.to_half and tensor.dtype in HALVED:
        return SafetensorsEntry(
            tensor.name, HALF, tensor.shape, lambda: to_float16(blocks(model, tensor), model.path, tensor.name)
        )
    return SafetensorsEntry(tensor.name, tensor.dtype, tensor.shape, lambda: blocks(model, tensor))


def _compare(entries: Sequence[SafetensorsEntry], result: ModelFile) -> None:
    """Read back the written tensors, and compare them with their sources bit by bit."""
    written = {tensor.name: tensor.storage.extent for tensor in result.tensors}
    for entry in entries:
        extent = written[entry.name]
        if extent is None:
            raise AssertionError
        offset = extent.offset
        for block in entry.blocks():
            raw = np.frombuffer(raw_bytes(block), np.uint8)
            for begin in range(0, raw.size, BLOCK_BYTES):
                expected = raw[begin : begin + BLOCK_BYTES]
                run = Extent(extent.path, offset + begin, expected.size)
                if not all(np.array_equal(piece, expected) for piece in extents.blocks(run, BYTE)):
                    raise WorkError(f"{entry.name} has different values in the output; nothing was written")
            offset += raw.size


def _removed_of_ranks(model: ModelFile) -> Iterator[RemovedItem]:
    """Yield the removed items of the ranks: the state of each optimizer, and all values that are not tensors."""
    rest = model.nbytes
    states: Counter[str] = Counter()
    for tensor in model.tensors:
        rest -= tensor.storage.stored_bytes
        if tensor.role not in WEIGHTS:
            states[tensor.name.partition(".")[0]] += tensor.storage.stored_bytes
    yield from (RemovedItem(name, StripPart.OPTIMIZER, nbytes) for name, nbytes in states.items())
    if rest > 0:
        yield RemovedItem("values beside the tensors", StripPart.TRAINING, rest)


def _verify(model: ModelFile, result: ModelFile, options: StripOptions, removed: frozenset[str]) -> None:
    """Verify that everything to be removed is gone, and that no other tensor has changed."""
    wrappers_left = result.about.pruning_wrappers
    if StripPart.MASKS in options.parts and wrappers_left:
        raise WorkError(
            f"the output of {model.path} still has a wrapper around {wrappers_left[0].layer}; nothing was written"
        )
    copies = options.copies
    left = next((tensor.name for tensor in result.tensors if copies is not None and copies.is_removed(tensor.name)), "")
    if left:
        raise WorkError(f"the output of {model.path} still has {left} of the other copy; nothing was written")
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    if model.format == "saved-model" and wrapped and StripPart.MASKS in options.parts:
        # Rebuilding without masks renumbers the variables; the stripper has compared them by their layers already.
        return
    before = {tensor.name: tensor for tensor in model.tensors}
    for tensor in result.tensors:
        original = before.get(tensor.name)
        if original is None or tensor.layer in wrapped:
            continue
        if tensor.name in removed and tensor.role == Role.OPTIMIZER and count_zeros(result, tensor) == tensor.size:
            # Optimizer state that the graph still references is set to zero instead of removed.
            continue
        if original.shape != tensor.shape or not bitwise_equal(model, original, result, tensor):
            raise WorkError(f"{tensor.name} of {model.path} has different values in the output; nothing was written")


def stats_for_report(
    model: ModelFile, meter: ProgressFactory = no_progress, *, beside: int = 0, is_gzipped: bool = False
) -> ModelStats:
    """Statistics of a model; with the gzip size if the model and `beside` are small, or if `is_gzipped` is set."""
    if is_gzipped or max(model.nbytes, beside) <= outputs.BIG_BYTES:
        return measure(model, get_codec(CodecName.GZIP, None), meter)
    with meter(f"measuring {model.path.name}", model.nbytes) as bar:
        return measure_stats(model, model.tensors, has_channels=False, tick=bar.advance)
