"""What no layer multiplies by is no kernel: constants, tables and statistics stay as they are, in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from prunectl.formats.base import Role
from prunectl.formats.budgets import MAX_SCRIPT_TOKENS
from prunectl.formats.registry import open_model
from prunectl.formats.torch import script
from tests.pruning.reference import prune
from tests.running import here

pytestmark = pytest.mark.filterwarnings("ignore")

KERNELS = {"conv.weight": (8, 3, 3, 3), "head.weight": (4, 8), "norm.proj.weight": (8, 8)}


class Normed(torch.nn.Module):
    """A layer whose name says norm, and whose kernel is one all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)
        self.weight = torch.nn.Parameter(torch.rand(1, 16, 8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) / self.weight


class Net(torch.nn.Module):
    """A network that normalises its input, with every sort of tensor that is no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
        self.register_buffer("anchors", torch.rand(4, 2))
        self.register_buffer("mel_filters", torch.rand(8, 8))
        self.positions = torch.nn.Parameter(torch.rand(1, 16, 8))
        self.spread = torch.nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.norm = Normed()
        self.head = torch.nn.Linear(8, 4)
        self.shade = torch.tensor([[[[0.5]], [[0.6]], [[0.7]]]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean) / self.std / self.shade
        x = functional.relu(self.bn(self.conv(x))) / self.spread
        x = x.flatten(2).transpose(1, 2) + self.positions
        x = torch.matmul(self.norm(x), self.mel_filters)
        return self.head(x) * self.anchors.sum()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


INPUT = torch.rand(1, 3, 8, 8)


def state_dict(path: Path) -> None:
    torch.save(net().state_dict(), path)


def pickled(path: Path) -> None:
    torch.save(net(), path)


def safetensors(path: Path) -> None:
    save_file(net().state_dict(), path)


def traced(path: Path) -> None:
    torch.jit.trace(net(), INPUT).save(path)


def scripted(path: Path) -> None:
    torch.jit.script(net()).save(path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(net(), (INPUT,)), path)


def onnx(path: Path) -> None:
    torch.onnx.export(net(), (INPUT,), path, dynamo=False)


def answer(path: Path) -> Any:
    """What a pruned network says, run by its own library."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return session.run(None, {session.get_inputs()[0].name: INPUT.numpy()})[0]
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(INPUT).detach().numpy()
    if path.suffix == ".ts":
        return torch.jit.load(path)(INPUT).detach().numpy()
    filled = net()
    filled.load_state_dict(torch.load(path, weights_only=True))
    return filled(INPUT).detach().numpy()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        *(("m.pt", state_dict), ("m.safetensors", safetensors), ("whole.pt", pickled)),
        *(("m.ts", traced), ("m.ts", scripted), ("m.pt2", exported), ("m.onnx", onnx)),
    ],
)
def test_every_format_prunes_the_kernels_and_nothing_else(
    name: str, save: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path / name)
    found, written = prune(tmp_path / name, tmp_path / "out", sparsity=0.9)
    expected = sorted((*sorted(shape),) for shape in KERNELS.values())
    assert sorted((*sorted(cut.tensor.shape),) for cut in found.plan.cuts) == expected
    if save not in {pickled, safetensors}:
        assert np.isfinite(answer(written)).all()


def test_the_kernels_of_a_frozen_script_are_those_that_its_code_multiplies_by(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.script(net())).save(tmp_path / "m.ts")
    found, written = prune(tmp_path / "m.ts", tmp_path / "out", sparsity=0.9)
    # Of a mel filter bank without a name, the code only tells that a product takes it.
    assert {cut.tensor.shape for cut in found.plan.cuts} - {(8, 8)} == set(KERNELS.values()) - {(8, 8)}
    assert np.isfinite(answer(written)).all()


def test_a_recurrent_network_and_attention_are_told_from_the_code(tmp_path: Path) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(4, 4, num_layers=2, bidirectional=True)
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.embed = torch.nn.Embedding(9, 4)
            self.slow = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.rnn(self.embed(x))
            x, _ = self.attention(x, x, x)
            return self.slow(x)

    mixed, words = Mixed().eval(), torch.tensor([[1], [2], [3]])
    torch.jit.trace(mixed, words).save(tmp_path / "m.ts")
    torch.save(mixed.state_dict(), tmp_path / "m.pt")
    told = {t.name: t.role for t in open_model(tmp_path / "m.ts").tensors if t.is_prunable}
    named = {t.name: t.role for t in open_model(tmp_path / "m.pt").tensors if t.is_prunable}
    assert told == named
    assert len(named) == 8 + 2 + 1
    assert named["slow.parametrizations.weight.original1"] is Role.KERNEL


