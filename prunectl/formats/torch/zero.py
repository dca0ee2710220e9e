"""Checkpoints of DeepSpeed ZeRO (Rajbhandari 2020): flat arrays of 32-bit weights, partitioned over the ranks.

The weights are merged as in DeepSpeed's own `zero_to_fp32`: in stages 1 and 2 the partitions of a parameter group are
concatenated and hold its weights one after another; in stage 3 each weight is cut into one slice per rank.
Nothing is unpickled.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, abbreviated, some_tensors
from prunectl.formats import budgets, extents, state_dict, zip_read
from prunectl.formats.base import Array, ModelFile, ModelInfo, Role, Storage, Tensor, format_shape
from prunectl.formats.detect import ZERO_RANK
from prunectl.formats.extents import Extent
from prunectl.formats.torch import model as torch_zip
from prunectl.formats.torch import tree, views
from prunectl.formats.torch.boxes import allocated_bytes, pickle_scale
from prunectl.formats.torch.pickle.opcodes import OpaqueCall, PickleDict

_GROUPS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""The entry that holds the flat partitions of a rank, by the ZeRO stage."""
_FLOAT = np.dtype(np.float32)
Runs = tuple[Extent, ...]
"""The extents of a tensor's elements, in order."""


@dataclass(slots=True)
class _File:
    """One file of the checkpoint: entries of its pickle, and the source of its storages."""

    path: Path
    state: extents.FileState
    source: torch_zip.PickleSource
    fields: dict[str, Any]

    def run(self, value: Any, name: str) -> tuple[Tensor, Extent]:
        """A contiguous, uncompressed tensor, and its extent in the file."""
        value = tree.inner_tensor(value)
        if not (isinstance(value, OpaqueCall) and value.path in views.VIEW_CALLS):
            raise InputError(f"{self.path} is damaged: {abbreviated(name)} is not a tensor")
        view = views.view_of(self.path, value, name)
        storage = self.source.find(view.storage)
        if storage.extent is None or view.strides is not None or storage.big_endian:
            raise InputError(f"{self.path}: {abbreviated(name)} is compressed or not a plain tensor, which is not read")
        tensor = Tensor(name, "", view.shape, view.dtype, Role.OTHER, storage)
        offset = storage.extent.offset + view.start * view.dtype.itemsize
        return tensor, Extent(self.path, offset, tensor.nbytes)

    def dictionary(self, name: str, *, is_needed: bool = True) -> list[tuple[str, Any]]:
        """The items of an entry that is a dictionary with string keys; empty if it is missing and not needed."""
        value = self.fields.get(name)
        if value is None and not is_needed:
            return []
        return _items(self.path, value, name)


def _items(path: Path, value: Any, name: str) -> list[tuple[str, Any]]:
    items = value.items if isinstance(value, PickleDict) else None
    if isinstance(value, OpaqueCall):
        items = value.pairs.items if value.pairs is not None else []
    if items is None or not all(isinstance(key, str) for key, _ in items):
        raise InputError(f"{path} is damaged: it has no {name}")
    return items


