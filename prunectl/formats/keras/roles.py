"""The names of weights that only have numbers, and the roles and channel axes of weights by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prunectl.formats.base import Role
from prunectl.formats.keras.config import LORA_PREFIX, LayerConfig, object_in, string_in
from prunectl.formats.keras.hdf5 import Dataset
from prunectl.formats.kernel_axes import KernelAxes, attention_axes, depthwise_axes, einsum_axes

_ROLES = {
    "recurrent_kernel": Role.RECURRENT,
    "embeddings": Role.EMBEDDING,
    "bias": Role.BIAS,
    "gamma": Role.NORM,
    "beta": Role.NORM,
    "scale": Role.NORM,
    "moving_mean": Role.STATE,
    "moving_variance": Role.STATE,
    "running_mean": Role.STATE,
    "running_std": Role.STATE,
    "mean": Role.STATE,
    "variance": Role.STATE,
    "count": Role.STATE,
    "seed_generator_state": Role.STATE,
    "vector_u": Role.STATE,
    "alpha": Role.OTHER,
    **dict.fromkeys(("kernel_scale", "embeddings_scale", "reverse_embeddings_scale"), Role.OTHER),
    **dict.fromkeys(("kernel_zero", "embeddings_zero", "reverse_embeddings_zero", "g_idx"), Role.OTHER),
    "mask": Role.MASK,
    "threshold": Role.SCHEDULE,
    "pruning_step": Role.SCHEDULE,
}
_CELL = re.compile(r"cells?(_\d+)?$")


class WeightRole(NamedTuple):
    """The role and the channel axes of a weight."""

    role: Role
    out_axis: int | None = None
    in_axis: int | None = None


def weight_role(leaf: str, kind: str, dataset: Dataset, *, is_channels_first: bool = False) -> WeightRole:
    """The role of the weight called ``leaf`` of a layer of class ``kind``."""
    shape = dataset.shape
    role = _role(leaf, kind, dataset)
    if role not in {Role.KERNEL, Role.RECURRENT} or len(shape) < 2:
        return WeightRole(role)
    if is_channels_first and len(shape) > 2:  # Keras 1 on Theano: [out, in, height, width]
        return WeightRole(role, 0, 1)
    if (axes := depthwise_axes(leaf, kind, shape)) is not None:
        return WeightRole(role, *axes)
    if kind.endswith("Transpose") or kind.startswith("Deconvolution"):  # [height, width, out, in]
        return WeightRole(role, len(shape) - 2, len(shape) - 1)
    return WeightRole(role, len(shape) - 1)


def weight_class(layer: LayerConfig | None) -> str:
    """The class of a layer, on which the roles of its weights depend; for a quantization wrapper, the inner class."""
    if layer is None:
        return ""
    inner = string_in(object_in(layer.config, "layer"), "class_name")
    return inner if inner and layer.kind.rpartition(">")[2].startswith("QuantizeWrapper") else layer.kind


def kernel_axes(
    weight: WeightRole, step: str, layer: LayerConfig | None, shape: tuple[int, ...]
) -> WeightRole | KernelAxes:
    """The axes of a weight: from the settings of its layer or the ``step`` before its name, if these give more."""
    if weight.role is not Role.KERNEL or weight.out_axis is None:
        return weight
    kind, settings = (layer.kind, layer.config) if layer is not None else ("", {})
    if kind.endswith("EinsumDense"):
        return einsum_axes(settings.get("equation"), len(shape)) or weight
    return attention_axes(step, kind, shape) or weight


def looks_channels_first(leaf: str, shape: tuple[int, ...]) -> bool:
    """Whether a convolution kernel of Keras 1 must be in Theano's order, window last: judged by its name and shape."""
    return len(shape) == 4 and leaf.endswith("_W") and shape[2] * shape[3] < shape[0] * shape[1]


def strip_cells(names: Sequence[str]) -> tuple[str, ...]:
    """The names on the path to a weight, without the cells of a recurrent layer at its end."""
    end = len(names)
    while end > 1 and _CELL.search(names[end - 1]):
        end -= 1
    return tuple(names[:end])


_MOST_DIGITS = 9
"""Most digits in the number of a weight; Keras has not written a longer one."""


def position(step: str) -> int:
    """The last step of a path as a number; 0 if it is not a number."""
    return int(step) if step.isdecimal() and len(step) <= _MOST_DIGITS else 0


