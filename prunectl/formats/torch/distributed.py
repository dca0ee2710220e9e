"""Distributed checkpoints of PyTorch (DCP): a pickle with the positions of the parts of each tensor, and their files.

`.metadata` is interpreted by the pickle VM, as every pickle here. Each part of a tensor is an archive of torch.save.
So is each byte entry (a value that is not a tensor), which PyTorch loads without `weights_only`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from prunectl.errors import InputError, UntrustedError, abbreviated
from prunectl.formats import budgets, state_dict, zip_read
from prunectl.formats.base import (
    Array,
    ModelFile,
    ModelInfo,
    NameAllocator,
    Role,
    Storage,
    Tensor,
    dtype_name,
    format_shape,
)
from prunectl.formats.extents import Extent, check_inside, file_states
from prunectl.formats.torch import model as torch_zip
from prunectl.formats.torch import views
from prunectl.formats.torch.boxes import TensorChunk, allocated_bytes, is_tiled, merged, pickle_scale, slices
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, PickleDict, describe_value
from prunectl.formats.torch.pickle.vm import interpret

_DISTRIBUTED = "torch.distributed."
_METADATA, _TENSOR, _BYTES = "Metadata", "TensorStorageMetadata", "BytesStorageMetadata"
_KNOWN = frozenset(
    {
        *(
            f"torch.distributed.{home}.{name}"
            for home in ("checkpoint", "_shard.checkpoint")
            for name in (
                *(f"metadata.{name}" for name in (_METADATA, _TENSOR, _BYTES, "TensorProperties", "StorageMeta")),
                *("metadata.ChunkStorageMetadata", "metadata.MetadataIndex", "metadata._MEM_FORMAT_ENCODING"),
                *("filesystem._StorageInfo", "filesystem._StoragePrefix"),
            )
        ),
        *(
            f"torch.distributed._shard.sharded_tensor.metadata.{name}"
            for name in ("TensorProperties", "MEM_FORMAT_ENCODING")
        ),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
    }
)
"""Classes that `.metadata` names beside plain data, from PyTorch 1.13 on: each only stores its arguments."""
_MOST_FIELDS = 64
"""Most fields of an instance; `Metadata` has five."""
_MODEL_KEYS = state_dict.MODEL_ROOTS | {"app"}
"""Keys that may enclose a whole checkpoint, and are then not part of the tensors' names."""


