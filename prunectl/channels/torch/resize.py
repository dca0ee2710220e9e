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
        seen = OpContext(node, shapes, views)
        names = (*seen.tensors, *(name for name in seen.outputs if name in shapes))
        if any(map(after.has_changed, names)) and (change := _CHANGES.get(op_name(node))) is not None:
            change(seen, after)


def _groups(seen: OpContext, after: PrunedShapes) -> None:
    groups = seen.arg("groups", 1)
    if groups > 1 and groups == seen.shape("input")[1]:
        set_argument(seen.node, "groups", after.shape(seen.name("input"))[1])


def _each_a_group(seen: OpContext, after: PrunedShapes) -> None:
    name = "num_groups" if "num_groups" in seen.arguments else "group"
    set_argument(seen.node, name, after.shape(seen.name("input"))[1])


def _shape(seen: OpContext, after: PrunedShapes) -> None:
    for name in ("size", "shape"):
        if isinstance(said := seen.arguments.get(name), list | tuple):
            old, new = seen.result, after.shape(seen.outputs[0])
            front = len(old) - len(said)
            numbers = [new[axis + front] if number == old[axis + front] else number for axis, number in enumerate(said)]
            # What is measured and multiplied, as a batch times heads is, comes out by itself.
            worked_out = [
                axis
                for axis, number in enumerate(said)
                if isinstance(number, torch.fx.Node) and old[axis + front] != new[axis + front]
            ]
            for axis in worked_out if -1 not in said else ():
                numbers[axis] = -1
            set_argument(seen.node, name, numbers)


def _unflatten(seen: OpContext, after: PrunedShapes) -> None:
    before, said = seen.shape("self"), list(seen.arguments["sizes"])
    axis = seen.arg("dim") % len(before)
    old, new = seen.result[axis : axis + len(said)], after.shape(seen.outputs[0])[axis : axis + len(said)]
    sizes = [new[place] if number == old[place] else number for place, number in enumerate(said)]
    set_argument(seen.node, "sizes", sizes)


def _split(seen: OpContext, after: PrunedShapes) -> None:
    name = seen.tensors[0]
    axis = seen.arg("dim", 0) % len(seen.shapes[name])
    if seen.shapes[name][axis] == after.shape(name)[axis]:
        return
    sizes = [after.shape(output)[axis] for output in seen.outputs]
    if rest := after.shape(name)[axis] - sum(sizes):
        sizes.append(rest)
    seen.node.target = _aten.split_with_sizes.default
    seen.node.args, seen.node.kwargs = (seen.node.args[0], sizes, axis), {}


def _slice(seen: OpContext, after: PrunedShapes) -> None:
    name, before = seen.name("self"), seen.shape("self")
    axis = seen.arg("dim", 0) % len(before)
    if before[axis] == after.shape(name)[axis]:
        return
    start, stop, _ = slice(seen.arg("start"), seen.arg("end"), seen.arg("step", 1)).indices(before[axis])
    set_argument(seen.node, "start", after.before(name, axis, start))
    set_argument(seen.node, "end", after.before(name, axis, stop))


def _narrow(seen: OpContext, after: PrunedShapes) -> None:
    name, before = seen.name("self"), seen.shape("self")
    axis, start = seen.arg("dim") % len(before), seen.arg("start")
    if before[axis] == after.shape(name)[axis]:
        return
    start %= before[axis]
    begin, end = (after.before(name, axis, place) for place in (start, start + seen.arg("length")))
    set_argument(seen.node, "start", begin)
    set_argument(seen.node, "length", end - begin)


def _scale(seen: OpContext, after: PrunedShapes) -> None:
    """Divide by what was divided by, however many numbers of a head are left."""
    before = seen.shape("query")[-1]
    if seen.arguments.get("scale") is None and after.shape(seen.name("query"))[-1] != before:
        set_argument(seen.node, "scale", 1 / math.sqrt(before))


def _states(seen: OpContext, after: PrunedShapes) -> None:
    """Begin with as many zeros as there are units."""
    given = seen.arguments["hx"]
    state = f"{seen.node.name}.state0.0"
    units = after.shape(state)[-1]
    if units == seen.shapes[state][-1]:
        return
    fresh = {}
    for begun in given if isinstance(given, list | tuple) else [given]:
        size = arguments(begun).get("size")
        if is_zeros(begun) and begun not in fresh and isinstance(size, list | tuple):
            with seen.node.graph.inserting_before(seen.node):
                fresh[begun] = seen.node.graph.node_copy(begun)
            set_argument(fresh[begun], "size", [*size[:-1], units])
    for old, new in fresh.items():
        seen.node.replace_input_with(old, new)


def _shuffle(seen: OpContext, after: PrunedShapes) -> None:
    set_argument(seen.node, "groups", after.shape(f"{seen.node.name}.apart")[1])


_NAMES: tuple[tuple[str, Callable[[OpContext, PrunedShapes], None]], ...] = (
    ("conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d", _groups),
    ("group_norm native_group_norm", _each_a_group),
    ("view reshape _unsafe_view expand", _shape),
    ("unflatten", _unflatten),
    ("split split_with_sizes chunk tensor_split", _split),
    ("slice", _slice),
    ("narrow", _narrow),
    ("scaled_dot_product_attention", _scale),
    ("lstm gru rnn_tanh rnn_relu", _states),
    ("channel_shuffle", _shuffle),
)
_CHANGES: Mapping[str, Callable[[OpContext, PrunedShapes], None]] = {
    name: change for names, change in _NAMES for name in names.split()
}


def prune_program(
    found: TracedModel, axes: Mapping[str, Axes], after: PrunedShapes, replaced: Mapping[str, torch.Tensor]
) -> WeightedProgram:
    """Return the smaller program, its weights slices of those of the larger, or of what replaces them."""
    values = dict(replaced)
    for name, of in found.names.items():
        own = axes.get(found.aliases.get(of, of))
        if own is not None:
            values[name] = delete_tensor_indices(values.get(name, attribute(found.module, name)), own)
    with quiet():
        graph = copy.deepcopy(found.module.graph)
        update_sizes(graph, after)
        graph.lint()
        return WeightedProgram(torch.fx.GraphModule(found.module, graph), values)


def delete_tensor_indices(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Return a tensor without some indices of some axes, its memory its own."""
    for axis, indices in axes.items():
        kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(indices)] = False
        tensor = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return tensor.detach()


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{name} is no tensor")
    return found