def open_checkpoint(path: Path) -> ModelFile:
    """Open a checkpoint by the file with the optimizer states of its first rank."""
    allocated = allocated_bytes(path.parent, "_states.pt")
    scale = pickle_scale(allocated)
    ranks = _ranks(path)
    states = _open(ranks, "optimizer_state_dict", scale)
    stage = _stage(states[0])
    _check_count(states[0], len(states))
    models = _open(_model_files(path.parent, stage, len(states)), "", scale)
    slices = [_slices(state, _GROUPS[stage]) for state in states]
    max_parts = max(budgets.MAX_SMALL_PARTS, scale * budgets.PICKLE_SCALE_BYTES // budgets.PART_BYTES)
    groups = [[(name, _shape(models[0].path, name, shape)) for name, shape in group] for group in _shapes(models[0])]
    if sum(map(len, groups)) * len(states) > max_parts:
        raise InputError(f"{path} is refused: it claims more parts of tensors than its files could hold")
    runs: dict[str, Runs] = {}
    by_name: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], where: Runs) -> None:
        if name in by_name:
            raise InputError(f"{path} is damaged: it holds {abbreviated(name)} twice")
        runs[name] = where
        nbytes = math.prod(shape) * dtype.itemsize
        by_name[name] = Tensor(name, "", shape, dtype, Role.OTHER, Storage(name, nbytes, None, nbytes))

    merge = _sliced_weights if stage == 3 else _consecutive_weights
    for name, shape, where in merge(path, slices, groups):
        add(name, shape, _FLOAT, where)
    for name, shape, dtype, where in (*_frozen(models, stage), *_others(models[0], stage, runs)):
        add(name, shape, dtype, where)
    originals = _originals(models[0], by_name.keys())
    tied = [replace(by_name[original], name=name) for name, original in originals.items() if original in by_name]
    untied = {name: original for name, original in originals.items() if original not in by_name}
    in_module, missing = _untied(models[0], stage, untied)
    for name, value in in_module:
        tensor, run = models[0].run(value, name)
        add(name, tensor.shape, tensor.dtype, (run,))
    # A tied name takes a few bytes in the checkpoint, but a pruned copy holds all elements of its tensor.
    max_bytes = max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_READINGS * allocated)
    if len(tied) > budgets.MAX_TIED or sum(tensor.nbytes for tensor in tied) > max_bytes:
        raise InputError(f"{path} is refused: its tensors reuse the bytes that they share too many times")
    if not by_name:
        raise InputError(f"{path} holds no tensors")
    described = (*state_dict.describe([*by_name.values(), *tied]), *_moments(states))
    calls = dict.fromkeys(call for file in (*states, *models) for call in file.source.program.foreign_calls)
    about = ModelInfo(
        producer=f"deepspeed (ZeRO stage {stage}, {len(states)} ranks)",
        optimizer="optimizer state",
        code=torch_zip.shorten(tuple(calls)),
        notes=_note_untied(missing),
    )
    files = (path, *(file for file in (*ranks, *(model.path for model in models)) if file != path))
    return ModelFile(
        path=path,
        format="deepspeed-zero",
        tensors=described,
        about=about,
        files=files,
        decode=partial(_decode, runs),
        stream=partial(_stream, runs),
        states={file.path: file.state for file in (*states, *models)},
    )


def _note_untied(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    verb = "is" if len(names) == 1 else "are"
    return (f"{some_tensors(names)} {verb} not in the checkpoint: it was saved without what they are tied to.",)


def _ranks(path: Path) -> list[Path]:
    """The files with the optimizer states of all ranks, in their order."""
    prefix = path.name.partition("zero_pp_rank_")[0]
    by_rank: dict[int, Path] = {}
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(prefix)]
    for name in names:
        match = ZERO_RANK.fullmatch(name)
        if match is None:
            continue
        if int(match[2]):
            raise InputError(
                f"{path.parent} was saved with model parallelism, which prunectl does not read",
                hint="convert it with DeepSpeed's ds_to_universal.py",
            )
        if (first := by_rank.setdefault(int(match[1]), path.with_name(name))).name != name:
            raise InputError(f"{path.parent} is damaged: {first.name} and {name} are of the same rank")
    if len(by_rank) > budgets.MAX_FILES:
        raise InputError(f"{path.parent} is refused: it has more than {budgets.MAX_FILES} files")
    if missing := [rank for rank in range(len(by_rank)) if rank not in by_rank]:
        raise InputError(f"{path.parent} is incomplete: the optimizer states of rank {missing[0]} are missing")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _open(paths: Sequence[Path], entry: str, scale: int) -> list[_File]:
    """Interpret the pickle of each file; the fields are those of ``entry``, or all entries if it is empty."""
    opened, steps = [], 0
    for path in paths:
        state = extents.file_state(path)
        archive = zip_read.open_archive(path)
        source = torch_zip.pickle_source(archive, torch_zip.top_folder(archive), "data")
        steps += source.program.steps
        if steps > scale * budgets.MAX_PICKLE_STEPS:
            raise InputError(f"{path} is refused: with those of the other ranks, its pickle takes too many steps")
        fields = dict(_items(path, source.program.value, "entries"))
        opened.append(_File(path, state, source, dict(_items(path, fields.get(entry), entry)) if entry else fields))
    return opened


def _stage(state: _File) -> int:
    """The ZeRO stage, saved as a number or as a member of DeepSpeed's enumeration."""
    value = state.fields.get("zero_stage")
    number = value.arg(0) if isinstance(value, OpaqueCall) else value
    if type(number) is not int or number not in _GROUPS:
        raise InputError(f"{state.path} is not of ZeRO stage 1, 2 or 3")
    return number


def _check_count(state: _File, count: int) -> None:
    value = state.fields.get("partition_count")
    counts = value if isinstance(value, list | tuple) else [value]
    numbers = [number for number in counts if type(number) is int]
    if numbers and max(numbers) != count:
        raise InputError(f"{state.path.parent} is incomplete: {max(numbers)} ranks saved it, but it has {count}")


