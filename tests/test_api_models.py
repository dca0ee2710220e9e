"""Models in memory, pruned as their files are."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import onnx
import pytest
import safetensors.numpy
import tf_keras
import torch
from torch.nn.utils.prune import l1_unstructured

import prunectl
from prunectl.errors import UsageError
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
DATA = f"{FIXTURES / 'digits.npz'}?norm=/16&limit=64"


def module() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))


def network(library: Any) -> Any:
    library.utils.set_random_seed(3)
    layers = library.layers
    return library.Sequential(
        [layers.Input((8, 8, 1)), layers.Conv2D(8, 3), layers.Flatten(), layers.Dense(10, activation="softmax")]
    )


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))


@pytest.mark.parametrize("options", [{"sparsity": "80%"}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "global"}])
def test_a_module_is_pruned_as_its_state_dict_in_a_file(tmp_path: Path, options: Any) -> None:
    dense = module()
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    prunectl.prune(tmp_path / "dense.pt", tmp_path / "sparse.pt", **options)
    expected = torch.load(tmp_path / "sparse.pt", weights_only=True)
    before = copy.deepcopy(dense.state_dict())
    pruned = prunectl.prune(dense, **options)
    assert type(pruned) is type(dense)
    assert all(torch.equal(value, expected[name]) for name, value in pruned.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert prunectl.prune(dense, in_place=True, **options) is dense
    assert all(torch.equal(value, expected[name]) for name, value in dense.state_dict().items())


def test_a_module_is_its_own_builder_where_data_is_looked_at(tmp_path: Path) -> None:
    dense = module()
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    options: Any = {"sparsity": 0.7, "strategy": "activation-magnitude", "samples": 64, "data": DATA}
    prunectl.prune(tmp_path / "dense.pt", tmp_path / "sparse.pt", builder=module, **options)
    expected = torch.load(tmp_path / "sparse.pt", weights_only=True)
    pruned = prunectl.prune(dense, **options)
    assert all(torch.equal(value, expected[name]) for name, value in pruned.state_dict().items())


def test_a_state_dict_comes_back_as_one() -> None:
    state = module().state_dict()
    pruned = prunectl.prune(state, sparsity="80%")
    expected = prunectl.prune(module(), sparsity="80%").state_dict()
    assert type(pruned) is type(state)
    assert list(pruned) == list(state)
    assert all(torch.equal(pruned[name], expected[name]) for name in state)
    assert all(torch.equal(value, state[name]) for name, value in module().state_dict().items())


def test_arrays_are_pruned_as_in_a_file_of_safetensors(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    arrays = {"fc1.weight": random.normal(size=(32, 64)).astype("f4"), "fc1.bias": np.ones(32, "f4")}
    safetensors.numpy.save_file(arrays, tmp_path / "dense.safetensors")
    prunectl.prune(tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors", sparsity=0.9)
    expected = safetensors.numpy.load_file(tmp_path / "sparse.safetensors")
    before = {name: array.copy() for name, array in arrays.items()}
    pruned = prunectl.prune(arrays, sparsity=0.9)
    assert list(pruned) == list(arrays)
    assert all(np.array_equal(pruned[name], expected[name]) for name in arrays)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    # A transposed view has other bytes than its numbers in order.
    turned = prunectl.prune({"fc.weight": arrays["fc1.weight"].T}, sparsity=0.9)
    assert np.array_equal(turned["fc.weight"] == 0, expected["fc1.weight"].T == 0)


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_a_keras_model_is_pruned_as_its_file(tmp_path: Path, library: Any) -> None:
    dense = network(library)
    dense.save(tmp_path / "dense.keras")
    prunectl.prune(tmp_path / "dense.keras", tmp_path / "sparse.keras", sparsity="80%")
    expected = library.models.load_model(tmp_path / "sparse.keras")
    before = library.models.load_model(tmp_path / "dense.keras")
    pruned = prunectl.prune(dense, sparsity="80%")
    assert type(pruned) is type(dense)
    assert same(pruned, expected)
    assert same(dense, before)
    assert prunectl.prune(dense, sparsity="80%", in_place=True) is dense
    assert same(dense, expected)


class Scale(keras.layers.Layer):  # type: ignore[misc]
    """A layer that Keras does not know."""

    def call(self, x: Any) -> Any:
        return x * 2


def test_layers_of_ones_own_need_no_words() -> None:
    dense = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(32), Scale(), keras.layers.Dense(4)])
    pruned = prunectl.prune(dense, sparsity=0.5, scope="layer")
    assert isinstance(pruned.layers[1], Scale)
    assert np.mean(pruned.layers[0].get_weights()[0] == 0) == 0.5


def doubled(x: Any) -> Any:
    """An activation that Keras does not know."""
    return x * 2


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_a_function_of_ones_own_needs_no_words(library: Any) -> None:
    dense = library.Sequential([library.layers.Input((16,)), library.layers.Dense(8, activation=doubled)])
    pruned = prunectl.prune(dense, sparsity=0.5)
    assert pruned.layers[0].activation is doubled
    assert np.mean(pruned.layers[0].get_weights()[0] == 0) == 0.5


class Wide(keras.Model):  # type: ignore[misc]
    """A model that Keras cannot save: it does not say how many units it was made with."""

    def __init__(self, units: Any) -> None:
        super().__init__()
        self.line = keras.layers.Dense(int(units[0]))

    def call(self, x: Any) -> Any:
        return self.line(x)


def test_a_keras_model_that_cannot_be_saved_is_pruned_by_its_weights(tmp_path: Path) -> None:
    dense = Wide(np.array([8]))
    dense(np.ones((1, 16), "f4"))
    with pytest.raises(UsageError, match="Keras cannot save Wide") as caught:
        prunectl.prune(dense, sparsity=0.5)
    assert "save_weights" in caught.value.hint
    dense.save_weights(tmp_path / "m.weights.h5")
    prunectl.prune(tmp_path / "m.weights.h5", tmp_path / "s.weights.h5", sparsity=0.5)
    dense.load_weights(tmp_path / "s.weights.h5")
    assert np.mean(dense.get_weights()[0] == 0) == 0.5


def pruned_twice() -> Any:
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    l1_unstructured(net[0], "weight", amount=0.25)
    return net


def normed() -> Any:
    with pytest.warns(FutureWarning):
        return torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(16, 8)))


def spectral() -> Any:
    net = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(16, 8)))
    net(torch.ones(1, 16))
    return net.eval()


BY_DATA: Any = {"strategy": "activation-magnitude", "data": np.ones((8, 16), "f4")}


@pytest.mark.parametrize(("make", "options"), [(pruned_twice, {}), (normed, {}), (normed, BY_DATA), (spectral, {})])
@pytest.mark.parametrize("in_place", [False, True])
def test_weights_that_a_module_computes_are_those_that_were_pruned(make: Any, in_place: bool, options: Any) -> None:
    torch.manual_seed(3)
    dense = make()
    before = dense[0].weight.detach().clone()
    pruned = prunectl.prune(dense, sparsity=0.5, scope="layer", in_place=in_place, **options)
    assert (pruned[0].weight == 0).float().mean() == 0.5
    assert (pruned is dense) == in_place
    assert torch.equal(dense[0].weight, before) != in_place
    shown = pruned[0].weight.detach().clone()
    pruned(torch.ones(1, 16))
    assert torch.equal(pruned[0].weight, shown)


def test_computing_a_spectral_weight_takes_no_power_step() -> None:
    dense = spectral().train()
    vector = dense[0].weight_u.clone()
    assert torch.equal(prunectl.prune(dense, sparsity=0.5)[0].weight_u, vector)


def test_a_module_that_keeps_computed_tensors_in_a_container_is_copied() -> None:
    dense = torch.nn.Linear(4, 4)
    dense.cache = {"seen": [(dense.weight * 2,)]}  # type: ignore[assignment]
    kept = prunectl.prune(dense, sparsity=0.5).cache["seen"][0][0]
    assert torch.equal(kept, dense.weight * 2)
    assert kept.is_leaf


class Odd(torch.nn.Module):
    """A module with a state that is no tensor, and of a class that PyTorch does not load."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.told: Any = None

    def get_extra_state(self) -> Any:
        return Path("/")

    def set_extra_state(self, state: Any) -> None:
        self.told = state