def open_checkpoint(path: Path) -> ModelFile:
    """Open the checkpoint that a `.metadata` describes."""
    if path.stat().st_size > budgets.MAX_PICKLE_BYTES:
        raise InputError(f"{path} is refused: it is longer than {budgets.MAX_PICKLE_BYTES} bytes")
    allocated = allocated_bytes(path.parent, ".distcp")
    scale = pickle_scale(allocated)
    program = interpret(path.read_bytes(), path, "it", scale=scale)
    _refuse_foreign(path, program.foreign_calls)
    fields = _fields(path, program.value, _METADATA)
    max_parts = max(budgets.MAX_SMALL_PARTS, allocated // budgets.PART_BYTES)
    entries = _dictionary(path, fields.get("state_dict_metadata"), max_parts)
    extents, all_extents = _extents(path, fields.get("storage_data"), max_parts)
    _refuse_repeated(path, entries, max_parts)
    parts: dict[str, list[TensorChunk]] = {}
    all_tensors: list[Tensor] = []
    for key, entry in entries:
        if _is_class(entry, _BYTES):
            continue
        tensor, parts[key] = _tensor(path, key, entry, extents)
        all_tensors.append(tensor)
    if not all_tensors:
        raise InputError(f"{path} holds no tensors")
    keys = _object_paths(path, fields.get("planner_data"))
    named, sections = _named(all_tensors, keys)
    described = state_dict.describe(named, sections)
    files = dict.fromkeys(extent.path for extent in all_extents)
    states = file_states(files)
    used = {part.extent for boxes in parts.values() for part in boxes}
    # Byte entries are told apart by their extents, not their names: PyTorch may see other names in a crafted pickle.
    code = _code(path, [extent for extent in all_extents if extent not in used], scale)
    has_optimizer = any(tensor.role is Role.OPTIMIZER for tensor in described)
    about = ModelInfo(
        producer="pytorch (distributed checkpoint)",
        wrappers=state_dict.wrappers(described),
        optimizer="optimizer state" if has_optimizer else "",
        code=code,
    )
    return ModelFile(
        path=path,
        format="torch-dcp",
        tensors=described,
        about=about,
        files=(path, *files),
        decode=partial(_decode, path, parts),
        stream=partial(_stream, path, parts),
        states=states,
    )


def _refuse_foreign(path: Path, calls: Sequence[str]) -> None:
    """Refuse a pickle that names a function or class that no checkpoint needs; PyTorch would call it on opening."""
    for call in calls:
        name = call.partition(" ")[2]
        if name not in _KNOWN:
            raise UntrustedError(f"{path} is refused: opened by PyTorch, its pickle would use {abbreviated(name)}")


def _code(path: Path, values: Sequence[Extent], scale: int) -> tuple[str, ...]:
    """The foreign calls that PyTorch would make when it loads the byte entries."""
    foreign_calls: dict[str, None] = {}
    seen: set[bytes] = set()
    num_values = entries = steps = 0
    last = Extent(path, 0, 0)
    for extent in sorted(values, key=lambda extent: (extent.path, extent.offset)):
        if extent.path == last.path and extent.offset < last.offset + last.nbytes:
            raise InputError(f"{path} is refused: two of its values overlap in {extent.path.name}")
        last = extent
        # The settings of an optimizer are saved for every parameter, and nearly all of them are equal.
        if extent.nbytes <= budgets.MAX_NAME_BYTES:
            with extent.path.open("rb") as file:
                file.seek(extent.offset)
                digest = hashlib.sha256(file.read(extent.nbytes)).digest()
            if digest in seen:
                continue
            seen.add(digest)
        num_values += 1
        archive = zip_read.open_part(extent)
        entries += len(archive.entries)
        calls, taken = _calls(archive)
        foreign_calls |= dict.fromkeys(calls)
        steps += taken
        max_values = budgets.MAX_SMALL_VALUES * scale
        if num_values > max_values or entries > max_values * budgets.MAX_VALUE_ENTRIES:
            raise InputError(f"{path} is refused: it holds more values beside the tensors than any checkpoint")
        if steps > budgets.MAX_PICKLE_STEPS * scale:
            raise InputError(f"{path} is refused: the pickles of its values take more steps than any checkpoint")
    return torch_zip.shorten(tuple(foreign_calls))


def _calls(archive: zip_read.Archive) -> tuple[list[str], int]:
    """The foreign calls of one byte entry, and the steps that its pickles took."""
    # PyTorch looks up entries without regard to case, in the folder of the first entry.
    pickles = [entry for name, entry in archive.entries.items() if name.lower().endswith(".pkl")]
    if not pickles or not all(entry.is_stored for entry in pickles):
        raise InputError(f"{archive.path} is damaged: a value in it is not what PyTorch writes")
    is_script = any("code/" in name.lower() or name.lower().endswith("constants.pkl") for name in archive.entries)
    programs = [torch_zip.program_of(archive, entry) for entry in pickles]
    calls = [call for program in programs for call in program.foreign_calls]
    return [torch_zip.SCRIPT_CODE] * is_script + calls, sum(program.steps for program in programs)


def _is_class(value: Any, name: str) -> bool:
    """Whether a value is an instance of a class of torch.distributed with this name."""
    return (
        isinstance(value, OpaqueCall)
        and isinstance(value.function, Global)
        and value.function.name == name
        and value.function.path.startswith(_DISTRIBUTED)
    )


def _fields(path: Path, value: Any, name: str) -> dict[str, Any]:
    if not _is_class(value, name) or not isinstance(value.state, PickleDict) or len(value.state.items) > _MOST_FIELDS:
        raise InputError(f"{path} is not the metadata of a distributed checkpoint: it has no {name}")
    return value.state.plain()


def _dictionary(path: Path, value: Any, max_parts: int) -> list[tuple[str, Any]]:
    if isinstance(value, PickleDict) and len(value.items) > max_parts:
        raise InputError(f"{path} is refused: it claims {len(value.items)} entries, more than its files could hold")
    if not isinstance(value, PickleDict) or not all(isinstance(key, str) for key, _ in value.items):
        raise InputError(f"{path} is damaged: it does not list the tensors")
    if len({key for key, _ in value.items}) < len(value.items):
        raise InputError(f"{path} is damaged: it lists a tensor twice")
    return value.items


PartExtents = Mapping[tuple[str, tuple[int, ...]], Extent]
"""The extent of each part of a tensor, by the tensor's name and the part's offsets in it."""


def _refuse_repeated(path: Path, entries: Sequence[tuple[str, Any]], max_parts: int) -> None:
    """Refuse more parts than there can be: in a crafted pickle, all entries may share one list of parts."""
    states = [entry.state for _, entry in entries if _is_class(entry, _TENSOR) and isinstance(entry.state, PickleDict)]
    chunks = (state.plain().get("chunks") for state in states if len(state.items) <= _MOST_FIELDS)
    if sum(len(parts) for parts in chunks if isinstance(parts, list)) > max_parts:
        raise InputError(f"{path} is refused: it claims more parts of tensors than its files could hold")


def _extents(path: Path, value: Any, max_parts: int) -> tuple[PartExtents, Sequence[Extent]]:
    """The extents of the parts of all tensors, and of all values, as the storage data gives them."""
    if isinstance(value, PickleDict) and len(value.items) > max_parts:
        raise InputError(f"{path} is refused: it claims {len(value.items)} parts, more than its files could hold")
    if not isinstance(value, PickleDict):
        raise InputError(f"{path} is damaged: it does not give the positions of the tensors")
    part_extents: dict[tuple[str, tuple[int, ...]], Extent] = {}
    all_extents: dict[Extent, None] = {}
    sizes: dict[str, int] = {}
    for key, info in value.items:
        index = _fields(path, key, "MetadataIndex")
        name, corner = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or not (corner is None or _is_shape(corner)):
            raise InputError(f"{path} is damaged: it does not give the position of each part of a tensor")
        extent = _extent(path, name, _fields(path, info, "_StorageInfo"), sizes)
        all_extents[extent] = None
        if corner is not None:
            part_extents[name, tuple(corner)] = extent
    return part_extents, list(all_extents)


def _extent(path: Path, key: str, where: Mapping[str, Any], sizes: dict[str, int]) -> Extent:
    """The extent of a part or a value, checked against its file; fills ``sizes`` with the length of the file."""
    name, offset, length = where.get("relative_path"), where.get("offset"), where.get("length")
    if not isinstance(name, str):
        raise InputError(f"{path} is damaged: it does not say in which file {abbreviated(key)} lies")
    if name in {"", ".", ".."} or "/" in name or "\\" in name:
        raise InputError(f"{path} is refused: it names a file outside its folder: {abbreviated(name)}")
    if where.get("transform_descriptors"):
        raise InputError(f"{path}: its parts are compressed or transformed, which prunectl does not read")
    if name not in sizes:
        file = path.with_name(name)
        if not file.is_file():
            raise InputError(f"{path} is incomplete: {abbreviated(name)} is missing")
        sizes[name] = file.stat().st_size
    if type(offset) is not int or type(length) is not int:
        raise InputError(f"{path} is damaged: it does not say where {abbreviated(name)} begins")
    check_inside(path.with_name(name), offset, length, sizes[name], key)
    return Extent(path.with_name(name), offset, length)


def _tensor(path: Path, key: str, entry: Any, extents: PartExtents) -> tuple[Tensor, list[TensorChunk]]:
    """A tensor by its metadata, and its parts."""
    fields = _fields(path, entry, _TENSOR)
    shape, chunks = fields.get("size"), fields.get("chunks")
    dtype = _dtype(path, key, fields.get("properties"))
    if not _is_shape(shape) or not isinstance(chunks, list):
        raise InputError(f"{path} is damaged: {abbreviated(key)} has no shape")
    parts: dict[tuple[tuple[int, ...], tuple[int, ...]], TensorChunk] = {}
    for chunk in chunks:
        box = _fields(path, chunk, "ChunkStorageMetadata")
        offsets, sizes = box.get("offsets"), box.get("sizes")
        if not (_is_shape(offsets) and _is_shape(sizes) and len(offsets) == len(sizes) == len(shape)):
            raise InputError(f"{path} is damaged: a part of {abbreviated(key)} has no place in it")
        extent = extents.get((key, tuple(offsets)))
        if extent is None:
            raise InputError(f"{path} is damaged: it does not say where a part of {abbreviated(key)} lies")
        parts[tuple(offsets), tuple(sizes)] = TensorChunk(tuple(offsets), tuple(sizes), extent)
    boxes = list(parts.values())
    if not is_tiled(tuple(shape), boxes):
        raise InputError(
            f"{path} is damaged: the parts of {abbreviated(key)} do not make up its shape {format_shape(shape)}"
        )
    stored = sum(part.extent.nbytes for part in boxes)
    nbytes = math.prod(shape) * dtype.itemsize
    storage = Storage(key, nbytes, None, min(stored, nbytes) if len(boxes) < 2 else nbytes)
    return Tensor(key, "", tuple(shape), dtype, Role.OTHER, storage), boxes


def _is_shape(value: Any) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(value, tuple | list)
        and len(value) <= budgets.MAX_AXES
        and all(type(length) is int and 0 <= length <= budgets.MAX_ELEMENTS for length in value)
    )


