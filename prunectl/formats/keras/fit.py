"""Do the weights in a Keras file fit its configuration? What can be told without Keras, before it is imported."""

from __future__ import annotations

from collections import Counter, defaultdict

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.keras.config import Layer, layers
from prunectl.formats.keras.dialect import modern_kind, modern_settings

_WIDTHS = {
    "Conv1D": ("filters", 1),
    "Conv2D": ("filters", 1),
    "Conv3D": ("filters", 1),
    "Dense": ("units", 1),
    "Embedding": ("output_dim", 1),
    "GRU": ("units", 3),
    "LSTM": ("units", 4),
    "SimpleRNN": ("units", 1),
}
"""What says how wide the weights of a layer are, and how many gates share their last axis."""


def check(model: ModelFile) -> None:
    """Refuse a file whose layers say another width than their weights have, or have no weights at all."""
    if model.format != "keras-h5" or model.about.keras is None:
        # Elsewhere weights are numbered, and which layer they belong to is a guess.
        return
    kernels: defaultdict[str, list[Tensor]] = defaultdict(list)
    for tensor in model.tensors:
        if tensor.role in {Role.KERNEL, Role.EMBEDDING}:
            kernels[tensor.layer].append(tensor)
    every = tuple(layers(model.about.keras))
    names = Counter(layer.name for layer in every)
    for layer in every:
        if not layer.path and names[layer.name] == 1:
            _check_layer(model, layer, kernels.get(layer.name, []))


def _check_layer(model: ModelFile, layer: Layer, kernels: list[Tensor]) -> None:
    kind = modern_kind(layer.kind)
    if kind not in _WIDTHS:
        return
    key, gates = _WIDTHS[kind]
    width, name = modern_settings(kind, layer.config).get(key), abbreviated(layer.name)
    if type(width) is not int:
        raise InputError(f"{model.path} is damaged: its configuration does not say the {key} of {kind} {name}")
    if not kernels:
        raise InputError(f"{model.path} is damaged: it holds no weights of {kind} {name}")
    for kernel in kernels:
        if not kernel.shape or kernel.shape[-1] != width * gates:
            raise InputError(
                f"{model.path} is damaged: {kind} {name} has {width} {key}, and {abbreviated(kernel.name)} the shape "
                f"{abbreviated(str(kernel.shape))}"
            )
