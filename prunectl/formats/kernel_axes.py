"""Guess the output axis and the input axis of a kernel where no graph shows how it is used.

Kernels of PyTorch are `[out, in, …]`. Exceptions are recognised by the shapes of the tensors beside them:

- `Conv1D` of GPT-2 and similar models is `[in, out]`: its bias is as long as the last axis. GPT-BigCode and nanoGPT
  have linear layers of the same names, so that names are not enough.
- A transposed convolution is `[in, out / groups, …]`: its bias is as long as the second axis, or a multiple of it,
  where that of a convolution is as long as the first.
- Flax puts the outputs last.
- Experts in one tensor are `[expert, out, in]` (Mixtral, GraniteMoe) or `[expert, in, out]` (Llama 4, gpt-oss): the
  first matrix of an expert computes gate and value, two times as many outputs as the second has inputs.

Kernels of Keras have the inputs before the outputs, which are last. Kernels of attention and EinsumDense have several
input or output axes. In a depthwise convolution, each output has a single input channel of its own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prunectl.formats import budgets


class KernelAxes(NamedTuple):
    """The axes of a kernel that run over its outputs and its inputs."""

    out_axis: int
    in_axis: int


_ROWS_LAST = KernelAxes(1, 0)
_DEPTHWISE = re.compile(r"depthwise_?conv", re.IGNORECASE)
"""Start of the class of a depthwise layer, and of its default name."""
_BIASES = {"weight": "bias", "kernel": "bias", "W": "b", "w": "b"}
"""The name of the bias that belongs to a weight."""
_EXPERT_PAIRS = {"gate_up_proj": "down_proj", "input_linear.weight": "output_linear.weight"}
"""Names of the first matrix of the experts of a layer, and of the second."""
_ROWS_FIRST = {"input_linear.weight"}
"""First matrices that are `[expert, out, in]` with or without gates, as in JetMoe."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of all tensors of a model, by name."""


