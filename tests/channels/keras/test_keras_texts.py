"""Keras networks that begin with texts or categories, or have layers of the user's own, lose channels as others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from prunectl.channels.adapter import open_adapter
from prunectl.formats.keras.flops import trace_shapes
from prunectl.formats.registry import open_model
from prunectl.training.backend import LoadOptions
from tests.channels.keras.masked import silence
from tests.channels.keras.nets import LIBRARIES, filled
from tests.channels.keras.test_keras_nets import cut, say

WORDS, ANIMALS = ["red", "green", "blue", "cat", "dog"], ["horse", "cow"]


def texts(k: Any, shape: tuple[int, ...] = (1,)) -> Any:
    """Texts whose words are looked up in a table."""
    of = k.layers
    i = k.Input(shape, dtype="string", name="text")
    tokens = of.TextVectorization(output_sequence_length=6, vocabulary=WORDS)(i)
    x = of.Conv1D(8, 3, activation="tanh", name="line")(of.Embedding(7, 8, name="table")(tokens))
    return k.Model(i, of.Dense(3, name="last")(of.GlobalMaxPooling1D()(x)))


def categories(k: Any) -> Any:
    """A table of words, whole numbers and measurements."""
    of = k.layers
    i = [k.Input((1,), dtype="string", name="color"), k.Input((1,), dtype="int64", name="age"), k.Input((3,))]
    i += [k.Input((1,), dtype="string", name="animal")]
    bins = of.Embedding(4, 6, name="bins")(of.Discretization([-0.5, 0.0, 0.5])(i[2]))
    x = [of.StringLookup(vocabulary=WORDS, output_mode="one_hot")(i[0]), of.Flatten()(bins)]
    x += [of.CategoryEncoding(4)(i[1]), of.Normalization(mean=[0.1] * 3, variance=[0.5] * 3)(i[2])]
    x += [of.StringLookup(vocabulary=ANIMALS, num_oov_indices=0, output_mode="one_hot")(i[3])]
    x = of.Dense(8, activation="tanh", name="wide")(of.Concatenate()(x))
    return k.Model(i, of.Dense(3, name="last")(of.Dense(6, activation="tanh", name="mid")(x)))


@pytest.mark.parametrize(
    ("kind", "which", "suffix"),
    [(texts, "two", ".keras"), (texts, "three", ".keras"), (categories, "two", ".h5"), (categories, "three", ".keras")],
)
@pytest.mark.filterwarnings("ignore")
def test_half_of_the_channels_behind_texts_and_categories_go(
    kind: Any, which: str, suffix: str, tmp_path: Path
) -> None:
    keras = LIBRARIES[which]
    model = filled(kind(keras))
    path, output = tmp_path / f"net{suffix}", tmp_path / f"small{suffix}"
    model.save(path)
    found = cut(path, output)
    random = np.random.default_rng(3)
    colors = random.choice([*WORDS, "stranger", "red cat dog"], (9, 1))
    measured, animals = random.normal(size=(9, 3)).astype("float32"), random.choice(ANIMALS, (9, 1))
    arrays = [colors, random.integers(0, 4, (9, 1)), measured, animals]
    given = [tf.constant(array) for array in arrays[: len(model.inputs)]]
    small = keras.models.load_model(output)
    assert small.count_params() < 0.7 * model.count_params()
    wanted = say(silence(model, found), given)[0]
    assert np.ptp(wanted, axis=0).min() > 1e-2
    np.testing.assert_allclose(say(small, given)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["two", "three"])
@pytest.mark.filterwarnings("ignore")
def test_random_texts_have_the_words_that_a_network_knows(which: str, tmp_path: Path) -> None:
    of = LIBRARIES[which].layers
    i = LIBRARIES[which].Input((), dtype="string")
    adapted = of.TextVectorization(output_sequence_length=6)
    adapted.adapt(["two words"])
    LIBRARIES[which].Model(i, of.Dense(2)(of.Embedding(4, 8)(adapted(i)))).save(tmp_path / "net.keras")
    adapter = open_adapter(open_model(tmp_path / "net.keras"), LoadOptions())
    drawn = [adapter.random_inputs(np.random.default_rng(seed)) for seed in range(20)]
    said = {word for feeds in drawn for array in feeds.values() for text in array.ravel() for word in text.split()}
    assert {"two", "words"} <= said <= {"two", "words", "[UNK]"}


@pytest.mark.parametrize("which", ["two", "three"])
@pytest.mark.filterwarnings("ignore")
def test_the_shapes_behind_lookups_are_those_of_keras(which: str, tmp_path: Path) -> None:
    keras = LIBRARIES[which]
    of = keras.layers
    word, number, one = (
        keras.Input((1,), dtype="string"),
        keras.Input((3,), dtype="int64"),
        keras.Input((1,), dtype="int64"),
    )
    made = [
        of.StringLookup(vocabulary=WORDS, num_oov_indices=2, name="a")(word),
        of.StringLookup(vocabulary=WORDS, output_mode="multi_hot", max_tokens=9, pad_to_max_tokens=True, name="b")(
            word
        ),
        of.IntegerLookup(vocabulary=[4, 5], output_mode="count", mask_token=0, name="c")(number),
        of.IntegerLookup(vocabulary=[4, 5], output_mode="one_hot", name="d")(one),
        of.Discretization([1.0, 2.0], output_mode="multi_hot", name="e")(number),
        of.Discretization([1.0, 2.0], name="f")(number),
        of.Hashing(5, name="g")(word),
        of.CategoryEncoding(7, name="h")(number),
        of.TextVectorization(vocabulary=WORDS, output_sequence_length=4, name="i")(word),
        of.TextVectorization(vocabulary=WORDS, name="j")(word),
    ]
    path = tmp_path / "net.keras"
    # A file without any weights is refused.
    keras.Model([word, number, one], [*made, of.Dense(2)(made[1])]).save(path)
    traced = trace_shapes(open_model(path)).shapes
    assert [traced[name][0][0] for name in "abcdefghij"] == [tuple(one.shape[1:]) for one in made]


@tf_keras.utils.register_keras_serializable("mine")
class Gain(tf_keras.layers.Layer):
    """A scale for each channel, of which a file of HDF5 says only the name."""

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(name="gain", shape=(shape[-1],), initializer="ones")

    def call(self, value: Any) -> Any:
        return value * self.gain


OBJECTS = {"Gain": Gain, "mine>Gain": Gain}


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_the_users_own_locks_only_the_channels_that_it_reads(suffix: str, tmp_path: Path) -> None:
    of = tf_keras.layers
    i = tf_keras.Input((8, 8, 3))
    x = Gain()(of.Conv2D(8, 3, name="locked")(of.Conv2D(6, 3, activation="tanh", name="free")(i)))
    x = of.Conv2D(8, 3, activation="tanh", name="behind")(x)
    model = filled(tf_keras.Model(i, of.Dense(2, name="out")(of.Flatten()(x))))
    path, output = tmp_path / f"net{suffix}", tmp_path / f"small{suffix}"
    model.save(path)
    found = cut(path, output, custom_objects=f"{__name__}:OBJECTS")
    small = tf_keras.models.load_model(output, custom_objects=OBJECTS)
    assert [small.get_layer(name).kernel.shape[-1] for name in ("free", "locked", "behind")] == [3, 8, 4]
    given = [np.random.default_rng(3).normal(size=(2, 8, 8, 3)).astype("float32")]
    np.testing.assert_allclose(say(small, given)[0], say(silence(model, found), given)[0], rtol=1e-4, atol=1e-5)