def _model_files(folder: Path, stage: int, ranks: int) -> list[Path]:
    """The files with names, shapes and weights that are not trained: one per rank in stage 3, else a single one."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    names = names if stage == 3 else ["mp_rank_00_model_states.pt"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is incomplete: {name} is missing")
    return [folder / name for name in names]


def _slices(state: _File, entry: str) -> list[Extent]:
    """The extent of a rank's partition of each parameter group."""
    groups = state.fields.get(entry)
    if not isinstance(groups, list | tuple) or len(groups) > budgets.MAX_FILES:
        raise InputError(f"{state.path} is damaged: it has no {entry}")
    flat_tensors = [state.run(group, f"{entry}.{number}") for number, group in enumerate(groups)]
    if any(tensor.dtype != _FLOAT or len(tensor.shape) != 1 for tensor, _ in flat_tensors):
        raise InputError(f"{state.path} is damaged: {entry} is not flat, or not of 32-bit floats")
    return [run for _, run in flat_tensors]


def _shapes(model: _File) -> list[list[tuple[str, Any]]]:
    """The names and shapes of the trained weights, group by group."""
    groups = model.fields.get("param_shapes")
    groups = groups if isinstance(groups, list | tuple) else [groups]
    return [_items(model.path, group, "param_shapes") for group in groups]


def _shape(path: Path, name: str, value: Any) -> tuple[int, ...]:
    inner = value.arg(0) if isinstance(value, OpaqueCall) and value.path == "torch.Size" else value
    is_shape = isinstance(inner, list | tuple) and len(inner) <= budgets.MAX_AXES
    if not is_shape or not all(type(length) is int and 0 <= length <= budgets.MAX_ELEMENTS for length in inner):
        raise InputError(f"{path} is damaged: it does not give the shape of {abbreviated(name)}")
    return tuple(inner)


Group = Sequence[tuple[str, tuple[int, ...]]]
Weights = Iterator[tuple[str, tuple[int, ...], Runs]]


