"""Words of older versions of Keras, in those of Keras 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.formats.keras.config import text

_KINDS = {
    "Convolution": "Conv",
    "AtrousConv": "Conv",
    "AtrousConvolution": "Conv",
    "SeparableConvolution": "SeparableConv",
    "DepthwiseConvolution": "DepthwiseConv",
    "MaxPool": "MaxPooling",
    "AvgPool": "AveragePooling",
    "GlobalMaxPool": "GlobalMaxPooling",
    "GlobalAvgPool": "GlobalAveragePooling",
}
_ALIASES = {
    "Deconvolution2D": "Conv2DTranspose",
    "Deconvolution3D": "Conv3DTranspose",
    "Convolution2DTranspose": "Conv2DTranspose",
    "Convolution3DTranspose": "Conv3DTranspose",
    "CuDNNLSTM": "LSTM",
    "CuDNNGRU": "GRU",
    "TimeDistributedDense": "Dense",
    "GroupedQueryAttention": "GroupQueryAttention",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
}
_KEYS = {
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "subsample": "strides",
    "subsample_length": "strides",
    "border_mode": "padding",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
}
_FORMATS = {"th": "channels_first", "tf": "channels_last"}
_WINDOWS = (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))


def modern_kind(kind: str) -> str:
    """Return the class of a layer as Keras 2 calls it."""
    stem, digit, rest = kind[:-2], kind[-2:-1], kind[-2:]
    if digit in {"1", "2", "3"} and rest.endswith("D") and stem in _KINDS:
        return _KINDS[stem] + rest
    return _ALIASES.get(kind, kind)


def modern_settings(kind: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a layer under the names that Keras 2 gives them."""
    found = {_KEYS.get(key, key): value for key, value in config.items()}
    for keys in _WINDOWS:
        if all(key in config for key in keys):
            found["kernel_size"] = [config[key] for key in keys]
    if kind != "Embedding" and "output_dim" in config and "units" not in config:
        found["units"] = config["output_dim"]
    ordering = text(config, "dim_ordering")
    if ordering in _FORMATS:
        found["data_format"] = _FORMATS[ordering]
    return found