def unusual_axes(shapes: Shapes, *, is_flax: bool) -> Mapping[str, KernelAxes]:
    """The axes of kernels, by name, that are not `[out, in, …]`."""
    by_rank: defaultdict[int, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        by_rank[len(shape)].append(name)
    flax = {name: axes for name in shapes if is_flax and (axes := _flax_axes(name, shapes[name])) is not None}
    windows = (name for rank in (3, 4, 5) for name in by_rank[rank])
    transposed = {name: _ROWS_LAST for name in windows if _is_transposed(name, shapes)}
    outputs_last = dict(_with_outputs_last(by_rank[2], shapes))
    return {**flax, **transposed, **outputs_last, **dict(_of_experts(by_rank[3], shapes))}


def split_name(name: str, shapes: Shapes) -> tuple[str, str]:
    """Split a name into the layer, with its dot, and the weight; parametrized weights get their original name."""
    inside = ".parametrizations."
    if inside in f".{name}":
        before, _, rest = f".{name}".partition(inside)
        leaf, _, part = rest.partition(".")
        # weight_norm stores the norms as original0, and the directions as original1. Beside a base, the original of
        # `orthogonal` is not the weight, but the rotation of the base.
        is_rotation = f"{name.removesuffix('original')}0.base" in shapes
        is_weight = part == "original" and not is_rotation
        is_weight |= part == "original1" and f"{name.removesuffix('1')}0" in shapes
        return f"{before.removeprefix('.')}." if before else "", leaf if is_weight else f"{leaf} {part}"
    begin = max(name.rfind("."), name.rfind("/")) + 1
    return name[:begin], name[begin:]


def depthwise_axes(leaf: str, kind: str, shape: tuple[int, ...]) -> tuple[int | None, int | None] | None:
    """The output and input axes of a depthwise kernel of Keras; None for another kernel.

    It is `[height, width, channels, multiplier]`, and an output sums only over its window. With a multiplier of 1, the
    last axis counts as the input axis, as the 1 in `[channels, 1, height, width]` of other frameworks. With a larger
    one, the outputs lie along both axes, and no axis runs over inputs.
    """
    if "depthwise" not in leaf and not _DEPTHWISE.match(kind):
        return None
    return (len(shape) - 2, len(shape) - 1) if shape[-1] == 1 else (None, None)


def _flax_axes(name: str, shape: tuple[int, ...]) -> KernelAxes | None:
    steps = name.replace("/", ".").split(".")
    if steps[-1] != "kernel" or len(shape) < 2:
        return None
    return attention_axes(steps[-2] if len(steps) > 1 else "", "", shape) or KernelAxes(len(shape) - 1, len(shape) - 2)


def _is_transposed(name: str, shapes: Shapes) -> bool:
    """Whether a convolution kernel must be that of a transposed convolution."""
    shape = shapes[name]
    if shape[1] < 2:
        return False
    prefix, leaf = split_name(name, shapes)
    if leaf.removesuffix("_orig") not in {"weight", "weight_v"}:
        return False
    bias = shapes.get(f"{prefix}bias", ())
    if len(bias) != 1 or bias[0] == shape[0] or bias[0] % shape[1]:
        return False
    # A stack of matrices `[n, in, out]` has such a bias too. The groups must divide the inputs as well.
    groups = bias[0] // shape[1]
    return groups > 0 and shape[0] % groups == 0 and (len(shape) > 3 or bias[0] != shape[2])


def _with_outputs_last(matrices: Iterable[str], shapes: Shapes) -> Iterator[tuple[str, KernelAxes]]:
    """Yield matrices that are `[in, out]`; square ones follow those of the same layer name, or all others."""
    square: list[tuple[str, str, bool]] = []
    layer_names: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name in matrices:
        shape = shapes[name]
        prefix, leaf = split_name(name, shapes)
        leaf = leaf.removesuffix("_orig")
        if leaf not in _BIASES:
            continue
        layer_name = _NUMBER.sub("", prefix.replace("/", ".").rstrip(".").rpartition(".")[2])
        bias = shapes.get(f"{prefix}{_BIASES[leaf]}")
        if shape[0] == shape[1]:
            square.append((name, layer_name, bias == shape[:1]))
        elif bias in {shape[:1], shape[1:]}:
            is_last = bias == shape[1:]
            layer_names[is_last][layer_name] += 1
            if is_last:
                yield name, _ROWS_LAST
    clear = layer_names[True].keys() - layer_names[False].keys()
    are_all_last = not layer_names[False] and layer_names[True].total() > 1
    yield from ((name, _ROWS_LAST) for name, layer, has_bias in square if layer in clear or (are_all_last and has_bias))


_NUMBER = re.compile(r"_\d+$")


def _of_experts(stacks: Iterable[str], shapes: Shapes) -> Iterator[tuple[str, KernelAxes]]:
    for first, second in _EXPERT_PAIRS.items():
        for name in stacks:
            if not name.endswith(first):
                continue
            other = f"{name.removesuffix(first)}{second}"
            other_shape = shapes.get(other, ())
            if len(other_shape) != 3 or other_shape[0] != shapes[name][0]:
                continue
            _, rows, columns = shapes[name]
            is_gated = 2 * other_shape[2] == rows
            if other_shape[1] == columns and (is_gated or first in _ROWS_FIRST):
                yield from ((name, KernelAxes(1, 2)), (other, KernelAxes(1, 2)))
            elif other_shape[2] == rows and 2 * other_shape[1] == columns:
                yield from ((name, KernelAxes(2, 1)), (other, KernelAxes(2, 1)))


_PROJECTION = re.compile(r"_?(query|key|value)(_dense)?")


def attention_axes(step: str, kind: str, shape: tuple[int, ...]) -> KernelAxes | None:
    """The axes of the query, key or value kernel of a Keras attention layer, `[in, heads, size]`; None for others.

    ``step`` is the last part of the kernel's path in its layer. Where the class of the layer is unknown, the kernel
    might be that of a convolution, `[window, in, out]`, whose first axis is short.
    """
    is_clear = kind.endswith("Attention") or (not kind and len(shape) == 3 and shape[0] > shape[1])
    return KernelAxes(2, 0) if is_clear and len(shape) == 3 and _PROJECTION.fullmatch(step) else None


def einsum_axes(equation: object, rank: int) -> KernelAxes | None:
    """The last output axis and the last summed axis of an EinsumDense kernel."""
    if not isinstance(equation, str) or len(equation) > budgets.MAX_EINSUM_LABELS:
        return None
    operands, _, output = equation.partition("->")
    inputs, _, kernel = operands.replace(" ", "").partition(",")
    summed = [axis for axis, label in enumerate(kernel) if label in inputs and label not in output]
    free = [axis for axis, label in enumerate(kernel) if label in output and label not in inputs]
    return KernelAxes(free[-1], summed[-1]) if summed and free and len(kernel) == rank else None
