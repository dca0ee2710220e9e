"""Which axis of a kernel runs over outputs, and which over inputs, where no graph says what is done with it?

The layers of PyTorch keep `[out, in, …]`. What keeps them otherwise is told by the shapes beside it:

- `Conv1D` of GPT-2 and its kin keeps `[in, out]`: its bias is as long as the last axis. GPT-BigCode and nanoGPT have
  linear layers of the same names, so names alone do not tell.
- A transposed convolution keeps `[in, out / groups, …]`: its bias is as long as the second axis, or a multiple of it,
  where that of a convolution is as long as the first.
- Flax puts the outputs last.
- Experts that share a tensor keep `[expert, out, in]` (Mixtral, GraniteMoe) or `[expert, in, out]` (Llama 4, gpt-oss):
  the first matrix of an expert makes gate and value, two times as many outputs as the second has inputs.

Those of Keras put the inputs before the outputs, which stand last; an attention and an EinsumDense have several axes of
either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class KernelAxes(NamedTuple):
    """The axes of a kernel that runs over outputs and inputs."""

    out_axis: int
    in_axis: int


_ROWS_LAST = KernelAxes(1, 0)
_BIASES = {"weight": "bias", "kernel": "bias", "W": "b", "w": "b"}
"""What the bias beside a weight is called."""
_EXPERT_PAIRS = {"gate_up_proj": "down_proj", "input_linear.weight": "output_linear.weight"}
"""The first matrices of the experts of a layer, and the second ones."""


def unusual_axes(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, KernelAxes]:
    """The axes of the kernels, by name, that do not begin with outputs and inputs."""
    transposed = {name: _ROWS_LAST for name, shape in shapes.items() if _is_transposed(name, shape, shapes)}
    return {**transposed, **dict(_with_outputs_last(shapes)), **dict(_of_experts(shapes))}


def _is_transposed(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a kernel must be that of a transposed convolution."""
    stem = name.removesuffix("_orig")
    if not 3 <= len(shape) <= 5 or not stem.endswith("weight"):
        return False
    bias = shapes.get(f"{stem.removesuffix('weight')}bias", ())
    return len(bias) == 1 and bias[0] != shape[0] and shape[1] > 1 and bias[0] % shape[1] == 0


def _with_outputs_last(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, KernelAxes]]:
    """Yield matrices `[in, out]`; a square one is taken for what others of its layer's name are."""
    square: list[tuple[str, str]] = []
    layer_names: dict[bool, set[str]] = {True: set(), False: set()}
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        before, _, leaf = name.removesuffix("_orig").replace("/", ".").rpartition(".")
        if leaf not in _BIASES:
            continue
        layer_name = before.rpartition(".")[2]
        if shape[0] == shape[1]:
            square.append((name, layer_name))
            continue
        begin = name.removesuffix("_orig").removesuffix(leaf)
        bias = shapes.get(f"{begin}{_BIASES[leaf]}")
        if bias in {shape[:1], shape[1:]}:
            is_last = bias == shape[1:]
            layer_names[is_last].add(layer_name)
            if is_last:
                yield name, _ROWS_LAST
    clear = layer_names[True] - layer_names[False]
    yield from ((name, _ROWS_LAST) for name, layer_name in square if layer_name in clear)


def flax_axes(shape: tuple[int, ...]) -> KernelAxes:
    """The axes of a kernel of Flax."""
    return KernelAxes(len(shape) - 1, len(shape) - 2)


def _of_experts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, KernelAxes]]:
    for first, second in _EXPERT_PAIRS.items():
        for name, shape in shapes.items():
            if len(shape) != 3 or not name.endswith(first):
                continue
            other = f"{name.removesuffix(first)}{second}"
            other_shape = shapes.get(other, ())
            if len(other_shape) != 3 or other_shape[0] != shape[0]:
                continue
            rows, columns = shape[1:]
            if other_shape[1] == columns and 2 * other_shape[2] == rows:
                yield from ((name, KernelAxes(1, 2)), (other, KernelAxes(1, 2)))
            elif other_shape[2] == rows and 2 * other_shape[1] == columns:
                yield from ((name, KernelAxes(2, 1)), (other, KernelAxes(2, 1)))


_PROJECTION = re.compile(r"_?(query|key|value)(_dense)?")


def attention_axes(step: str, kind: str, shape: tuple[int, ...]) -> KernelAxes | None:
    """The axes of what an attention of Keras makes queries, keys or values with, `[in, heads, size]`.

    ``step`` is what the kernel is called in its layer. Where the class of the layer is unknown, it might be the kernel
    of a convolution, `[window, in, out]`, whose first axis is short.
    """
    is_clear = kind.endswith("Attention") or (not kind and len(shape) == 3 and shape[0] > shape[1])
    return KernelAxes(2, 0) if is_clear and len(shape) == 3 and _PROJECTION.fullmatch(step) else None


def einsum_axes(equation: object, rank: int) -> KernelAxes | None:
    """The last axes that an EinsumDense sums over and makes."""
    operands, _, made = equation.partition("->") if isinstance(equation, str) else ("", "", "")
    given, _, kernel = operands.replace(" ", "").partition(",")
    summed = [axis for axis, label in enumerate(kernel) if label in given and label not in made]
    free = [axis for axis, label in enumerate(kernel) if label in made and label not in given]
    return KernelAxes(free[-1], summed[-1]) if summed and free and len(kernel) == rank else None
