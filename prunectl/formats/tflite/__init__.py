"""TensorFlow Lite models: a FlatBuffer with the graph and its constants; also their multiply-accumulates (MACs)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets, state_dict
from prunectl.formats.base import (
    PRUNABLE,
    Array,
    ModelFile,
    ModelInfo,
    NameAllocator,
    Operation,
    Role,
    Storage,
    Tensor,
    format_shape,
)
from prunectl.formats.extents import Extent, check_inside, unpack
from prunectl.formats.tflite.schema import (
    BITS,
    DTYPES,
    NOT_NUMBERS,
    FlatBufferError,
    FlatTable,
    LiteFile,
    LiteGraph,
    LiteOperator,
    LiteTensor,
    read_lite,
    stored_bytes,
)
from prunectl.formats.tflite.usage import LiteTensorPurpose, LiteTensorUse, layer_of, tensor_purposes

_COMPRESSED = 1
_INDEX_TYPES: dict[int, type[np.generic]] = {1: np.int32, 2: np.uint16, 3: np.uint8}


@dataclass(frozen=True, slots=True)
class _Level:
    """One dimension of a sparse tensor, in storage order."""

    size: int
    segments: NDArray[np.int64] | None
    """As in CSR, the offset at which the indices of each parent begin; None when the dimension is dense."""
    indices: NDArray[np.int64]


def densify(sparsity: FlatTable, shape: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
    """The dense tensor whose non-zero blocks are ``values``."""
    order, blocks = (sparsity.numbers(field, np.int32, budgets.MAX_AXES + 1).tolist() for field in (0, 1))
    levels = [_level(level) for level in sparsity.children(2, budgets.MAX_AXES)]
    rank = len(shape)
    if sorted(order) != list(range(rank + len(blocks))) or len(levels) != len(order):
        raise FlatBufferError("a sparse tensor does not give its storage order")
    if any(not 0 <= axis < rank for axis in blocks) or len(set(blocks)) != len(blocks):
        raise FlatBufferError("a sparse tensor has blocks along an axis that it lacks")
    limit = max([len(values), *(len(level.segments) for level in levels if level.segments is not None)])
    level_indices = _walk(levels, limit)
    if len(level_indices[0]) != len(values):
        raise FlatBufferError(f"a sparse tensor holds {len(values)} values for {len(level_indices[0])} positions")
    by_number = {number: (along, level.size) for number, along, level in zip(order, level_indices, levels, strict=True)}
    indices = []
    for axis, size in enumerate(shape):
        index = by_number[axis][0]
        if axis in blocks:
            inner, width = by_number[rank + blocks.index(axis)]
            index = index * width + inner
        if index.size and not 0 <= index.min() <= index.max() < size:
            raise FlatBufferError("a sparse tensor has an index outside its shape")
        indices.append(index)
    dense = np.zeros(shape, values.dtype)
    dense[tuple(indices)] = values
    return dense


def _level(facts: FlatTable) -> _Level:
    if facts.number(0, 1) != _COMPRESSED:
        return _Level(facts.number(1, 4, is_signed=True), None, np.zeros(0, np.int64))
    return _Level(0, _numbers(facts, 2), _numbers(facts, 4))


def _numbers(facts: FlatTable, field: int) -> NDArray[np.int64]:
    kind, values = _INDEX_TYPES.get(facts.number(field, 1)), facts.child(field + 1)
    if kind is None or values is None:
        raise FlatBufferError("a sparse tensor lacks its indices")
    return values.numbers(0, kind)


def _walk(levels: list[_Level], limit: int) -> list[NDArray[np.int64]]:
    """The index of every value along each level.

    No level has more positions than there are values, or segments in the level below: ``limit`` is the larger number.
    """
    found: list[NDArray[np.int64]] = []
    count = 1
    for level in levels:
        if level.segments is None:
            if level.size < 0 or count * level.size > limit:
                raise FlatBufferError("a sparse tensor has more positions than values")
            found = [np.repeat(indices, level.size) for indices in found]
            found.append(np.tile(np.arange(level.size), count))
        else:
            widths = np.diff(level.segments)
            if len(widths) != count or (widths < 0).any() or int(widths.sum()) != len(level.indices):
                raise FlatBufferError("a sparse tensor's segments do not fit its indices")
            found = [np.repeat(indices, widths) for indices in found]
            found.append(level.indices)
        count = len(found[-1])
    return found or [np.zeros(1, np.int64)]


_UNUSED = LiteTensorPurpose("", "", LiteTensorUse(Role.OTHER))


def open_model(path: Path) -> ModelFile:
    """Open a .tflite file."""
    lite = read_lite(path)
    sources = dict(constants(lite))
    tensors = tuple(tensor for tensor, _ in sources.values())
    return ModelFile(
        path=path,
        format="tflite",
        tensors=tensors,
        about=ModelInfo(
            producer=_producer(lite),
            notes=_notes(lite, [source for _, source in sources.values()]),
            is_compressed=any(source.sparsity is not None for _, source in sources.values()),
        ),
        files=(path,),
        decode=_decoder(lite, {tensor.name: source for tensor, source in sources.values()}),
    )


def constants(lite: LiteFile) -> Iterator[tuple[tuple[int, int], tuple[Tensor, LiteTensor]]]:
    """Yield the tensors with values in the file, by the index of their graph and their index in it."""
    allocator = NameAllocator()
    for number, graph in enumerate(lite.graphs):
        purposes = tensor_purposes(graph)
        for index, source in enumerate(graph.tensors):
            if not _has_values(lite, source):
                continue
            name = allocator.unique(source.name)
            yield (number, index), (_tensor(lite, name, source, purposes.get(index, _UNUSED)), source)


def _has_values(lite: LiteFile, source: LiteTensor) -> bool:
    if source.buffer >= len(lite.buffers):
        raise InputError(
            f"{lite.path} is damaged: {abbreviated(source.name)} is in buffer {source.buffer}, which does not exist"
        )
    return lite.buffers[source.buffer][1] > 0 and not source.is_external and source.code not in NOT_NUMBERS


def _role(name: str, purpose: LiteTensorPurpose) -> Role:
    """The role of a tensor; a fixed basis, such as that of a Fourier transform, is not a kernel, but a state."""
    is_fixed = purpose.use.role in PRUNABLE and state_dict.is_constant(name, purpose.layer)
    return Role.STATE if is_fixed else purpose.use.role


def _tensor(lite: LiteFile, name: str, source: LiteTensor, purpose: LiteTensorPurpose) -> Tensor:
    offset, nbytes = lite.buffers[source.buffer]
    check_inside(lite.path, offset, nbytes, len(lite.data), name)
    if source.code not in DTYPES:
        raise InputError(f"{lite.path} holds {abbreviated(name)} as type {source.code}, which prunectl does not read")
    dtype, size = DTYPES[source.code], math.prod(source.shape)
    if any(axis < 0 for axis in source.shape):
        raise InputError(f"{lite.path} is damaged: {abbreviated(name)} has values, but no fixed shape")
    if source.sparsity is None and nbytes != stored_bytes(source.code, size):
        raise InputError(
            f"{lite.path} is damaged: {abbreviated(name)} of shape {format_shape(source.shape)} "
            f"does not match its {nbytes} bytes"
        )
    if size * dtype.itemsize > max(budgets.MAX_FREE_BYTES, budgets.MAX_SPARSE_UNFOLDING * nbytes):
        raise InputError(
            f"{lite.path} is refused: {abbreviated(name)} claims to expand {nbytes} bytes to {size * dtype.itemsize}"
        )
    is_flat = source.sparsity is None and source.code not in BITS
    return Tensor(
        name=name,
        layer=purpose.layer or source.name.rpartition("/")[0] or source.name,
        shape=source.shape,
        dtype=dtype,
        role=_role(name, purpose),
        storage=Storage(
            f"buffer {source.buffer}",
            size * dtype.itemsize,
            Extent(lite.path, offset, nbytes) if is_flat else None,
            nbytes,
        ),
        kind=purpose.kind,
        out_axis=purpose.use.out_axis,
        in_axis=purpose.use.in_axis,
    )


def _decoder(lite: LiteFile, sources: dict[str, LiteTensor]) -> Callable[[Tensor], Array]:
    def decode(tensor: Tensor) -> Array:
        source = sources[tensor.name]
        offset, nbytes = lite.buffers[source.buffer]
        raw = np.frombuffer(lite.data, np.uint8, nbytes, offset)
        count = (
            tensor.size if source.sparsity is None else nbytes * 8 // BITS.get(source.code, 8 * tensor.dtype.itemsize)
        )
        raw, bits = raw[: stored_bytes(source.code, count)], BITS.get(source.code)
        array = (raw.view(tensor.dtype) if bits is None else unpack(raw, tensor.dtype, bits))[:count]
        try:
            dense = densify(source.sparsity, tensor.shape, array) if source.sparsity else array.reshape(tensor.shape)
        except FlatBufferError as error:
            raise InputError(f"{lite.path} is damaged: {abbreviated(tensor.name)}: {error}") from error
        dense.flags.writeable = False
        return dense

    return decode


def _producer(lite: LiteFile) -> str:
    runtime = f"runtime {lite.runtime}" if lite.runtime else ""
    description = lite.description.strip().rstrip(".")
    return ", ".join(filter(None, (f"tflite schema {lite.version}", runtime, description)))


def _notes(lite: LiteFile, sources: list[LiteTensor]) -> tuple[str, ...]:
    quantised = Counter(
        DTYPES[source.code].name for source in sources if source.is_quantised and DTYPES[source.code].itemsize <= 2
    )
    sparse = sum(source.sparsity is not None for source in sources)
    elsewhere = sum(source.is_external for graph in lite.graphs for source in graph.tensors)
    notes = [f"{_tensors(count)} quantised to {kind}." for kind, count in sorted(quantised.items())]
    if sparse:
        notes.append(f"{_tensors(sparse)} stored sparse.")
    if elsewhere:
        notes.append(f"{_tensors(elsewhere)} stored in other files, which prunectl does not read.")
    return tuple(notes)


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


_DECODING = frozenset({"DEQUANTIZE", "DENSIFY"})


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The multiply-accumulate operations of a model, for the shapes in the file; an unknown size counts as 1."""
    lite = read_lite(model.path)
    names = {place: tensor.name for place, (tensor, _) in constants(lite)}
    operations = []
    for number, graph in enumerate(lite.graphs):
        makers = {output: operator for operator in graph.operators for output in operator.outputs}
        for operator in graph.operators:
            if operator.kind not in _MULTIPLYING or not _is_complete(operator):
                continue
            weight = _origin(operator.inputs[1], makers)
            operations.append(
                Operation(
                    layer=layer_of(graph, operator, operator.outputs[0]),
                    kind=operator.kind,
                    macs=_macs(graph, operator),
                    weight=names.get((number, weight), ""),
                )
            )
    return tuple(operations)