def test_the_extra_state_of_a_module_stays() -> None:
    pruned = prunectl.prune(Odd(), sparsity=0.5)
    assert (pruned.fc.weight == 0).sum() == 8
    assert pruned.told == Path("/")


class Moments(NamedTuple):
    """A tuple that PyTorch does not load."""

    mean: Any
    share: Any


def test_what_is_no_tensor_in_a_state_dict_stays() -> None:
    kept = {
        "arguments": {"root": Path("/"), np.int64(3): {1}},
        "rate": np.float64(0.1),
        "names": np.array(["cat"]),
        "mean": np.ones(3),
        "seen": [Path("/"), np.array([[1, 2]]), [np.ones(2)]],
        "shape": torch.Size([4, 4]),
        "counts": Counter(cat=2),
    }
    moments = Moments(torch.ones(3), np.float32(0.5))
    state = {"fc.weight": torch.rand(4, 4), "best": {"moments": moments, "at": Path("/")}, **kept}
    pruned = prunectl.prune(state, sparsity=0.5)
    assert (pruned["fc.weight"] == 0).sum() == 8
    assert list(pruned) == list(state)
    assert repr({name: pruned[name] for name in kept}) == repr(kept)
    assert repr(pruned["best"]) == repr(state["best"])
    assert type(pruned["best"]["moments"]) is Moments
    with pytest.raises(
        TypeError, match=r"model\['best'\]\['array'\] must be a tensor, as others are, not a NumPy array"
    ):
        prunectl.prune({**state, "best": {"array": np.ones((4, 4))}}, sparsity=0.5)