def _dtype(path: Path, key: str, properties: Any) -> np.dtype[Any]:
    """The dtype, which is the first item of the state of the properties, or its entry `dtype`."""
    state = properties.state if _is_class(properties, "TensorProperties") else None
    code = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, PickleDict):
        code = state.plain().get("dtype")
    name = code.name if isinstance(code, Global) else ""
    if name not in views.DTYPES:
        raise InputError(f"{path} holds {abbreviated(key)} in a type of number that prunectl does not read")
    return views.DTYPES[name]


def _object_paths(path: Path, planner: Any) -> dict[str, tuple[str, ...]]:
    """The keys that lead to each tensor in the saved dictionaries."""
    key_paths: dict[str, tuple[str, ...]] = {}
    characters = 0
    for key, steps in planner.items if isinstance(planner, PickleDict) else ():
        if not isinstance(key, str) or not isinstance(steps, tuple) or not 0 < len(steps) <= budgets.MAX_AXES:
            continue
        if all(isinstance(step, str | int) for step in steps):
            key_paths[key] = tuple(map(str, steps))
            characters += sum(map(len, key_paths[key]))
        if characters > budgets.MAX_NAMES_BYTES:
            raise InputError(f"{path} is refused: its names are longer than those of any model")
    return key_paths


def _named(tensors: Sequence[Tensor], paths: Mapping[str, tuple[str, ...]]) -> tuple[list[Tensor], frozenset[str]]:
    """The tensors under the names of the model's state dict, and the first keys of those that have several.

    Keys that enclose the whole model are left out of the names, since the model's class does not know them.
    """
    steps = {tensor.name: paths.get(tensor.name, (tensor.name,)) for tensor in tensors}
    while _share_first(list(steps.values())) and next(iter(steps.values()))[0] in _MODEL_KEYS:
        steps = {name: path[1:] for name, path in steps.items()}
    sections = frozenset(path[0] for path in steps.values() if len(path) > 1)
    models = sections & state_dict.MODEL_ROOTS
    allocator = NameAllocator()
    named = []
    for tensor in tensors:
        path = steps[tensor.name]
        is_in_model = len(models) == 1 and len(path) > 1 and path[0] in models
        named.append(replace(tensor, name=allocator.unique(".".join(path[1:] if is_in_model else path))))
    return named, sections


