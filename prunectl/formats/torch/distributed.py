"""Distributed checkpoints of PyTorch (DCP): a pickle that says where the parts of each tensor lie, and their files.

`.metadata` is followed by our own pickle machine, as every pickle here; each part is what torch.save wrote of a tensor.
So is each value beside the tensors (byte entries), which PyTorch loads without `weights_only`.
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

_HERE = "torch.distributed."
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
"""Classes that a metadata names beside plain data, from PyTorch 1.13 on: each only holds what it is given."""
_MOST_FIELDS = 64
"""Fields of an instance; the metadata itself has five."""
_OUTER = state_dict.MODEL_ROOTS | {"app"}
"""Names of entries that only say that here is the model."""


def open_checkpoint(path: Path) -> ModelFile:
    """Open the checkpoint that a `.metadata` describes."""
    if path.stat().st_size > budgets.MAX_PICKLE_BYTES:
        raise InputError(f"{path} is refused: it is longer than {budgets.MAX_PICKLE_BYTES} bytes")
    allocated = allocated_bytes(path.parent, ".distcp")
    scale = pickle_scale(allocated)
    program = interpret(path.read_bytes(), path, "it", scale=scale)
    _refuse_foreign(path, program.foreign_calls)
    fields = _fields(path, program.value, _METADATA)
    most = max(budgets.MAX_SMALL_PARTS, allocated // budgets.PART_BYTES)
    entries = _dictionary(path, fields.get("state_dict_metadata"), most)
    places, everything = _places(path, fields.get("storage_data"), most)
    _refuse_repeated(path, entries, most)
    parts: dict[str, list[TensorChunk]] = {}
    found: list[Tensor] = []
    for key, entry in entries:
        if _is_class(entry, _BYTES):
            continue
        tensor, parts[key] = _tensor(path, key, entry, places)
        found.append(tensor)
    if not found:
        raise InputError(f"{path} holds no tensors")
    keys = _object_paths(path, fields.get("planner_data"))
    named, sections = _named(found, keys)
    described = state_dict.describe(named, sections)
    files = dict.fromkeys(place.path for place in everything)
    states = file_states(files)
    used = {part.place for boxes in parts.values() for part in boxes}
    # By what reads are told apart, not by names: PyTorch may find other ones in a pickle that was made for that.
    code = _code(path, [place for place in everything if place not in used], scale)
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
    """Refuse a pickle that would call what no checkpoint needs, as soon as PyTorch opened it."""
    for call in calls:
        name = call.partition(" ")[2]
        if name not in _KNOWN:
            raise UntrustedError(f"{path} is refused: opened by PyTorch, its pickle would use {abbreviated(name)}")


def _code(path: Path, values: Sequence[Extent], scale: int) -> tuple[str, ...]:
    """What PyTorch would run when it opens the values beside the tensors."""
    found: dict[str, None] = {}
    seen: set[bytes] = set()
    looked_at = entries = steps = 0
    last = Extent(path, 0, 0)
    for place in sorted(values, key=lambda extent: (extent.path, extent.offset)):
        if place.path == last.path and place.offset < last.offset + last.nbytes:
            raise InputError(f"{path} is refused: two of its values lie over each other in {place.path.name}")
        last = place
        # The settings of an optimizer are saved for every parameter, and nearly all of them are the same.
        if place.nbytes <= budgets.MAX_NAME_BYTES:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                digest = hashlib.sha256(file.read(place.nbytes)).digest()
            if digest in seen:
                continue
            seen.add(digest)
        looked_at += 1
        archive = zip_read.open_part(place)
        entries += len(archive.entries)
        calls, taken = _calls(archive)
        found |= dict.fromkeys(calls)
        steps += taken
        most = budgets.MAX_SMALL_VALUES * scale
        if looked_at > most or entries > most * budgets.MAX_VALUE_ENTRIES:
            raise InputError(f"{path} is refused: it holds more values beside the tensors than any checkpoint")
        if steps > budgets.MAX_PICKLE_STEPS * scale:
            raise InputError(f"{path} is refused: the pickles of its values take more steps than any checkpoint")
    return torch_zip.shorten(tuple(found))


def _calls(archive: zip_read.Archive) -> tuple[list[str], int]:
    """What loading one value would call, and the steps that it took to see that."""
    # PyTorch looks for entries without regard to case, in a folder that it takes from the first of them.
    pickles = [entry for name, entry in archive.entries.items() if name.lower().endswith(".pkl")]
    if not pickles or not all(entry.is_stored for entry in pickles):
        raise InputError(f"{archive.path} is damaged: a value in it is not what PyTorch writes")
    is_script = any("code/" in name.lower() or name.lower().endswith("constants.pkl") for name in archive.entries)
    programs = [torch_zip.program_of(archive, entry) for entry in pickles]
    calls = [call for program in programs for call in program.foreign_calls]
    return [torch_zip.SCRIPT_CODE] * is_script + calls, sum(program.steps for program in programs)


def _is_class(value: Any, name: str) -> bool:
    """Whether a value is an instance of a class of torch.distributed.checkpoint."""
    return (
        isinstance(value, OpaqueCall)
        and isinstance(value.function, Global)
        and value.function.name == name
        and value.function.path.startswith(_HERE)
    )


def _fields(path: Path, value: Any, name: str) -> dict[str, Any]:
    if not _is_class(value, name) or not isinstance(value.state, PickleDict) or len(value.state.items) > _MOST_FIELDS:
        raise InputError(f"{path} is not the metadata of a distributed checkpoint: it has no {name}")
    return value.state.plain()


def _dictionary(path: Path, value: Any, most: int) -> list[tuple[str, Any]]:
    if isinstance(value, PickleDict) and len(value.items) > most:
        raise InputError(f"{path} is refused: it claims {len(value.items)} entries, more than its files could hold")
    if not isinstance(value, PickleDict) or not all(isinstance(key, str) for key, _ in value.items):
        raise InputError(f"{path} is damaged: it does not list the tensors")
    if len({key for key, _ in value.items}) < len(value.items):
        raise InputError(f"{path} is damaged: it lists a tensor twice")
    return value.items


Places = Mapping[tuple[str, tuple[int, ...]], Extent]
"""Where the part of a tensor lies that begins at these offsets."""


def _refuse_repeated(path: Path, entries: Sequence[tuple[str, Any]], most: int) -> None:
    """Refuse lists of more parts than there can be: one list may stand in every entry."""
    states = [entry.state for _, entry in entries if _is_class(entry, _TENSOR) and isinstance(entry.state, PickleDict)]
    chunks = (state.plain().get("chunks") for state in states if len(state.items) <= _MOST_FIELDS)
    if sum(len(parts) for parts in chunks if isinstance(parts, list)) > most:
        raise InputError(f"{path} is refused: it claims more parts of tensors than its files could hold")


def _places(path: Path, value: Any, most: int) -> tuple[Places, Sequence[Extent]]:
    """Where every part of a tensor lies, and where anything lies, as the storage says."""
    if isinstance(value, PickleDict) and len(value.items) > most:
        raise InputError(f"{path} is refused: it claims {len(value.items)} parts, more than its files could hold")
    if not isinstance(value, PickleDict):
        raise InputError(f"{path} is damaged: it does not say where the tensors lie")
    found: dict[tuple[str, tuple[int, ...]], Extent] = {}
    everything: dict[Extent, None] = {}
    sizes: dict[str, int] = {}
    for key, info in value.items:
        index = _fields(path, key, "MetadataIndex")
        name, corner = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or not (corner is None or _is_shape(corner)):
            raise InputError(f"{path} is damaged: it does not say which part of which tensor lies where")
        place = _place(path, name, _fields(path, info, "_StorageInfo"), sizes)
        everything[place] = None
        if corner is not None:
            found[name, tuple(corner)] = place
    return found, list(everything)


def _place(path: Path, key: str, where: Mapping[str, Any], sizes: dict[str, int]) -> Extent:
    """Where one part or value lies, held against the file; fill in how long that is."""
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


def _tensor(path: Path, key: str, entry: Any, places: Places) -> tuple[Tensor, list[TensorChunk]]:
    """A tensor by its metadata, and the parts that it lies in."""
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
        place = places.get((key, tuple(offsets)))
        if place is None:
            raise InputError(f"{path} is damaged: it does not say where a part of {abbreviated(key)} lies")
        parts[tuple(offsets), tuple(sizes)] = TensorChunk(tuple(offsets), tuple(sizes), place)
    boxes = list(parts.values())
    if not is_tiled(tuple(shape), boxes):
        raise InputError(
            f"{path} is damaged: the parts of {abbreviated(key)} do not make up its shape {format_shape(shape)}"
        )
    stored = sum(part.place.nbytes for part in boxes)
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
    """The type of numbers, which stands first in what the properties pickle of themselves."""
    state = properties.state if _is_class(properties, "TensorProperties") else None
    code = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, PickleDict):
        code = state.plain().get("dtype")
    name = code.name if isinstance(code, Global) else ""
    if name not in views.DTYPES:
        raise InputError(f"{path} holds {abbreviated(key)} in a type of number that prunectl does not read")
    return views.DTYPES[name]


def _object_paths(path: Path, planner: Any) -> dict[str, tuple[str, ...]]:
    """Where in the dictionaries that were saved each tensor stood."""
    found: dict[str, tuple[str, ...]] = {}
    characters = 0
    for key, steps in planner.items if isinstance(planner, PickleDict) else ():
        if not isinstance(key, str) or not isinstance(steps, tuple) or not 0 < len(steps) <= budgets.MAX_AXES:
            continue
        if all(isinstance(step, str | int) for step in steps):
            found[key] = tuple(map(str, steps))
            characters += sum(map(len, found[key]))
        if characters > budgets.MAX_NAMES_BYTES:
            raise InputError(f"{path} is refused: its names are longer than those of any model")
    return found


def _named(tensors: Sequence[Tensor], paths: Mapping[str, tuple[str, ...]]) -> tuple[list[Tensor], frozenset[str]]:
    """The tensors under the names that a model has for them, and the entries that held further ones.

    Entries that only say that here is the model are left out of the names: the class of the model does not know them.
    """
    steps = {tensor.name: paths.get(tensor.name, (tensor.name,)) for tensor in tensors}
    while _share_first(list(steps.values())) and next(iter(steps.values()))[0] in _OUTER:
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
    """Put a tensor together from its parts, each mapped where it lies."""
    boxes = parts[tensor.storage.key]
    if len(boxes) == 1:
        return _read(path, tensor, boxes[0])
    whole = np.empty(tensor.shape, tensor.dtype)
    for part in boxes:
        whole[slices(part)] = _read(path, tensor, part)
    whole.flags.writeable = False
    return whole


def _stream(path: Path, parts: Mapping[str, Sequence[TensorChunk]], tensor: Tensor) -> Iterator[Array]:
    """Yield a tensor in C order from its parts, each piece valid until the next: memory stays a slab of it."""
    boxes: list[TensorChunk] = []
    for part in parts[tensor.storage.key]:
        if not math.prod(part.sizes):
            continue
        run = _run(_located(path, tensor, part))
        if run is None or not tensor.shape:
            yield _decode(path, parts, tensor)
            return
        boxes.append(replace(part, place=run))
    yield from merged(tensor.shape, boxes, tensor.dtype)


def _run(part: Tensor) -> Extent | None:
    """Where the numbers of a part lie, if they do so one after another."""
    extent = part.storage.extent
    if extent is None or part.strides is not None or part.storage.big_endian:
        return None
    return Extent(extent.path, extent.offset + part.start * part.dtype.itemsize, part.nbytes)


@lru_cache(maxsize=1 << 13)
def _opened(path: Path, place: Extent) -> tuple[zip_read.Archive, tuple[Tensor, ...]]:
    """What torch.save wrote at a place."""
    archive = zip_read.open_part(place)
    source = torch_zip.pickle_source(archive, torch_zip.top_folder(archive), "data")
    _refuse_foreign(path, source.program.foreign_calls)
    return archive, tuple(torch_zip.tensors(place.path, source, {})[0])


def _located(path: Path, tensor: Tensor, part: TensorChunk) -> Tensor:
    """A part as a tensor of its own, if it is what the metadata says."""
    _, found = _opened(path, part.place)
    if len(found) != 1 or (found[0].shape, found[0].dtype) != (part.sizes, tensor.dtype):
        what = f"{dtype_name(tensor.dtype)} of shape {format_shape(part.sizes)}"
        raise InputError(f"{part.place.path} is damaged: a part of {describe_value(tensor.name)} is no {what}")
    return found[0]


def _read(path: Path, tensor: Tensor, part: TensorChunk) -> Array:
    located, (archive, _) = _located(path, tensor, part), _opened(path, part.place)
    opened = ModelFile(part.place.path, "torch", (), ModelInfo(), (part.place.path,), torch_zip.decoder(archive))
    return opened.read(located)
