"""The rules for PyTorch operations: the operations of the channel graph that each becomes, and how it is resized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from prunectl.channels.adapter import PrunedShapes
from prunectl.channels.graph import OpKind, OpNode, WeightView
from prunectl.channels.torch.attention import (
    Lowering,
    glu,
    recurrent,
    resize_initial_states,
    resize_scale,
    scaled_dot_product,
)
from prunectl.channels.torch.fx import OpContext, op_name, set_argument


@dataclass(frozen=True, slots=True)
class OpRule:
    """The operations of the channel graph that a node becomes, and how its arguments are updated after a removal."""

    lower: Callable[[OpContext], Lowering]
    resize: Callable[[OpContext, PrunedShapes], None] | None = None


def lower(op: OpContext) -> Lowering:
    """The operations of the channel graph for a node; UNKNOWN without a rule, or if the rule needs run-time values."""
    rule = RULES.get(op_name(op.node), OpRule(_unknown))
    try:
        steps = rule.lower(op)
        if any(0 in op.shapes[name] for node in steps for name in (*filter(None, node.inputs), *node.outputs)):
            return _unknown(op)
    except LookupError:
        return _unknown(op)
    return steps or _unknown(op)


def resize(graph: torch.fx.Graph, after: PrunedShapes) -> None:
    """Update the lengths in the arguments of nodes whose inputs or outputs lost channels."""
    shapes, views = dict(after.trace.graph.shapes), dict(after.trace.graph.views)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        op = OpContext(node, shapes, views)
        names = (*op.tensors, *(name for name in op.outputs if name in shapes))
        rule = RULES.get(op_name(node))
        if rule is not None and rule.resize is not None and any(map(after.has_changed, names)):
            rule.resize(op, after)


def _stack(op: OpContext) -> Lowering:
    shape, axis = op.result, op.arg("dim", 0) % len(op.result)
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = {op.temporary(f"part{number}", single): name for number, name in enumerate(_list_argument(op))}
    reshaped = tuple(op.emit(OpKind.RESHAPE, (name,), (part,)) for part, name in parts.items())
    return (*reshaped, op.emit(OpKind.CONCAT, parts, axis=axis))


def _split(op: OpContext) -> Lowering:
    before, axis = op.shapes[op.tensors[0]], op.arg("dim", 0)
    axis %= len(before)
    sizes = [op.shapes[name][axis] for name in op.outputs if name in op.shapes]
    if len(sizes) < len(op.outputs) or sum(sizes) > before[axis]:
        return ()
    outputs = list(op.outputs)
    if rest := before[axis] - sum(sizes):
        outputs.append(op.temporary("rest", (*before[:axis], rest, *before[axis + 1 :])))
        sizes.append(rest)
    return (op.emit(OpKind.SPLIT, op.tensors[:1], outputs, axis=axis, sizes=tuple(sizes)),)


def _resize_split(op: OpContext, after: PrunedShapes) -> None:
    name = op.tensors[0]
    axis = op.arg("dim", 0) % len(op.shapes[name])
    if op.shapes[name][axis] == after.shape(name)[axis]:
        return
    sizes = [after.shape(output)[axis] for output in op.outputs]
    if rest := after.shape(name)[axis] - sum(sizes):
        sizes.append(rest)
    op.node.target = torch.ops.aten.split_with_sizes.default
    op.node.args, op.node.kwargs = (op.node.args[0], sizes, axis), {}


def _unbind(op: OpContext) -> Lowering:
    axis = op.arg("dim", 0) % len(op.shapes[op.tensors[0]])
    steps: list[OpNode] = []
    for number, name in enumerate(op.outputs):
        if name in op.shapes:
            steps += _take_index(op, axis, number, name)
    return tuple(steps)


def _select(op: OpContext) -> Lowering:
    # On any axis but the first, the index is taken for a position, not a channel.
    before = op.shapes[op.tensors[0]]
    axis, number = op.arg("dim", 0) % len(before), op.arg("index", 0)
    if axis:
        return _along_axes(op, (axis,))
    return tuple(_take_index(op, axis, number % before[axis], op.outputs[0]))


def _bounds(op: OpContext) -> tuple[int, int, int, int]:
    """The axis, start, end and step of a slice."""
    before = op.shape("self")
    axis, start = op.arg("dim", 0) % len(before), op.arg("start")
    if "length" in op.arguments:
        start %= before[axis]
        return axis, start, start + op.arg("length"), 1
    return (axis, *slice(start, op.arg("end"), op.arg("step", 1)).indices(before[axis]))


def _resize_slice(op: OpContext, after: PrunedShapes) -> None:
    name, (axis, *bounds, _) = op.name("self"), _bounds(op)
    if op.shapes[name][axis] == after.shape(name)[axis]:
        return
    start, end = (after.num_kept_before(name, axis, offset) for offset in bounds)
    set_argument(op.node, "start", start)
    if "length" in op.arguments:
        set_argument(op.node, "length", end - start)
    else:
        set_argument(op.node, "end", end)


def _reshape(op: OpContext) -> Lowering:
    return (op.emit(OpKind.RESHAPE, op.tensors[:1]),)


def _resize_shape(op: OpContext, after: PrunedShapes) -> None:
    for name in ("size", "shape"):
        if isinstance(sizes := op.arguments.get(name), list | tuple):
            old, new = op.result, after.shape(op.outputs[0])
            front = len(old) - len(sizes)
            numbers = [
                new[axis + front] if number == old[axis + front] else number for axis, number in enumerate(sizes)
            ]
            # A length that is computed at run time, such as batch * heads, is left to the runtime: -1.
            computed = [
                axis
                for axis, number in enumerate(sizes)
                if isinstance(number, torch.fx.Node) and old[axis + front] != new[axis + front]
            ]
            for axis in computed if -1 not in sizes else ():
                numbers[axis] = -1
            set_argument(op.node, name, numbers)


def _resize_unflatten(op: OpContext, after: PrunedShapes) -> None:
    before, lengths = op.shape("self"), list(op.arguments["sizes"])
    axis = op.arg("dim") % len(before)
    old, new = op.result[axis : axis + len(lengths)], after.shape(op.outputs[0])[axis : axis + len(lengths)]
    sizes = [new[offset] if number == old[offset] else number for offset, number in enumerate(lengths)]
    set_argument(op.node, "sizes", sizes)


def _permute(op: OpContext) -> Lowering:
    rank = len(op.result)
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(axis % rank for axis in op.arg("dims"))),)


def _transpose(op: OpContext) -> Lowering:
    names = ("axis0", "axis1") if "axis0" in op.arguments else ("dim0", "dim1")
    order = list(range(len(op.result)))
    first, second = (op.arg(name) % len(order) for name in names)
    order[first], order[second] = order[second], order[first]
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(order)),)


def _reverse_axes(op: OpContext) -> Lowering:
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(reversed(range(len(op.result))))),)


def _pixel_shuffle(op: OpContext) -> Lowering:
    """Blocks of channels become positions."""
    *front, channels, height, width = op.shape("self")
    if len(front) != 1:
        return ()
    times = op.arg("upscale_factor")
    return _shuffled(op, (*front, channels // times**2, times, times, height, width), (0, 1, 4, 2, 5, 3))


def _channel_shuffle(op: OpContext) -> Lowering:
    """The channels of all groups are interleaved."""
    batch, channels, *space = op.shape("self")
    groups = op.arg("groups")
    return _shuffled(op, (batch, groups, channels // groups, *space), (0, 2, 1, *range(3, 3 + len(space))))


def _shuffled(op: OpContext, apart: tuple[int, ...], order: tuple[int, ...]) -> Lowering:
    """A reshape, a transpose and a reshape."""
    blocks = op.temporary("apart", apart)
    moved = op.temporary("moved", tuple(apart[axis] for axis in order))
    return (
        op.emit(OpKind.RESHAPE, op.tensors, (blocks,)),
        op.emit(OpKind.TRANSPOSE, (blocks,), (moved,), order=order),
        op.emit(OpKind.RESHAPE, (moved,)),
    )


def _resize_shuffle(op: OpContext, after: PrunedShapes) -> None:
    set_argument(op.node, "groups", after.shape(f"{op.node.name}.apart")[1])


def _expand(op: OpContext) -> Lowering:
    """Axes of length 1 are added in front, then axes are repeated."""
    before, after = op.shape("self"), op.result
    padded = (1,) * (len(after) - len(before)) + before
    axes = tuple(axis for axis, pair in enumerate(zip(padded, after, strict=True)) if len(set(pair)) > 1)
    if len(before) == len(after):
        return _along_axes(op, axes)
    reshaped = op.temporary("padded", padded)
    return (
        op.emit(OpKind.RESHAPE, op.tensors[:1], (reshaped,)),
        op.emit(OpKind.ALONG_AXES, (reshaped,), axes=axes),
    )


def _pad(op: OpContext) -> Lowering:
    # There are two widths for each axis, beginning with the last axis.
    pads, rank = op.arg("pad"), len(op.result)
    axes = [rank - 1 - number // 2 for number, width in enumerate(pads) if width]
    return _along_axes(op, tuple(axes))


def _take_index(op: OpContext, axis: int, number: int, name: str) -> list[OpNode]:
    before = op.shapes[op.tensors[0]]
    single = op.temporary(f"at{number}", (*before[:axis], 1, *before[axis + 1 :]))
    return [
        op.emit(OpKind.SLICE, op.tensors[:1], (single,), slices=((axis, number, number + 1, 1),)),
        op.emit(OpKind.RESHAPE, (single,), (name,)),
    ]


def _list_argument(op: OpContext) -> tuple[str, ...]:
    """The names in the argument `tensors`, which may contain a value twice, unlike `op.tensors`."""
    return tuple(value.name for value in op.arguments["tensors"])


def _convolution(op: OpContext) -> Lowering:
    name = op_name(op.node)
    data, kernel = op.name("input"), op.name("weight")
    if len(op.shapes[data]) != len(op.shapes[kernel]):
        return ()  # the input has no batch axis
    is_transposed = bool(op.arg("transposed", default=False)) or name.startswith("conv_transpose")
    inputs = (data, kernel, op.name("bias"))
    return (op.emit(OpKind.CONVOLUTION, inputs, groups=op.arg("groups"), is_transposed=is_transposed),)


def _resize_groups(op: OpContext, after: PrunedShapes) -> None:
    groups = op.arg("groups", 1)
    if groups > 1 and groups == op.shape("input")[1]:
        set_argument(op.node, "groups", after.shape(op.name("input"))[1])


def _linear(op: OpContext) -> Lowering:
    # The weight has the shape (outputs, inputs).
    if len(op.shape("weight")) != 2:
        return ()
    return (op.emit(OpKind.LINEAR, (op.name("input"), op.name("weight"), op.name("bias")), in_axis=1),)


def _addmm(op: OpContext) -> Lowering:
    # The weight has the shape (inputs, outputs).
    return (op.emit(OpKind.LINEAR, (op.name("mat1"), op.name("mat2"), op.name("self")), in_axis=0),)


def _matmul(op: OpContext) -> Lowering:
    left, right = op.tensors if len(op.tensors) == 2 else op.tensors * 2
    if left in op.views:
        return ()
    if right in op.views:
        return (op.emit(OpKind.LINEAR, (left, right), in_axis=0),) if len(op.shapes[right]) == 2 else ()
    return (op.emit(OpKind.MATMUL, (left, right)),)


def _channel_norm(op: OpContext) -> Lowering:
    # With running statistics but no scale, a zeroed channel would not stay zero: that is not supported.
    names = {name: op.name(name) for name in ("input", "weight", "bias", "running_mean", "running_var")}
    if not names["weight"]:
        if names["running_mean"]:
            return ()
        return (op.emit(OpKind.CHANNEL_NORM, (names["input"],), op.outputs[:1]),)
    inputs = tuple(names.values())
    if not names["running_mean"]:
        inputs = inputs[:3]
    return (op.emit(OpKind.CHANNEL_NORM, inputs, op.outputs[:1]),)


def _group_norm(op: OpContext) -> Lowering:
    # Supported if each channel is a group of its own.
    if op.arg("num_groups", op.arg("group")) != op.shape("input")[1] or not op.name("weight"):
        return ()
    inputs = (op.name("input"), op.name("weight"), op.name("bias"))
    return (op.emit(OpKind.CHANNEL_NORM, inputs, op.outputs[:1]),)


def _resize_norm_groups(op: OpContext, after: PrunedShapes) -> None:
    name = "num_groups" if "num_groups" in op.arguments else "group"
    set_argument(op.node, name, after.shape(op.name("input"))[1])


def _prelu(op: OpContext) -> Lowering:
    # The slopes belong to axis 1 of the data.
    data, slopes = op.tensors
    rank = len(op.shapes[data])
    if slopes in op.views and len(op.shapes[slopes]) == 1 and rank > 1:
        view = op.views[slopes]
        name = op.temporary("slopes", (*op.shapes[slopes], *[1] * (rank - 2)))
        op.views[name] = WeightView(view.tensor, (*view.axes, *[None] * (rank - 2)))
        slopes = name
    return (op.emit(OpKind.ELEMENTWISE, (data, slopes)),)


def _embedding(op: OpContext) -> Lowering:
    if op.name("weight") not in op.views:
        return ()
    return (op.emit(OpKind.EMBEDDING, (op.name("weight"), op.name("indices"))),)


def _unknown(op: OpContext) -> Lowering:
    return (op.emit(OpKind.UNKNOWN, op.tensors),)


def _along_axes(op: OpContext, axes: tuple[int, ...]) -> Lowering:
    return (op.emit(OpKind.ALONG_AXES, (op.tensors[0],), axes=axes),)


def _pool(op: OpContext) -> Lowering:
    rank = len(op.result)
    if rank < 3 or len(op.outputs) > 1:
        return _unknown(op)
    return _along_axes(op, tuple(range(2, rank)))


def _reduce(op: OpContext) -> Lowering:
    dims = op.arg("dim")
    axes = tuple(range(len(op.shapes[op.tensors[0]]))) if dims is None or dims == () else dims
    return _along_axes(op, (axes,) if isinstance(axes, int) else axes)


def _along_dims(op: OpContext) -> Lowering:
    axes = op.arg("dims") if "dims" in op.arguments else op.arg("dim")
    if axes is None or axes == ():
        return _unknown(op)
    return _along_axes(op, (axes,) if isinstance(axes, int) else axes)


def _last_axes(op: OpContext) -> Lowering:
    return _along_axes(op, tuple(range(-len(op.arg("normalized_shape")), 0)))[:1]


_ELEMENTWISE = """relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu softplus sigmoid
log_sigmoid tanh exp expm1 log log1p log2 sqrt rsqrt square abs neg floor ceil round sign reciprocal sin cos tan atan
erf clamp clamp_min clamp_max add sub rsub mul div pow maximum minimum where eq ne gt lt ge le logical_and logical_or
logical_xor logical_not bitwise_and bitwise_or bitwise_not masked_fill addcmul addcdiv lerp copy nan_to_num isnan isinf
threshold hardshrink softshrink remainder fmod trunc atan2"""
_PASSED_ON = """dropout feature_dropout alpha_dropout clone contiguous detach alias to _to_copy type_as lift_fresh_copy
lift_fresh detach_copy native_dropout"""
_POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d max_pool2d_with_indices
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d
upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d"""
_ROWS: tuple[tuple[str, OpRule], ...] = (
    (_ELEMENTWISE, OpRule(lambda op: (op.emit(OpKind.ELEMENTWISE, op.tensors),))),
    (_PASSED_ON, OpRule(lambda op: (op.emit(OpKind.ELEMENTWISE, op.tensors[:1], op.outputs[:1]),))),
    (_POOLS, OpRule(_pool)),
    ("mean sum amax amin prod std var logsumexp norm linalg_vector_norm", OpRule(_reduce)),
    ("argmax argmin max min any all", OpRule(_reduce)),
    ("softmax log_softmax _softmax _log_softmax cumsum flip roll", OpRule(_along_dims)),
    ("layer_norm native_layer_norm rms_norm", OpRule(_last_axes)),
    (
        "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d",
        OpRule(_convolution, _resize_groups),
    ),
    ("linear", OpRule(_linear)),
    ("addmm", OpRule(_addmm)),
    ("mm matmul bmm", OpRule(_matmul)),
    ("batch_norm _native_batch_norm_legit_no_training instance_norm", OpRule(_channel_norm)),
    ("group_norm native_group_norm", OpRule(_group_norm, _resize_norm_groups)),
    ("prelu _prelu_kernel", OpRule(_prelu)),
    ("embedding", OpRule(_embedding)),
    ("scaled_dot_product_attention", OpRule(scaled_dot_product, resize_scale)),
    ("lstm gru rnn_tanh rnn_relu", OpRule(recurrent, resize_initial_states)),
    ("glu", OpRule(glu)),
    ("cat", OpRule(lambda op: (op.emit(OpKind.CONCAT, _list_argument(op), axis=op.arg("dim", 0)),))),
    ("stack", OpRule(_stack)),
    ("chunk split split_with_sizes tensor_split", OpRule(_split, _resize_split)),
    ("unbind", OpRule(_unbind)),
    ("select", OpRule(_select)),
    ("slice narrow", OpRule(lambda op: (op.emit(OpKind.SLICE, op.tensors[:1], slices=(_bounds(op),)),), _resize_slice)),
    ("index_select", OpRule(lambda op: (op.emit(OpKind.ALONG_AXES, (op.name("self"),), axes=(op.arg("dim"),)),))),
    ("view reshape _unsafe_view flatten squeeze unsqueeze", OpRule(_reshape, _resize_shape)),
    ("unflatten", OpRule(_reshape, _resize_unflatten)),
    ("permute", OpRule(_permute)),
    ("transpose swapaxes", OpRule(_transpose)),
    ("t numpy_T", OpRule(_reverse_axes)),
    ("pixel_shuffle", OpRule(_pixel_shuffle)),
    ("channel_shuffle", OpRule(_channel_shuffle, _resize_shuffle)),
    ("expand expand_as", OpRule(_expand, _resize_shape)),
    ("pad constant_pad_nd", OpRule(_pad)),
)
RULES: Mapping[str, OpRule] = {name: rule for names, rule in _ROWS for name in names.split()}
