"""What each Keras layer does to channels: one row for each class that is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunectl.channels.keras import functions, heads, moving, recurrent, weighted
from prunectl.channels.keras.activations import activated
from prunectl.channels.keras.called import Called
from prunectl.formats.keras.config import text
from prunectl.formats.keras.recurrent import GATES

FUNCTION = "function"
"""The row of what is no layer."""
Follow = Callable[[Called], str | tuple[str, ...]]


def _activation(call: Called) -> str:
    return activated(call, call.data)


_ALONE = (
    *("ReLU", "LeakyReLU", "ELU", "ThresholdedReLU", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "ActivityRegularization", "Identity"),
    *("RandomContrast", "RandomBrightness"),
)
_SPATIAL = (
    *(f"{kind}Pooling{axes}D" for kind in ("Max", "Average", "GlobalMax", "GlobalAverage") for axes in (1, 2, 3)),
    *(f"{kind}{axes}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for axes in (1, 2, 3)),
    *("Resizing", "CenterCrop"),
)
KINDS: Mapping[str, Follow] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), weighted.convolution),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), weighted.transposed),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), weighted.depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), weighted.separable),
    "Dense": weighted.dense,
    "Embedding": weighted.embedding,
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), weighted.normalised),
    "GroupNormalization": weighted.by_group,
    **dict.fromkeys(GATES, recurrent.recurrent),
    "Bidirectional": recurrent.both,
    "MultiHeadAttention": heads.attended,
    "PReLU": weighted.sloped,
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), moving.together),
    "Concatenate": moving.concatenated,
    **dict.fromkeys(_ALONE, moving.alone),
    "Rescaling": moving.rescaled,
    "Activation": _activation,
    **dict.fromkeys(
        ("Softmax", "Masking", "LayerNormalization", "UnitNormalization", "RMSNormalization"), moving.normal
    ),
    **dict.fromkeys(_SPATIAL, moving.spatial),
    "Flatten": moving.flat,
    "Reshape": moving.reshaped,
    "Permute": moving.permuted,
    "RepeatVector": moving.repeated,
    FUNCTION: functions.function,
}


WORDS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys((*GATES, "Bidirectional"), recurrent.WORDS),
    "MultiHeadAttention": heads.WORDS,
}
"""What layers can be given by name."""
_OWN_MODULES = ("keras", "tf_keras", "tensorflow")
_OF_APPLICATIONS: Mapping[str, Follow] = {
    "LayerScale": weighted.scaled,
    "StochasticDepth": moving.alone,
    "CustomScaleLayer": moving.alike,
}
"""Layers that come with the architectures of Keras: a scale for each channel, a sum with a share of another."""


def row(found: Mapping[str, Any], kind: str) -> Follow | None:
    """Return what a layer does, unless it is somebody's own class, whatever its name is."""
    module = text(found, "module")
    is_own = module.split(".")[0] in _OWN_MODULES if module else ">" not in text(found, "registered_name")
    if not is_own:
        return None
    return _OF_APPLICATIONS.get(kind) if ".applications." in module else KINDS.get(kind)