def _share_first(paths: Sequence[tuple[str, ...]]) -> bool:
    return all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1


def _decode(path: Path, parts: Mapping[str, Sequence[TensorChunk]], tensor: Tensor) -> Array:
    """Assemble a tensor from its parts, each memory-mapped."""
    boxes = parts[tensor.storage.key]
    if len(boxes) == 1:
        return _read(path, tensor, boxes[0])
    whole = np.empty(tensor.shape, tensor.dtype)
    for part in boxes:
        whole[slices(part)] = _read(path, tensor, part)
    whole.flags.writeable = False
    return whole


def _stream(path: Path, parts: Mapping[str, Sequence[TensorChunk]], tensor: Tensor) -> Iterator[Array]:
    """Yield a tensor in C order, in pieces that are valid only until the next one: at most a slab is in memory."""
    boxes: list[TensorChunk] = []
    for part in parts[tensor.storage.key]:
        if not math.prod(part.sizes):
            continue
        run = _run(_located(path, tensor, part))
        if run is None or not tensor.shape:
            yield _decode(path, parts, tensor)
            return
        boxes.append(replace(part, extent=run))
    yield from merged(tensor.shape, boxes, tensor.dtype)


def _run(part: Tensor) -> Extent | None:
    """The extent of a part's elements; None unless they are contiguous, uncompressed and little-endian."""
    extent = part.storage.extent
    if extent is None or part.strides is not None or part.storage.big_endian:
        return None
    return Extent(extent.path, extent.offset + part.start * part.dtype.itemsize, part.nbytes)


@lru_cache(maxsize=1 << 13)
def _opened(path: Path, extent: Extent) -> tuple[zip_read.Archive, tuple[Tensor, ...]]:
    """The archive of torch.save at an extent, and its tensors."""
    archive = zip_read.open_part(extent)
    source = torch_zip.pickle_source(archive, torch_zip.top_folder(archive), "data")
    _refuse_foreign(path, source.program.foreign_calls)
    return archive, tuple(torch_zip.tensors(extent.path, source, {})[0])


def _located(path: Path, tensor: Tensor, part: TensorChunk) -> Tensor:
    """A part as a tensor of its own, refused unless it is what the metadata says."""
    _, tensors = _opened(path, part.extent)
    if len(tensors) != 1 or (tensors[0].shape, tensors[0].dtype) != (part.sizes, tensor.dtype):
        what = f"{dtype_name(tensor.dtype)} of shape {format_shape(part.sizes)}"
        raise InputError(f"{part.extent.path} is damaged: a part of {describe_value(tensor.name)} is no {what}")
    return tensors[0]


def _read(path: Path, tensor: Tensor, part: TensorChunk) -> Array:
    located, (archive, _) = _located(path, tensor, part), _opened(path, part.extent)
    opened = ModelFile(part.extent.path, "torch", (), ModelInfo(), (part.extent.path,), torch_zip.decoder(archive))
    return opened.read(located)
