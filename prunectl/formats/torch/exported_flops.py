"""How much an exported program calculates: the multiply-accumulates of each operation, for one input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from prunectl.errors import InputError
from prunectl.formats import zip_read
from prunectl.formats.base import ModelFile, Operation, Shape, numel
from prunectl.formats.budgets import MAX_EXPORTED_GRAPH_BYTES, MAX_EXPORTED_GRAPH_DEPTH
from prunectl.formats.torch.exported_graph import ExportedGraph, ExportedNode, inner_graph

_RUN_ONCE = "wrap_with_"
"""How operations begin that run their graph as it stands, such as `wrap_with_set_grad_enabled`."""


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The operations that multiply, a batch counted as 1 when the program leaves it open."""
    counted: list[Operation] = []
    for entry, graph in model.about.programs.items():
        if graph is None:
            nbytes = zip_read.open_archive(model.path).entries[entry].nbytes
            raise InputError(
                f"{model.path} has a graph of {nbytes} bytes: prunectl counts in at most {MAX_EXPORTED_GRAPH_BYTES}"
            )
        prefix = f"{PurePosixPath(entry).stem}." if len(model.about.programs) > 1 else ""
        counted += (_prefixed(operation, prefix) for operation in _count_macs(graph))
    return tuple(counted)


def _prefixed(operation: Operation, prefix: str) -> Operation:
    return replace(operation, weight=f"{prefix}{operation.weight}") if prefix and operation.weight else operation


def _count_macs(graph: ExportedGraph, depth: int = 0) -> Iterator[Operation]:
    for node in graph.nodes:
        yield from _node_macs(node, graph)
        operands = node.operands
        for inner_json in node.graphs if depth < MAX_EXPORTED_GRAPH_DEPTH else ():
            for operation in _count_macs(inner_graph(inner_json, operands, graph), depth + 1):
                yield operation if node.op.startswith(_RUN_ONCE) else replace(operation, macs=None)


def _node_macs(node: ExportedNode, graph: ExportedGraph) -> Iterator[Operation]:
    if node.op in _RECURRENT:
        data = graph.shape(node.tensor("input"))
        names = [*node.tensors("params"), node.tensor("w_ih"), node.tensor("w_hh")]
        for name in filter(None, names):
            weight = graph.shape(name)
            if weight is not None and len(weight) == 2:
                macs = None if data is None else numel((*data[:-1], *weight))
                yield _operation(node, graph, name, macs)
    elif node.op in _RULES:
        rule, argument = _RULES[node.op]
        try:
            macs = rule(node, graph)
        except _UnknownError:
            macs = None
        yield _operation(node, graph, node.tensor(argument), macs)


def _operation(node: ExportedNode, graph: ExportedGraph, name: str, macs: int | None) -> Operation:
    weight = graph.weight(name)
    layer = weight.rpartition(".")[0] or node.module or (node.outputs[0] if node.outputs else node.op)
    return Operation(layer, node.op, macs, weight)


class _UnknownError(Exception):
    """The program does not tell a size."""


def _shape(node: ExportedNode, graph: ExportedGraph, argument: str) -> Shape:
    shape = graph.shape(node.tensor(argument))
    if shape is None:
        raise _UnknownError
    return shape


def _output(node: ExportedNode, graph: ExportedGraph) -> Shape:
    shape = graph.shape(node.outputs[0]) if node.outputs else None
    if shape is None:
        raise _UnknownError
    return shape


def _convolution(node: ExportedNode, graph: ExportedGraph) -> int | None:
    weight = _shape(node, graph, "weight")
    if node.flag("transposed"):
        return _transposed(node, graph)
    return numel((*_output(node, graph), *weight[1:]))


def _transposed(node: ExportedNode, graph: ExportedGraph) -> int | None:
    return numel((*_shape(node, graph, "input"), *_shape(node, graph, "weight")[1:]))


def _summed_over(argument: str) -> Callable[[ExportedNode, ExportedGraph], int | None]:
    """The rule of a product of matrices that sums over the last axis of one of them."""

    def rule(node: ExportedNode, graph: ExportedGraph) -> int | None:
        return numel((*_output(node, graph), *_shape(node, graph, argument)[-1:]))

    return rule


def _attention(node: ExportedNode, graph: ExportedGraph) -> int | None:
    query, key, value = (_shape(node, graph, name) for name in ("query", "key", "value"))
    scores = numel((*query, *key[-2:-1]))
    mixed = numel((*query[:-1], *value[-2:]))
    return None if scores is None or mixed is None else scores + mixed


def _einsum(node: ExportedNode, graph: ExportedGraph) -> int | None:
    """Every label runs once, in a product of two."""
    left, _, _ = node.string_arg("equation").replace(" ", "").partition("->")
    labels, names = left.split(","), node.tensors("tensors")
    if len(names) != 2 or len(labels) != 2:
        raise _UnknownError
    lengths: dict[str, int | None] = {}
    for letters, name in zip(labels, names, strict=True):
        shape = graph.shape(name)
        if shape is None or len(shape) != len(letters) or "." in letters:
            raise _UnknownError
        for letter, length in zip(letters, shape, strict=True):
            # An axis of 1 is stretched to the other's.
            lengths[letter] = length if lengths.get(letter, 1) == 1 else lengths[letter]
    return numel(lengths.values())


def _uncounted(_: ExportedNode, __: ExportedGraph) -> int | None:
    return None


_RECURRENT = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)
_RULES: dict[str, tuple[Callable[[ExportedNode, ExportedGraph], int | None], str]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), (_convolution, "weight")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (_transposed, "weight")),
    "linear": (_summed_over("weight"), "weight"),
    "addmm": (_summed_over("mat1"), "mat2"),
    "mm": (_summed_over("self"), "mat2"),
    "bmm": (_summed_over("self"), "mat2"),
    "baddbmm": (_summed_over("batch1"), "batch2"),
    "matmul": (_summed_over("self"), "other"),
    "mv": (_summed_over("self"), "self"),
    "addmv": (_summed_over("mat"), "mat"),
    "dot": (_summed_over("self"), "tensor"),
    "einsum": (_einsum, ""),
    "scaled_dot_product_attention": (_attention, ""),
    "_scaled_dot_product_flash_attention": (_attention, ""),
    "_scaled_dot_product_flash_attention_for_cpu": (_attention, ""),
    "_scaled_dot_product_efficient_attention": (_attention, ""),
    **dict.fromkeys(
        ("bilinear", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"), (_uncounted, "weight")
    ),
}
