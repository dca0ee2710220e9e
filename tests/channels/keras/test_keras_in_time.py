"""Units of recurrent Keras layers, and heads of attention: they go from all their gates and projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.groups import channel_groups
from prunectl.channels.keras.traverse import load_keras
from prunectl.channels.plan import macs
from prunectl.channels.prune import ChannelPruneResult
from prunectl.formats.registry import open_model
from tests.channels.keras.nets import LIBRARIES, filled, keras, tf_keras
from tests.channels.keras.nets_in_time import STEPS, attending, films, inside, seq2seq
from tests.channels.keras.test_keras_nets import cut, images, say, short

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "seq2seq": {"lstm_cell/kernel": (5, 12), "gru_cell/bias": (2, 6), "simple_rnn_cell/kernel": (4, 2)},
    "attending": {"query/kernel": (8, 2, 3), "attention_output/kernel": (2, 3, 8), "groups/gamma": (8,)},
    "films": {"mid/kernel": (1, 1, 1, 2, 2), "last/kernel": (12, 3), "side/kernel": (18, 2)},
    "inside": {"gru_cell/bias": (9,), "query/bias": (2, 3), "lstm_cell/recurrent_kernel": (2, 8)},
}
CASES = [
    *((kind, "three", ".keras") for kind in (seq2seq, attending, films)),
    *((kind, "two", ".h5") for kind in (seq2seq, attending, films, inside)),
    (inside, "three", ".h5"),
]


def gone(found: ChannelPruneResult, tensor: str, axis: int) -> list[int]:
    """The indices of a weight that went, whose name ends so."""
    return sorted(
        {
            index
            for loss in found.pruned_groups
            for number in loss.dropped
            for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True)
            if place.tensor.removesuffix(":0").endswith(tensor) and place.axis == axis
            for index in indices
        }
    )


def silence(model: Any, found: ChannelPruneResult) -> Any:
    """Let a model's weights make nothing of what went: units from their number alone, heads where they are read."""
    named = {getattr(weight, "path", weight.name).removesuffix(":0"): weight for weight in model.weights}
    for name, weight in named.items():
        front, _, leaf = name.rpartition("/")
        array, shape = np.array(weight), weight.shape
        if (inner := named.get(f"{front}/recurrent_kernel")) is not None:
            units = gone(found, f"{front}/recurrent_kernel", len(inner.shape) - 2)
            count = inner.shape[-2]
            array[..., [index + gate * count for gate in range(shape[-1] // count) for index in units]] = 0
        elif len(shape) == 3:
            array[gone(found, name, 0) if "output" in name else []] = 0
        elif leaf in {"kernel", "embeddings", "gamma", "beta"} or "output" in name:
            array[..., gone(found, name, len(shape) - 1)] = 0
        elif leaf == "bias" and len(shape) == 1:
            array[gone(found, name, 0)] = 0
        if len(shape) == 3 and "output" in name:
            array[..., gone(found, name, 2)] = 0
        weight.assign(array)
    return model


@pytest.mark.parametrize(
    ("kind", "which", "suffix"), CASES, ids=[f"{kind.__name__}-{which}{suffix}" for kind, which, suffix in CASES]
)
def test_half_of_the_units_and_heads_go_and_the_rest_say_the_same(
    kind: Any, which: str, suffix: str, tmp_path: Path
) -> None:
    library = LIBRARIES[which]
    path, output = tmp_path / f"net{suffix}", tmp_path / f"small{suffix}"
    model = filled(kind(library))
    model.save(path)
    given = images(model)
    graph = load_keras(open_model(path)).graph
    found = cut(path, output)
    assert macs(graph, graph.shapes.__getitem__) == found.before.macs
    shapes = short(open_model(output).tensors)
    assert {name: shapes[name] for name in SHAPES[kind.__name__]} == SHAPES[kind.__name__]
    small = library.models.load_model(output)
    assert found.after.params.total == small.count_params()
    wanted, said = say(silence(model, found), given), say(small, given)
    for one, other in zip(said, wanted, strict=True):
        assert np.ptp(other) > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_a_unit_goes_from_each_gate(tmp_path: Path) -> None:
    of = keras.layers
    model = filled(keras.Sequential([keras.Input((STEPS, 3)), of.LSTM(4, name="lstm"), of.Dense(2, name="last")]))
    path, output = tmp_path / "net.keras", tmp_path / "small.keras"
    model.save(path)
    found = cut(path, output)
    kept = [unit for unit in range(4) if unit not in gone(found, "lstm_cell/recurrent_kernel", 0)]
    assert len(kept) == 2
    kernel, inner, bias = (np.array(weight) for weight in model.get_layer("lstm").weights)
    small = keras.models.load_model(output).get_layer("lstm")
    assert small.units == 2
    for one, other in zip(
        small.weights,
        (
            kernel.reshape(3, 4, 4)[..., kept].reshape(3, 8),
            inner.reshape(4, 4, 4)[kept][..., kept].reshape(2, 8),
            bias.reshape(4, 4)[:, kept].reshape(8),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(np.array(one), other)


def test_a_head_goes_from_every_projection(tmp_path: Path) -> None:
    of = tf_keras.layers
    i = tf_keras.Input((STEPS, 8))
    model = filled(tf_keras.Model(i, of.MultiHeadAttention(4, 3, name="mha")(i, i)))
    path, output = tmp_path / "net.h5", tmp_path / "small.h5"
    model.save(path)
    found = cut(path, output)
    heads = gone(found, "query/kernel", 1)
    assert len(heads) == 2
    old, new = model.get_layer("mha").weights, tf_keras.models.load_model(output).get_layer("mha").weights
    for one, other, axis in zip(old, new, (1, 0, 1, 0, 1, 0, 0, None), strict=True):
        left = np.array(one) if axis is None else np.delete(np.array(one), heads, axis)
        np.testing.assert_array_equal(np.array(other), left)


@pytest.mark.parametrize("which", LIBRARIES)
def test_what_is_more_than_units_and_heads_keeps_them(which: str, tmp_path: Path) -> None:
    k = LIBRARIES[which]
    of = k.layers
    i = k.Input((STEPS, 8), batch_size=2)
    odd = of.SimpleRNN(4, activation="exponential", name="odd")(i)
    left = of.GRU(4, stateful=True, name="left")(i)
    seen, scores = of.MultiHeadAttention(2, 3, name="scored")(i, i, return_attention_scores=True)
    normal = of.LayerNormalization(name="norm")(of.Dense(6, name="before")(i))
    made = [of.Dense(2)(odd), of.Dense(2)(left), of.Dense(2)(seen), of.Flatten()(scores), of.Dense(2)(normal)]
    path = tmp_path / "net.keras"
    k.Model(i, made).save(path)
    reasons = {family.name: family.locked_because for family in channel_groups(open_model(path)).groups}
    assert not {"odd", "left", "scored"} & {name.split("/")[0] for name in reasons}
    assert reasons["before/kernel"] == "LayerNormalization norm spans several channels"


def test_a_mask_of_steps_keeps_no_units(tmp_path: Path) -> None:
    of = keras.layers
    i = keras.Input((STEPS,), dtype="int32")
    x = of.Embedding(9, 8, mask_zero=True, name="table")(i)
    x = of.Bidirectional(of.LSTM(4, return_sequences=True, dropout=0.2, name="in"), name="ways")(x)
    x = of.GRU(6, name="end")(of.MultiHeadAttention(4, 2, dropout=0.1, name="mha")(x, x))
    model = filled(keras.Model(i, of.Dense(3, name="last")(x)))
    path, output = tmp_path / "net.keras", tmp_path / "small.keras"
    model.save(path)
    found = cut(path, output)
    assert (found.dropped, found.channels) == (4 + 2 + 2 + 2 + 4 + 3, 8 + 4 + 4 + 4 + 8 + 6)
    small, given = keras.models.load_model(output), [np.array([[1, 2, 0], [1, 0, 0]], "int32")]
    wanted, said = say(silence(model, found), given), say(small, given)
    np.testing.assert_allclose(said[0], wanted[0], rtol=1e-4, atol=1e-5)
