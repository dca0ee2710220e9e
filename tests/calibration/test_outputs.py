"""What comes out of each channel, held against what the layers of the frameworks themselves put out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prunectl.calibration import im2col
from prunectl.calibration.outputs import OutputStatistics, collect_outputs, output_norms, sum_abs_and_squares
from prunectl.calibration.prune import prune
from prunectl.calibration.reconstruct import bias_of
from prunectl.errors import PrunectlError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.calibration import nets
from tests.calibration.by_hand import as_rows, normal, of_outputs, run, shown, use_of
from tests.calibration.layers import LAYERS
from tests.calibration.runs import DIGITS, FILES, NETS, build_of, data, examples, numbers, saved
from tests.calibration.test_sensitivity import digits_net
from tests.contract import Array
from tests.networks import keras
from tests.running import FIXTURES
from tests.training.keras import nets as keras_nets
from tests.training.onnx import models as onnx_models
from tests.training.torch import nets as torch_nets

HERE = "tests.calibration.test_outputs"


class Turned(nn.Module):
    """The weights of its encoder, turned, are those of its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inside(x)) @ self.inside.weight


def seen(path: Path, names: list[str] | None = None, **wish: Any) -> dict[str, OutputStatistics]:
    model = open_model(path)
    wanted = [tensor.name for tensor in model.tensors if len(tensor.shape) > 1] if names is None else names
    return dict(collect_outputs(model, wanted, PruneRequest(**wish)).outputs)


def assert_same(found: OutputStatistics, expected: Array) -> None:
    """Compare with the outputs themselves, as positions by outputs."""
    expected = expected.astype("f8")
    assert found.counts.tolist() == [len(expected)] * expected.shape[1]
    np.testing.assert_allclose(found.mean_abs, np.abs(expected).mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum_squares, np.square(expected).sum(axis=0), rtol=1e-4, atol=1e-6)


