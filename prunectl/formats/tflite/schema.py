"""A .tflite file taken apart: its graphs, their tensors and operators, and where the constants lie."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.mapped import map_file
from prunectl.formats.tflite.flatbuffer import FlatBufferError, Table, root
from prunectl.formats.tflite.operators import CUSTOM, OPERATORS

MAX_PARTS = 100_000
"""Tensors, operators or buffers: beyond any model, and little enough to refuse within a second or two."""
_PART_BYTES, _FEW_PARTS = 24, 1000
"""What a tensor or an operator takes in a file at least, and how many may be told in however small a file."""
MAX_KINDS = 1000
"""Kinds of operators in one model."""
MAX_NAMES_BYTES = 32 << 20
MAX_RANK = 32
MAX_INPUTS = 32
"""No operator with weights has more inputs that matter."""
_PLACEHOLDER_OFFSET = 1
_RUNTIME = "min_runtime_version"


@dataclass(frozen=True, slots=True)
class LiteTensor:
    """A tensor as the file describes it."""

    name: str
    shape: tuple[int, ...]
    code: int
    buffer: int
    is_quantised: bool
    is_elsewhere: bool
    sparsity: Table | None


@dataclass(frozen=True, slots=True)
class LiteOperator:
    """One operation, with the numbers of the tensors that it takes and gives; -1 stands for none."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None


@dataclass(frozen=True, slots=True)
class LiteGraph:
    """A subgraph."""

    tensors: tuple[LiteTensor, ...]
    operators: tuple[LiteOperator, ...]


@dataclass(frozen=True, slots=True)
class LiteFile:
    """All that a file says."""

    path: Path
    data: memoryview
    version: int
    description: str
    runtime: str
    buffers: tuple[tuple[int, int], ...]
    """Offset and length of each."""
    graphs: tuple[LiteGraph, ...]


def read_lite(path: Path) -> LiteFile:
    """Take a file apart."""
    data = map_file(path)
    try:
        return _read(path, data, root(data))
    except FlatBufferError as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error


def _read(path: Path, data: memoryview, model: Table) -> LiteFile:
    codes = tuple(_operator_name(code) for code in model.children(1, MAX_KINDS))
    buffers = tuple(_buffer(buffer) for buffer in model.children(4, MAX_PARTS))
    for number, (offset, nbytes) in enumerate(buffers):
        if offset + nbytes > len(data):
            raise FlatBufferError(f"buffer {number} should end at byte {offset + nbytes}, the file has {len(data)}")
    runs = [run for run in buffers if run[1]]
    if len(runs) - len(set(runs)) > budgets.MAX_TIED:
        raise FlatBufferError(f"more than {budgets.MAX_TIED} buffers are the same bytes")
    spend = _Budget(len(data)).spend
    graphs = tuple(_graph(graph, codes, spend) for graph in model.children(2, MAX_PARTS))
    names = {facts.text(0): facts.number(1, 4) for facts in model.children(6, MAX_KINDS)}
    runtime = ""
    if 0 < names.get(_RUNTIME, 0) < len(buffers):
        offset, nbytes = buffers[names[_RUNTIME]]
        runtime = str(data[offset : offset + min(nbytes, 32)], "ascii", "replace").partition("\0")[0]
    return LiteFile(path, data, model.number(0, 4), model.text(3), runtime, buffers, graphs)


class _Budget:
    """What all graphs together may hold: several of them may point to the same long vector."""

    def __init__(self, file_bytes: int) -> None:
        self.parts, self.names_bytes = 0, 0
        self.most = min(MAX_PARTS, max(file_bytes // _PART_BYTES, _FEW_PARTS))
        self.buffers: Counter[int] = Counter()

    def spend(self, name_bytes: int, buffer: int = 0) -> None:
        """Count one part, with its name and the buffer that it lies in."""
        self.parts += 1
        self.names_bytes += name_bytes
        self.buffers[buffer] += buffer > 0
        if self.parts > self.most or self.names_bytes > MAX_NAMES_BYTES:
            raise FlatBufferError(f"it claims more than {self.parts - 1} tensors and operators")
        if self.buffers[buffer] > budgets.MAX_TIED:
            raise FlatBufferError(f"more than {budgets.MAX_TIED} tensors share buffer {buffer}")


def _operator_name(code: Table) -> str:
    # The first field ran out of numbers at 127 and holds a placeholder since.
    number = max(code.number(0, 1, is_signed=True), code.number(3, 4, is_signed=True))
    if number == CUSTOM:
        return code.text(1) or OPERATORS[CUSTOM]
    return OPERATORS[number] if 0 <= number < len(OPERATORS) else f"operator {number}"


def _buffer(buffer: Table) -> tuple[int, int]:
    offset = buffer.number(1, 8)
    # Models of more than 2 GB keep their data behind the FlatBuffer.
    if offset > _PLACEHOLDER_OFFSET:
        return offset, buffer.number(2, 8)
    run = buffer.run(0, 1)
    return run.begin, run.count


def _graph(graph: Table, codes: tuple[str, ...], spend: Callable[..., None]) -> LiteGraph:
    tensors = []
    for table in graph.children(0, MAX_PARTS):
        tensor = _tensor(table)
        spend(len(tensor.name), tensor.buffer)
        tensors.append(tensor)
    operators = []
    for table in graph.children(3, MAX_PARTS):
        spend(0)
        operators.append(_operator(table, codes, len(tensors)))
    return LiteGraph(tuple(tensors), tuple(operators))


def _tensor(tensor: Table) -> LiteTensor:
    sizes = tensor.numbers(0, np.int32, MAX_RANK + 1)
    if len(sizes) > MAX_RANK:
        raise FlatBufferError(f"a tensor of more than {MAX_RANK} dimensions")
    shape = tuple(int(size) for size in sizes)
    if math.prod(max(size, 1) for size in shape) > 1 << 58:
        raise FlatBufferError("a shape beyond any memory")
    quantisation = tensor.child(4)
    return LiteTensor(
        name=tensor.text(3),
        shape=shape,
        code=tensor.number(1, 1, is_signed=True),
        buffer=tensor.number(2, 4),
        is_quantised=quantisation is not None and quantisation.run(2, 4).count > 0,
        is_elsewhere=tensor.number(10, 4) > 0,
        sparsity=tensor.child(6),
    )


def _operator(operator: Table, codes: tuple[str, ...], tensors: int) -> LiteOperator:
    code = operator.number(0, 4)
    inputs, outputs = (tuple(int(at) for at in operator.numbers(field, np.int32, MAX_INPUTS)) for field in (1, 2))
    if code >= len(codes) or any(not -1 <= at < tensors for at in inputs + outputs):
        raise FlatBufferError("an operator names a code or a tensor that is not there")
    return LiteOperator(codes[code], inputs, outputs, operator.child(4))
