"""Small networks of the usual kinds, in either Keras, with random numbers wherever training would leave some."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
tf_keras = pytest.importorskip("tf_keras")
LIBRARIES = {"three": keras, "two": tf_keras}
SIDE = 12


def filled(model: Any) -> Any:
    """A model as if trained: no number of its normalisation is what it was, the same every time."""
    random = np.random.default_rng(5)
    for weight in model.weights:
        # The square root of the inputs keeps the numbers about as large as they were.
        spread = 1.0 / np.sqrt(max(int(np.prod(weight.shape[:-1])), 1))
        is_kernel = len(weight.shape) > 1
        low, high = (-1.5 * spread, 2.5 * spread) if is_kernel else (0.5, 1.5)
        weight.assign(random.uniform(low, high, tuple(weight.shape)).astype("float32"))
    return model


def conv(k: Any, x: Any, filters: int, size: int = 3, stride: int = 1, *, name: str) -> Any:
    """A convolution, normalised."""
    x = k.layers.Conv2D(filters, size, stride, padding="same", use_bias=False, name=name)(x)
    x = k.layers.BatchNormalization(name=f"{name}_norm")(x)
    return k.layers.ReLU(name=f"{name}_relu")(x)


def vgg(k: Any) -> Any:
    """Convolutions in a row, flattened into dense layers."""
    of = k.layers
    return k.Sequential(
        [
            k.Input((SIDE, SIDE, 3)),
            of.Conv2D(8, 3, padding="same", activation="relu", name="one"),
            of.MaxPooling2D(),
            of.ZeroPadding2D(1),
            of.Conv2D(12, 3, activation="gelu", name="two"),
            of.AveragePooling2D(2),
            of.Flatten(),
            of.Dense(20, activation="relu", name="wide"),
            of.Dropout(0.5),
            of.Dense(5, activation="softmax", name="last"),
        ]
    )


def residual(k: Any) -> Any:
    """A block on the stream as it is, and one that makes it wider through a projection."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    stem = conv(k, i, 8, name="stem")
    x = of.Add()([stem, conv(k, conv(k, stem, 6, name="a"), 8, name="b")])
    y = of.Add()([conv(k, x, 16, 1, 2, name="down"), conv(k, conv(k, x, 10, stride=2, name="c"), 16, name="d")])
    return k.Model(i, of.Dense(5, name="last")(of.GlobalAveragePooling2D()(of.Activation("relu")(y))))


def mobile(k: Any) -> Any:
    """Channel by channel, with and without a multiplier, separable, in groups."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    x = conv(k, i, 8, name="stem")
    x = of.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="each")(x)
    x = of.SeparableConv2D(16, 3, padding="same", activation="relu", name="split")(x)
    x = of.LeakyReLU()(x)
    x = of.Conv2D(16, 3, padding="same", groups=16, name="alone")(x)
    x = of.Conv2D(16, 1, groups=4, name="grouped")(x)
    x = of.GlobalAveragePooling2D(keepdims=True)(x)
    return k.Model(i, of.Reshape((5,))(of.Conv2D(5, 1, name="last")(of.Reshape((1, 1, 16))(x))))


def beside(k: Any) -> Any:
    """Each layer reads what all before it made."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    one = conv(k, i, 6, name="one")
    two = conv(k, one, 8, name="two")
    three = conv(k, of.Concatenate()([one, two]), 10, name="three")
    x = of.BatchNormalization(scale=False, name="norm")(of.Concatenate()([one, two, three]))
    return k.Model(i, of.Dense(5, name="last")(of.GlobalMaxPooling2D()(of.PReLU(shared_axes=[1, 2], name="slope")(x))))


