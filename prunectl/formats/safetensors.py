"""Safetensors: files of a length, a JSON header and one buffer, and sharded models with an index; also their strip."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats import budgets, masked_params, registry, state_dict
from prunectl.formats.base import (
    WRAPPING,
    Array,
    DtypeTable,
    ModelFile,
    ModelInfo,
    RemovedItem,
    Role,
    Storage,
    StripOptions,
    StripPart,
    Tensor,
    dtype_name,
    format_shape,
)
from prunectl.formats.extents import Extent, blocks, file_bytes, file_state, raw_bytes
from prunectl.formats.masked_params import MaskedParam
from prunectl.formats.patch import HALF, HALVED, TensorUpdate, apply_mask, broadcast_mask, patch_files, to_float16
from prunectl.formats.safe_json import SURROGATES, parse_object, read_object
from prunectl.formats.state_dict import GRADIENT_LEAVES, OPTIMIZER_ROOTS

LENGTH_BYTES = 8

_MAX_BITS = 63

DTYPES = DtypeTable(
    {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    },
    {
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    },
)


def open_model(path: Path) -> ModelFile:
    """Open a safetensors file."""
    model = open_undescribed(path)
    described = state_dict.describe(model.tensors)
    about = replace(model.about, wrappers=state_dict.wrappers(described))
    return replace(model, tensors=described, about=about)


def open_undescribed(path: Path, prefix: str = "") -> ModelFile:
    """Open a safetensors file without judging roles by names; `prefix` is put in front of its storage keys."""
    all_bytes = file_bytes(path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if header_bytes > min(budgets.MAX_SAFETENSORS_HEADER_BYTES, all_bytes - LENGTH_BYTES):
            raise InputError(f"{path} is truncated or damaged: it claims a header of {header_bytes} bytes")
        header = parse_object(file.read(header_bytes), path, "its header")
    metadata = header.pop("__metadata__", {})
    if len(header) > budgets.MAX_TENSORS:
        raise InputError(f"{path} is refused: it claims {len(header)} tensors")
    start = LENGTH_BYTES + header_bytes
    tensors = tuple(_tensor(path, name, facts, start, prefix) for name, facts in header.items())
    _check_layout(path, tensors, start, all_bytes)
    return ModelFile(path, "safetensors", tensors, ModelInfo(producer=_producer(metadata)), files=(path,))


def _producer(metadata: Any) -> str:
    return f"format {metadata['format']}" if isinstance(metadata, dict) and "format" in metadata else ""


def _tensor(path: Path, name: str, facts: Any, start: int, prefix: str) -> Tensor:
    try:
        (begin, end), shape, code = facts["data_offsets"], tuple(facts["shape"]), facts["dtype"]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: its header does not give the offsets of {abbreviated(name)}") from error
    numbers = (begin, end, *shape)
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise InputError(f"{path} is damaged: its header does not give the offsets of {abbreviated(name)}")
    if len(shape) > budgets.MAX_AXES or max(numbers).bit_length() > _MAX_BITS:
        raise InputError(
            f"{path} is refused: {abbreviated(name)} claims the shape {format_shape(shape)}, too large for any memory"
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise InputError(
            f"{path} holds {abbreviated(name)} as {abbreviated(str(code))}, a type that prunectl does not read"
        )
    dtype = DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"{path} is damaged: {abbreviated(name)} of shape {format_shape(shape)} does not match bytes {begin}..{end}"
        )
    storage = Storage(f"{prefix}{name}", end - begin, Extent(path, start + begin, end - begin), end - begin)
    return Tensor(name, "", shape, dtype, Role.OTHER, storage)


def _check_layout(path: Path, tensors: Iterable[Tensor], start: int, all_bytes: int) -> None:
    offset = start
    for extent, name in sorted((_extent(tensor), tensor.name) for tensor in tensors):
        if extent[0] != offset:
            raise InputError(f"{path} is damaged: {abbreviated(name)} overlaps another tensor or leaves a gap")
        offset += extent[1]
    if offset != all_bytes:
        raise InputError(
            f"{path} is truncated or damaged: its tensors end at byte {offset}, but the file ends at {all_bytes}"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    extent = tensor.storage.extent
    return (extent.offset, extent.nbytes) if extent is not None else (0, 0)


CODES = DTYPES.codes
_METADATA = "__metadata__"
_ALIGNMENT = 8


def read(path: Path) -> dict[str, Any]:
    """The header of a file that was checked by `open_model` before."""
    with path.open("rb") as file:
        return parse_object(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")), path, "its header")


def header_without_tensors(path: Path) -> dict[str, Any]:
    """A header with the `__metadata__` of another file, and no tensors yet."""
    old = read(path)
    return {_METADATA: old[_METADATA]} if _METADATA in old else {}


def encode_header(header: Mapping[str, Any]) -> bytes:
    """The bytes of a header, with its length in front, padded to a multiple of 8."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", SURROGATES)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """A tensor to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Array]]
    """The values, block by block."""


def array_entry(name: str, array: Array) -> SafetensorsEntry:
    """A tensor in memory."""
    return SafetensorsEntry(name, array.dtype, array.shape, lambda: (array,))


def unchanged_entry(tensor: Tensor, name: str) -> SafetensorsEntry:
    """A tensor of another file with the given name."""
    extent = tensor.storage.extent
    return SafetensorsEntry(
        name, tensor.dtype, tensor.shape, lambda: blocks(extent, tensor.dtype) if extent is not None else ()
    )


def by_width(entry: SafetensorsEntry) -> tuple[int, str]:
    """Sort key of the format's own library: wide dtypes first, so that each tensor is aligned to its element size."""
    return -entry.dtype.itemsize, entry.name


