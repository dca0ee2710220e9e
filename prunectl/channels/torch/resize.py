"""Numbers of channels that stand in a program by themselves: in shapes, sizes, groups and slices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch

from prunectl.channels.adapter import Axes, PrunedShapes
from prunectl.channels.torch.attention import is_zeros
from prunectl.channels.torch.export import TracedModel
from prunectl.channels.torch.fx import OpContext, WeightedProgram, arguments, op_name, set_argument
from prunectl.channels.torch.tracing import quiet

_aten = torch.ops.aten


def update_sizes(graph: torch.fx.Graph, after: PrunedShapes) -> None:
    """Set right what names a number of channels that is no longer true."""
    shapes, views = dict(after.trace.graph.shapes), dict(after.trace.graph.views)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        op = OpContext(node, shapes, views)
        names = (*op.tensors, *(name for name in op.outputs if name in shapes))
        if any(map(after.has_changed, names)) and (change := _RESIZERS.get(op_name(node))) is not None:
            change(op, after)


def _conv_groups(op: OpContext, after: PrunedShapes) -> None:
    groups = op.arg("groups", 1)
    if groups > 1 and groups == op.shape("input")[1]:
        set_argument(op.node, "groups", after.shape(op.name("input"))[1])


def _norm_groups(op: OpContext, after: PrunedShapes) -> None:
    name = "num_groups" if "num_groups" in op.arguments else "group"
    set_argument(op.node, name, after.shape(op.name("input"))[1])


def _sizes(op: OpContext, after: PrunedShapes) -> None:
    for name in ("size", "shape"):
        if isinstance(sizes := op.arguments.get(name), list | tuple):
            old, new = op.result, after.shape(op.outputs[0])
            front = len(old) - len(sizes)
            numbers = [
                new[axis + front] if number == old[axis + front] else number for axis, number in enumerate(sizes)
            ]
            # What is measured and multiplied, as a batch times heads is, comes out by itself.
            computed = [
                axis
                for axis, number in enumerate(sizes)
                if isinstance(number, torch.fx.Node) and old[axis + front] != new[axis + front]
            ]
            for axis in computed if -1 not in sizes else ():
                numbers[axis] = -1
            set_argument(op.node, name, numbers)


def _unflatten(op: OpContext, after: PrunedShapes) -> None:
    before, lengths = op.shape("self"), list(op.arguments["sizes"])
    axis = op.arg("dim") % len(before)
    old, new = op.result[axis : axis + len(lengths)], after.shape(op.outputs[0])[axis : axis + len(lengths)]
    sizes = [new[offset] if number == old[offset] else number for offset, number in enumerate(lengths)]
    set_argument(op.node, "sizes", sizes)


def _split(op: OpContext, after: PrunedShapes) -> None:
    name = op.tensors[0]
    axis = op.arg("dim", 0) % len(op.shapes[name])
    if op.shapes[name][axis] == after.shape(name)[axis]:
        return
    sizes = [after.shape(output)[axis] for output in op.outputs]
    if rest := after.shape(name)[axis] - sum(sizes):
        sizes.append(rest)
    op.node.target = _aten.split_with_sizes.default
    op.node.args, op.node.kwargs = (op.node.args[0], sizes, axis), {}


def _slice(op: OpContext, after: PrunedShapes) -> None:
    name, before = op.name("self"), op.shape("self")
    axis = op.arg("dim", 0) % len(before)
    if before[axis] == after.shape(name)[axis]:
        return
    start, stop, _ = slice(op.arg("start"), op.arg("end"), op.arg("step", 1)).indices(before[axis])
    set_argument(op.node, "start", after.num_kept_before(name, axis, start))
    set_argument(op.node, "end", after.num_kept_before(name, axis, stop))


def _narrow(op: OpContext, after: PrunedShapes) -> None:
    name, before = op.name("self"), op.shape("self")
    axis, start = op.arg("dim") % len(before), op.arg("start")
    if before[axis] == after.shape(name)[axis]:
        return
    start %= before[axis]
    begin, end = (after.num_kept_before(name, axis, offset) for offset in (start, start + op.arg("length")))
    set_argument(op.node, "start", begin)
    set_argument(op.node, "length", end - begin)


def _scale(op: OpContext, after: PrunedShapes) -> None:
    """Divide by what was divided by, however many numbers of a head are left."""
    before = op.shape("query")[-1]
    if op.arguments.get("scale") is None and after.shape(op.name("query"))[-1] != before:
        set_argument(op.node, "scale", 1 / math.sqrt(before))


def _initial_states(op: OpContext, after: PrunedShapes) -> None:
    """Begin with as many zeros as there are units."""
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


def _shuffle(op: OpContext, after: PrunedShapes) -> None:
    set_argument(op.node, "groups", after.shape(f"{op.node.name}.apart")[1])


_ROWS: tuple[tuple[str, Callable[[OpContext, PrunedShapes], None]], ...] = (
    ("conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d", _conv_groups),
    ("group_norm native_group_norm", _norm_groups),
    ("view reshape _unsafe_view expand", _sizes),
    ("unflatten", _unflatten),
    ("split split_with_sizes chunk tensor_split", _split),
    ("slice", _slice),
    ("narrow", _narrow),
    ("scaled_dot_product_attention", _scale),
    ("lstm gru rnn_tanh rnn_relu", _initial_states),
    ("channel_shuffle", _shuffle),
)
_RESIZERS: Mapping[str, Callable[[OpContext, PrunedShapes], None]] = {
    name: change for names, change in _ROWS for name in names.split()
}


def prune_program(
    traced: TracedModel, axes: Mapping[str, Axes], after: PrunedShapes, replaced: Mapping[str, torch.Tensor]
) -> WeightedProgram:
    """The smaller program, its weights slices of those of the larger, or of what replaces them."""
    values = dict(replaced)
    for name, tensor in traced.names.items():
        removed = axes.get(traced.aliases.get(tensor, tensor))
        if removed is not None:
            values[name] = delete_tensor_indices(values.get(name, attribute(traced.module, name)), removed)
    with quiet():
        graph = copy.deepcopy(traced.module.graph)
        update_sizes(graph, after)
        graph.lint()
        return WeightedProgram(torch.fx.GraphModule(traced.module, graph), values)


def delete_tensor_indices(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A tensor without some indices of some axes, its memory its own."""
    for axis, indices in axes.items():
        kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(indices)] = False
        tensor = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return tensor.detach()


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    weight = getattr(module.get_submodule(owner), last)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} is no tensor")
    return weight
