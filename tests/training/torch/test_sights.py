"""What the weights of PyTorch modules meet, held against what PyTorch makes of them."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunectl.formats.registry import open_model
from prunectl.training.backend import InspectableModel, LayerInput, LoadOptions
from prunectl.training.data.source import Arrays
from prunectl.training.runtimes import load_trainable
from prunectl.training.torch.layer_inputs import capture_layer_inputs
from tests.calibration.by_hand import as_rows, product
from tests.calibration.layers import LAYERS
from tests.contract import Array
from tests.running import FIXTURES
from tests.training.torch import nets


def seen(module: nn.Module, *x: torch.Tensor) -> dict[str, list[LayerInput]]:
    """All sights of all parameters, in order; nothing else is different while somebody looks."""
    weights = dict(module.named_parameters())
    with torch.no_grad():
        before = module(*x)
    found: dict[str, list[LayerInput]] = {}

    def see(sight: LayerInput) -> None:
        found.setdefault(sight.name, []).append(LayerInput(sight.name, sight.inputs.copy(), sight.use))

    values = {name: weight.detach().clone() for name, weight in weights.items()}
    with capture_layer_inputs(weights, see):
        after = module(*x)
    for old, new in zip(flat(before), flat(after), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(values[name], weight) for name, weight in weights.items())
    return found


def flat(outs: Any) -> list[torch.Tensor]:
    return [outs] if isinstance(outs, torch.Tensor) else [one for out in outs if out is not None for one in flat(out)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def close(found: Array, expected: Any) -> None:
    np.testing.assert_allclose(found, np.asarray(expected.detach()), rtol=1e-4, atol=1e-5)


def outputs(module: nn.Module, sight: LayerInput) -> Array:
    return product(dict(module.named_parameters())[sight.name].detach().numpy(), sight.inputs, sight.use)


def met(sights: list[LayerInput]) -> Array:
    """All rows of inputs in some order that is always the same."""
    rows = np.concatenate([sight.inputs.reshape(-1, sight.inputs.shape[-1]) for sight in sights]).astype("f8")
    return rows[np.lexsort(rows.round(4).T)]


def in_order(rows: torch.Tensor) -> Array:
    found = rows.detach().reshape(-1, rows.shape[-1]).numpy().astype("f8")
    return found[np.lexsort(found.round(4).T)]


def meets(sights: list[LayerInput], *rows: torch.Tensor) -> None:
    expected = torch.cat([one.reshape(-1, one.shape[-1]) for one in rows])
    np.testing.assert_allclose(met(sights), in_order(expected), atol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_its_weights_and_their_inputs(kind: str, has_bias: bool) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    if not has_bias:
        layer.bias = None
    x = normal(3, *shape)
    (sight,) = seen(layer, x)["weight"]
    expected = as_rows(layer(x).detach().numpy(), sight.use)
    bias = layer.bias.detach().numpy() if has_bias else 0
    np.testing.assert_allclose(outputs(layer, sight) + bias, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 3, 6), (1, 1, 6), (2, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_takes_inputs_of_any_rank(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = nn.Linear(6, 4, bias=has_bias), normal(*shape)
    (sight,) = seen(layer, x)["weight"]
    expected = layer(x).reshape(-1, 4) - (layer.bias if has_bias else 0)
    close(outputs(layer, sight), expected)


def test_a_linear_layer_may_have_a_single_input_or_output() -> None:
    for sizes in ((1, 4), (4, 1), (1, 1)):
        layer, x = nn.Linear(*sizes), normal(5, sizes[0])
        (sight,) = seen(layer, x)["weight"]
        close(outputs(layer, sight), layer(x) - layer.bias)


@pytest.mark.parametrize("mode", ["reflect", "circular", "same"])
def test_a_convolution_meets_what_it_was_padded_with(mode: str) -> None:
    how: dict[str, Any] = {"padding": "same"} if mode == "same" else {"padding": 2, "padding_mode": mode}
    layer, x = nn.Conv2d(2, 3, (3, 5), bias=False, **how), normal(2, 2, 7, 6)
    (sight,) = seen(layer, x)["weight"]
    close(outputs(layer, sight), torch.from_numpy(as_rows(layer(x).detach().numpy(), sight.use)))


class Functional(nn.Module):
    """Weights without layers."""

    def __init__(self, apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.apply_it = nn.Parameter(normal(*shape)), apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_it(x, self.weight)


FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "linear": (nn.functional.linear, (4, 6)),
    "x @ w": (lambda x, w: x @ w, (6, 4)),
    "x @ w.T": (lambda x, w: x @ w.T, (4, 6)),
    "w @ x": (lambda x, w: (w @ x.T).T, (4, 6)),
    "w.T @ x": (lambda x, w: (w.T @ x.T).T, (6, 4)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (6, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(4), x, w), (6, 4)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_product_without_a_layer_is_seen(kind: str) -> None:
    module, x = Functional(*FUNCTIONS[kind]), normal(5, 6)
    (sight,) = seen(module, x)["weight"]
    close(outputs(module, sight), module(x))


def test_parts_of_a_weight_are_seen_as_parts() -> None:
    module = Functional(lambda x, w: torch.cat([x @ w[1:3].T, (2 * x) @ w[3:].T], 1), (5, 6))
    x = normal(7, 6)
    first, second = seen(module, x)["weight"]
    assert (first.use.outputs, second.use.outputs) == ((1, 3), (3, 5))
    close(outputs(module, first), x @ module.weight[1:3].T)
    close(outputs(module, second), 2 * x @ module.weight[3:].T)


HIDDEN: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "a part of the inputs": (lambda x, w: x[:, :3] @ w[:, :3].T, (4, 6)),
    "every other output": (lambda x, w: x @ w[::2].T, (4, 6)),
    "a reshaped weight": (lambda x, w: x @ w.reshape(6, 4), (4, 6)),
    "a weight that was changed first": (lambda x, w: x @ (2 * w).T, (4, 6)),
    "elementwise": (lambda x, w: x * w, (6,)),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_cannot_be_told_is_not_shown(kind: str) -> None:
    assert seen(Functional(*HIDDEN[kind]), normal(5, 6)) == {}


class Attentive(nn.Module):
    """Attention to others, or to oneself."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **how)

    def forward(self, query: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
        key = query if key is None else key
        found: torch.Tensor = self.attention(query, key, key)[0]
        return found


def projected(module: Attentive, sights: list[LayerInput]) -> dict[tuple[int, int], Array]:
    """What comes out of each part of the projections of query, key and value."""
    return {sight.use.outputs or (0, 24): outputs(module, sight) for sight in sights}


def attended(module: Attentive, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What the output projection meets."""
    weight, bias = module.attention.in_proj_weight, module.attention.in_proj_bias
    parts = zip(weight.split(8), bias.split(8), (query, key, key), strict=True)
    q, k, v = ((x @ part.T + add).unflatten(-1, (2, 4)).transpose(1, 2) for part, add, x in parts)
    shares = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def test_attention_to_oneself_meets_the_same_inputs_with_all_its_projections() -> None:
    module, x = Attentive().eval(), normal(3, 5, 8)
    found = seen(module, x)
    weight = module.attention.in_proj_weight.detach()
    meets(found["attention.in_proj_weight"], x)
    (whole,) = projected(module, found["attention.in_proj_weight"]).values()
    np.testing.assert_allclose(
        np.sort(whole, axis=0), np.sort((x @ weight.T).reshape(-1, 24).numpy(), axis=0), atol=1e-4
    )
    meets(found["attention.out_proj.weight"], attended(module, x, x))


def test_attention_to_others_meets_them_with_two_of_three_parts() -> None:
    module, x, other = Attentive().eval(), normal(3, 5, 8), normal(3, 4, 8) + 1
    found = seen(module, x, other)
    sights = found["attention.in_proj_weight"]
    assert sorted(sight.use.outputs or (0, 24) for sight in sights) == [(0, 8), (8, 24)]
    weight = module.attention.in_proj_weight.detach()
    for part, made in projected(module, sights).items():
        expected = (x if part == (0, 8) else other) @ weight[slice(*part)].T
        expected = expected.reshape(-1, part[1] - part[0])
        np.testing.assert_allclose(np.sort(made, axis=0), np.sort(expected.numpy(), axis=0), atol=1e-4)
    meets(found["attention.out_proj.weight"], attended(module, x, other))


def test_attention_with_other_sizes_has_a_weight_for_each_part() -> None:
    module, x, other = Attentive(kdim=6, vdim=6).eval(), normal(3, 5, 8), normal(3, 4, 6)
    found = seen(module, x, other)
    meets(found["attention.q_proj_weight"], x)
    meets(found["attention.k_proj_weight"], other)
    meets(found["attention.v_proj_weight"], other)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_fused_transformer_layer_is_seen_in_its_parts(norm_first: bool, is_enabled: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first).eval()
    x = normal(3, 5, 8)
    old = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_enabled)
    try:
        found = seen(layer, x)
        assert torch.backends.mha.get_fastpath_enabled() is is_enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(old)
    assert found.keys() == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    attention = layer.self_attn
    if norm_first:
        inside = layer.norm1(x)
        middle = x + attention(inside, inside, inside)[0]
        met_by_first = layer.norm2(middle)
    else:
        inside = x
        met_by_first = layer.norm1(x + attention(x, x, x)[0])
    meets(found["self_attn.in_proj_weight"], inside)
    meets(found["linear1.weight"], met_by_first)
    meets(found["linear2.weight"], torch.relu(layer.linear1(met_by_first)))


def lstm_inputs(lstm: nn.LSTM, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each weight of an LSTM meets, step by step; x is steps by examples by features."""
    found: dict[str, torch.Tensor] = {}
    for layer in range(lstm.num_layers):
        sides = []
        for suffix in ("", "_reverse") if lstm.bidirectional else ("",):
            w, u, b, c = (
                getattr(lstm, f"{part}_l{layer}{suffix}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden = cell = torch.zeros(x.shape[1], lstm.hidden_size)
            before, after = [], []
            for step in x.flip(0) if suffix else x:
                before.append(hidden)
                into, forget, new, out = (step @ w.T + b + hidden @ u.T + c).chunk(4, 1)
                cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
                hidden = out.sigmoid() * cell.tanh()
                after.append(hidden)
            found[f"weight_ih_l{layer}{suffix}"] = x
            found[f"weight_hh_l{layer}{suffix}"] = torch.stack(before)
            sides.append(torch.stack(after[::-1] if suffix else after))
        x = torch.cat(sides, 2)
    return found


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("is_bidirectional", [False, True])
@pytest.mark.parametrize("is_batch_first", [False, True])
@pytest.mark.parametrize("examples", [1, 3])
def test_an_lstm_meets_its_inputs_and_what_it_said_before(
    layers: int, is_bidirectional: bool, is_batch_first: bool, examples: int
) -> None:
    torch.manual_seed(2)
    lstm = nn.LSTM(4, 5, layers, bidirectional=is_bidirectional, batch_first=is_batch_first)
    x = normal(6, examples, 4)
    found = seen(lstm, x.transpose(0, 1).contiguous() if is_batch_first else x)
    expected = lstm_inputs(lstm, x)
    assert found.keys() == expected.keys()
    for name, inputs in expected.items():
        meets(found[name], inputs)
        assert all(sight.use.outputs is None for sight in found[name])


def gru_inputs(gru: nn.GRU, x: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden, before = torch.zeros(x.shape[1], gru.hidden_size), []
    for step in x:
        before.append(hidden)
        reset, keep, new = (step @ gru.weight_ih_l0.T + gru.bias_ih_l0).chunk(3, 1)
        old_reset, old_keep, old_new = (hidden @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3, 1)
        keep = (keep + old_keep).sigmoid()
        new = (new + (reset + old_reset).sigmoid() * old_new).tanh()
        hidden = (1 - keep) * new + keep * hidden
    return {"weight_ih_l0": x, "weight_hh_l0": torch.stack(before)}


def rnn_inputs(rnn: nn.RNN, x: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden, before = torch.zeros(x.shape[1], rnn.hidden_size), []
    for step in x:
        before.append(hidden)
        hidden = (step @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + hidden @ rnn.weight_hh_l0.T + rnn.bias_hh_l0).tanh()
    return {"weight_ih_l0": x, "weight_hh_l0": torch.stack(before)}


@pytest.mark.parametrize(("make", "by_hand"), [(nn.GRU, gru_inputs), (nn.RNN, rnn_inputs)], ids=["gru", "rnn"])
def test_other_cells_meet_their_inputs_and_what_they_said_before(make: Any, by_hand: Any) -> None:
    torch.manual_seed(2)
    cell, x = make(4, 5), normal(6, 3, 4)
    found, expected = seen(cell, x), by_hand(cell, x)
    assert found.keys() == expected.keys()
    for name, inputs in expected.items():
        meets(found[name], inputs)


def test_a_layer_that_is_used_twice_is_seen_twice() -> None:
    module, a, b = nets.Forked(), normal(4, 6), normal(4, 6) + 2
    found = seen(module, a, b)
    first, second = found["shared.weight"]
    np.testing.assert_array_equal(first.inputs, a.numpy())
    np.testing.assert_array_equal(second.inputs, b.numpy())
    both = torch.cat([torch.relu(module.shared(a)), torch.relu(module.shared(b))], 1)
    meets(found["left.weight"], both)


def test_a_weight_with_two_names_is_seen_under_both() -> None:
    weight, x = nn.Parameter(normal(4, 6)), normal(5, 6)
    names: list[str] = []
    with capture_layer_inputs({"one": weight, "two": weight}, lambda sight: names.append(sight.name)):
        nn.functional.linear(x, weight)
    assert names == ["one", "two"]


def test_only_what_was_asked_for_is_shown_and_in_the_order_of_the_data() -> None:
    module = nets.Plain()
    names: list[str] = []
    weights = {"second": module.two.weight, "first": module.one.weight}
    with capture_layer_inputs(weights, lambda sight: names.append(sight.name)):
        module(normal(3, 12))
    assert names == ["first", "second"]


def test_a_layer_that_is_never_called_is_not_shown() -> None:
    module = nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(6, 4)})
    found: list[LayerInput] = []
    with capture_layer_inputs(dict(module.named_parameters()), found.append):
        module["one"](normal(3, 6))
    assert {sight.name for sight in found} == {"one.weight"}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_is_seen_as_its_module_is() -> None:
    torch.manual_seed(0)
    module = nets.Noisy().eval()
    script = torch.jit.script(module)
    x = normal(3, 1, 8, 8)
    ours, theirs = seen(module, x), seen(script, x)
    assert ours.keys() == theirs.keys() == {"conv.weight", "head.weight"}
    for name, sights in ours.items():
        for one, other in zip(sights, theirs[name], strict=True):
            np.testing.assert_allclose(one.inputs, other.inputs, atol=1e-6)
            assert one.use == other.use


def test_half_precision_is_shown_in_single() -> None:
    layer = nn.Linear(6, 4).bfloat16()
    (sight,) = seen(layer, normal(3, 6).bfloat16())["weight"]
    assert sight.inputs.dtype == np.float32
    np.testing.assert_array_equal(sight.inputs, normal(3, 6).bfloat16().float().numpy())


@pytest.mark.parametrize("is_enabled", [True, False])
def test_an_error_leaves_nothing_behind(is_enabled: bool) -> None:
    old = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_enabled)
    try:
        layer = nn.Linear(6, 4)
        found: list[LayerInput] = []
        with pytest.raises(RuntimeError), capture_layer_inputs({"w": layer.weight}, found.append):
            layer(normal(3, 5))
        assert torch.backends.mha.get_fastpath_enabled() is is_enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(old)
    layer(normal(3, 6))
    assert found == []
    assert torch.is_grad_enabled()


def observed(
    path: Path, x: Arrays, origin: LoadOptions | None = None
) -> tuple[InspectableModel, dict[str, list[LayerInput]]]:
    network = load_trainable(open_model(path), origin or LoadOptions())
    assert isinstance(network, InspectableModel)
    names = [tensor.name for tensor in open_model(path).tensors]
    before, found = network.predict(x), dict[str, list[LayerInput]]()

    def see(sight: LayerInput) -> None:
        found.setdefault(sight.name, []).append(LayerInput(sight.name, sight.inputs.copy(), sight.use))

    network.observe(names, x, see)
    np.testing.assert_array_equal(network.predict(x), before)
    return network, found


@pytest.mark.parametrize(
    "file", ["digits_cnn.pt", "digits_cnn_torchscript.pt", "digits_cnn.pt2", "digits_cnn.safetensors"]
)
def test_every_file_of_one_network_shows_the_same(file: str) -> None:
    path, x = FIXTURES / file, normal(4, 1, 8, 8).numpy()
    build = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN")
    is_weights_alone = file in {"digits_cnn.pt", "digits_cnn.safetensors"}
    _, found = observed(path, x, build if is_weights_alone else None)
    state = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
    assert found.keys() == {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
    inputs = torch.from_numpy(x)
    for name, sights in found.items():
        # What was exported for one example sees one at a time.
        assert len(sights) == (len(x) if path.suffix == ".pt2" else 1)
        sight = LayerInput(name, np.concatenate([sight.inputs for sight in sights]), sights[0].use)
        np.testing.assert_allclose(sight.inputs, inputs.numpy(), atol=1e-5)
        weight, bias = state[name], state[name.replace("weight", "bias")]
        apply = nn.functional.conv2d if weight.ndim == 4 else nn.functional.linear
        made = apply(inputs, weight, bias)
        close(
            product(weight.numpy(), sight.inputs, sight.use) + bias.numpy(),
            torch.from_numpy(as_rows(made.numpy(), sight.use)),
        )
        inputs = made.relu()
        if name == "conv2.weight":
            inputs = inputs.permute(0, 2, 3, 1).reshape(len(x), -1)


def test_looking_drops_nothing_out_and_takes_no_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nets.Noisy()
    torch.save(module.state_dict(), tmp_path / "m.pt")
    x = normal(8, 1, 8, 8).numpy()
    network, found = observed(tmp_path / "m.pt", x, LoadOptions("tests.training.torch.nets:Noisy"))
    module.eval()
    with torch.no_grad():
        inside = torch.relu(module.norm(module.conv(torch.from_numpy(x)))).flatten(1)
    meets(found["head.weight"], inside)
    assert isinstance(network, InspectableModel)
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(network.tensors()[name], value.numpy())  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")
def test_what_is_exported_shows_layers_behind_recurrent_ones() -> None:
    torch.manual_seed(0)
    module = nets.Reader().eval()
    x = torch.arange(12).reshape(3, 4) % 20
    exported = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), exported)
    exported.seek(0)
    program = torch.export.load(exported).module()
    ours, theirs = seen(module, x), seen(program, x)
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"} <= ours.keys()
    assert ours.keys() == theirs.keys()
    for name, sights in ours.items():
        np.testing.assert_allclose(met(sights), met(theirs[name]), atol=1e-5)


def test_what_fills_a_piece_up_is_not_shown(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).eval()
    torch.export.save(torch.export.export(module, (normal(4, 1, 5, 5),)), tmp_path / "four.pt2")
    x = normal(6, 1, 5, 5)
    _, by_name = observed(tmp_path / "four.pt2", x.numpy())
    close(np.concatenate([sight.inputs for sight in by_name["0.weight"]]), x)
    close(np.concatenate([sight.inputs for sight in by_name["3.weight"]]), module[:3](x))


def test_what_looks_at_a_compiled_module_is_not_compiled_with_it() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x, shown = normal(6, 3, 5), []

    def see(sight: LayerInput) -> None:
        # Views of this kind are more than the compiler knows of NumPy.
        shown.append(np.lib.stride_tricks.sliding_window_view(sight.inputs, 2, -1)[..., ::2, :].sum())

    for is_compiled in (False, True):
        if is_compiled:
            module.compile(backend="eager")
        with capture_layer_inputs(dict(module.named_parameters()), see):
            module(x)
    assert len(shown) == 4
    assert shown[:2] == shown[2:]


def test_looking_does_not_import_the_compiler_of_pytorch(tmp_path: Path) -> None:
    code = """
import sys, torch
from prunectl.training.torch.layer_inputs import capture_layer_inputs
layer = torch.nn.Linear(3, 2)
with capture_layer_inputs({"weight": layer.weight}, lambda sight: print(sight.inputs.shape)):
    layer(torch.ones(4, 3))
print([name for name in ("torch._dynamo", "torch.distributed.tensor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["(4, 3)", "[]"]
