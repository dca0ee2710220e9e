"""What each operation of PyTorch does to channels: often one kind, sometimes several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunectl.channels.graph import OpKind, OpNode, WeightView
from prunectl.channels.torch.attention import glu, recurrent, scaled_dot_product
from prunectl.channels.torch.fx import OpContext, op_name


def cat(op: OpContext) -> Lowering:
    """Read what is put one behind the other."""
    return (op.emit(OpKind.CONCAT, _list_argument(op), axis=op.arg("dim", 0)),)


def stack(op: OpContext) -> Lowering:
    """Read what is put one behind the other along an axis of its own."""
    shape, axis = op.result, op.arg("dim", 0) % len(op.result)
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = {op.temporary(f"part{number}", single): name for number, name in enumerate(_list_argument(op))}
    reshaped = tuple(op.emit(OpKind.RESHAPE, (name,), (part,)) for part, name in parts.items())
    return (*reshaped, op.emit(OpKind.CONCAT, parts, axis=axis))


def chunk(op: OpContext) -> Lowering:
    """Read what is taken apart along an axis."""
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


def unbind(op: OpContext) -> Lowering:
    """Read what is taken apart along an axis that is no more."""
    axis = op.arg("dim", 0) % len(op.shapes[op.tensors[0]])
    steps: list[OpNode] = []
    for number, name in enumerate(op.outputs):
        if name in op.shapes:
            steps += _take_index(op, axis, number, name)
    return tuple(steps)


def select(op: OpContext) -> Lowering:
    """Read one of what lies along an axis; behind the first it is a position, and no channel."""
    before = op.shapes[op.tensors[0]]
    axis, number = op.arg("dim", 0) % len(before), op.arg("index", 0)
    if axis:
        return (op.emit(OpKind.ALONG_AXES, op.tensors[:1], axes=(axis,)),)
    return tuple(_take_index(op, axis, number % before[axis], op.outputs[0]))


def slice_(op: OpContext) -> Lowering:
    """Read a part of an axis."""
    before = op.shape("self")
    axis = op.arg("dim", 0) % len(before)
    bounds = slice(op.arg("start"), op.arg("end"), op.arg("step", 1)).indices(before[axis])
    return (op.emit(OpKind.SLICE, op.tensors[:1], slices=((axis, *bounds),)),)


def narrow(op: OpContext) -> Lowering:
    """Read a part of an axis, by where it begins and how long it is."""
    before = op.shape("self")
    axis, start = op.arg("dim") % len(before), op.arg("start")
    start %= before[axis]
    return (op.emit(OpKind.SLICE, op.tensors[:1], slices=((axis, start, start + op.arg("length"), 1),)),)


def index_select(op: OpContext) -> Lowering:
    """Read positions taken in another order."""
    return (op.emit(OpKind.ALONG_AXES, (op.name("self"),), axes=(op.arg("dim") % len(op.shape("self")),)),)


def reshape(op: OpContext) -> Lowering:
    """Read the same numbers in another shape."""
    return (op.emit(OpKind.RESHAPE, op.tensors[:1]),)


def permute(op: OpContext) -> Lowering:
    """Read axes in another order."""
    rank = len(op.result)
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(axis % rank for axis in op.arg("dims"))),)


def transpose(op: OpContext) -> Lowering:
    """Read two axes that change places."""
    names = ("axis0", "axis1") if "axis0" in op.arguments else ("dim0", "dim1")
    order = list(range(len(op.result)))
    first, second = (op.arg(name) % len(order) for name in names)
    order[first], order[second] = order[second], order[first]
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(order)),)


def reverse_axes(op: OpContext) -> Lowering:
    """Read all axes backwards."""
    return (op.emit(OpKind.TRANSPOSE, op.tensors, order=tuple(reversed(range(len(op.result))))),)


def pixel_shuffle(op: OpContext) -> Lowering:
    """Read channels that become positions: a reshape, a transposition, a reshape."""
    *front, channels, height, width = op.shape("self")
    if len(front) != 1:
        return ()
    times = op.arg("upscale_factor")
    blocks = op.temporary("apart", (*front, channels // times**2, times, times, height, width))
    order = (0, 1, 4, 2, 5, 3)
    moved = op.temporary("moved", tuple(op.shapes[blocks][axis] for axis in order))
    return (
        op.emit(OpKind.RESHAPE, op.tensors, (blocks,)),
        op.emit(OpKind.TRANSPOSE, (blocks,), (moved,), order=order),
        op.emit(OpKind.RESHAPE, (moved,)),
    )


def channel_shuffle(op: OpContext) -> Lowering:
    """Read channels of groups dealt out in turns: a reshape, a transposition, a reshape."""
    batch, channels, *space = op.shape("self")
    groups = op.arg("groups")
    blocks = op.temporary("apart", (batch, groups, channels // groups, *space))
    order = (0, 2, 1, *range(3, 3 + len(space)))
    moved = op.temporary("moved", (batch, channels // groups, groups, *space))
    return (
        op.emit(OpKind.RESHAPE, op.tensors, (blocks,)),
        op.emit(OpKind.TRANSPOSE, (blocks,), (moved,), order=order),
        op.emit(OpKind.RESHAPE, (moved,)),
    )


def expand(op: OpContext) -> Lowering:
    """Read axes of length 1 that are made longer; new ones are put in front first."""
    before, after = op.shape("self"), op.result
    padded = (1,) * (len(after) - len(before)) + before
    axes = tuple(axis for axis, pair in enumerate(zip(padded, after, strict=True)) if len(set(pair)) > 1)
    if len(before) == len(after):
        return (op.emit(OpKind.ALONG_AXES, op.tensors[:1], axes=axes),)
    reshaped = op.temporary("longer", padded)
    return (
        op.emit(OpKind.RESHAPE, op.tensors[:1], (reshaped,)),
        op.emit(OpKind.ALONG_AXES, (reshaped,), axes=axes),
    )


def pad(op: OpContext) -> Lowering:
    """Read edges, two numbers for each axis, the last axis first."""
    pads, rank = op.arg("pad"), len(op.result)
    axes = [rank - 1 - number // 2 for number, width in enumerate(pads) if width]
    return (op.emit(OpKind.ALONG_AXES, op.tensors[:1], axes=tuple(sorted(set(axes)))),)


def _take_index(op: OpContext, axis: int, number: int, name: str) -> list[OpNode]:
    before = op.shapes[op.tensors[0]]
    single = op.temporary(f"at{number}", (*before[:axis], 1, *before[axis + 1 :]))
    return [
        op.emit(OpKind.SLICE, op.tensors[:1], (single,), slices=((axis, number, number + 1, 1),)),
        op.emit(OpKind.RESHAPE, (single,), (name,)),
    ]


def _list_argument(op: OpContext) -> tuple[str, ...]:
    """The names in a list of values: one may stand in it twice."""
    return tuple(value.name for value in op.arguments["tensors"])


def convolution(op: OpContext) -> Lowering:
    """Read a convolution; one without a batch is not known."""
    name = op_name(op.node)
    data, kernel = op.name("input"), op.name("weight")
    if len(op.shapes[data]) != len(op.shapes[kernel]):
        return ()
    is_transposed = bool(op.arg("transposed", default=False)) or name.startswith("conv_transpose")
    inputs = (data, kernel, op.name("bias"))
    return (op.emit(OpKind.CONVOLUTION, inputs, groups=op.arg("groups"), is_transposed=is_transposed),)


def linear(op: OpContext) -> Lowering:
    """Read a dense layer, its matrix outputs by inputs."""
    if len(op.shape("weight")) != 2:
        return ()
    return (op.emit(OpKind.LINEAR, (op.name("input"), op.name("weight"), op.name("bias")), in_axis=1),)


def addmm(op: OpContext) -> Lowering:
    """Read a dense layer as it is without its name."""
    return (op.emit(OpKind.LINEAR, (op.name("mat1"), op.name("mat2"), op.name("self")), in_axis=0),)


def matmul(op: OpContext) -> Lowering:
    """Read a product of a value and a matrix, or of two values."""
    left, right = op.tensors if len(op.tensors) == 2 else op.tensors * 2
    if left in op.views:
        return ()
    if right in op.views:
        return (op.emit(OpKind.LINEAR, (left, right), in_axis=0),) if len(op.shapes[right]) == 2 else ()
    return (op.emit(OpKind.MATMUL, (left, right)),)


def channel_norm(op: OpContext) -> Lowering:
    """Read a normalisation of each channel; by numbers of its own it needs a scale and a shift, to fall silent."""
    names = {name: op.name(name) for name in ("input", "weight", "bias", "running_mean", "running_var")}
    if not names["weight"]:
        if names["running_mean"]:
            return ()
        return (op.emit(OpKind.CHANNEL_NORM, (names["input"],), op.outputs[:1]),)
    inputs = tuple(names.values())
    if not names["running_mean"]:
        inputs = inputs[:3]
    return (op.emit(OpKind.CHANNEL_NORM, inputs, op.outputs[:1]),)


def group_norm(op: OpContext) -> Lowering:
    """Read a normalisation over groups of channels, known where each channel is a group."""
    if op.arg("num_groups", op.arg("group")) != op.shape("input")[1] or not op.name("weight"):
        return ()
    inputs = (op.name("input"), op.name("weight"), op.name("bias"))
    return (op.emit(OpKind.CHANNEL_NORM, inputs, op.outputs[:1]),)


def prelu(op: OpContext) -> Lowering:
    """Read slopes, which lie along axis 1."""
    data, slopes = op.tensors
    rank = len(op.shapes[data])
    if slopes in op.views and len(op.shapes[slopes]) == 1 and rank > 1:
        view = op.views[slopes]
        name = op.temporary("slopes", (*op.shapes[slopes], *[1] * (rank - 2)))
        op.views[name] = WeightView(view.tensor, (*view.axes, *[None] * (rank - 2)))
        slopes = name
    return (op.emit(OpKind.ELEMENTWISE, (data, slopes)),)


def embedding(op: OpContext) -> Lowering:
    """Read a table of words."""
    if op.name("weight") not in op.views:
        return ()
    return (op.emit(OpKind.EMBEDDING, (op.name("weight"), op.name("indices"))),)


Lowering = tuple[OpNode, ...]
Reader = Callable[[OpContext], Lowering]


def unknown_operation(op: OpContext) -> Lowering:
    """Say that nothing is known of it."""
    return (op.emit(OpKind.UNKNOWN, op.tensors),)


def _elementwise(op: OpContext) -> Lowering:
    return (op.emit(OpKind.ELEMENTWISE, op.tensors),)


def _elementwise_first(op: OpContext) -> Lowering:
    return (op.emit(OpKind.ELEMENTWISE, op.tensors[:1], op.outputs[:1]),)


def _along_axes(op: OpContext, axes: tuple[int, ...]) -> Lowering:
    rank = len(op.shapes[op.tensors[0]])
    return (op.emit(OpKind.ALONG_AXES, op.tensors[:1], axes=tuple(sorted({axis % rank for axis in axes}))),)


def _pool(op: OpContext) -> Lowering:
    rank = len(op.result)
    if rank < 3 or len(op.outputs) > 1:
        return unknown_operation(op)
    return _along_axes(op, tuple(range(2, rank)))


def _reduce(op: OpContext) -> Lowering:
    """Read what is taken over some axes, or over all."""
    dims = op.arg("dim")
    axes = tuple(range(len(op.shapes[op.tensors[0]]))) if dims is None or dims == () else dims
    return _along_axes(op, (axes,) if isinstance(axes, int) else axes)


def _along_dims(op: OpContext) -> Lowering:
    axes = op.arg("dims") if "dims" in op.arguments else op.arg("dim")
    if axes is None or axes == ():
        return unknown_operation(op)
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
_LOWERING_ROWS: tuple[tuple[str, Reader], ...] = (
    (_ELEMENTWISE, _elementwise),
    (_PASSED_ON, _elementwise_first),
    (_POOLS, _pool),
    ("mean sum amax amin prod std var logsumexp norm linalg_vector_norm", _reduce),
    ("argmax argmin max min any all", _reduce),
    ("softmax log_softmax _softmax _log_softmax cumsum flip roll", _along_dims),
    ("layer_norm native_layer_norm rms_norm", _last_axes),
    ("conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d", convolution),
    ("linear", linear),
    ("addmm", addmm),
    ("mm matmul bmm", matmul),
    ("batch_norm _native_batch_norm_legit_no_training instance_norm", channel_norm),
    ("group_norm native_group_norm", group_norm),
    ("prelu _prelu_kernel", prelu),
    ("embedding", embedding),
    ("scaled_dot_product_attention", scaled_dot_product),
    ("lstm gru rnn_tanh rnn_relu", recurrent),
    ("glu", glu),
    ("cat", cat),
    ("stack", stack),
    ("chunk split split_with_sizes tensor_split", chunk),
    ("unbind", unbind),
    ("select", select),
    ("slice", slice_),
    ("narrow", narrow),
    ("index_select", index_select),
    ("view reshape _unsafe_view flatten unflatten squeeze unsqueeze", reshape),
    ("permute", permute),
    ("transpose swapaxes", transpose),
    ("t numpy_T", reverse_axes),
    ("pixel_shuffle", pixel_shuffle),
    ("channel_shuffle", channel_shuffle),
    ("expand expand_as", expand),
    ("pad constant_pad_nd", pad),
)
LOWERINGS: Mapping[str, Reader] = {name: reader for names, reader in _LOWERING_ROWS for name in names.split()}


def lower(op: OpContext) -> Lowering:
    """What an operation does to channels; unknown where it is not said before it runs."""
    reader = LOWERINGS.get(op_name(op.node), unknown_operation)
    try:
        steps = reader(op)
        if any(0 in op.shapes[name] for node in steps for name in (*filter(None, node.inputs), *node.outputs)):
            return unknown_operation(op)
    except LookupError:
        return unknown_operation(op)
    return steps or unknown_operation(op)
