"""`inspect --sensitivity`, beside what NumPy and PyTorch make of the same weights and examples."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional

from prunectl.calibration.sensitivity import (
    SPARSITIES,
    LayerSensitivity,
    Score,
    Sensitivity,
    SensitivityPoint,
    collapses,
    sensitivity,
)
from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning.request import PruneRequest
from tests import networks
from tests.contract import Array
from tests.running import FIXTURES

DIGITS = FIXTURES / "digits_cnn.pt"
NET = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"
EXAMPLES = 60
NETS = '''
import torch
class Net(torch.nn.Module):
    """Depthwise, grouped, spread out, dilated, and one layer that is used twice."""
    def __init__(self):
        super().__init__()
        self.depth = torch.nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.up = torch.nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.wide = torch.nn.Conv2d(6, 5, 2, dilation=2, stride=2)
        self.twice = torch.nn.Linear(5, 5)
    def forward(self, x):
        x = self.wide(torch.relu(self.up(torch.relu(self.depth(x))))).mean((2, 3))
        return self.twice(torch.relu(self.twice(x)))
'''


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every example that is looked at, scaled as in training, so that their order does not matter."""
    with np.load(FIXTURES / "digits.npz") as held:
        x, y = held["x"][-EXAMPLES:], held["y"][-EXAMPLES:]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=x.transpose(0, 3, 1, 2).astype(np.float32) / 16, y=y.astype(np.int64))
    return path


def looked_at(path: Path, data: Path | str = "", layers: str = "", **words: Any) -> Sensitivity:
    return sensitivity(open_model(path), PruneRequest(data=str(data), **words), layers=layers)


def pruned(weights: Array, sparsity: float) -> Array:
    """Return weights without the smallest, by sorting all of them."""
    flat = weights.copy().ravel()
    flat[np.argsort(np.abs(flat), kind="stable")[: round(sparsity * flat.size)]] = 0
    return flat.reshape(weights.shape)


def state(path: Path = DIGITS) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def digits_net(**changed: Array) -> Any:
    """Return the digits network with some of its weights replaced."""
    namespace: dict[str, Any] = {}
    exec((FIXTURES / "digits_torch.py").read_text(), namespace)
    net = namespace["DigitsCNN"]()
    net.load_state_dict({**state(), **{name: torch.from_numpy(value) for name, value in changed.items()}})
    return net.eval()


