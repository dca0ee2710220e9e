"""Families of Hugging Face models: what `inspect` says of a folder, by its config or by its names alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl.formats import families
from prunectl.formats.registry import open_model
from tests.running import at_terminal, here, without_colors

MIXTURE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "tie_word_embeddings": True,
}


def weights_of(blocks: int, experts: int, prefix: str = "model.layers") -> dict[str, Any]:
    """Tensors by the names of Mixtral: an embedding of 128, and in each block 64, and 32 for each expert."""
    found = {"model.embed_tokens.weight": np.ones((16, 8), np.float32)}
    for number in range(blocks):
        found[f"{prefix}.{number}.self_attn.q_proj.weight"] = np.ones((8, 8), np.float16)
        for expert in range(experts):
            found[f"{prefix}.{number}.block_sparse_moe.experts.{expert}.w1.weight"] = np.ones((4, 8), np.float16)
    return found


def made(folder: Path, config: dict[str, Any] | None, weights: dict[str, Any]) -> Path:
    """Write a folder of two shards."""
    folder.mkdir()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def test_inspect_tells_first_what_a_folder_is(tmp_path: Path) -> None:
    folder = made(tmp_path / "moe", MIXTURE, weights_of(3, 4))
    found = here("inspect", folder, "--json").json["models"][0]
    assert found["architecture"] == {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "blocks": {"model.layers": 3},
        "hidden_size": 8,
        "heads": 4,
        "key_value_heads": 2,
        "vocabulary": 16,
        "experts": {"total": 4, "active": 1, "active_params": 128 + 3 * (64 + 32)},
        "dtypes": {"float16": 3 * (64 + 4 * 32), "float32": 128},
        "is_tied": True,
        "shards": 2,
        "base_model": "",
        "notes": [],
    }
    lines = without_colors(at_terminal("inspect", folder, columns=120).out).splitlines()
    assert [line.split(None, 1)[1] for line in lines[1:5]] == [
        "mixtral (MixtralForCausalLM)",
        "3 blocks in model.layers, hidden size 8, 4 heads (2 for keys and values), vocabulary 16",
        "1 of 4 for each token: 416 parameters are active (59.1 %)",
        "float16 (576), float32 (128) in 2 shards; the output layer is the embedding (tied)",
    ]


@pytest.mark.parametrize(("method", "dtype"), [("gptq", "int32"), ("mxfp4", "uint8"), ("compressed-tensors", "int8")])
def test_parameters_of_packed_weights_are_called_what_they_are(method: str, dtype: str, tmp_path: Path) -> None:
    weights = {
        f"model.layers.{block}.experts.{expert}.up_proj.qweight": np.ones((8, 8), dtype)
        for block in range(2)
        for expert in range(4)
    }
    config = {**MIXTURE, "quantization_config": {"quant_method": method}}
    (found,) = here("inspect", made(tmp_path / "moe", config, weights), "--json").json["models"]
    assert found["architecture"]["experts"]["active_params"] == 2 * 64
    # Of int8, each number is a parameter.
    sentence = f"Weights are packed by {method} into {dtype}: parameters, also the active ones, are counted as stored."
    assert found["architecture"]["notes"] == ([] if dtype == "int8" else [sentence])


def test_of_an_unknown_family_the_names_tell_the_blocks(tmp_path: Path) -> None:
    folder = made(tmp_path / "new", {"model_type": "never_seen"}, weights_of(3, 1, "trunk.cells"))
    found = here("inspect", folder, "--json").json["models"][0]["architecture"]
    assert (found["model_type"], found["blocks"], found["heads"]) == ("never_seen", {"trunk.cells": 3}, None)


def test_an_adapter_says_what_it_adapts(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({"base_model.model.q.lora_A.weight": np.ones((2, 8), np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/llama"}')
    assert "LORA for some/llama" in at_terminal("inspect", folder, columns=120).out


def test_a_config_that_is_no_json_is_a_sentence_beside_the_weights(tmp_path: Path) -> None:
    folder = made(tmp_path / "broken", None, weights_of(2, 1))
    (folder / "config.json").write_text("{,")
    done = here("inspect", folder, "--json")
    assert done.code == 0
    assert done.json["models"][0]["advice"] == [f"{folder}/config.json is damaged: it is not JSON."]


@pytest.mark.parametrize("config", [{"model_type": 3, "architectures": "x", "hidden_size": "8"}, {"text_config": []}])
def test_a_config_of_odd_values_tells_nothing_and_breaks_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    found = families.architecture(open_model(made(tmp_path / "odd", config, weights_of(2, 1))))
    assert found is not None
    assert (found.model_type, found.architectures, found.hidden_size, found.is_tied) == ("", (), None, None)


def test_what_training_left_in_a_folder_is_said(tmp_path: Path) -> None:
    folder = made(tmp_path / "trained", MIXTURE, weights_of(3, 4))
    (folder / "optimizer.pt").write_bytes(bytes(2_000_000))
    (folder / "scheduler.pt").write_bytes(bytes(1_000))
    (advice,) = here("inspect", folder, "--json").json["models"][0]["advice"]
    assert advice == (
        "The folder also holds the state of a training (2 files such as optimizer.pt, 2.00 MB). "
        "`prunectl strip` leaves it out."
    )


def test_a_config_that_links_out_of_its_folder_is_not_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "linked", None, weights_of(2, 1))
    (tmp_path / "secret").write_text('{"model_type": "secret"}')
    (folder / "config.json").symlink_to("../secret")
    assert "secret" not in here("inspect", folder, "--json").out


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "twice", MIXTURE, weights_of(3, 4))
    save_file({"model.embed_tokens.weight": np.ones((16, 8), np.float32)}, folder / "model-00002-of-00002.safetensors")
    index = {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}
    names = sorted(weights_of(3, 4))
    index |= dict.fromkeys(names[1:3], "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for words in (("inspect", folder), ("prune", folder, "-s", "50%", "-o", tmp_path / "out")):
        done = here(*words)
        assert done.code == 3
        assert "model.embed_tokens.weight stands in two of its shards, model-0000" in done.err
    assert not (tmp_path / "out").exists()


def test_missing_shards_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    folder = made(tmp_path / "part", MIXTURE, weights_of(3, 4))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    done = here("prune", folder, "-s", "50%", "-o", tmp_path / "out")
    assert done.code == 3
    assert "is incomplete: 2 of its 2 shards are missing, such as model-00001-of-00002.safetensors" in done.err
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_index_leaves_out_are_said(tmp_path: Path) -> None:
    folder = made(tmp_path / "extra", MIXTURE, weights_of(3, 4))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    notes = here("inspect", folder, "--json").json["models"][0]["advice"]
    assert notes == ["1 tensor of its shards is not in the index, such as model.embed_tokens.weight."]