def write_entries(path: Path, header: dict[str, Any], entries: Sequence[SafetensorsEntry]) -> None:
    """Write tensors to a file in the given order, with one block in memory; `header` has the metadata."""
    offset = 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        code = CODES[dtype_name(entry.dtype)]
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    with path.open("xb") as file:
        file.write(encode_header(header))
        for entry in entries:
            for block in entry.blocks():
                file.write(raw_bytes(block))


def open_shards(path: Path) -> ModelFile:
    """Open the shards of an index as one model."""
    weight_map = read_object(path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path} is JSON, but not the index of a sharded checkpoint: it has no weight_map")
    if not weight_map:
        raise InputError(f"{path} is damaged: its weight_map names no tensors", hint=_DOWNLOAD_AGAIN)
    if len(weight_map) > budgets.MAX_INDEX_NAMES:
        raise InputError(f"{path} is refused: it names more than {budgets.MAX_INDEX_NAMES} tensors")
    names = list(dict.fromkeys(weight_map.values()))
    _refuse_missing(path, names)
    shards = [_open_shard(path, name) for name in names]
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    stored = {tensor.name for tensor in tensors}
    if len(stored) < len(tensors):
        raise _stored_twice(path, shards)
    if missing := [name for name in weight_map if name not in stored]:
        raise InputError(
            f"{path} is damaged: "
            f"it lists {abbreviated(missing[0])}, but {abbreviated(weight_map[missing[0]])} does not hold it",
            hint=_DOWNLOAD_AGAIN,
        )
    unlisted = [tensor.name for tensor in tensors if tensor.name not in weight_map]
    described = state_dict.describe(tensors)
    owners = {shard.path.name: shard for shard in shards}

    def decode(tensor: Tensor) -> Array:
        owner, _, key = tensor.storage.key.partition(_SEPARATOR)
        return owners[owner].read(replace(tensor, storage=replace(tensor.storage, key=key)))

    return ModelFile(
        path=path,
        format="shards",
        tensors=described,
        about=ModelInfo(
            producer=shards[0].about.producer if shards else "",
            wrappers=state_dict.wrappers(described),
            code=tuple(dict.fromkeys(code for shard in shards for code in shard.about.code)),
            code_bytes=sum(shard.about.code_bytes for shard in shards),
            notes=_note_unlisted(unlisted),
            is_compressed=any(shard.about.is_compressed for shard in shards),
        ),
        files=(path, *(shard.path for shard in shards)),
        decode=decode,
        states={path: state for shard in shards for path, state in shard.states.items()},
    )


_SEPARATOR = "\0"
"""Separates the name of a shard from the key of a storage in it; no file name contains it."""