def hooked(module: nn.Module, x: Array) -> dict[str, Array]:
    """What each layer of a module puts out, as PyTorch's own hooks see it: the channels last."""
    found: dict[str, Array] = {}

    def hook(name: str, layer: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            found[name] = as_rows(out.numpy(), use_of(layer))

    for name, layer in module.named_modules():
        layer.register_forward_hook(partial(hook, name))
    with torch.no_grad():
        module.eval()(torch.from_numpy(x))
    return found


@pytest.mark.parametrize("chunk", [1, 32 << 20], ids=["one by one", "at once"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_those_of_the_layer(kind: str, has_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(im2col, "_CHUNK_BYTES", chunk)
    torch.manual_seed(len(kind))
    make, shape = LAYERS[kind]
    layer: Any = make().double()
    if not has_bias:
        layer.bias = None
    x, weight = normal(3, *shape), layer.weight.detach().numpy()
    biases = {"w": layer.bias.detach().numpy()} if has_bias else {}
    (sizes, squares), count = sum_abs_and_squares({"w": weight}, biases, shown(x, use_of(layer)), weight.shape)
    expected = as_rows(run(layer, x), use_of(layer))
    assert count == len(expected)
    np.testing.assert_allclose(sizes.reshape(-1), np.abs(expected).sum(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(squares.reshape(-1), np.square(expected).sum(axis=0), rtol=1e-4, atol=1e-4)


def test_a_part_of_the_outputs_has_its_part_of_the_bias() -> None:
    layer = nn.Linear(4, 6).double()
    x, weight, bias = normal(9, 4), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    part = of_outputs(use_of(layer), 2, 5)
    (sizes, _), _ = sum_abs_and_squares({"w": weight}, {"w": bias}, shown(x, part), weight.shape)
    np.testing.assert_allclose(sizes[0], np.abs(run(layer, x)[:, 2:5]).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_one_network_puts_out_the_same_in_every_framework(file: str) -> None:
    module = digits_net()
    with np.load(FIXTURES / "digits.npz") as digits:
        expected = hooked(module, (digits["x"] / 16).astype("f4").reshape(-1, 1, 8, 8))
    wish = {"data": DIGITS, "samples": 1797, "batch_size": 500, "model": build_of(file)}
    found = {
        name.replace(":0", "").replace("/", ".").split(".")[0]: one
        for name, one in seen(FIXTURES / file, **wish).items()
    }
    assert found.keys() == {"conv1", "conv2", "fc1", "fc2"}
    for name, one in found.items():
        assert one.bias
        assert_same(one, expected[name])


def test_modules_of_pytorch_put_out_what_hooks_see(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nets.Windows(), examples(24, 4, 8, 8)
    path, expected = saved(module, tmp_path / "m.pt"), hooked(module, x)
    found = seen(path, data=data(tmp_path / "x.npz", x=x), model=f"{NETS}:Windows", batch_size=7)
    # What nothing ever calls is not among them.
    assert found.keys() == {f"{name}.weight" for name in ("first", "grouped", "up", "head")}
    for name, one in found.items():
        assert one.bias == name.replace("weight", "bias")
        assert_same(one, expected[name.removesuffix(".weight")])


def test_queries_keys_and_values_are_outputs_of_one_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nets.Attentive(), examples(16, 5, 8)
    attention = module.layer.self_attn
    with torch.no_grad():
        attention.in_proj_bias.normal_()
        made = nn.functional.linear(torch.from_numpy(x), attention.in_proj_weight, attention.in_proj_bias)
    found = seen(saved(module, tmp_path / "m.pt"), data=data(tmp_path / "x.npz", x=x), model=f"{NETS}:Attentive")
    assert_same(found["layer.self_attn.in_proj_weight"], made.numpy().reshape(-1, 24))
    assert_same(found["layer.linear1.weight"], hooked(module, x)["layer.linear1"])


def test_a_layer_that_is_used_twice_counts_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch_nets.Forked()
    a, b = examples(20, 6), examples(20, 6, seed=1)
    path, source = saved(module, tmp_path / "m.pt"), data(tmp_path / "x.npz", a=a, b=b)
    found = seen(path, data=f"{source}[a+b]", model="tests.training.torch.nets:Forked")
    with torch.no_grad():
        both = module.shared(torch.from_numpy(np.concatenate([a, b]))).numpy()
    assert_same(found["shared.weight"], both)


def test_keras_layers_of_two_kernels_have_their_bias_at_the_second(tmp_path: Path) -> None:
    k = keras()
    k.utils.set_random_seed(0)
    layers, x = k.layers, examples(10, 6, 6, 4)
    inside = layers.Input((6, 6, 4))
    # As many channels inside as outside, so that sizes do not tell whose the bias is.
    out = layers.SeparableConv2D(4, 3, name="pair", bias_initializer="normal", activation="relu")(inside)
    alone = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="alone", bias_initializer="normal")(out)
    model = k.Model(inside, layers.Dense(3, name="head")(layers.Flatten()(alone)))
    path = keras_nets.saved(model, tmp_path / "m.keras")
    file = {tensor.name: tensor for tensor in open_model(path).tensors}
    biases = {name: bias_of(open_model(path), file[name]) for name in file if "kernel" in name}
    named = {name: one.name if one is not None else "" for name, one in biases.items()}
    assert {name for name, bias in named.items() if not bias} == {"pair/depthwise_kernel"}
    found = seen(path, list(named), data=data(tmp_path / "x.npz", x=x))
    assert {name: one.bias for name, one in found.items()} == named
    pair, depthwise = model.get_layer("pair"), model.get_layer("alone")
    pair.activation = k.activations.linear
    first = k.ops.depthwise_conv(x, pair.depthwise_kernel, padding="valid")
    whole = pair(x)
    for name, expected in {
        "pair/depthwise_kernel": first,
        "pair/pointwise_kernel": whole,
        "alone/kernel": depthwise(k.ops.relu(whole)),
    }.items():
        made = np.asarray(expected)
        assert_same(found[name], made.reshape(-1, made.shape[-1]))


def test_an_onnx_product_whose_sum_has_no_clear_bias_is_seen_without(tmp_path: Path) -> None:
    weights = {"w": onnx_models.normal(6, 4), "b": onnx_models.normal(4)}
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("Add", ["h", "b"], ["y"])]
    ports = {"x": [onnx_models.port("x", ("n", 6))], "y": [onnx_models.port("y", ("n", 4))]}
    path = onnx_models.save(tmp_path / "m.onnx", nodes, weights, **ports)
    x = examples(12, 6)
    found = seen(path, data=data(tmp_path / "x.npz", x=x))["w"]
    assert_same(found, x @ weights["w"] + (weights["b"] if found.bias else 0))


def test_what_meets_a_state_has_no_bias_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = torch_nets.Reader(), np.arange(80).reshape(16, 5) % 20
    found = seen(
        saved(module, tmp_path / "m.pt"), data=data(tmp_path / "x.npz", x=x), model="tests.training.torch.nets:Reader"
    )
    lstm = module.lstm
    with torch.no_grad():
        words = module.words(torch.from_numpy(x))
        made = nn.functional.linear(words, lstm.weight_ih_l0, lstm.bias_ih_l0).numpy()
        states = lstm(words)[0]
        before = torch.cat([torch.zeros(16, 1, 12), states[:, :-1]], 1)
        recurrent = nn.functional.linear(before, lstm.weight_hh_l0).numpy()
    assert_same(found["lstm.weight_ih_l0"], made.reshape(-1, 48))
    assert found["lstm.weight_hh_l0"].bias == ""
    assert_same(found["lstm.weight_hh_l0"], recurrent.reshape(-1, 48))


@pytest.mark.parametrize("norm", ["1", "2"])
def test_norms_are_means_over_all_that_came_out(norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = torch_nets.Plain(), examples(40, 12)
    path = saved(module, tmp_path / "m.pt")
    wish = PruneRequest(data=data(tmp_path / "x.npz", x=x), model="tests.training.torch.nets:Plain")
    found = output_norms(open_model(path), ("one.weight", "two.weight"), wish, norm=norm)
    for name, made in hooked(module, x).items():
        if name:
            expected = np.abs(made).mean(axis=0) if norm == "1" else np.sqrt(np.square(made).mean(axis=0))
            np.testing.assert_allclose(found[f"{name}.weight"], expected, rtol=1e-4)


def test_weights_used_as_they_are_and_turned_are_not_taken_for_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, x = saved(Turned(), tmp_path / "m.pt"), examples(16, 6)
    wish = {"data": data(tmp_path / "x.npz", x=x), "model": f"{HERE}:Turned"}
    assert seen(path, **wish) == {}
    done = prune(
        path, PruneRequest(sparsity=0.5, strategy="activation-magnitude", **wish), Destination(tmp_path / "out.pt")
    )
    assert any("inside.weight: ranked by magnitude" in note for note in done.notes)
    before, after = numbers(path)["inside.weight"], numbers(tmp_path / "out.pt")["inside.weight"]
    expected = before.copy()
    expected.reshape(-1)[np.argsort(np.abs(before), axis=None)[:18]] = 0
    np.testing.assert_array_equal(after, expected)


def test_outputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    module = torch_nets.Plain()
    with torch.no_grad():
        module.one.bias[0] = torch.inf
    path = saved(module, tmp_path / "m.pt")
    with pytest.raises(PrunectlError, match="NaN or infinite") as failed:
        seen(path, data=data(tmp_path / "x.npz", x=examples(16, 12)), model="tests.training.torch.nets:Plain")
    assert failed.value.exit_code == 5