def locked() -> Any:
    net = module()
    net.lock = threading.Lock()  # type: ignore[assignment]
    return net


def renamed() -> Any:
    net = torch.nn.Linear(4, 4)
    net.register_state_dict_post_hook(lambda net, state, prefix, local: state.update({"x.weight": state.pop("weight")}))
    return net


@pytest.mark.parametrize(
    ("make", "options", "message", "hint"),
    [
        (locked, {}, "Sequential cannot be copied: cannot pickle '_thread.lock' object", "in_place=True"),
        (renamed, {}, "Linear does not load its own state dict", "prune net.state_dict()"),
        (lambda: torch.nn.LazyLinear(4), {}, "weight has no shape yet", "call the module once"),
        (lambda: torch.nn.Linear(4, 4, device="meta"), {}, "on the device meta: it has no values", "load the weights"),
        (lambda: keras.Sequential([keras.layers.Dense(4)]), {}, "the Keras model has no weights yet", "call it once"),
        (lambda: network(keras), {"pattern": "channel", "in_place": True}, "cannot be removed", "leave out in_place"),
        (pruned_twice, BY_DATA, "the model has pruning wrappers", "remove them first"),
        (module, {"max_drop": "1pp"}, "max_drop needs a file: a PyTorch module is in memory", "save it, and prune"),
    ],
)
def test_a_model_in_memory_that_cannot_be_pruned_is_refused_with_the_way_out(
    make: Any, options: Any, message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        prunectl.prune(make(), **{"sparsity": 0.5, **options})
    assert hint in caught.value.hint


def test_channels_are_cut_out_of_a_keras_model() -> None:
    thin = prunectl.prune(network(keras), pattern="channel", sparsity="50%")
    assert thin.layers[0].filters == 4
    assert thin(np.zeros((1, 8, 8, 1), "f4")).shape == (1, 10)


def test_an_onnx_model_is_pruned_as_its_file(tmp_path: Path) -> None:
    dense = onnx.load(FIXTURES / "digits_cnn.onnx")
    prunectl.prune(FIXTURES / "digits_cnn.onnx", tmp_path / "sparse.onnx", sparsity="80%")
    pruned = prunectl.prune(dense, sparsity="80%")
    assert isinstance(pruned, onnx.ModelProto)
    assert pruned == onnx.load(tmp_path / "sparse.onnx")
    assert dense == onnx.load(FIXTURES / "digits_cnn.onnx")
    assert prunectl.prune(dense, sparsity="80%", in_place=True) is dense
    assert dense == pruned


def test_what_cannot_be_is_refused_in_words_of_python() -> None:
    with pytest.raises(UsageError, match="channels cannot be removed from a PyTorch module in memory"):
        prunectl.prune(module(), pattern="channel", sparsity=0.5)
    with pytest.raises(UsageError, match="a PyTorch module in memory is returned and not written"):
        prunectl.prune(module(), "out.pt", sparsity=0.5)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="no output is given"):
        prunectl.prune("model.pt", sparsity=0.5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="or a dict of arrays or tensors, not object"):
        prunectl.prune(object(), sparsity=0.5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="model must be a path: only prune takes a model in memory, not Sequential"):
        prunectl.size(module())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model\['a'\] must be a NumPy array, not list"):
        prunectl.prune({"a": [1.0]}, sparsity=0.5)
    with pytest.raises(UsageError, match="the model") as caught:
        prunectl.prune({"a": np.ones(4, "f4")}, sparsity=0.5)
    assert "/" not in str(caught.value)


def test_no_framework_is_imported_for_arrays() -> None:
    code = (
        "import sys, numpy as np, prunectl;"
        "prunectl.prune({'fc.weight': np.ones((8, 8), 'f4')}, sparsity=0.5);"
        "sys.exit(bool({'torch', 'tensorflow', 'keras', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
