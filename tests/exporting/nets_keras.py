"""Kilobytes of every kind of network, in either Keras; half of each kernel is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _normed(k: Any, x: Any, kind: str, **more: Any) -> Any:
    layer = k.layers.DepthwiseConv2D(3, padding="same", use_bias=False, **more) if kind == "depthwise" else None
    layer = layer or k.layers.Conv2D(6, 3 if kind == "wide" else 1, padding="same", use_bias=False, **more)
    return k.layers.BatchNormalization()(layer(x))


def resnet(k: Any) -> Any:
    x = k.layers.Input((8, 8, 3), name="image")
    y = k.layers.ReLU()(_normed(k, x, "wide"))
    z = k.layers.ReLU()(_normed(k, y, "wide"))
    z = k.layers.add([y, _normed(k, z, "wide")])
    z = k.layers.GlobalAveragePooling2D()(k.layers.MaxPooling2D()(k.layers.ReLU()(z)))
    return k.Model(x, k.layers.Dense(4, activation="softmax", name="classes")(z))


def mobilenet(k: Any) -> Any:
    x = k.layers.Input((8, 8, 3), name="image")
    y = k.layers.ReLU(6.0)(_normed(k, x, "wide", strides=2))
    y = k.layers.ReLU(6.0)(_normed(k, y, "depthwise"))
    y = k.layers.ReLU(6.0)(_normed(k, y, "narrow"))
    return k.Model(x, k.layers.Dense(4, name="classes")(k.layers.GlobalAveragePooling2D()(y)))


def lstm(k: Any) -> Any:
    x = k.layers.Input((6, 3), name="steps")
    return k.Model(x, k.layers.Dense(2, name="answer")(k.layers.LSTM(5)(x)))


def transformer(k: Any) -> Any:
    x = k.layers.Input((6, 8), name="words")
    y = k.layers.LayerNormalization()(x + k.layers.MultiHeadAttention(2, 4)(x, x))
    z = k.layers.Dense(8)(k.layers.Dense(16, activation="gelu")(y))
    return k.Model(x, k.layers.Dense(3, name="answer")(k.layers.LayerNormalization()(y + z)))


def several(k: Any) -> Any:
    left, right = k.layers.Input((4,), name="left"), k.layers.Input((3,), name="right")
    both = k.layers.concatenate([left, right])
    return k.Model([left, right], [k.layers.Dense(2, name="one")(both), k.layers.Dense(5, name="other")(both)])


NETS: dict[str, Callable[[Any], Any]] = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "lstm": lstm,
    "transformer": transformer,
    "several": several,
}


def made(k: Any, name: str) -> Any:
    """Return a network with numbers that only its name decides."""
    k.backend.clear_session()
    model = NETS[name](k)
    random = np.random.default_rng(len(name))
    for layer in model.layers:
        weights = []
        for array in layer.get_weights():
            # Variances of batch normalisation must not be negative.
            value = (
                np.abs(random.normal(0.5, 0.3, array.shape)) + 0.05
                if array.ndim == 1
                else random.normal(0, 0.5, array.shape)
            )
            if array.ndim > 1:
                value[random.random(array.shape) < 0.5] = 0
            weights.append(value.astype(np.float32))
        layer.set_weights(weights)
    return model
