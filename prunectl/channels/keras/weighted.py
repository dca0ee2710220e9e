"""Keras layers that make channels by weights, or scale them one by one."""

from __future__ import annotations

from dataclasses import replace

from prunectl.channels.graph import Kind
from prunectl.channels.keras.activations import activated
from prunectl.channels.keras.called import Called
from prunectl.channels.keras.net import Look
from prunectl.formats.keras.multiplying import products
from prunectl.formats.keras.shapes import UnknownShapeError, plain


def convolution(call: Called) -> str:
    """A convolution, plain or in groups; its kernel is (*space, in, out)."""
    _check(call)
    axes = call.step.axes
    groups = call.step.number("groups", 1)
    kernel = call.weight("kernel", (axes + 1, axes, *range(axes)))
    return _convolved(call, kernel, groups=groups, is_transposed=False)


def transposed(call: Called) -> str:
    """A transposed convolution; its kernel is (*space, out, in)."""
    _check(call)
    axes = call.step.axes
    kernel = call.weight("kernel", (axes + 1, axes, *range(axes)))
    return _convolved(call, kernel, groups=1, is_transposed=True)


def depthwise(call: Called) -> str:
    """A convolution channel by channel; its kernel is (*space, channels, multiplier)."""
    _check(call)
    channels = call.fronted(call.shape(call.data))[1]
    return _convolved(call, _by_channel(call), groups=channels, is_transposed=True)


def separable(call: Called) -> str:
    """A convolution channel by channel, and one that mixes the channels at each position."""
    _check(call)
    axes = call.step.axes
    made = call.fronted(call.made())
    data = call.forward(call.data)
    channels, wide = call.shape(data)[1], call.leaves["pointwise_kernel"].shape[-2]
    # By another name, as what each of the two reads and makes is told by their names.
    inner = replace(call, names=(*call.names, "depthwise")).does(
        Kind.CONVOLUTION,
        (data, _by_channel(call)),
        (call.batch, wide, *made[2:]),
        groups=channels,
        is_transposed=True,
        is_padded=_is_padded(call),
    )
    kernel = call.weight("pointwise_kernel", (axes + 1, axes, *range(axes)))
    found = call.does(
        Kind.CONVOLUTION, (inner, kernel, *_bias(call)), made, groups=1, is_transposed=False, is_padded=False
    )
    return activated(call, call.back(_seen(call, found)))


def dense(call: Called) -> str:
    """A matrix, (in, out), over the last axis."""
    _check(call)
    inputs = (call.data, call.weight("kernel", (0, 1)), *_bias(call))
    return activated(call, _seen(call, call.does(Kind.LINEAR, inputs, call.made(), in_axis=0), is_image=False))


def embedding(call: Called) -> str:
    """A table of words."""
    table = call.leaves["embeddings"]
    made = call.made()
    if table.shape[1:] != made[-1:]:
        raise UnknownShapeError
    return call.does(Kind.EMBEDDING, (call.weight("embeddings", (0, 1)), call.data), made)


def normalised(call: Called) -> str:
    """Batch normalisation, along one axis."""
    shape = call.shape(call.data)
    axis = _one_axis(call, len(shape))
    if any(tensor.shape != (shape[axis],) for tensor in call.leaves.values()) or not call.leaves:
        raise UnknownShapeError
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    data = call.turned(call.data, order)
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    inputs = (data, *(call.weight(leaf, (0,)) for leaf in leaves))
    made = call.does(Kind.NORM, inputs, call.shape(data))
    return call.turned(made, tuple(order.index(place) for place in range(len(shape))))


def by_group(call: Called) -> str:
    """Normalisation over groups of channels, and over all positions; whole groups go."""
    shape = call.shape(call.data)
    axis, groups = _one_axis(call, len(shape)), call.step.number("groups", 32)
    channels = shape[axis]
    groups = channels if groups == -1 else groups
    if groups < 1 or channels % groups or any(tensor.shape != (channels,) for tensor in call.leaves.values()):
        raise UnknownShapeError
    last = (*(other for other in range(len(shape)) if other != axis), axis)
    data = call.turned(call.data, last)
    behind = call.shape(data)
    apart = call.does(Kind.RESHAPE, (data,), (*behind[:-1], groups, channels // groups))
    apart = call.does(Kind.STRETCH, (apart,), call.shape(apart), axes=(len(shape),))
    data = call.does(Kind.RESHAPE, (apart,), behind)
    data = call.turned(data, (0, len(shape) - 1, *range(1, len(shape) - 1)))
    made = call.does(Kind.NORM, (data, call.weight("gamma", (0,)), call.weight("beta", (0,))), call.shape(data))
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    return call.turned(made, tuple(order.index(place) for place in range(len(shape))))


def sloped(call: Called) -> str:
    """A rectifier with slopes of its own; along shared axes they have length 1."""
    shape, slopes = call.shape(call.data), call.leaves["alpha"]
    if len(slopes.shape) != len(shape) - 1:
        raise UnknownShapeError
    return call.does(Kind.EACH, (call.data, call.weight("alpha", range(len(slopes.shape)))), shape)


def scaled(call: Called) -> str:
    """A scale of its own for each channel of the last axis."""
    shape, scales = call.shape(call.data), call.leaves["gamma"]
    if scales.shape != shape[-1:]:
        raise UnknownShapeError
    return call.does(Kind.EACH, (call.data, call.weight("gamma", (0,))), shape)


def _convolved(call: Called, kernel: str, *, groups: int, is_transposed: bool) -> str:
    shape = call.fronted(call.made())
    inputs = (call.forward(call.data), kernel, *_bias(call))
    found = call.does(
        Kind.CONVOLUTION, inputs, shape, groups=groups, is_transposed=is_transposed, is_padded=_is_padded(call)
    )
    return activated(call, call.back(_seen(call, found)))


def _by_channel(call: Called) -> str:
    """Return a kernel of channel by channel as one of a transposed convolution in as many groups.

    Its first axis runs over what goes in, each of which makes as many as the multiplier says, one beside the other.
    """
    axes = call.step.axes
    return call.weight("depthwise_kernel", (axes, axes + 1, *range(axes)))


def _is_padded(call: Called) -> bool:
    return call.step.word("padding", "valid") != "valid"


def _bias(call: Called) -> tuple[str, ...]:
    return (call.weight("bias", (0,)),) if "bias" in call.leaves else ()


def _seen(call: Called, value: str, *, is_image: bool = True) -> str:
    """Remember where Keras has a value: of an image, with the channels where the layer has them."""
    order = tuple(range(len(call.shape(value))))
    if is_image and not call.step.is_channels_first:
        order = (0, order[-1], *order[1:-1])
    call.net.looks[value] = Look(call.names, order)
    return value


def _check(call: Called) -> None:
    """Hold the shapes of the weights against what the settings say."""
    found = products(call.step)
    if any(one.leaf not in call.leaves or call.leaves[one.leaf].shape != one.shape for one in found):
        raise UnknownShapeError


def _one_axis(call: Called, rank: int) -> int:
    said = plain(call.step.config.get("axis", -1))
    axes = said if isinstance(said, list) else [said]
    if len(axes) != 1 or type(axes[0]) is not int or not -rank < axes[0] < rank or not axes[0]:
        raise UnknownShapeError
    return int(axes[0]) % rank
