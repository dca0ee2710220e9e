"""What --repair gives back: outputs that are nearer to what they were, and means that are what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.calibration.prune import prune
from prunectl.calibration.reconstruct import bias_of, correct_bias, mean_outputs
from prunectl.calibration.statistics import InputStatistics, sum_inputs
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune as prune_file
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import WeightUse
from tests.calibration import nets
from tests.calibration.by_hand import normal, of_outputs, shown
from tests.calibration.runs import NETS, data, digits, examples, numbers, saved
from tests.contract import Array
from tests.networks import keras
from tests.running import FIXTURES
from tests.training.keras.nets import saved as saved_keras

X = examples(60, 12)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    return saved(nets.One(), tmp_path / "one.pt")


def run(path: Path, name: str, **wish: object) -> dict[str, Array]:
    said = {"sparsity": 0.5, "data": data(path.parent / "x.npz", x=X), "samples": 60, "model": f"{NETS}:One", **wish}
    out = path.parent / f"{name}.pt"
    prune(path, PruneRequest(**said), Destination(out))  # type: ignore[arg-type]
    return numbers(out)


def outputs(state: dict[str, Array]) -> Array:
    return X.astype("f8") @ state["one.weight"].T.astype("f8") + state["one.bias"]


def error(state: dict[str, Array], before: dict[str, Array]) -> float:
    return float(np.square(outputs(state) - outputs(before)).sum())


def test_a_layer_is_fitted_anew_as_a_regression_with_an_intercept_and_a_ridge(one: Path) -> None:
    before, found = numbers(one), run(one, "out", strategy="magnitude", is_repaired=True)
    old, new = before["one.weight"].astype("f8"), found["one.weight"]
    wanted = outputs(before) - before["one.bias"]
    x = X.astype("f8") - X.mean(axis=0, dtype="f8")
    ridge = np.sqrt(0.01 * np.square(x).sum(axis=0).mean())
    for row, weights in enumerate(new):
        at = np.flatnonzero(weights)
        inputs = np.concatenate([x[:, at], ridge * np.eye(len(at))])
        targets = np.concatenate([x @ old[row], ridge * old[row, at]])
        np.testing.assert_allclose(weights[at], np.linalg.lstsq(inputs, targets, rcond=None)[0], rtol=1e-3, atol=1e-4)
    bias = before["one.bias"] + (wanted - X @ new.T).mean(axis=0)
    np.testing.assert_allclose(found["one.bias"], bias, rtol=1e-4, atol=1e-4)


def test_obs_fits_all_that_stays_to_what_the_layer_said(one: Path) -> None:
    old, found = numbers(one), run(one, "out", strategy="obs")
    rows, x = old["one.weight"].astype("f8"), X.astype("f8")
    ridge = np.sqrt(0.01 * np.square(x).sum(axis=0).mean())
    for row, weights in zip(rows, found["one.weight"], strict=True):
        at = np.flatnonzero(weights)
        inputs = np.concatenate([x[:, at], ridge * np.eye(len(at))])
        targets = np.concatenate([x @ row, ridge * row[at]])
        np.testing.assert_allclose(weights[at], np.linalg.lstsq(inputs, targets, rcond=None)[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found["one.bias"], old["one.bias"])


def test_by_magnitude_the_same_weights_go_as_without_repair(one: Path) -> None:
    prune_file(one, PruneRequest(sparsity=0.5), Destination(one.parent / "plain.pt"))
    plain, found = numbers(one.parent / "plain.pt"), run(one, "out", strategy="magnitude", is_repaired=True)
    np.testing.assert_array_equal(plain["one.weight"] == 0, found["one.weight"] == 0)


@pytest.mark.parametrize("pattern", ["", "2:4", "block:2x2"])
@pytest.mark.parametrize("strategy", ["activation-magnitude", "obs"])
def test_outputs_are_nearer_to_what_they_were_and_right_on_the_average(strategy: str, pattern: str, one: Path) -> None:
    sparsity = None if pattern == "2:4" else 0.5
    before = numbers(one)
    found = [
        run(one, str(is_repaired), strategy=strategy, pattern=pattern, sparsity=sparsity, is_repaired=is_repaired)
        for is_repaired in (False, True)
    ]
    np.testing.assert_array_equal(found[0]["one.weight"] == 0, found[1]["one.weight"] == 0)
    assert error(found[1], before) <= error(found[0], before) * (1 + 1e-6)
    np.testing.assert_allclose(outputs(found[1]).mean(axis=0), outputs(before).mean(axis=0), atol=1e-3)


def test_what_others_make_up_for_hurts_less_than_zeros_alone(one: Path) -> None:
    before = numbers(one)
    prune_file(one, PruneRequest(sparsity=0.5), Destination(one.parent / "plain.pt"))
    zeroed = error(numbers(one.parent / "plain.pt"), before)
    assert error(run(one, "obs", strategy="obs"), before) < zeroed


@pytest.mark.parametrize("file", ["digits_cnn.keras", "digits_cnn.onnx", "digits_cnn.pt"])
def test_a_whole_network_says_nearly_what_it_said(file: str, tmp_path: Path) -> None:
    errors = []
    for is_repaired in (False, True):
        out = tmp_path / f"{is_repaired}{Path(file).suffix}"
        digits(file, out, strategy="activation-magnitude", is_repaired=is_repaired, sparsity=0.8, samples=256)
        errors.append(np.square(said(out) - said(FIXTURES / file)).mean())
    assert errors[1] < 0.5 * errors[0]


def said(path: Path) -> Array:
    """What the digits network answers, computed by PyTorch from the numbers in a file."""
    found = {}
    for name, array in numbers(path).items():
        layer = name.replace("/", ".").split(".")[0]
        if layer in {"conv1", "conv2", "fc1", "fc2"}:
            found["bias" in name, layer] = torch.from_numpy(
                np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1))) if "kernel" in name else array
            )
    with np.load(FIXTURES / "digits.npz") as kept:
        x = torch.from_numpy(kept["x"].astype("f4")[..., 0][:, None] / 16)
    for layer in ("conv1", "conv2"):
        x = torch.nn.functional.conv2d(x, found[False, layer], found[True, layer]).relu()
    x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
    x = torch.nn.functional.linear(x, found[False, "fc1"], found[True, "fc1"]).relu()
    return np.asarray(torch.nn.functional.linear(x, found[False, "fc2"], found[True, "fc2"]))


def test_means_of_outputs_are_those_over_all_that_was_met() -> None:
    weights, x, seen = normal(6, 4), normal(30, 4), InputStatistics()
    parts = (of_outputs(WeightUse(0, 1), 4, 6), of_outputs(WeightUse(0, 1), 0, 4))
    for at, use in enumerate(parts):
        seen.add(shown(x + at, use), (6, 4), sum_inputs)
    expected = np.concatenate([((x + 1) @ weights[:4].T).mean(axis=0), (x @ weights[4:].T).mean(axis=0)])
    np.testing.assert_allclose(mean_outputs(seen, weights), expected)


def test_a_bias_takes_what_is_missing_and_keeps_its_type() -> None:
    bias = np.array([1.0, 2.0], "f2")
    found = correct_bias(np.array([3.0, 3.0]), np.array([2.5, 4.0]), bias)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, [1.5, 1.0])


@pytest.mark.parametrize("file", ["digits_cnn.keras", "digits_cnn.h5", "digits_cnn.pt", "digits_cnn.onnx"])
def test_the_bias_of_a_kernel_is_found_by_its_name(file: str) -> None:
    model = open_model(FIXTURES / file)
    kernels = [tensor for tensor in model.tensors if "kernel" in tensor.name or "weight" in tensor.name]
    kernels = [tensor for tensor in kernels if not tensor.name.startswith("optimizer")]
    assert len(kernels) == 4
    for tensor in kernels:
        bias = bias_of(model, tensor)
        assert bias is not None
        assert bias.name == tensor.name.replace("kernel", "bias").replace("weight", "bias")


def test_a_layer_whose_bias_cannot_make_up_for_means_is_fitted_without_it(tmp_path: Path) -> None:
    k = keras()
    k.utils.set_random_seed(0)
    # It has a bias for inputs and another for states, in one tensor.
    model = k.Sequential([k.layers.Input((5, 6)), k.layers.GRU(4, name="gru")])
    path, out, x = saved_keras(model, tmp_path / "m.keras"), tmp_path / "out.keras", examples(40, 5, 6) + 9
    wish = PruneRequest(
        sparsity=0.5, only="gru/gru_cell/kernel", data=data(tmp_path / "x.npz", x=x), samples=40, is_repaired=True
    )
    prune(path, wish, Destination(out))
    before, after = numbers(path), numbers(out)
    np.testing.assert_array_equal(before["gru/gru_cell/bias"], after["gru/gru_cell/bias"])
    old, new = before["gru/gru_cell/kernel"].astype("f8"), after["gru/gru_cell/kernel"]
    met = x.reshape(-1, 6).astype("f8")
    ridge = np.sqrt(0.01 * np.square(met).sum(axis=0).mean())
    for column in range(12):
        at = np.flatnonzero(new[:, column])
        inputs = np.concatenate([met[:, at], ridge * np.eye(len(at))])
        targets = np.concatenate([met @ old[:, column], ridge * old[at, column]])
        np.testing.assert_allclose(new[at, column], np.linalg.lstsq(inputs, targets, rcond=None)[0], atol=1e-3)
