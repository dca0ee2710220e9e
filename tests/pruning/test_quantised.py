"""Weights that are quantised, or stored with scales, and what only looks like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from tests.running import here


def test_that_weights_of_eight_bits_are_ranked_without_their_scales_is_told(tmp_path: Path) -> None:
    weight = torch.randn(16, 16).to(torch.float8_e4m3fn)
    tensors = {"q.weight": weight, "q.weight_scale_inv": torch.ones(2, 2)}
    save_torch_file(tensors, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert "q.weight has a scale in the file, which the ranking ignores" in " ".join(done.err.split())
    kept = load_torch_file(tmp_path / "out.safetensors")
    assert torch.equal(kept["q.weight_scale_inv"], tensors["q.weight_scale_inv"])
    assert int((kept["q.weight"].float() == 0).sum()) >= 128


def test_weights_with_scales_are_not_ranked_together_with_those_of_other_layers(tmp_path: Path) -> None:
    q, head = torch.randn(32, 32) * 100, torch.randn(32, 32) * 0.02
    tensors = {
        "q.weight": q.to(torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.full((1, 1), 2e-4),
        "out.weight": head,
    }
    save_torch_file(tensors, tmp_path / "m.safetensors")
    words = ("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    done = here(*words)
    assert (done.code, "q.weight has a scale" in done.err, "--scope layer" in done.err) == (2, True, True)
    assert here(*words, "--scope", "layer").code == 0
    for name, tensor in load_torch_file(tmp_path / "out.safetensors").items():
        assert int((tensor.float() == 0).sum()) == (0 if "scale" in name else 512)


def test_a_quantised_model_is_not_pruned_in_its_output_layer_alone_unless_that_is_named(tmp_path: Path) -> None:
    blocks = {f"layers.{n}.q_proj.qweight": np.ones((8, 64), np.int32) for n in range(4)}
    save_file({**blocks, "classifier.weight": np.ones((40, 64), np.float32)}, tmp_path / "m.safetensors")
    words = ("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    done = here(*words)
    assert done.code == 2
    assert "are quantised, so that classifier.weight alone would be pruned" in done.err
    assert here(*words, "--layers", "classifier.weight").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--layer", "classifier.weight=0.5"),
        ("--exclude", "b.weight"),
        ("--policy", "skip-classifier"),
        ("--policy", "min-size:100"),
    ],
)
def test_what_a_user_chose_is_pruned_though_most_weights_are_quantised(words: tuple[str, ...], tmp_path: Path) -> None:
    floats = {name: np.ones((40, 64), np.float32) for name in ("b.weight", "classifier.weight")}
    save_file({"q_proj.qweight": np.ones((64, 64), np.int32), **floats}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert (done.code, "only 2 of its tensors" in done.err) == (2, True)
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5", *words)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "dtype"), [("codes.weight", np.int32), ("palette.weight", np.uint8), ("emb.weight", np.int8)]
)
def test_tables_of_integers_are_no_quantised_kernels(name: str, dtype: type[np.generic], tmp_path: Path) -> None:
    arrays = {name: np.ones((1000, 64), dtype), "fc.weight": np.ones((40, 64), np.float32)}
    if name == "emb.weight":
        arrays["emb.weight_scale"] = np.ones((1000, 1), np.float32)
    save_file(arrays, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert done.code == 0, done.err
    kept = load_file(tmp_path / "out.safetensors")
    assert np.array_equal(kept[name], arrays[name])
    assert np.count_nonzero(kept["fc.weight"]) == 20 * 64


@pytest.mark.parametrize("scale", ["SCB", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "weight_scale"])
def test_a_model_of_bytes_with_scales_is_refused_and_its_largest_float_tensor_named(scale: str, tmp_path: Path) -> None:
    arrays = {"q_proj.weight": np.ones((128, 64), np.uint8), f"q_proj.{scale}": np.ones(128, np.float32)}
    floats = {"a.weight": np.ones((4, 4), np.float32), "out.weight": np.ones((40, 64), np.float32)}
    save_file({**arrays, **floats}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert (done.code, "--layers out.weight" in done.err) == (2, True)


def test_learnt_step_sizes_beside_wide_floats_do_not_forbid_a_joint_ranking(tmp_path: Path) -> None:
    weights = {f"fc{n}.weight": torch.randn(64, 64) for n in (1, 2)}
    save_torch_file({**weights, **{f"{name}_scale": torch.ones(1) for name in weights}}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert (done.code, "has a scale" in done.err, "have scales" in done.err) == (0, False, False), done.err


@pytest.mark.parametrize("strategy", ["random", "lamp"])
def test_scores_without_a_unit_rank_weights_with_scales_together(strategy: str, tmp_path: Path) -> None:
    weight = torch.randn(32, 32).to(torch.float8_e4m3fn)
    tensors = {"q.weight": weight, "q.weight_scale": torch.ones(1), "out.weight": torch.randn(32, 32)}
    save_torch_file(tensors, tmp_path / "m.safetensors")
    words = ("-s", "0.5", "--strategy", strategy, "--scope", "global")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", *words)
    assert done.code == 0, done.err
