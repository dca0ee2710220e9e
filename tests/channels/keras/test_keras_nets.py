"""Keras networks of the usual kinds, half of whose channels go: they say what Keras says without these channels."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.adapter import open_adapter
from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LoadOptions
from prunectl.training.runtimes import load_trainable
from tests.channels.keras.masked import silence
from tests.channels.keras.nets import LIBRARIES, NETS, arithmetic, filled, mobile, nested, reduced, shared
from tests.channels.keras.nets_in_time import attending, inside, seq2seq

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "vgg": {"one/kernel": (3, 3, 3, 4), "two/kernel": (3, 3, 4, 6), "wide/kernel": (54, 10), "last/kernel": (10, 5)},
    "residual": {"stem/kernel": (3, 3, 3, 4), "a/kernel": (3, 3, 4, 3), "down/kernel": (1, 1, 4, 8)},
    "mobile": {"split/depthwise_kernel": (3, 3, 8, 1), "alone/kernel": (3, 3, 1, 8), "grouped/kernel": (1, 1, 2, 8)},
    "beside": {"three/kernel": (3, 3, 7, 5), "norm/moving_mean": (12,), "slope/alpha": (1, 1, 12)},
    "unet": {"up/kernel": (2, 2, 5, 6), "mid/kernel": (3, 3, 15, 4), "last/kernel": (1, 1, 4, 2)},
    "excite": {"squeeze/kernel": (8, 3), "widen/kernel": (3, 8)},
    "nested": {"inside/kernel": (3, 3, 4, 4), "hidden/kernel": (4, 6)},
    "shared": {"twice/kernel": (3, 3, 3, 4), "thin/kernel": (1, 1, 8, 3), "other/kernel": (4, 2)},
    "words": {"table/embeddings": (30, 6), "line/kernel": (3, 6, 4)},
    "reduced": {"gate/kernel": (1, 1, 4, 4), "side/kernel": (1, 1, 4, 3), "last/kernel": (7, 5)},
    "arithmetic": {"stem/kernel": (3, 3, 3, 4), "side/kernel": (1, 1, 4, 4)},
}


def cut(path: Path, output: Path, **asked: Any) -> ChannelPruneResult:
    return prune_channels(path, PruneRequest(**{"sparsity": 0.5, "pattern": "channel"} | asked), Destination(output))


def images(model: Any) -> list[Any]:
    random = np.random.default_rng(3)
    shapes = [tuple(2 if length is None else int(length) for length in one.shape) for one in model.inputs]
    are_words = [str(getattr(one.dtype, "name", one.dtype)).startswith("int") for one in model.inputs]
    return [
        random.integers(0, 30, shape).astype("int32") if is_words else random.normal(size=shape).astype("float32")
        for shape, is_words in zip(shapes, are_words, strict=True)
    ]


def say(model: Any, given: list[Any]) -> list[Any]:
    made = model(given[0] if len(given) == 1 else given, training=False)
    return [np.array(one) for one in (made if isinstance(made, list | tuple) else [made])]


def short(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(one.name.removesuffix(":0").split("/")[-2:]): one.shape for one in tensors}


CASES = [
    *((kind, "three", ".keras") for kind in NETS),
    # In Keras 2 what it writes in another way: layers of its own, layers in layers, operations without a layer.
    *((kind, "two", ".h5") for kind in NETS if kind in {mobile, nested, shared, arithmetic, reduced}),
    (nested, "two", ".keras"),
]


@pytest.mark.parametrize(
    ("kind", "which", "suffix"), CASES, ids=[f"{kind.__name__}-{which}{suffix}" for kind, which, suffix in CASES]
)
@pytest.mark.filterwarnings("ignore")
def test_half_of_the_channels_go_and_the_rest_say_the_same(kind: Any, which: str, suffix: str, tmp_path: Path) -> None:
    keras = LIBRARIES[which]
    path, output = tmp_path / f"net{suffix}", tmp_path / f"small{suffix}"
    model = filled(kind(keras))
    model.save(path)
    given = images(model)
    found = cut(path, output)
    assert found.proof.error_float64 is not None
    assert found.proof.error_float64 < 1e-9
    shapes = short(open_model(output).tensors)
    wanted_shapes = SHAPES[kind.__name__]
    assert {name: shapes[name] for name in wanted_shapes} == wanted_shapes
    small = keras.models.load_model(output)
    assert found.after.params.total == small.count_params()
    wanted, said = say(silence(model, found), given), say(small, given)
    for one, other in zip(said, wanted, strict=True):
        assert np.ptp(other) > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(("which", "suffix"), [("three", ".keras"), ("two", ".keras")])
@pytest.mark.filterwarnings("ignore")
def test_layers_of_the_architectures_of_keras_need_nobody_to_vouch_for_them(
    which: str, suffix: str, tmp_path: Path
) -> None:
    keras = LIBRARIES[which]
    layers = keras.layers
    beside = {
        name: getattr(import_module(f"{keras.__name__}.src.applications.{module}"), name)
        for module, name in (
            ("convnext", "LayerScale"),
            ("convnext", "StochasticDepth"),
            ("inception_resnet_v2", "CustomScaleLayer"),
        )
    }
    image = layers.Input((6, 6, 3))
    stem = layers.Conv2D(8, 3, name="stem")(image)
    scaled = beside["StochasticDepth"](0.1)(beside["LayerScale"](0.5, 8, name="scale")(stem))
    both = beside["CustomScaleLayer"](0.2)([scaled, layers.Conv2D(8, 3, name="beside")(image)])
    model = filled(keras.Model(image, layers.Dense(3, name="last")(layers.GlobalAveragePooling2D()(both))))
    path, output = tmp_path / f"net{suffix}", tmp_path / f"small{suffix}"
    model.save(path)
    found = cut(path, output)
    # Keras itself does not find all of them.
    small = keras.models.load_model(output, custom_objects=beside)
    assert small.get_layer("scale").gamma.shape == (4,)
    given = images(model)
    np.testing.assert_allclose(say(small, given)[0], say(silence(model, found), given)[0], rtol=1e-4, atol=1e-5)
    # HDF5 does not say that they are those of Keras.
    model.save(tmp_path / "net.h5")
    with pytest.raises(InputError, match="Unknown layer"):
        load_trainable(open_model(tmp_path / "net.h5"), LoadOptions())


def converted(k: Any) -> Any:
    """Numbers that are kept from when layers were built: a mean, and a type that one is converted to."""
    i = k.Input((6,))
    x = k.layers.Dense(5, name="stem")(k.layers.Normalization(mean=[0.1] * 6, variance=[0.3] * 6)(i))
    return k.Model(i, k.layers.Dense(3, name="last")(k.ops.cast(x, "float32")))


@pytest.mark.parametrize("kind", [*NETS, attending, seq2seq, inside, converted])
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_is_widened_says_to_the_bit_what_one_built_in_float64_does(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.keras"
    filled(kind(LIBRARIES["three"])).save(path)
    source = open_adapter(open_model(path), LoadOptions())
    network, names = source.with_weights({}), sorted(source.observable)
    feeds = source.random_inputs(np.random.default_rng(0))
    wide = {name: array.astype("float64") if array.dtype.kind == "f" else array for name, array in feeds.items()}
    built = source.runner(network, names)
    built(feeds)
    widened = source.to_float64(built, network, names)
    assert (widened is built) == (kind not in {nested, inside, arithmetic, reduced, converted})
    for one, other in zip(widened(wide), source.runner(network, names, in_float64=True)(wide), strict=True):
        assert one.dtype == other.dtype == np.float64
        np.testing.assert_array_equal(one, other)
