"""Operations of PyTorch with weights: they make channels, or scale them one by one."""

from __future__ import annotations

from prunectl.channels.graph import Kind, Node, View
from prunectl.channels.torch.seen import Seen, op

Steps = tuple[Node, ...]


def convolution(seen: Seen) -> Steps:
    """Read a convolution; one without a batch is not known."""
    name = op(seen.node)
    data, kernel = seen.name("input"), seen.name("weight")
    if len(seen.shapes[data]) != len(seen.shapes[kernel]):
        return ()
    is_transposed = bool(seen.arg("transposed", default=False)) or name.startswith("conv_transpose")
    inputs = (data, kernel, seen.name("bias"))
    return (seen.made(Kind.CONVOLUTION, inputs, groups=seen.arg("groups"), is_transposed=is_transposed),)


def linear(seen: Seen) -> Steps:
    """Read a dense layer, its matrix outputs by inputs."""
    if len(seen.shape("weight")) != 2:
        return ()
    return (seen.made(Kind.LINEAR, (seen.name("input"), seen.name("weight"), seen.name("bias")), in_axis=1),)


def addmm(seen: Seen) -> Steps:
    """Read a dense layer as it is without its name."""
    return (seen.made(Kind.LINEAR, (seen.name("mat1"), seen.name("mat2"), seen.name("self")), in_axis=0),)


def product(seen: Seen) -> Steps:
    """Read a product of a value and a matrix, or of two values."""
    one, other = seen.tensors if len(seen.tensors) == 2 else seen.tensors * 2
    if one in seen.views:
        return ()
    if other in seen.views:
        return (seen.made(Kind.LINEAR, (one, other), in_axis=0),) if len(seen.shapes[other]) == 2 else ()
    return (seen.made(Kind.PRODUCT, (one, other)),)


def norm(seen: Seen) -> Steps:
    """Read a normalisation of each channel; by numbers of its own it needs a scale and a shift, to fall silent."""
    argument = {name: seen.name(name) for name in ("input", "weight", "bias", "running_mean", "running_var")}
    if not argument["weight"]:
        if argument["running_mean"]:
            return ()
        return (seen.made(Kind.NORM, (argument["input"],), seen.outputs[:1]),)
    inputs = tuple(argument.values())
    if not argument["running_mean"]:
        inputs = inputs[:3]
    return (seen.made(Kind.NORM, inputs, seen.outputs[:1]),)


def group_norm(seen: Seen) -> Steps:
    """Read a normalisation over groups of channels, known where each channel is a group."""
    if seen.arg("num_groups", seen.arg("group")) != seen.shape("input")[1] or not seen.name("weight"):
        return ()
    inputs = (seen.name("input"), seen.name("weight"), seen.name("bias"))
    return (seen.made(Kind.NORM, inputs, seen.outputs[:1]),)


def prelu(seen: Seen) -> Steps:
    """Read slopes, which lie along axis 1."""
    data, slopes = seen.tensors
    rank = len(seen.shapes[data])
    if slopes in seen.views and len(seen.shapes[slopes]) == 1 and rank > 1:
        view = seen.views[slopes]
        name = seen.between("slopes", (*seen.shapes[slopes], *[1] * (rank - 2)))
        seen.views[name] = View(view.tensor, (*view.axes, *[None] * (rank - 2)))
        slopes = name
    return (seen.made(Kind.EACH, (data, slopes)),)


def embedding(seen: Seen) -> Steps:
    """Read a table of words."""
    if seen.name("weight") not in seen.views:
        return ()
    return (seen.made(Kind.EMBEDDING, (seen.name("weight"), seen.name("indices"))),)