def name_by_position(kind: str, index: int, count: int, shape: tuple[int, ...], settings: Mapping[str, Any]) -> str:
    """The name of a weight that has only a number in the file.

    ``kind`` is the class of the layer in snake case, from the path to the weight; ``settings`` are those of the layer
    in the configuration, empty if the layer is unknown.
    """
    names = _POSITIONS.get("cell" if kind.endswith("_cell") else kind)
    # gamma and beta may be switched off; the moving statistics always come last.
    affine = tuple(leaf for leaf, switch in _AFFINE.items() if settings.get(switch, True))
    if kind.startswith("batch_normalization"):
        names = (*affine[: max(count - 2, 0)], "moving_mean", "moving_variance")
    elif kind.endswith("normalization") and names is None:
        names = affine
    elif kind.startswith("separable_conv"):
        names = ("depthwise_kernel", "pointwise_kernel", "bias")
    if names is not None and index < len(names):
        return names[index]
    return "kernel" if len(shape) >= 2 and index == 0 else "bias" if index <= 1 else f"weight_{index}"


def quantised_names(stored: Sequence[Dataset]) -> Sequence[str]:
    """The names of the weights of a layer that Keras quantised to integers, by their dtypes; empty for other layers.

    Only matrices of int8 or uint8 count as integers, everything else counts as floats.
    """
    by_number = {dataset.name.rpartition("/")[2]: dataset for dataset in stored}
    numbers = [str(number) for number in range(len(stored))]
    if len(stored) > _MOST_QUANTISED or by_number.keys() != set(numbers):
        return ()
    ordered = [by_number[number] for number in numbers]
    signature = "".join(_LETTERS.get(dataset.dtype.name, "f") if len(dataset.shape) > 1 else "f" for dataset in ordered)
    return _QUANTISED.get(signature, "").split()


_LETTERS = {"int8": "i", "uint8": "u"}
_QUANTISED = {
    # int8, and int4 with a scale for each output
    "if": "kernel kernel_scale",
    "iff": "kernel bias kernel_scale",
    # int4 in groups of inputs
    "ifif": "kernel kernel_scale kernel_zero g_idx",
    "iffif": "kernel bias kernel_scale kernel_zero g_idx",
    # GPTQ; Keras 3.15 leaves out the zeros
    "uff": "kernel kernel_scale g_idx",
    "ufuf": "kernel kernel_scale kernel_zero g_idx",
    "fuff": "bias kernel kernel_scale g_idx",
    "fufuf": "bias kernel kernel_scale kernel_zero g_idx",
    # AWQ
    "ufff": "kernel kernel_scale awq_scales g_idx",
    "ufuff": "kernel kernel_scale kernel_zero awq_scales g_idx",
    "fufff": "bias kernel kernel_scale awq_scales g_idx",
    "fufuff": "bias kernel kernel_scale kernel_zero awq_scales g_idx",
}
"""Names of the weights in a layer's folder, by dtype (i: int8, u: uint8, f: other). Embeddings count as kernels."""
_MOST_QUANTISED = max(map(len, _QUANTISED))
_AFFINE = {"gamma": "scale", "beta": "center"}
"""Weights of a normalization, and the settings that switch them off."""
_POSITIONS: dict[str, tuple[str, ...]] = {
    "cell": ("kernel", "recurrent_kernel", "bias"),
    "embedding": ("embeddings",),
    "seed_generator": ("seed_generator_state",),
    "normalization": ("mean", "variance", "count"),
    "rms_normalization": ("scale",),
    "spectral_normalization": ("kernel", "vector_u"),
    "p_re_lu": ("alpha",),
    "attention": ("scale",),
    "additive_attention": ("scale",),
}


def _role(leaf: str, kind: str, dataset: Dataset) -> Role:
    if leaf in _ROLES:
        return _ROLES[leaf]
    if leaf.startswith(LORA_PREFIX):
        return Role.OTHER
    if leaf.endswith("bias"):
        return Role.BIAS
    if kind == "Embedding":
        return Role.EMBEDDING
    is_number = dataset.dtype.kind not in "iub" or (leaf == "kernel" and dataset.dtype.name in _LETTERS)
    return Role.KERNEL if is_number and len(dataset.shape) > 1 else Role.OTHER