def test_a_fixed_basis_that_a_converter_renamed_is_told_by_the_operation_that_takes_it(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx").helper
    bases = ["net/cq_t2010v2_1/conv1d;net/cq_t2010v2_1/conv1d", "/front/stft/Conv"]
    layers = [*bases, "net/conv1d_1/Conv;net/cq_t2010v2_1/Relu"]
    names = [f"const_fold_opt__{place}" for place in range(3)]
    values = ["x", "a", "b", "y"]
    nodes = [
        helper.make_node("Conv", [values[place], names[place]], [values[place + 1]], name=layer, pads=[1, 1])
        for place, layer in enumerate(layers)
    ]
    kernels = [helper.make_tensor(name, 1, (4, 4, 3), np.ones(48, np.float32)) for name in names]
    ends = [helper.make_tensor_value_info(name, 1, (1, 4, 9)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], kernels)
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert [t.name for t in open_model(tmp_path / "m.onnx").tensors if t.is_prunable] == names[2:]


def described(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Names of what is prunable among tensors of these names and shapes."""
    path = tmp_path / "m.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    return {tensor.name for tensor in open_model(path).tensors if tensor.is_prunable}


@pytest.mark.parametrize(
    "name",
    [
        *("conv.weight", "weight", "lstm.weight_ih_l0", "lstm.weight_hh_l1_reverse", "attn.in_proj_weight"),
        *("fc.weight_orig", "q_proj.lora_A.weight", "q_proj.lora_A.default.weight", "qkv.lora_B", "cell.weight_hh"),
        *("mlp.experts.gate_up_proj", "ffn.experts.mlp.w1", "model.norm_1.proj.weight", "0.weight", "mean.weight"),
        *("patch_embed.proj.weight", "embed_out.weight", "time_embedding.linear_1.weight", "shared.fc.weight"),
        *("conv.parametrizations.weight.original", "body.module.weight", "std.weight", "spectrogram.encoder.weight"),
    ],
)
def test_what_layers_call_their_kernels_is_pruned(name: str, tmp_path: Path) -> None:
    assert described(tmp_path, {name: (4, 6)}) == {name}


@pytest.mark.parametrize(
    "name",
    [
        *("mean", "normalize.std", "model.24.anchors", "model.24.anchor_grid", "attn.relative_position_bias_table"),
        *("text_projection", "visual.proj", "cls_token", "mixer.A_log", "rotary.cos_cached", "encoder.pe"),
        *("conv.weight_g", "conv.parametrizations.weight.original0", "proj.weight_scale", "proj.scales", "attn.mask"),
        *("front.stft.conv_real.weight", "melspec.mel_scale.fb", "model.22.dfl.conv.weight", "sub_mean.weight"),
        *("block.relative_attention_bias.weight", "blur.kernel", "tensor", "a", "norm.weight", "fc.weight_v"),
        *("q_proj.lora_magnitude_vector.default.weight", "quantizer.codebook", "grid", "pos_embed", "wte.weight"),
        *("front.cqt_kernels_real", "front.wsin", "front.lowpass_filter", "front.CQT2010v2.weight"),
        *("shared.weight", "model.shared.weight", "embeddings.word_embeddings.weight", "embed.0.weight"),
    ],
)
def test_what_may_be_a_table_or_a_scale_is_left_alone(name: str, tmp_path: Path) -> None:
    assert described(tmp_path, {name: (4, 6), "fc.weight": (2, 2)}) == {"fc.weight"}


def test_a_bias_of_as_many_outputs_tells_a_kernel_whatever_its_name(tmp_path: Path) -> None:
    shapes = {"a.W": (4, 6), "a.b": (6,), "b.W": (4, 6), "b.b": (5,), "fc_weight": (4, 6), "fc_bias": (4,)}
    assert described(tmp_path, {**shapes, "W1": (3, 2), "b1": (3,)}) == {"a.W", "fc_weight", "W1"}


def test_a_table_has_two_axes_and_no_bias(tmp_path: Path) -> None:
    windows = {"vit.embeddings.patch_embedding.weight": (8, 3, 4, 4), "embedder.conv1d.weight": (8, 3, 4)}
    assert described(tmp_path, windows) == {*windows}
    assert described(tmp_path, {"patch_embedding.kernel": (4, 4, 3, 8), "tokens.embedding": (9, 8)}) == {
        "patch_embedding.kernel"
    }
    # As Stable Diffusion, DiT and T5 call them; a bias of another length is that of something else.
    for layer in ("time_embed.0", "label_emb.0.0", "t_embedder.mlp.0", "shared"):
        weight = {f"{layer}.weight": (4, 6)}
        assert described(tmp_path, {**weight, f"{layer}.bias": (4,)}) == {*weight}
        assert described(tmp_path, {**weight, f"{layer}.bias": (6,)}) == set()


@pytest.mark.parametrize("head", ["lm_head", "embed_out"])
def test_an_output_layer_without_a_table_of_tokens_is_the_embedding(head: str, tmp_path: Path) -> None:
    block, weight = {"h.0.fc.weight": (8, 8), "wpe.weight": (5, 8)}, {f"{head}.weight": (9, 8)}
    assert described(tmp_path, {**block, **weight}) == {"h.0.fc.weight"}
    # A table of another length is one that it is not tied to.
    for rows in (9, 12):
        assert described(tmp_path, {**block, **weight, "wte.weight": (rows, 8)}) == {"h.0.fc.weight", *weight}
    # A model that hears has a head with a bias, and no table.
    assert described(tmp_path, {**block, **weight, f"{head}.bias": (9,)}) == {"h.0.fc.weight", *weight}
    # The last shard alone: its table stands in the first one.
    for later in ("h.7.fc.weight", "h.7.mlp.experts.0.fc.weight"):
        assert described(tmp_path, {later: (8, 8), **weight}) == {later, *weight}


def saved(net: torch.nn.Module, example: torch.Tensor, kind: str, folder: Path) -> Path:
    """A network as a script, an exported program or a pickle."""
    path = folder / ("m.pt2" if kind == "exported" else "m.pt")
    if kind == "script":
        torch.jit.trace(net, example).save(path)
    elif kind == "exported":
        torch.export.save(torch.export.export(net, (example,)), path)
    else:
        torch.save(net, path)
    return path


class WithHead(torch.nn.Module):
    """A block and an output layer without a bias, and no table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.lm_head = torch.nn.Linear(8, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.layers[0](x))


@pytest.mark.parametrize("kind", ["script", "exported", "whole"])
def test_an_output_layer_that_a_graph_or_a_class_calls_one_is_a_kernel(kind: str, tmp_path: Path) -> None:
    path = saved(WithHead().eval(), torch.ones(1, 8), kind, tmp_path)
    assert {tensor.name for tensor in open_model(path).tensors if tensor.is_prunable} == {
        "layers.0.weight",
        "lm_head.weight",
    }


class Tied(torch.nn.Module):
    """A table that is the output layer too, and a layer that is called an embedder and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.embedder = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.embedder(self.rows(x)), self.rows.weight)


@pytest.mark.parametrize("kind", ["script", "exported", "whole"])
def test_what_a_graph_or_a_class_says_tells_more_than_a_name(kind: str, tmp_path: Path) -> None:
    path = saved(Tied().eval(), torch.ones(1, 3, dtype=torch.int64), kind, tmp_path)
    roles = {tensor.name: tensor.role for tensor in open_model(path).tensors}
    assert (roles["rows.weight"], roles["embedder.weight"]) == (Role.EMBEDDING, Role.KERNEL)


def test_kernels_of_flax_are_told_where_nothing_is_called_weight(tmp_path: Path) -> None:
    assert described(tmp_path, {"Dense_0.kernel": (4, 6), "Dense_0.bias": (6,), "attn.query.kernel": (4, 2, 3)})


def test_weight_norm_of_old_is_told_by_its_lengths(tmp_path: Path) -> None:
    assert described(tmp_path, {"c.weight_v": (4, 6, 3), "c.weight_g": (4, 1, 1)}) == {"c.weight_v"}


@pytest.mark.parametrize(
    "weight_norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
def test_that_weight_norm_makes_what_is_kept_larger_is_told(weight_norm: Any, tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(weight_norm(torch.nn.Linear(8, 6)), torch.nn.Linear(6, 2)).eval()

    torch.save(build().state_dict(), tmp_path / "m.pt")
    done = here("prune", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "-s", "50%")
    assert "weight_norm: pruning makes the kept weights larger" in " ".join(done.err.split())
    pruned = build()
    pruned.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    before, after = (module[0](torch.eye(8)) - module[0](torch.zeros(1, 8)) for module in (build(), pruned))
    # The rows have the lengths that they had, in fewer weights.
    torch.testing.assert_close(after.norm(dim=0), before.norm(dim=0))
    torch.save(torch.nn.Linear(8, 6).state_dict(), tmp_path / "plain.pt")
    assert "kept weights larger" not in here("prune", tmp_path / "plain.pt", "-o", tmp_path / "p.pt", "-s", "50%").err


def test_what_other_parametrizations_make_of_zeros_is_told(tmp_path: Path) -> None:
    class Symmetric(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.triu() + weight.triu(1).mT

    turned, scaled, unknown = (torch.nn.Linear(8, 8) for _ in range(3))
    layers = torch.nn.Sequential(turned, scaled, unknown)
    torch.nn.utils.parametrizations.orthogonal(turned)
    torch.nn.utils.parametrizations.spectral_norm(scaled)
    torch.nn.utils.parametrize.register_parametrization(unknown, "weight", Symmetric())
    torch.save(layers.state_dict(), tmp_path / "m.pt")
    done = here("prune", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "-s", "50%")
    assert "2.parametrizations.weight.original is the input of a parametrization" in " ".join(done.err.split())
    before, after = dict(layers.state_dict()), torch.load(tmp_path / "out.pt", weights_only=True)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{number}.parametrizations.weight.original" for number in (1, 2)}
    layers.load_state_dict(after)
    torch.testing.assert_close(scaled.weight == 0, after["1.parametrizations.weight.original"] == 0)


def test_a_norm_over_several_axes_is_no_kernel(tmp_path: Path) -> None:
    assert described(tmp_path, {"x.weight": (4, 6), "x.bias": (4, 6), "fc.weight": (2, 2)}) == {"fc.weight"}


def test_of_numbers_that_cannot_be_pruned_it_is_not_said_how_to_prune_them(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"fc.weight": torch.ones(4, 4), "axes": torch.arange(2)}, path)
    done = here("prune", path, "-o", tmp_path / "a.safetensors", "-s", "50%")
    assert "1 tensor (of type int64)" in done.err
    assert "unknown role" not in done.err


def test_what_is_doubtful_is_said_and_taken_when_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"fc.weight": torch.ones(4, 4), "text_projection": torch.ones(4, 4)}, path)
    done = here("prune", path, "-o", tmp_path / "a.safetensors", "-s", "50%")
    assert "1 tensor of unknown role" in done.err
    assert "if --layers names them" in done.err
    named = here("prune", path, "-o", tmp_path / "b.safetensors", "-s", "50%", "--layers", "text_projection")
    assert named.code == 0
    pruned = open_model(tmp_path / "b.safetensors")
    zeros = {tensor.name: int((pruned.read(tensor) == 0).sum()) for tensor in pruned.tensors}
    assert zeros == {"fc.weight": 0, "text_projection": 8}


@pytest.mark.parametrize(
    "code",
    [
        "    x = " + "(" * 100_000,
        "    a = [b, c]\n" + "".join(f"    v{i} = [v{i - 1}, v{i - 1}]\n" for i in range(20_000)),
        "    x = torch.add(x, x)\n" * (MAX_SCRIPT_TOKENS // 8),
        "    x = self" + ".a" * 200_000,
        "= = ) ] } , : \n" * 20_000,
        "def\nclass\n  def\n    return\n",
        '    x = "' + '\\"' * 100_000,
    ],
    ids=["deep", "laughing", "long", "dotted", "signs", "cut", "quoted"],
)
def test_code_that_no_compiler_wrote_tells_nothing(code: str) -> None:
    header = "class Net(Module):\n  def forward(self: __torch__.Net,\n    x: Tensor) -> Tensor:\n"
    assert not script.uses([("__torch__", header + code)])