def shard_of(tensor: Tensor) -> str:
    """The name of the shard that holds a tensor of a sharded model."""
    return tensor.storage.key.partition(_SEPARATOR)[0]


def write_shards(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write every shard with its updates, and an index with the shards' new names."""
    shards = {source: target for source, target in targets.items() if source != model.path}
    by_shard: dict[Path, list[TensorUpdate]] = {source: [] for source in shards}
    for rewrite in rewrites:
        by_shard[rewrite.run.path].append(rewrite)
    for source, target in shards.items():
        # By the shard's own format, because the zips of PyTorch have checksums.
        writer = registry.load(registry.recognise(source).writer)
        writer(replace(model, path=source), {source: target}, by_shard[source])
    names = {source.name: target.name for source, target in shards.items()}
    if all(old == new for old, new in names.items()):
        patch_files(model, {model.path: targets[model.path]}, ())
        return
    index = read_object(model.path, "the index")
    index["weight_map"] = {tensor: names[shard] for tensor, shard in index["weight_map"].items()}
    targets[model.path].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


_DOWNLOAD_AGAIN = "download or save the model again: its index and its shards belong together"


def _refuse_missing(index: Path, names: Sequence[str]) -> None:
    for name in names:
        if "/" in name or "\\" in name or name in {"", ".", ".."}:
            raise InputError(
                f"{index} is refused: it names a shard outside its folder: {abbreviated(name)}",
                hint="put the shards beside the index, which names each without a folder",
            )
    # os.path raises no errors for impossible names.
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        reason = f"its shard {abbreviated(missing[0])} is missing"
        if len(missing) > 1:
            reason = f"{len(missing)} of its {len(names)} shards are missing, such as {abbreviated(missing[0])}"
        raise InputError(f"{index} is incomplete: {reason}", hint=_DOWNLOAD_AGAIN)


def _stored_twice(index: Path, shards: Sequence[ModelFile]) -> InputError:
    """The error for a tensor that is in two shards: different loaders would take different ones."""
    owners: dict[str, Path] = {}
    for shard in shards:
        for tensor in shard.tensors:
            other = owners.setdefault(tensor.name, shard.path)
            if other != shard.path:
                return InputError(
                    f"{index} is refused: {abbreviated(tensor.name)} stands in two of its shards, "
                    f"{abbreviated(other.name)} and {abbreviated(shard.path.name)}",
                    hint="save the model again, so that each tensor stands in one shard",
                )
    return InputError(f"{index} is refused: one of its shards holds a tensor twice")


def _note_unlisted(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    what = "1 tensor of its shards is" if len(names) == 1 else f"{len(names)} tensors of its shards are"
    return (f"{what} not in the index, such as {abbreviated(names[0])}.",)


def _open_shard(index: Path, name: str) -> ModelFile:
    shard = index.parent / name
    prefix = f"{name}{_SEPARATOR}"
    with reading(shard):
        row = registry.recognise(shard)
        if row.name == "shards":
            raise InputError(f"{index} is refused: its shard {abbreviated(name)} is itself an index")
        if row.name == "safetensors":
            # Roles are judged by the names of all shards together, in `open_shards`.
            state = file_state(shard)
            return replace(open_undescribed(shard, prefix), states={shard: state})
    model = registry.open_model(shard)
    return replace(model, tensors=tuple(_tagged(tensor, prefix) for tensor in model.tensors))


def _tagged(tensor: Tensor, prefix: str) -> Tensor:
    return replace(tensor, storage=replace(tensor.storage, key=f"{prefix}{tensor.storage.key}"))


_AVERAGES = ("ema.", "model_ema.", "ema_model.", "swa_model.")


def strip(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy without the parts to strip, and return the removed items."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    removed: list[RemovedItem] = []
    if options.copies is not None:
        tensors = options.copies.kept(model.tensors)
        kept_names = {tensor.name for tensor in tensors.values()}
        copy = (tensor for tensor in model.tensors if tensor.name not in kept_names)
        removed += (RemovedItem(tensor.name, StripPart.TRAINING, tensor.nbytes) for tensor in copy)
    dead = {name: part for name in tensors if (part := _part(name, tensors)) in options.parts}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dead}
    removed += [RemovedItem(name, part, tensors[name].nbytes) for name, part in dead.items() if part is not None]
    wrapped: tuple[MaskedParam, ...] = ()
    if options.parts & WRAPPING:
        wrapped = tuple(weight for weight in masked_params.find(kept, {}) if _fits(weight, kept))
        removed += [
            RemovedItem(mask, StripPart.MASKS, kept[mask].nbytes) for weight in wrapped for mask in weight.masks
        ]
        removed += [
            RemovedItem(name, StripPart.WRAPPERS, 0) for name in dict.fromkeys(weight.wrapper for weight in wrapped)
        ]
        _refuse_others(model, kept, wrapped)
    if not removed and not (options.to_half and any(tensor.dtype in HALVED for tensor in kept.values())):
        patch_files(model, targets, ())
        return ()
    entries = [_halved(model, entry, options) for entry in _entries(model, kept, wrapped)]
    # Wide dtypes first, as the format's own library does it: each tensor is then aligned to its element size.
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    write_entries(targets[model.path], header_without_tensors(model.path), entries)
    return tuple(removed)


def weight_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The current names of the tensors that strip keeps, by their names after strip."""
    kept = {name: tensor for name, tensor in tensors.items() if _part(name, tensors) is None}
    wrapped = tuple(weight for weight in masked_params.find(kept, {}) if _fits(weight, kept))
    masks = {mask for weight in wrapped for mask in weight.masks}
    return {plain: name for name, plain in masked_params.renamed(kept, wrapped).items() if name not in masks}


def _part(name: str, tensors: Mapping[str, Tensor]) -> StripPart | None:
    root, dot, rest = name.partition(".")
    if dot and root in OPTIMIZER_ROOTS:
        return StripPart.OPTIMIZER
    if name.endswith(GRADIENT_LEAVES) and name.rpartition(".")[0] in tensors:
        return StripPart.GRADIENTS
    is_copy = name.startswith(_AVERAGES) and (rest in tensors or f"model.{rest}" in tensors)
    return StripPart.TRAINING if is_copy else None


def _fits(weight: MaskedParam, tensors: Mapping[str, Tensor]) -> bool:
    original = tensors[weight.original]
    return original.is_float and all(
        tensors[mask].shape in (original.shape, original.shape[:1]) for mask in weight.masks
    )


def _refuse_others(model: ModelFile, kept: Mapping[str, Tensor], wrapped: tuple[MaskedParam, ...]) -> None:
    known = {mask for weight in wrapped for mask in weight.masks}
    for name, tensor in kept.items():
        if tensor.role == Role.MASK and name not in known:
            raise InputError(f"{model.path} holds the mask {abbreviated(name)}, whose shape does not match its weight")


def _entries(
    model: ModelFile, kept: Mapping[str, Tensor], wrapped: tuple[MaskedParam, ...]
) -> Iterator[SafetensorsEntry]:
    """Yield the tensors of the output, unchanged or multiplied by their masks, in the order of the header."""
    products = {weight.original: weight for weight in wrapped}
    masks = {mask for weight in wrapped for mask in weight.masks}
    plain = masked_params.renamed(kept, wrapped)
    for name, tensor in kept.items():
        if name not in masks:
            entry = unchanged_entry(tensor, plain[name])
            yield replace(entry, blocks=_product(model, products[name], kept)) if name in products else entry


def _product(model: ModelFile, weight: MaskedParam, kept: Mapping[str, Tensor]) -> Callable[[], Iterator[Array]]:
    def masked_blocks() -> Iterator[Array]:
        weights = model.read(kept[weight.original])
        factors = (broadcast_mask(weights, model.read(kept[mask])) for mask in weight.masks)
        yield from apply_mask(weights, [factor for factor in factors if factor is not None])

    return masked_blocks


def _halved(model: ModelFile, entry: SafetensorsEntry, options: StripOptions) -> SafetensorsEntry:
    if not options.to_half or entry.dtype not in HALVED:
        return entry
    return replace(entry, dtype=HALF, blocks=lambda: to_float16(iter(entry.blocks()), model.path, entry.name))
