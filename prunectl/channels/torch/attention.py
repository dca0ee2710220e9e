"""Rules for PyTorch operations that become several operations of the graph: attention, GLU, recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from prunectl.channels.adapter import PrunedShapes
from prunectl.channels.graph import OpKind, OpNode
from prunectl.channels.torch.fx import OpContext, arguments, op_name, set_argument

Lowering = tuple[OpNode, ...]
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


def scaled_dot_product(op: OpContext) -> Lowering:
    """Scaled dot-product attention: transposed keys, a matrix product, a softmax, a matrix product."""
    query, key, value = (op.name(name) for name in ("query", "key", "value"))
    if op.arg("enable_gqa", default=False) or len({len(op.shapes[name]) for name in (query, key, value)}) > 1:
        return ()
    rank = len(op.shapes[query])
    order = (*range(rank - 2), rank - 1, rank - 2)
    transposed = op.temporary("transposed", tuple(op.shapes[key][axis] for axis in order))
    shape = (*op.shapes[query][:-1], op.shapes[key][-2])
    scores, probabilities = op.temporary("scores", shape), op.temporary("probabilities", shape)
    steps = [
        op.emit(OpKind.TRANSPOSE, (key,), (transposed,), order=order),
        op.emit(OpKind.MATMUL, (query, transposed), (scores,)),
    ]
    if mask := op.name("attn_mask"):
        masked = op.temporary("masked", shape)
        steps.append(op.emit(OpKind.ELEMENTWISE, (scores, mask), (masked,)))
        scores = masked
    steps.append(op.emit(OpKind.ALONG_AXES, (scores,), (probabilities,), axes=(rank - 1,)))
    return (*steps, op.emit(OpKind.MATMUL, (probabilities, value)))


def resize_scale(op: OpContext, after: PrunedShapes) -> None:
    """Keep the default scale of the original heads, 1 / sqrt(head width), after the width changed."""
    before = op.shape("query")[-1]
    if op.arguments.get("scale") is None and after.shape(op.name("query"))[-1] != before:
        set_argument(op.node, "scale", 1 / math.sqrt(before))


def glu(op: OpContext) -> Lowering:
    """A gated linear unit: one half gates the other."""
    before = op.shapes[op.tensors[0]]
    axis = op.arg("dim", -1) % len(before)
    halves = [op.temporary(half, op.result) for half in ("half", "gate")]
    sizes = (before[axis] // 2,) * 2
    return (
        op.emit(OpKind.SPLIT, op.tensors[:1], halves, axis=axis, sizes=sizes),
        op.emit(OpKind.ELEMENTWISE, halves),
    )


def recurrent(op: OpContext) -> Lowering:
    """Stacked recurrent layers, in one direction or both; all have the same number of units."""
    name, arguments = op_name(op.node), op.arguments
    if "batch_sizes" in arguments or not isinstance(arguments.get("params"), list | tuple):
        return ()
    has_biases, directions = op.arg("has_biases"), 1 + bool(op.arg("bidirectional"))
    weights = [weight.name for weight in arguments["params"]]
    per_layer = 4 if has_biases else 2
    layers = op.arg("num_layers")
    if len(weights) != layers * directions * per_layer or not all(weight in op.views for weight in weights):
        return ()
    units = op.shapes[weights[1]][-1]
    data = op.name("input")
    states: list[str] = []
    steps: list[OpNode] = []
    initial_states = _initial_states(op, name)
    for layer in range(layers):
        shape = (*op.shapes[data][:-1], units)
        sides = []
        for side in range(directions):
            first = (layer * directions + side) * per_layer
            kernel, recurrent_kernel, *biases = weights[first : first + per_layer]
            sequence = op.temporary(f"out{layer}.{side}", shape)
            state = op.temporary(f"state{layer}.{side}", (1, shape[1 - op.arg("batch_first")], units))
            inputs = (data, kernel, recurrent_kernel, *(biases or [""]), *initial_states)
            steps.append(op.emit(OpKind.RECURRENT, inputs, (sequence, state), units=units, gates=_GATES[name]))
            sides.append(sequence)
            states.append(state)
        data = op.temporary(f"both{layer}", (*shape[:-1], units * directions))
        steps.append(op.emit(OpKind.CONCAT, sides, (data,), axis=len(shape) - 1))
    outputs = op.outputs
    steps.append(op.emit(OpKind.ELEMENTWISE, (data,), outputs[:1]))
    # The final states of all layers are one tensor, so that the same units of each layer are removed.
    stacked = op.temporary("states", (len(states), *op.shapes[states[0]][1:]))
    steps.append(op.emit(OpKind.CONCAT, states, (stacked,), axis=0))
    return (
        *steps,
        *(op.emit(OpKind.ELEMENTWISE, (stacked,), (output,)) for output in outputs[1:] if output in op.shapes),
    )


def _initial_states(op: OpContext, name: str) -> list[str]:
    """The initial states, without those that are zeros, whose size follows the number of units."""
    states = op.arguments["hx"]
    states = states if isinstance(states, list | tuple) else [states]
    if len(states) != _STATES[name]:
        raise LookupError(name)
    return [state.name for state in states if not is_zeros(state)]


def resize_initial_states(op: OpContext, after: PrunedShapes) -> None:
    """Set the size of initial states of zeros to the new number of units."""
    states = op.arguments["hx"]
    state = f"{op.node.name}.state0.0"
    units = after.shape(state)[-1]
    if units == op.shapes[state][-1]:
        return
    copies = {}
    for initial in states if isinstance(states, list | tuple) else [states]:
        size = arguments(initial).get("size")
        if is_zeros(initial) and initial not in copies and isinstance(size, list | tuple):
            with op.node.graph.inserting_before(op.node):
                copies[initial] = op.node.graph.node_copy(initial)
            set_argument(copies[initial], "size", [*size[:-1], units])
    for old, new in copies.items():
        op.node.replace_input_with(old, new)


def is_zeros(node: torch.fx.Node) -> bool:
    """Whether a node makes a tensor of zeros."""
    return op_name(node) in {"zeros", "new_zeros"}


_BEFORE_SELECT: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("contiguous", {}),
    ("squeeze", {"dim": -2}),
    ("transpose", {"dim0": 0, "dim1": -2}),
    ("unsqueeze", {"dim": 0}),
)
"""The operations between unflatten and select in the packed projection of nn.MultiheadAttention, the last first."""


def split_packed_qkv(graph: torch.fx.Graph) -> None:
    """Slice packed queries, keys and values on the last axis, where the network moves the parts to the front first."""
    for node in list(graph.nodes):
        origin = _packed_part(node) if node.op == "call_function" and op_name(node) == "select" else None
        if origin is not None:
            packed, width, number = origin
            with graph.inserting_before(node):
                cut = graph.call_function(
                    torch.ops.aten.slice.Tensor, (packed, -1, number * width, (number + 1) * width)
                )
                # Contiguous like the selected part, as later operations may view it in another shape.
                part = graph.call_function(torch.ops.aten.contiguous.default, (cut,))
            cut.meta, part.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    graph.eliminate_dead_code(_has_effect)


def _packed_part(node: torch.fx.Node) -> tuple[torch.fx.Node, int, int] | None:
    """The packed value, the width of each part, and the number of the part that a select takes; None for others."""
    inputs = arguments(node)
    if inputs["dim"] != 0 or type(inputs["index"]) is not int or inputs["index"] < 0:
        return None
    above = inputs["self"]
    for name, expected in _BEFORE_SELECT:
        arguments_of = arguments(above) if isinstance(above, torch.fx.Node) and above.op == "call_function" else {}
        if (
            not arguments_of
            or op_name(above) != name
            or any(arguments_of.get(key) != value for key, value in expected.items())
        ):
            return None
        above = arguments_of["self"]
    if above.op != "call_function" or op_name(above) != "unflatten":
        return None
    arguments_of = arguments(above)
    sizes = arguments_of["sizes"]
    if arguments_of["dim"] != -1 or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return arguments_of["self"], sizes[1], inputs["index"]


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether a node is kept even if nothing reads it: only the operations that made the parts may be removed."""
    names = {"unflatten", *(name for name, _ in _BEFORE_SELECT)}
    return node.op != "call_function" or op_name(node) not in names