def met(net: Any, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return the inputs of every layer, by its name."""
    seen: dict[str, list[torch.Tensor]] = {}

    def see(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0])

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in net.named_children()]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def output_error(layer: Any, inputs: list[torch.Tensor], sparsity: float) -> float:
    """Return how far a layer's own outputs are off when its weights are pruned, its bias left out."""
    layer.bias.zero_()
    before = [layer(one).double() for one in inputs]
    whole = layer.weight.clone()
    layer.weight.copy_(torch.from_numpy(pruned(whole.numpy(), sparsity)))
    lost = sum(float((old - layer(one)).square().sum()) for old, one in zip(before, inputs, strict=True))
    layer.weight.copy_(whole)
    return float(np.sqrt(lost / sum(float(old.square().sum()) for old in before)))


def test_the_weight_error_is_the_share_of_the_norm_that_goes() -> None:
    found = looked_at(DIGITS)
    assert [layer.name for layer in found.layers] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    for layer in found.layers:
        weights = state()[layer.name].double().numpy()
        assert layer.weights == weights.size
        assert tuple(point.sparsity for point in layer.points) == SPARSITIES
        for point in layer.points:
            wanted = np.linalg.norm(weights - pruned(weights, point.sparsity)) / np.linalg.norm(weights)
            assert point.weight_error == pytest.approx(wanted, rel=1e-12)
            assert (point.output_error, point.score) == (None, None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ties_and_zeros_go_as_in_prune(dtype: str, tmp_path: Path) -> None:
    weights = np.random.default_rng(3).integers(-2, 3, (12, 10)).astype(dtype)
    save_file({"layer.weight": weights}, tmp_path / "m.safetensors")
    (layer,) = looked_at(tmp_path / "m.safetensors").layers
    wide = weights.astype(np.float64)
    for point in layer.points:
        gone = wide - pruned(wide, point.sparsity)
        assert point.weight_error == pytest.approx(np.linalg.norm(gone) / np.linalg.norm(wide), rel=1e-12)


def test_a_tensor_of_zeros_loses_nothing(tmp_path: Path) -> None:
    save_file({"layer.weight": np.zeros((4, 4), np.float32)}, tmp_path / "m.safetensors")
    found = looked_at(tmp_path / "m.safetensors")
    assert {point.weight_error for point in found.layers[0].points} == {0.0}
    assert not collapses(found)


@pytest.mark.parametrize("name", ["digits_cnn.pt", "digits_cnn.onnx"])
def test_the_output_error_is_that_of_the_layers_own_outputs(name: str, digits: Path) -> None:
    found = looked_at(FIXTURES / name, digits, model=NET, samples=EXAMPLES, batch_size=25)
    assert found.examples == EXAMPLES
    net = digits_net()
    inputs = met(net, torch.from_numpy(np.load(digits)["x"]))
    assert len(found.layers) == 4
    for layer in found.layers:
        own = layer.name.partition(".")[0]
        for point in layer.points:
            wanted = output_error(getattr(net, own), inputs[own], point.sparsity)
            assert point.output_error == pytest.approx(wanted, rel=1e-4), (layer.name, point.sparsity)


def test_the_output_error_holds_for_every_kind_of_convolution_and_for_a_layer_used_twice(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    torch.manual_seed(0)
    net = namespace["Net"]().eval()
    torch.save(net.state_dict(), tmp_path / "m.pt")
    x = np.random.default_rng(0).standard_normal((7, 4, 6, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    found = looked_at(tmp_path / "m.pt", tmp_path / "x.npy", model=f"{tmp_path / 'nets.py'}:Net", batch_size=3)
    inputs = met(net, torch.from_numpy(x))
    assert [len(seen) for seen in inputs.values()] == [1, 1, 1, 2]
    assert len(found.layers) == 4
    assert found.base is None
    for layer in found.layers:
        own = layer.name.partition(".")[0]
        for point in layer.points:
            wanted = output_error(getattr(net, own), inputs[own], point.sparsity)
            assert point.output_error == pytest.approx(wanted, rel=1e-4), (layer.name, point.sparsity)
            assert point.score is None


def test_loss_and_accuracy_are_those_of_the_model_with_that_tensor_pruned(digits: Path) -> None:
    found = looked_at(DIGITS, digits, model=NET, samples=EXAMPLES, batch_size=25)
    with np.load(digits) as held:
        x, y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"])

    def judged(**changed: Array) -> Score:
        with torch.no_grad():
            out = digits_net(**changed)(x)
        return Score(float(functional.cross_entropy(out, y)), float((out.argmax(1) == y).double().mean()))

    def same(one: Score | None, other: Score) -> bool:
        return one is not None and (one.loss, one.accuracy) == pytest.approx((other.loss, other.accuracy), rel=1e-5)

    assert same(found.base, judged())
    for layer in found.layers:
        for point in layer.points:
            weights = pruned(state()[layer.name].numpy(), point.sparsity)
            assert same(point.score, judged(**{layer.name: weights})), (layer.name, point.sparsity)


def test_another_loss_can_be_measured(digits: Path, tmp_path: Path) -> None:
    with np.load(digits) as held:
        x, y = held["x"], np.eye(10, dtype=np.float32)[held["y"]]
    np.savez(tmp_path / "onehot.npz", x=x, y=y)
    found = looked_at(DIGITS, tmp_path / "onehot.npz", "fc2", model=NET, samples=EXAMPLES, loss="mse")
    weights = pruned(state()["fc2.weight"].numpy(), 0.5)
    with torch.no_grad():
        out = digits_net(**{"fc2.weight": weights})(torch.from_numpy(x))
    score = found.layers[0].points[0].score
    assert score is not None
    assert score.loss == pytest.approx(float(functional.mse_loss(out, torch.from_numpy(y))), rel=1e-5)
    assert score.accuracy is None


def test_a_keras_model_answers_as_keras_says(digits: Path) -> None:
    keras = networks.keras()
    found = looked_at(FIXTURES / "digits_cnn.keras", digits, "fc2", samples=EXAMPLES)
    (layer,) = found.layers
    model = keras.models.load_model(FIXTURES / "digits_cnn.keras", compile=False)
    kernel, bias = model.get_layer("fc2").get_weights()
    with np.load(digits) as held:
        x, y = held["x"].transpose(0, 2, 3, 1), held["y"]
    for point in layer.points:
        model.get_layer("fc2").set_weights([pruned(kernel, point.sparsity), bias])
        out = torch.from_numpy(np.array(model(x)))
        assert point.score is not None
        loss = float(functional.cross_entropy(out, torch.from_numpy(y)))
        assert point.score.loss == pytest.approx(loss, rel=1e-4)
        assert point.score.accuracy == pytest.approx(float((out.argmax(1).numpy() == y).mean()), rel=1e-5)


def test_the_file_is_as_it_was(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.pt"
    copy.write_bytes(DIGITS.read_bytes())
    looked_at(copy, digits, model=NET, samples=8)
    assert hashlib.sha256(copy.read_bytes()).digest() == hashlib.sha256(DIGITS.read_bytes()).digest()
    assert list(tmp_path.iterdir()) == [copy]


def test_a_layer_that_loses_an_output_collapses_where_it_does_first(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).uniform(1, 2, (10, 10)).astype(np.float32)
    weights[3] = 0.01  # the smallest tenth
    weights[6] = 0  # has been dead before
    save_file({"even.weight": weights[:2].copy(), "odd.weight": weights}, tmp_path / "m.safetensors")
    found = {one.name: one for one in collapses(looked_at(tmp_path / "m.safetensors"))}
    assert found["odd.weight"].sparsity == 0.5
    assert found["odd.weight"].reasons == ("an output has no weights left but zeros",)


def test_what_breaks_first_is_told_first_and_then_what_breaks_most() -> None:
    def layer(name: str, *off: float, accuracy: float = 1.0, dead_from: float | None = None) -> LayerSensitivity:
        points = (
            SensitivityPoint(sparsity, 0.0, error, Score(0.0, accuracy))
            for sparsity, error in zip(SPARSITIES, off, strict=True)
        )
        return LayerSensitivity(name, 1, tuple(points), dead_from)

    found = collapses(
        Sensitivity(
            (
                layer("fine", 0.1, 0.2, 0.3, 0.4, 0.5, accuracy=0.9),
                layer("late", 0.1, 0.2, 0.3, 0.4, 0.6),
                layer("early", 0.1, 0.51, 0.6, 0.7, 0.8),
                layer("more", 0.1, 0.8, 0.8, 0.8, 0.8),
                layer("dead", 0.1, 0.1, 0.1, 0.1, 0.1, dead_from=0.9),
                layer("wrong", 0.0, 0.0, 0.0, 0.0, 0.0, accuracy=0.85),
            ),
            base=Score(0.0, 1.0),
        )
    )
    assert [(one.name, one.sparsity) for one in found] == [
        ("wrong", 0.5), ("more", 0.7), ("early", 0.7), ("dead", 0.9), ("late", 0.95),
    ]  # fmt: skip
    assert found[0].reasons == ("accuracy falls by 15 percentage points",)
    assert found[1].reasons == ("output error 80 %",)


def test_what_is_not_finite_is_left_out_and_named(tmp_path: Path) -> None:
    good, bad = np.ones((4, 4), np.float32), np.full((4, 4), np.nan, np.float32)
    save_file({"bad.weight": bad, "good.weight": good}, tmp_path / "m.safetensors")
    found = looked_at(tmp_path / "m.safetensors")
    assert [layer.name for layer in found.layers] == ["good.weight"]
    assert any("bad.weight" in note and "NaN or infinity" in note for note in found.notes)


def test_tied_weights_are_looked_at_once() -> None:
    names = [layer.name for layer in looked_at(FIXTURES / "tied_and_views.pt").layers]
    assert len(names) == len(set(names))
    tied = {tensor.storage.key for tensor in open_model(FIXTURES / "tied_and_views.pt").tensors if tensor.name in names}
    assert len(tied) <= len(names)
    assert "decoder.weight" not in names


def test_labels_that_the_model_does_not_know_are_refused(digits: Path, tmp_path: Path) -> None:
    with np.load(digits) as held:
        np.savez(tmp_path / "bad.npz", x=held["x"], y=held["y"] + 5)
    with pytest.raises(UsageError, match="outside 0 to 9"):
        looked_at(DIGITS, tmp_path / "bad.npz", model=NET)


def test_a_loss_is_refused_where_none_can_be_taken(digits: Path, tmp_path: Path) -> None:
    with np.load(digits) as held:
        np.save(tmp_path / "x.npy", held["x"])
    with pytest.raises(UsageError, match="no targets"):
        looked_at(DIGITS, tmp_path / "x.npy", model=NET, loss="mse")
    with pytest.raises(UsageError, match="onnxruntime"):
        looked_at(FIXTURES / "digits_cnn.onnx", digits, loss="mse")


def test_onnx_says_that_targets_are_not_used(digits: Path) -> None:
    found = looked_at(FIXTURES / "digits_cnn.onnx", digits)
    assert found.base is None
    assert any("are not used" in note for note in found.notes)


def test_what_meets_its_inputs_unseen_has_a_loss_and_no_output_error() -> None:
    networks.keras()
    found = looked_at(FIXTURES / "every_variable_twice", "random:8", samples=8)
    points = [point for layer in found.layers for point in layer.points]
    assert points
    assert all(point.output_error is None and point.score is not None for point in points)
    assert any("cannot be captured" in note for note in found.notes)
