"""Mixtures whose experts `transformers` joins in one tensor, and their files hold apart, against its own networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.training.backend import LoadOptions
from prunectl.training.torch import experts
from prunectl.training.torch import folder as folders
from tests.running import here

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZE = {**WIDTHS, **HEADS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2}
QWEN = {**SIZE, "moe_intermediate_size": 8, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**SIZE, **LATENT, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
NETWORKS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZE, num_local_experts=4)),
    "qwen": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN, num_experts=4)),
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**DEEPSEEK, n_routed_experts=4)
    ),
    "sparse": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**{**QWEN, "num_experts_per_tok": 1}, num_experts=16)
    ),
}
ROWS = torch.from_numpy(np.random.default_rng(0).integers(3, 64, (24, 21)))


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    """Write a network of the library, and the tokens that go through it."""
    np.save(tmp_path / "ids.npy", ROWS.numpy())

    def make(name: str) -> Path:
        torch.manual_seed(0)
        network = NETWORKS[name]()
        with torch.no_grad():
            for parameter in network.parameters():
                # Larger than at the start of training, so that what one layer does can be seen in the next.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        network.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen", "deepseek"])
def test_experts_of_their_own_answer_as_the_joined_ones(name: str, made: Callable[[str], Path]) -> None:
    folder = made(name)
    network = folders.open_network(open_model(folder), LoadOptions())
    network.fill()
    assert set(network.names) == {tensor.name for tensor in open_model(folder).tensors}
    assert any(".experts.3." in name for name in network.names.values())
    with torch.no_grad():
        torch.testing.assert_close(network.module(ROWS), loaded(folder)(ROWS).logits)


@contextmanager
def watched(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the sums of squares of what goes into each layer of each joined expert, by its name in a file of Qwen."""
    seen: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def watch(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            states, chosen, _ = given
            for number in range(len(module.down_proj)):
                rows = states[(chosen == number).any(-1)]
                gate, up = (rows @ module.gate_up_proj[number].T).chunk(2, -1)
                for part, inputs in (("gate", rows), ("up", rows), ("down", torch.nn.functional.silu(gate) * up)):
                    seen[f"{path}.{number}.{part}_proj.weight"] = inputs.double().square().sum(0)

        return watch

    for path, module in model.named_modules():
        if path.endswith("experts"):
            module.register_forward_pre_hook(hook(path))
    yield seen


def test_wanda_ranks_an_expert_by_the_tokens_that_reach_it(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("qwen")
    model = loaded(folder)
    with watched(model) as seen, torch.no_grad():
        model(ROWS[:, :-1])
    options = ("-s", "50%", "--strategy", "activation-magnitude", "--data", tmp_path / "ids.npy")
    done = here("prune", folder, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert len(seen) == 2 * 4 * 3
    for name, squares in seen.items():
        order = (before[name].double().abs() * squares.sqrt()).argsort(dim=1, stable=True)
        gone = torch.zeros_like(before[name], dtype=torch.bool).scatter(1, order[:, : order.shape[1] // 2], value=True)
        assert torch.equal(after[name], before[name].masked_fill(gone, 0)), name


@pytest.mark.parametrize("words", [("--strategy", "obs"), ("--strategy", "obs", "--scope", "global"), ("--repair",)])
def test_experts_are_reconstructed_although_pruning_changes_which_tokens_reach_them(
    words: tuple[str, ...], made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("mixtral")
    done = here("prune", folder, "-o", tmp_path / "out", "-s", "60%", *words, "--data", tmp_path / "ids.npy")
    assert done.code == 0, done.err
    assert here("prune", folder, "-o", tmp_path / "plain", "-s", "60%", "--scope", "layer").code == 0
    with torch.no_grad():
        dense, mine, plain = (loaded(path)(ROWS).logits for path in (folder, tmp_path / "out", tmp_path / "plain"))
    assert (mine - dense).square().mean() < 0.7 * (plain - dense).square().mean()


def test_experts_that_no_token_reaches_any_more_are_pruned_all_the_same(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("sparse")
    np.save(tmp_path / "few.npy", ROWS[0].numpy())
    words = ("--pattern", "2:4", "--strategy", "obs", "--data", tmp_path / "few.npy")
    done = here("prune", folder, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "ranked by magnitude and not reconstructed" in done.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    found = [weight for name, weight in weights.items() if ".experts." in name]
    assert len(found) == 2 * 16 * 3
    assert all(bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()) for weight in found)


def test_experts_are_exported(made: Callable[[str], Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = made("mixtral")
    done = here("export", folder, "-o", tmp_path / "out.onnx", "--input", "input_ids:?,?:i64")
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = loaded(folder)(ROWS).logits.numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ROWS.numpy()})[0], expected, rtol=1e-4, atol=1e-4)


def test_experts_that_are_computed_otherwise_are_refused(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(experts._FLAGS, "has_bias", True)
    with pytest.raises(UsageError, match=r"makes model\.layers\.0\.mlp\.experts\.\w+ of several tensors of .*mixtral"):
        folders.open_network(open_model(made("mixtral")), LoadOptions())