def _is_complete(operator: LiteOperator) -> bool:
    needed = 3 if operator.kind == "TRANSPOSE_CONV" else 2
    return (
        len(operator.inputs) >= needed
        and bool(operator.outputs)
        and min(*operator.inputs[:needed], operator.outputs[0]) >= 0
    )


def _origin(index: int, makers: dict[int, LiteOperator]) -> int:
    """The index of the stored tensor from which a tensor is dequantised or densified."""
    for _ in range(budgets.MAX_PASSED_OPERATORS):
        maker = makers.get(index)
        if maker is None or maker.kind not in _DECODING or not maker.inputs:
            break
        index = maker.inputs[0]
    return index


def _macs(graph: LiteGraph, operator: LiteOperator) -> int:
    """Elements of the output (of a transposed convolution: of the input) times the weights that each one needs."""
    inputs = [tuple(max(size, 1) for size in graph.tensors[i].shape) if i >= 0 else () for i in operator.inputs]
    output = tuple(max(size, 1) for size in graph.tensors[operator.outputs[0]].shape)
    if operator.kind == "BATCH_MATMUL":
        is_transposed = operator.options is not None and operator.options.number(0, 1) != 0
        return math.prod(output) * math.prod(inputs[0][-2:-1] if is_transposed else inputs[0][-1:])
    if operator.kind == "TRANSPOSE_CONV":
        output = inputs[2]
    return math.prod(output) * math.prod(inputs[1][_SUMMED[operator.kind]])


_SUMMED = {
    "CONV_2D": slice(1, None),  # [out, height, width, in]
    "DEPTHWISE_CONV_2D": slice(1, 3),  # [1, height, width, channels]
    "FULLY_CONNECTED": slice(-1, None),  # [out, in]
    "TRANSPOSE_CONV": slice(None, -1),  # [out, height, width, in]
    "CONV_3D": slice(None, -1),  # [depth, height, width, in, out]
}
"""The axes of the weight whose elements are multiplied for each element of the output (transposed: of the input)."""
_MULTIPLYING = frozenset({*_SUMMED, "BATCH_MATMUL"})