def _consecutive_weights(path: Path, slices: Sequence[Sequence[Extent]], groups: Sequence[Group]) -> Weights:
    """Yield the weights of stages 1 and 2, which lie one after another in the concatenated partitions of the ranks."""
    if any(len(rank) != len(groups) for rank in slices):
        raise InputError(f"{path} is damaged: its ranks have other groups of weights than its model")
    align = 2 * len(slices) * _FLOAT.itemsize
    for number, group in enumerate(groups):
        flat = _Flat([rank[number] for rank in slices])
        offset = 0
        for name, shape in group:
            nbytes = math.prod(shape) * _FLOAT.itemsize
            yield name, shape, flat.cut(path, name, offset, nbytes)
            offset += nbytes
        if -(-offset // align) != -(-flat.nbytes // align):
            raise InputError(f"{path} is damaged: its shapes take {offset} bytes, but its ranks hold {flat.nbytes}")


def _sliced_weights(path: Path, slices: Sequence[Sequence[Extent]], groups: Sequence[Group]) -> Weights:
    """Yield the weights of stage 3, each cut into equal slices, one per rank; the last slices are padded."""
    flats = [_Flat(rank) for rank in slices]
    offset = 0
    for name, shape in (pair for group in groups for pair in group):
        left = math.prod(shape) * _FLOAT.itemsize
        nbytes = -(-math.prod(shape) // len(flats)) * _FLOAT.itemsize
        where: list[Extent] = []
        for flat in flats:
            where += flat.cut(path, name, offset, min(nbytes, left))
            left -= min(nbytes, left)
        yield name, shape, tuple(where)
        offset += nbytes
    if any(flat.nbytes != offset for flat in flats):
        raise InputError(f"{path} is damaged: its shapes take {offset} bytes of each rank, which hold others")


class _Flat:
    """Extents concatenated to one flat run of bytes."""

    def __init__(self, runs: Sequence[Extent]) -> None:
        self._runs = runs
        self._begins = [0, *accumulate(run.nbytes for run in runs)]
        self.nbytes = self._begins[-1]

    def cut(self, path: Path, name: str, offset: int, nbytes: int) -> Runs:
        """The extents of ``nbytes`` bytes from ``offset`` on."""
        if offset + nbytes > self.nbytes:
            raise InputError(f"{path} is damaged: its ranks do not hold all of {abbreviated(name)}")
        pieces: list[Extent] = []
        while nbytes:
            number = bisect_right(self._begins, offset) - 1
            run, begin = self._runs[number], offset - self._begins[number]
            taken = min(nbytes, run.nbytes - begin)
            pieces.append(Extent(run.path, run.offset + begin, taken))
            offset, nbytes = offset + taken, nbytes - taken
        return tuple(pieces)


Others = Iterator[tuple[str, tuple[int, ...], np.dtype[Any], Runs]]


def _frozen(models: Sequence[_File], stage: int) -> Others:
    """Yield the weights that were not trained; in stage 3 each rank holds a slice of them, too."""
    fragments = [dict(model.dictionary("frozen_param_fragments", is_needed=False)) for model in models]
    for name, value in models[0].dictionary("frozen_param_shapes", is_needed=False):
        shape = _shape(models[0].path, name, value)
        slices = [model.run(parts.get(name), name) for model, parts in zip(models, fragments, strict=True)]
        dtype = slices[0][0].dtype
        nbytes = math.prod(shape) * dtype.itemsize
        flat = _Flat([run for _, run in slices])
        if any(tensor.dtype != dtype for tensor, _ in slices) or (stage < 3 and flat.nbytes != nbytes):
            raise InputError(f"{models[0].path} is damaged: {abbreviated(name)} is not of shape {format_shape(shape)}")
        yield name, shape, dtype, flat.cut(models[0].path, name, 0, nbytes)


def _others(model: _File, stage: int, runs: Mapping[str, Runs]) -> Others:
    """Yield the module's buffers and, in stages 1 and 2, its weights outside the groups, which stage 3 saves empty."""
    names = model.fields.get("buffer_names")
    buffers = {name for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else set()
    tied = dict(model.dictionary("shared_params", is_needed=False))
    frozen = dict(model.dictionary("frozen_param_shapes", is_needed=False))
    for name, value in model.dictionary("module"):
        is_other = not (stage == 3 or name in runs or name in tied or name in frozen)
        if name in buffers or (is_other and _is_tensor(value)):
            tensor, run = model.run(value, name)
            yield name, tensor.shape, tensor.dtype, (run,)


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of any kind: modules may also save values that are not tensors."""
    value = tree.inner_tensor(value)
    return isinstance(value, OpaqueCall) and value.path.rpartition(".")[2].startswith("_rebuild_")


def _originals(model: _File, tensor_names: KeysView[str]) -> dict[str, str]:
    """The end of each tied name's chain of ties: the name of a tensor, or the last name if the chain has no tensor."""
    pairs = dict(model.dictionary("shared_params", is_needed=False))
    ends: dict[str, str] = {}
    for name in pairs:
        chain: dict[str, None] = {}
        end = name
        while end in pairs and end not in tensor_names and end not in ends and end not in chain:
            chain[end] = None
            end = pairs[end]
            if not isinstance(end, str):
                raise InputError(f"{model.path} is damaged: its shared_params are not pairs of names")
        ends |= dict.fromkeys(chain, ends.get(end, end))
    return ends


def _untied(model: _File, stage: int, ends: Mapping[str, str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Of the names that are tied to no tensor: items that the module itself holds, and names that are missing.

    DeepSpeed can leave out frozen weights, but still lists the names that are tied to them.
    """
    module = dict(model.dictionary("module"))
    # Stage 3 leaves the module empty.
    in_module = [(name, module[name]) for name in ends if stage < 3 and name in module]
    missing = [name for name in ends if stage == 3 or name not in module]
    for name in missing:
        if ends[name] in module:
            raise InputError(f"{model.path} is damaged: {abbreviated(name)} is tied to a tensor that it does not hold")
    return in_module, missing


def _moments(states: Sequence[_File]) -> Iterator[Tensor]:
    """Yield the state tensors of the optimizers, such as moments, rank by rank."""
    for rank, state in enumerate(states):
        for tensor in torch_zip.tensors(state.path, state.source, {})[0]:
            if tensor.storage.extent is None or any(group in tensor.name for group in _GROUPS.values()):
                continue
            name = f"optimizer.rank{rank}.{tensor.name}"
            storage = replace(tensor.storage, key=f"rank{rank}/{tensor.storage.key}")
            yield replace(tensor, name=name, role=Role.OPTIMIZER, storage=storage)


def _stream(runs: Mapping[str, Runs], tensor: Tensor) -> Iterator[Array]:
    for run in runs[tensor.storage.key]:
        yield from extents.blocks(run, tensor.dtype)


def _decode(runs: Mapping[str, Runs], tensor: Tensor) -> Array:
    whole = np.empty(tensor.size, tensor.dtype)
    done = 0
    for piece in _stream(runs, tensor):
        whole[done : done + piece.size] = piece
        done += piece.size
    whole.flags.writeable = False
    return whole.reshape(tensor.shape)
