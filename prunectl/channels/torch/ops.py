"""What each operation of PyTorch does to channels: often one kind, sometimes several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunectl.channels.graph import OpKind, OpNode, WeightView
from prunectl.channels.torch.attention import glu, recurrent, scaled_dot_product
from prunectl.channels.torch.fx import OpContext, op_name


def cat(seen: OpContext) -> Lowering:
    """Read what is put one behind the other."""
    return (seen.made(OpKind.CONCAT, _listed(seen), axis=seen.arg("dim", 0)),)


def stack(seen: OpContext) -> Lowering:
    """Read what is put one behind the other along an axis of its own."""
    shape, axis = seen.result, seen.arg("dim", 0) % len(seen.result)
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = {seen.between(f"part{number}", single): name for number, name in enumerate(_listed(seen))}
    longer = tuple(seen.made(OpKind.RESHAPE, (name,), (part,)) for part, name in parts.items())
    return (*longer, seen.made(OpKind.CONCAT, parts, axis=axis))


def chunk(seen: OpContext) -> Lowering:
    """Read what is taken apart along an axis."""
    before, axis = seen.shapes[seen.tensors[0]], seen.arg("dim", 0)
    axis %= len(before)
    sizes = [seen.shapes[name][axis] for name in seen.outputs if name in seen.shapes]
    if len(sizes) < len(seen.outputs) or sum(sizes) > before[axis]:
        return ()
    outputs = list(seen.outputs)
    if rest := before[axis] - sum(sizes):
        outputs.append(seen.between("rest", (*before[:axis], rest, *before[axis + 1 :])))
        sizes.append(rest)
    return (seen.made(OpKind.SPLIT, seen.tensors[:1], outputs, axis=axis, sizes=tuple(sizes)),)


def unbind(seen: OpContext) -> Lowering:
    """Read what is taken apart along an axis that is no more."""
    axis = seen.arg("dim", 0) % len(seen.shapes[seen.tensors[0]])
    found: list[OpNode] = []
    for number, name in enumerate(seen.outputs):
        if name in seen.shapes:
            found += _one(seen, axis, number, name)
    return tuple(found)


def select(seen: OpContext) -> Lowering:
    """Read one of what lies along an axis; behind the first it is a position, and no channel."""
    before = seen.shapes[seen.tensors[0]]
    axis, number = seen.arg("dim", 0) % len(before), seen.arg("index", 0)
    if axis:
        return (seen.made(OpKind.STRETCH, seen.tensors[:1], axes=(axis,)),)
    return tuple(_one(seen, axis, number % before[axis], seen.outputs[0]))


def slice_(seen: OpContext) -> Lowering:
    """Read a part of an axis."""
    before = seen.shape("self")
    axis = seen.arg("dim", 0) % len(before)
    bounds = slice(seen.arg("start"), seen.arg("end"), seen.arg("step", 1)).indices(before[axis])
    return (seen.made(OpKind.SLICE, seen.tensors[:1], slices=((axis, *bounds),)),)


def narrow(seen: OpContext) -> Lowering:
    """Read a part of an axis, by where it begins and how long it is."""
    before = seen.shape("self")
    axis, start = seen.arg("dim") % len(before), seen.arg("start")
    start %= before[axis]
    return (seen.made(OpKind.SLICE, seen.tensors[:1], slices=((axis, start, start + seen.arg("length"), 1),)),)


def index_select(seen: OpContext) -> Lowering:
    """Read positions taken in another order."""
    return (seen.made(OpKind.STRETCH, (seen.name("self"),), axes=(seen.arg("dim") % len(seen.shape("self")),)),)


def reshape(seen: OpContext) -> Lowering:
    """Read the same numbers in another shape."""
    return (seen.made(OpKind.RESHAPE, seen.tensors[:1]),)


def permute(seen: OpContext) -> Lowering:
    """Read axes in another order."""
    rank = len(seen.result)
    return (seen.made(OpKind.TRANSPOSE, seen.tensors, order=tuple(axis % rank for axis in seen.arg("dims"))),)


def transpose(seen: OpContext) -> Lowering:
    """Read two axes that change places."""
    names = ("axis0", "axis1") if "axis0" in seen.arguments else ("dim0", "dim1")
    order = list(range(len(seen.result)))
    one, other = (seen.arg(name) % len(order) for name in names)
    order[one], order[other] = order[other], order[one]
    return (seen.made(OpKind.TRANSPOSE, seen.tensors, order=tuple(order)),)


def reverse_axes(seen: OpContext) -> Lowering:
    """Read all axes backwards."""
    return (seen.made(OpKind.TRANSPOSE, seen.tensors, order=tuple(reversed(range(len(seen.result))))),)


def pixel_shuffle(seen: OpContext) -> Lowering:
    """Read channels that become positions: a reshape, a transposition, a reshape."""
    *front, channels, height, width = seen.shape("self")
    if len(front) != 1:
        return ()
    times = seen.arg("upscale_factor")
    apart = seen.between("apart", (*front, channels // times**2, times, times, height, width))
    order = (0, 1, 4, 2, 5, 3)
    moved = seen.between("moved", tuple(seen.shapes[apart][axis] for axis in order))
    return (
        seen.made(OpKind.RESHAPE, seen.tensors, (apart,)),
        seen.made(OpKind.TRANSPOSE, (apart,), (moved,), order=order),
        seen.made(OpKind.RESHAPE, (moved,)),
    )


def channel_shuffle(seen: OpContext) -> Lowering:
    """Read channels of groups dealt out in turns: a reshape, a transposition, a reshape."""
    batch, channels, *space = seen.shape("self")
    groups = seen.arg("groups")
    apart = seen.between("apart", (batch, groups, channels // groups, *space))
    order = (0, 2, 1, *range(3, 3 + len(space)))
    moved = seen.between("moved", (batch, channels // groups, groups, *space))
    return (
        seen.made(OpKind.RESHAPE, seen.tensors, (apart,)),
        seen.made(OpKind.TRANSPOSE, (apart,), (moved,), order=order),
        seen.made(OpKind.RESHAPE, (moved,)),
    )


def expand(seen: OpContext) -> Lowering:
    """Read axes of length 1 that are made longer; new ones are put in front first."""
    before, after = seen.shape("self"), seen.result
    whole = (1,) * (len(after) - len(before)) + before
    axes = tuple(axis for axis, pair in enumerate(zip(whole, after, strict=True)) if len(set(pair)) > 1)
    if len(before) == len(after):
        return (seen.made(OpKind.STRETCH, seen.tensors[:1], axes=axes),)
    longer = seen.between("longer", whole)
    return (
        seen.made(OpKind.RESHAPE, seen.tensors[:1], (longer,)),
        seen.made(OpKind.STRETCH, (longer,), axes=axes),
    )


def pad(seen: OpContext) -> Lowering:
    """Read edges, two numbers for each axis, the last axis first."""
    pads, rank = seen.arg("pad"), len(seen.result)
    axes = [rank - 1 - number // 2 for number, width in enumerate(pads) if width]
    return (seen.made(OpKind.STRETCH, seen.tensors[:1], axes=tuple(sorted(set(axes)))),)


def _one(seen: OpContext, axis: int, number: int, name: str) -> list[OpNode]:
    before = seen.shapes[seen.tensors[0]]
    single = seen.between(f"at{number}", (*before[:axis], 1, *before[axis + 1 :]))
    return [
        seen.made(OpKind.SLICE, seen.tensors[:1], (single,), slices=((axis, number, number + 1, 1),)),
        seen.made(OpKind.RESHAPE, (single,), (name,)),
    ]


def _listed(seen: OpContext) -> tuple[str, ...]:
    """Return the names in a list of values: one may stand in it twice."""
    return tuple(one.name for one in seen.arguments["tensors"])


def convolution(seen: OpContext) -> Lowering:
    """Read a convolution; one without a batch is not known."""
    name = op_name(seen.node)
    data, kernel = seen.name("input"), seen.name("weight")
    if len(seen.shapes[data]) != len(seen.shapes[kernel]):
        return ()
    is_transposed = bool(seen.arg("transposed", default=False)) or name.startswith("conv_transpose")
    inputs = (data, kernel, seen.name("bias"))
    return (seen.made(OpKind.CONVOLUTION, inputs, groups=seen.arg("groups"), is_transposed=is_transposed),)


def linear(seen: OpContext) -> Lowering:
    """Read a dense layer, its matrix outputs by inputs."""
    if len(seen.shape("weight")) != 2:
        return ()
    return (seen.made(OpKind.LINEAR, (seen.name("input"), seen.name("weight"), seen.name("bias")), in_axis=1),)


def addmm(seen: OpContext) -> Lowering:
    """Read a dense layer as it is without its name."""
    return (seen.made(OpKind.LINEAR, (seen.name("mat1"), seen.name("mat2"), seen.name("self")), in_axis=0),)


def product(seen: OpContext) -> Lowering:
    """Read a product of a value and a matrix, or of two values."""
    one, other = seen.tensors if len(seen.tensors) == 2 else seen.tensors * 2
    if one in seen.views:
        return ()
    if other in seen.views:
        return (seen.made(OpKind.LINEAR, (one, other), in_axis=0),) if len(seen.shapes[other]) == 2 else ()
    return (seen.made(OpKind.PRODUCT, (one, other)),)


def norm(seen: OpContext) -> Lowering:
    """Read a normalisation of each channel; by numbers of its own it needs a scale and a shift, to fall silent."""
    argument = {name: seen.name(name) for name in ("input", "weight", "bias", "running_mean", "running_var")}
    if not argument["weight"]:
        if argument["running_mean"]:
            return ()
        return (seen.made(OpKind.NORM, (argument["input"],), seen.outputs[:1]),)
    inputs = tuple(argument.values())
    if not argument["running_mean"]:
        inputs = inputs[:3]
    return (seen.made(OpKind.NORM, inputs, seen.outputs[:1]),)


def group_norm(seen: OpContext) -> Lowering:
    """Read a normalisation over groups of channels, known where each channel is a group."""
    if seen.arg("num_groups", seen.arg("group")) != seen.shape("input")[1] or not seen.name("weight"):
        return ()
    inputs = (seen.name("input"), seen.name("weight"), seen.name("bias"))
    return (seen.made(OpKind.NORM, inputs, seen.outputs[:1]),)


def prelu(seen: OpContext) -> Lowering:
    """Read slopes, which lie along axis 1."""
    data, slopes = seen.tensors
    rank = len(seen.shapes[data])
    if slopes in seen.views and len(seen.shapes[slopes]) == 1 and rank > 1:
        view = seen.views[slopes]
        name = seen.between("slopes", (*seen.shapes[slopes], *[1] * (rank - 2)))
        seen.views[name] = WeightView(view.tensor, (*view.axes, *[None] * (rank - 2)))
        slopes = name
    return (seen.made(OpKind.EACH, (data, slopes)),)


def embedding(seen: OpContext) -> Lowering:
    """Read a table of words."""
    if seen.name("weight") not in seen.views:
        return ()
    return (seen.made(OpKind.EMBEDDING, (seen.name("weight"), seen.name("indices"))),)


Lowering = tuple[OpNode, ...]
Reader = Callable[[OpContext], Lowering]


def unknown_operation(seen: OpContext) -> Lowering:
    """Say that nothing is known of it."""
    return (seen.made(OpKind.UNKNOWN, seen.tensors),)


def _each(seen: OpContext) -> Lowering:
    return (seen.made(OpKind.EACH, seen.tensors),)


def _first(seen: OpContext) -> Lowering:
    return (seen.made(OpKind.EACH, seen.tensors[:1], seen.outputs[:1]),)


def _stretch(seen: OpContext, axes: tuple[int, ...]) -> Lowering:
    rank = len(seen.shapes[seen.tensors[0]])
    return (seen.made(OpKind.STRETCH, seen.tensors[:1], axes=tuple(sorted({axis % rank for axis in axes}))),)


def _window(seen: OpContext) -> Lowering:
    rank = len(seen.result)
    if rank < 3 or len(seen.outputs) > 1:
        return unknown_operation(seen)
    return _stretch(seen, tuple(range(2, rank)))


def _over(seen: OpContext) -> Lowering:
    """Read what is taken over some axes, or over all."""
    said = seen.arg("dim")
    axes = tuple(range(len(seen.shapes[seen.tensors[0]]))) if said is None or said == () else said
    return _stretch(seen, (axes,) if isinstance(axes, int) else axes)


def _along(seen: OpContext) -> Lowering:
    axes = seen.arg("dims") if "dims" in seen.arguments else seen.arg("dim")
    if axes is None or axes == ():
        return unknown_operation(seen)
    return _stretch(seen, (axes,) if isinstance(axes, int) else axes)


def _last_axes(seen: OpContext) -> Lowering:
    return _stretch(seen, tuple(range(-len(seen.arg("normalized_shape")), 0)))[:1]


_ONE_BY_ONE = """relu relu6 gelu silu mish hardswish hardsigmoid hardtanh leaky_relu elu selu celu softplus sigmoid
log_sigmoid tanh exp expm1 log log1p log2 sqrt rsqrt square abs neg floor ceil round sign reciprocal sin cos tan atan
erf clamp clamp_min clamp_max add sub rsub mul div pow maximum minimum where eq ne gt lt ge le logical_and logical_or
logical_xor logical_not bitwise_and bitwise_or bitwise_not masked_fill addcmul addcdiv lerp copy nan_to_num isnan isinf
threshold hardshrink softshrink remainder fmod trunc atan2"""
_AS_IT_IS = """dropout feature_dropout alpha_dropout clone contiguous detach alias to _to_copy type_as lift_fresh_copy
lift_fresh detach_copy native_dropout"""
_POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d max_pool2d_with_indices
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d
upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d"""
_READERS: tuple[tuple[str, Reader], ...] = (
    (_ONE_BY_ONE, _each),
    (_AS_IT_IS, _first),
    (_POOLS, _window),
    ("mean sum amax amin prod std var logsumexp norm linalg_vector_norm", _over),
    ("argmax argmin max min any all", _over),
    ("softmax log_softmax _softmax _log_softmax cumsum flip roll", _along),
    ("layer_norm native_layer_norm rms_norm", _last_axes),
    ("conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d", convolution),
    ("linear", linear),
    ("addmm", addmm),
    ("mm matmul bmm", product),
    ("batch_norm _native_batch_norm_legit_no_training instance_norm", norm),
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
KINDS: Mapping[str, Reader] = {name: reader for names, reader in _READERS for name in names.split()}


def lower(seen: OpContext) -> Lowering:
    """Return what an operation does to channels; unknown where it is not said before it runs."""
    reader = KINDS.get(op_name(seen.node), unknown_operation)
    try:
        found = reader(seen)
        if any(0 in seen.shapes[name] for node in found for name in (*filter(None, node.inputs), *node.outputs)):
            return unknown_operation(seen)
    except LookupError:
        return unknown_operation(seen)
    return found or unknown_operation(seen)
