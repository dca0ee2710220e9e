from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.pruning.strip import strip
from prunectl.reporting.prune import wrap_report
from prunectl.training.backend import LoadOptions
from prunectl.training.wrap.prune import WrapResult, prune_wrapped
from tests.networks import tf_keras
from tests.running import FIXTURES
from tests.training.tfmot.models import convolutional, functional, recurrent, saved

k = tf_keras()
tfmot = pytest.importorskip("prunectl.training.tfmot.wrappers").load_tfmot()
pytestmark = [
    pytest.mark.usefixtures("_forked_rebuilding"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

POLYNOMIAL = SparsitySchedule("polynomial", 0.0, 10, 60, 0.1, 5, ("power=2.0",))


def wrapped(path: Path, out: Path, ramp: SparsitySchedule | None = None, custom: str = "", **words: Any) -> WrapResult:
    return prune_wrapped(
        path, PruneRequest(**{"sparsity": 0.75, **words}), ramp, LoadOptions(custom_objects=custom), Destination(out)
    )


def opened(path: Path) -> Any:
    with tfmot.prune_scope():
        return k.models.load_model(path)


def wrappers(model: Any) -> dict[str, Any]:
    return {layer.layer.name: layer for layer in model.layers if hasattr(layer, "pruning_schedule")}


def numbers(path: Path) -> dict[str, bytes]:
    model = open_model(path)
    return {one.name: model.read(one).tobytes() for one in model.tensors if one.role != "optimizer"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files of one model by their names, each saved once."""
    folder = tmp_path_factory.mktemp("original")
    return cache(lambda name: saved(convolutional(k), folder / name))


@pytest.fixture(params=["m.h5", "m.keras", "m"])
def path(request: Any, original: Callable[[str], Path]) -> Path:
    return original(request.param)


@pytest.fixture
def out(path: Path, tmp_path: Path) -> Path:
    return tmp_path / f"wrapped{path.suffix}"


class TestMasksInPlace:
    def test_are_found_by_tfmot_and_strip_to_what_prune_gives(self, path: Path, out: Path, tmp_path: Path) -> None:
        said = wrapped(path, out)
        assert (said.wrapped, said.bare, said.loses_optimizer, said.loses_compilation) == (2, (), False, False)
        assert {wrapper.layer for wrapper in open_model(out).about.wrappers} == {"conv", "hidden"}
        model = opened(out)
        found = wrappers(model)
        assert found.keys() == {"conv", "hidden"}
        for layer in found.values():
            (weight, mask, _), *_ = layer.pruning_vars
            assert np.count_nonzero(mask.numpy() == 0) == round(0.75 * mask.numpy().size)
            assert np.array_equal(weight.numpy() == 0, mask.numpy() == 0)
        assert model.optimizer is not None
        assert open_model(out).about.training == open_model(path).about.training
        plain, stripped = tmp_path / f"plain{path.suffix}", tmp_path / f"stripped{path.suffix}"
        prune(path, PruneRequest(sparsity=0.75), Destination(plain))
        parts = frozenset(StripPart) if not path.suffix else frozenset({StripPart.MASKS, StripPart.WRAPPERS})
        strip(out, StripOptions(parts), Destination(stripped), is_packed=False)
        assert numbers(stripped) == numbers(plain)

    def test_stay_what_they_are_while_tfmot_trains(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        out = tmp_path / "wrapped.keras"
        wrapped(original("m.keras"), out, sparsity=None, pattern="2:4")
        model = opened(out)
        before = {name: layer.pruning_vars[0][1].numpy() for name, layer in wrappers(model).items()}
        assert before["hidden"].mean() == 0.5
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        x, y = np.random.default_rng(0).normal(size=(64, 8, 8, 1)), np.arange(64) % 3
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[tfmot.UpdatePruningStep()])
        for name, layer in wrappers(model).items():
            weight, mask, _ = layer.pruning_vars[0]
            assert np.array_equal(mask.numpy(), before[name])
            assert np.all(weight.numpy()[before[name] == 0] == 0)


class TestASchedule:
    def test_is_in_the_file_and_nothing_is_pruned(self, path: Path, out: Path) -> None:
        found = wrapped(path, out, POLYNOMIAL, layers=(("*hidden*", 0.5),) if path.suffix else ())
        model = opened(out)
        plain = k.models.load_model(path)
        finals = {name: layer.pruning_schedule.get_config() for name, layer in wrappers(model).items()}
        assert finals["conv"] == tfmot.PolynomialDecay(0.1, 0.75, 10, 60, 2.0, 5).get_config()
        assert finals["hidden"]["config"]["final_sparsity"] == (0.5 if path.suffix else 0.75)
        for name, layer in wrappers(model).items():
            assert np.array_equal(layer.pruning_vars[0][0].numpy(), plain.get_layer(name).kernel.numpy())
            assert layer.pruning_vars[0][1].numpy().all()
        assert sum(tally.dropped for tally in found.pruned.counts.values()) == 0

    def test_is_followed_by_tfmot(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m.h5")
        wrapped(path, tmp_path / "w.h5", SparsitySchedule("polynomial", 0.0, 0, 12, 0.0, 4))
        model = opened(tmp_path / "w.h5")
        model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
        x, y = np.random.default_rng(0).normal(size=(64, 8, 8, 1)), np.arange(64) % 3
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[tfmot.UpdatePruningStep()])
        for layer in wrappers(model).values():
            mask = layer.pruning_vars[0][1].numpy()
            assert np.count_nonzero(mask == 0) == round(0.75 * mask.size)

    def test_of_our_own_is_found_again(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m.keras")
        ramp = SparsitySchedule("cosine", 0.0, 0, 20, 0.0, 3)
        wrapped(path, tmp_path / "w.keras", ramp)
        layer = wrappers(opened(tmp_path / "w.keras"))["hidden"]
        assert layer.pruning_schedule.schedule == SparsitySchedule("cosine", 0.75, 0, 20, 0.0, 3)

    def test_of_our_own_does_not_go_into_a_saved_model(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m")
        with pytest.raises(UsageError, match="SavedModel"):
            wrapped(path, tmp_path / "w", SparsitySchedule("cosine", 0.0, 0, 20, 0.0, 3))
        assert not (tmp_path / "w").exists()

    def test_has_the_sparsities_of_a_global_ranking(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m.h5")
        plain = prune(path, PruneRequest(sparsity=0.5, scope="global"), Destination(tmp_path / "plain.h5"))
        wrapped(path, tmp_path / "w.h5", POLYNOMIAL, sparsity=0.5, scope="global")
        for name, layer in wrappers(opened(tmp_path / "w.h5")).items():
            tally = plain.counts[f"{name}/kernel:0"]
            size = layer.pruning_vars[0][0].numpy().size
            assert layer.pruning_schedule.final_sparsity == pytest.approx(tally.dropped / size)

    def test_goes_with_blocks_of_matrices(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m.h5")
        found = wrapped(path, tmp_path / "w.h5", POLYNOMIAL, pattern="block:2x3:max")
        layers = wrappers(opened(tmp_path / "w.h5"))
        assert layers.keys() == {"hidden"}
        assert list(layers["hidden"].block_size) == [2, 3]
        assert layers["hidden"].block_pooling_type == "MAX"
        assert found.bare == ("conv/kernel:0",)

    def test_does_not_go_with_groups(self, original: Callable[[str], Path], tmp_path: Path) -> None:
        path = original("m.h5")
        with pytest.raises(UsageError, match="which tfmot applies at once"):
            wrapped(path, tmp_path / "w.h5", POLYNOMIAL, sparsity=None, pattern="2:4")


class TestModels:
    def test_with_shared_and_nested_layers_keep_what_tfmot_cannot_wrap(self, tmp_path: Path) -> None:
        path = saved(functional(k), tmp_path / "m.h5")
        found = wrapped(path, tmp_path / "w.h5")
        assert [name.split("/")[0] for name in found.bare] == ["spread"]
        model = opened(tmp_path / "w.h5")
        assert wrappers(model).keys() == {"shared", "out"}
        assert wrappers(model.get_layer("nested")).keys() == {"inside"}
        spread = model.get_layer("spread").layer.kernel.numpy()
        assert np.count_nonzero(spread == 0) == round(0.75 * spread.size)
        plain = tmp_path / "plain.h5"
        prune(path, PruneRequest(sparsity=0.75), Destination(plain))
        ones = [np.ones((2, 6), np.float32), np.full((2, 6), 2, np.float32)]
        expected = k.models.load_model(plain, compile=False)(ones, training=False)
        assert np.allclose(model(ones, training=False), expected, atol=1e-6)

    def test_with_recurrent_layers_are_scheduled_whole(self, tmp_path: Path) -> None:
        path = saved(recurrent(k), tmp_path / "m.h5", is_compiled=False)
        wrapped(path, tmp_path / "w.h5", POLYNOMIAL)
        assert len(wrappers(opened(tmp_path / "w.h5"))["lstm"].pruning_vars) == 2
        with pytest.raises(UsageError, match="all weights of lstm"):
            wrapped(path, tmp_path / "v.h5", POLYNOMIAL, only="*recurrent_kernel*")
        wrapped(path, tmp_path / "v.h5", only="*recurrent_kernel*")
        layer = wrappers(opened(tmp_path / "v.h5"))["lstm"]
        assert {float(mask.numpy().mean()) for _, mask, _ in layer.pruning_vars} == {1.0, 0.25}

    def test_with_a_prunable_layer_of_the_users_own(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "own_layers.py").write_text(OWN)
        monkeypatch.syspath_prepend(tmp_path)
        own = importlib.import_module("own_layers")
        path = saved(k.Sequential([k.layers.Input((6,)), own.Scaled(8, name="own")]), tmp_path / "m.h5")
        wrapped(path, tmp_path / "w.h5", only="own*", custom="own_layers:OBJECTS")
        with k.utils.custom_object_scope(own.OBJECTS):
            layer = wrappers(opened(tmp_path / "w.h5"))["own"]
        assert [tuple(mask.shape) for _, mask, _ in layer.pruning_vars] == [(6, 8)]
        assert layer.pruning_vars[0][1].numpy().mean() == 0.25
        sys.modules.pop("own_layers")

    def test_that_cannot_be_compiled_again_are_said_not_to_be(self, tmp_path: Path) -> None:
        model = k.Sequential([k.layers.Input((6,)), k.layers.Dense(8)])
        model.compile(loss="mse", optimizer=type("Own", (k.optimizers.SGD,), {})())
        model.save(tmp_path / "m.h5")
        found = wrapped(tmp_path / "m.h5", tmp_path / "w.h5")
        assert found.loses_compilation
        assert any("The result is not compiled" in one for one in wrap_report(found, "w.h5").sections[0].notes)

    def test_for_xnnpack_get_wrappers_where_tfmots_policy_puts_them(self, tmp_path: Path) -> None:
        model = mobile(k)
        path = saved(model, tmp_path / "m.h5")
        theirs = tfmot.prune_low_magnitude(model, pruning_policy=tfmot.PruneForLatencyOnXNNPack())
        wrapped(path, tmp_path / "w.h5", policy="xnnpack")
        assert wrappers(opened(tmp_path / "w.h5")).keys() == wrappers(theirs).keys() != set()

    def test_of_keras_3_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Keras 3") as caught:
            wrapped(FIXTURES / "digits_cnn.keras", tmp_path / "w.keras")
        assert str(FIXTURES) in caught.value.message

    def test_that_are_weights_alone_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds only weights, but a wrapper is part of a model"):
            wrapped(FIXTURES / "weights_only.h5", tmp_path / "w.h5")

    def test_with_wrappers_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="already"):
            wrapped(FIXTURES / "wrapped_by_tfmot.h5", tmp_path / "w.h5")


OWN = """
import tf_keras
from tensorflow_model_optimization.sparsity.keras import PrunableLayer

class Scaled(tf_keras.layers.Layer, PrunableLayer):
    def __init__(self, units, **words):
        super().__init__(**words)
        self.units = units
    def build(self, shape):
        self.kernel = self.add_weight("kernel", (shape[-1], self.units))
        self.scale = self.add_weight("scale", (self.units,))
    def call(self, x):
        return x @ self.kernel * self.scale
    def get_prunable_weights(self):
        return [self.kernel]
    def get_config(self):
        return {**super().get_config(), "units": self.units}

OBJECTS = {"Scaled": Scaled}
"""


def mobile(k: Any) -> Any:
    layers = k.layers
    x = start = k.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="valid", name="stem")(layers.ZeroPadding2D(1)(x))
    x = layers.Conv2D(8, 1, name="point")(layers.DepthwiseConv2D(3, padding="same", name="depth")(x))
    x = layers.GlobalAveragePooling2D(keepdims=True)(layers.ReLU()(x))
    return k.Model(start, layers.Flatten()(layers.Conv2D(3, 1, name="head")(x)))
