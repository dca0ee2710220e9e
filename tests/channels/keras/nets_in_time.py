"""Small networks that go through steps in time, or look from each to all others."""

from __future__ import annotations

from typing import Any

STEPS = 3
GATES = {"recurrent_activation": "hard_sigmoid"}
"""Gates of their own kind: with others, Keras 2 traces what a GPU would do, which takes seconds."""


def seq2seq(k: Any) -> Any:
    """A layer that begins with what another was left with, and two that run both ways."""
    of = k.layers
    i = k.Input((STEPS, 8))
    gates: dict[str, Any] = {**GATES, "return_sequences": True}
    x, *state = of.LSTM(6, return_state=True, name="enc", **gates)(i)
    y = of.LSTM(6, name="dec", **gates)(of.Dense(10, name="mid")(i), initial_state=state)
    z = of.Bidirectional(of.GRU(4, **gates), name="ways")(of.Concatenate()([x, y]))
    z = of.Bidirectional(of.SimpleRNN(4, activation="relu"), merge_mode="sum", name="sum")(z)
    return k.Model(i, of.Dense(3, name="last")(z))


def attending(k: Any) -> Any:
    """Attention to itself beside the stream, and to others with words, widths and an output of its own."""
    of = k.layers
    i = k.Input((STEPS, 8))
    x = of.Dense(12, name="emb")(i)
    x = of.Add()([x, of.MultiHeadAttention(4, 3, name="self")(x, x)])
    q, key = of.Dense(7, name="q")(i), of.Dense(6, name="k")(i)
    cross = of.MultiHeadAttention(4, 3, value_dim=2, use_bias=False, output_shape=10, name="cross")
    f = of.Dense(16, activation="gelu", name="up")(cross(query=q, value=x, key=key))
    groups = of.GroupNormalization(4, name="groups")
    f = groups(of.LeakyReLU()(groups(f)))
    f = of.MultiHeadAttention(2, 3, name="free")(f, f)
    return k.Model(i, of.Dense(3, name="last")(of.GlobalAveragePooling1D()(f)))


def inside(k: Any) -> Any:
    """The same in a model inside a model."""
    of = k.layers
    j = k.Input((STEPS, 5))
    x = of.MultiHeadAttention(2, 3, name="self")(of.GRU(6, reset_after=False, return_sequences=True, name="gru")(j), j)
    inner = k.Model(j, of.Bidirectional(of.LSTM(4, name="ways", **GATES), name="both")(x), name="inner")
    i = k.Input((STEPS, 8))
    return k.Model(i, of.Dense(3, name="last")(inner(of.Dense(5, name="first")(i))))


def films(k: Any) -> Any:
    """Images in time: a layer that begins with what another was left with, and one that says its last alone."""
    of = k.layers
    i = k.Input((STEPS, 6, 6, 2))
    x, *state = of.ConvLSTM2D(6, 3, strides=2, return_sequences=True, return_state=True, name="enc", **GATES)(i)
    less = of.MaxPooling3D((1, 3, 3))(of.Conv3D(4, 1, name="mid")(i))
    y = of.ConvLSTM2D(6, 2, padding="same", name="dec", **GATES)(less, initial_state=state)
    z = of.ConvLSTM1D(4, 2, use_bias=False, return_sequences=True, name="rows", **GATES)(of.Reshape((STEPS, 4, 6))(x))
    return k.Model(i, [of.Dense(3, name="last")(of.Flatten()(y)), of.Dense(2, name="side")(of.Flatten()(z))])