def unet(k: Any) -> Any:
    """Down, and up again beside what was there before."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    first = conv(k, i, 8, name="first")
    deep = conv(k, of.MaxPooling2D()(first), 12, name="deep")
    up = of.Conv2DTranspose(10, 2, 2, name="up", activation="relu")(deep)
    wide = of.UpSampling2D(2, interpolation="bilinear")(deep)
    x = conv(k, of.Concatenate()([up, first, wide]), 8, name="mid")
    return k.Model(i, of.Conv2D(2, 1, name="last")(of.Cropping2D(1)(x)))


def excite(k: Any) -> Any:
    """Squeeze and excite: channels scaled by what dense layers make of their means."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    x = conv(k, i, 16, name="stem")
    s = of.Reshape((1, 1, 16))(of.GlobalAveragePooling2D()(x))
    s = of.Dense(16, activation="sigmoid", name="widen")(of.Dense(6, activation="relu", name="squeeze")(s))
    x = of.Multiply()([x, s])
    return k.Model(i, of.Dense(5, name="last")(of.Flatten()(conv(k, x, 4, name="end"))))


def nested(k: Any) -> Any:
    """A model and a sequence inside a model; what goes into them loses channels too."""
    of = k.layers
    a = k.Input((SIDE, SIDE, 8), name="inner_in")
    inner = k.Model(a, of.Add()([a, of.Conv2D(8, 3, padding="same", name="inside")(a)]), name="inner")
    head = k.Sequential(
        [k.Input((8,)), of.Dense(12, activation="relu", name="hidden"), of.Dense(5, name="last")], name="head"
    )
    i = k.Input((SIDE, SIDE, 3))
    x = inner(conv(k, i, 8, name="stem"))
    return k.Model(i, head(of.GlobalAveragePooling2D()(x)))


def shared(k: Any) -> Any:
    """A layer that is called twice, and one that is called on every step in time."""
    of = k.layers
    i, j = k.Input((SIDE, SIDE, 3), name="left"), k.Input((SIDE, SIDE, 3), name="right")
    twice = of.Conv2D(8, 3, padding="same", activation="relu", name="twice")
    x = of.Concatenate()([twice(i), twice(j)])
    steps = of.Reshape((SIDE, SIDE * 6))(of.Conv2D(6, 1, name="thin")(x))
    deep = of.TimeDistributed(of.Dense(10, activation="relu", name="timed"), name="each_step")(
        of.Permute((1, 2))(steps)
    )
    x = of.Conv1D(8, 3, padding="causal", activation="relu", name="line")(deep)
    return k.Model([i, j], [of.Dense(5, name="last")(of.GlobalAveragePooling1D()(x)), of.Dense(2, name="other")(x)])


def words(k: Any) -> Any:
    """Numbers of words, looked up and convolved."""
    of = k.layers
    i = k.Input((7,), dtype="int32")
    x = of.Embedding(30, 12, name="table")(i)
    x = of.SpatialDropout1D(0.2)(x)
    x = of.Conv1D(8, 3, activation="relu", name="line")(x)
    return k.Model(i, of.Dense(5, name="last")(of.GlobalMaxPooling1D()(x)))


def arithmetic(k: Any) -> Any:
    """Bare operations between layers."""
    of = k.layers
    i = k.Input((SIDE, SIDE, 3))
    x = of.Rescaling(2.0)(conv(k, i, 8, name="stem"))
    x = x * of.ReLU(6.0, name="six")(x + 3.0) * (1 / 6.0)
    y = of.Conv2D(8, 1, name="side")(x)
    return k.Model(i, of.Dense(5, name="last")(of.GlobalAveragePooling2D()(of.Maximum()([x, y]) - y)))


def reduced(k: Any) -> Any:
    """Means and maxima over all positions, computed by functions instead of layers."""
    of = k.layers
    mean, largest = (k.ops.mean, k.ops.max) if hasattr(k, "ops") else (tf.reduce_mean, tf.reduce_max)
    i = k.Input((SIDE, SIDE, 3))
    x = conv(k, i, 8, name="stem")
    x = of.Multiply()([x, of.Conv2D(8, 1, activation="sigmoid", name="gate")(mean(x, axis=[1, 2], keepdims=True))])
    x = of.Concatenate()([mean(x, axis=(1, 2)), largest(of.Conv2D(6, 1, name="side")(x), axis=[-3, -2])])
    return k.Model(i, of.Dense(5, name="last")(x))


NETS = (vgg, residual, mobile, beside, unet, excite, nested, shared, words, arithmetic, reduced)
