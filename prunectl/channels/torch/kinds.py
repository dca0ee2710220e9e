"""What each operation of PyTorch does to channels: often one kind, sometimes several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunectl.channels.graph import Kind, Node
from prunectl.channels.torch.kinds_attention import glu, recurrent, scaled_dot_product
from prunectl.channels.torch.kinds_moving import (
    cat,
    channel_shuffle,
    chunk,
    different,
    index_select,
    narrow,
    pad,
    permute,
    pixel_shuffle,
    reshape,
    select,
    slice_,
    stack,
    transpose,
    turned,
    unbind,
)
from prunectl.channels.torch.kinds_weights import (
    addmm,
    convolution,
    embedding,
    group_norm,
    linear,
    norm,
    prelu,
    product,
)
from prunectl.channels.torch.seen import Seen, op

Steps = tuple[Node, ...]
Reader = Callable[[Seen], Steps]


def unknown(seen: Seen) -> Steps:
    """Say that nothing is known of it."""
    return (seen.made(Kind.UNKNOWN, seen.tensors),)


def _each(seen: Seen) -> Steps:
    return (seen.made(Kind.EACH, seen.tensors),)


def _first(seen: Seen) -> Steps:
    return (seen.made(Kind.EACH, seen.tensors[:1], seen.outputs[:1]),)


def _stretch(seen: Seen, axes: tuple[int, ...]) -> Steps:
    rank = len(seen.shapes[seen.tensors[0]])
    return (seen.made(Kind.STRETCH, seen.tensors[:1], axes=tuple(sorted({axis % rank for axis in axes}))),)


def _window(seen: Seen) -> Steps:
    rank = len(seen.result)
    if rank < 3 or len(seen.outputs) > 1:
        return unknown(seen)
    return _stretch(seen, tuple(range(2, rank)))


def _over(seen: Seen) -> Steps:
    """Read what is taken over some axes, or over all."""
    said = seen.arg("dim")
    axes = tuple(range(len(seen.shapes[seen.tensors[0]]))) if said is None or said == () else said
    return _stretch(seen, (axes,) if isinstance(axes, int) else axes)


def _along(seen: Seen) -> Steps:
    axes = seen.arg("dims") if "dims" in seen.arguments else seen.arg("dim")
    if axes is None or axes == ():
        return unknown(seen)
    return _stretch(seen, (axes,) if isinstance(axes, int) else axes)


def _last_axes(seen: Seen) -> Steps:
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
    ("t numpy_T", turned),
    ("pixel_shuffle", pixel_shuffle),
    ("channel_shuffle", channel_shuffle),
    ("expand expand_as", different),
    ("pad constant_pad_nd", pad),
)
KINDS: Mapping[str, Reader] = {name: reader for names, reader in _READERS for name in names.split()}


def steps(seen: Seen) -> Steps:
    """Return what an operation does to channels; unknown where it is not said before it runs."""
    reader = KINDS.get(op(seen.node), unknown)
    try:
        found = reader(seen)
        if any(0 in seen.shapes[name] for node in found for name in (*filter(None, node.inputs), *node.outputs)):
            return unknown(seen)
    except LookupError:
        return unknown(seen)
    return found or unknown(seen)
