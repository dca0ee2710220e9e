"""Depth pruning: blocks leave a model folder; names, config and index fit what is left, and no other byte changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prunectl
from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning import destination
from prunectl.pruning.blocks import chosen
from prunectl.reporting import prune as reporting
from tests.running import Outcome, here
from tests.safety.cost import assert_refused_cheaply, cost

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "hidden_size": 4}


def weights(stacks: Mapping[str, int], *, leaf: str = "mlp.up_proj.weight") -> dict[str, Any]:
    """Tensors of blocks that are told apart by their numbers, and an embedding."""
    found = {"model.embed_tokens.weight": np.full((8, 4), -1, np.float32)}
    for prefix, count in stacks.items():
        for number in range(count):
            found[f"{prefix}.{number}.{leaf}"] = np.full((4, 4), number, np.float32)
            found[f"{prefix}.{number}.norm.weight"] = np.full(4, number, np.float16)
    return found


def made(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names, index = list(tensors), {}
    for number in range(1, shards + 1):
        part = names[(number - 1) * len(names) // shards : number * len(names) // shards]
        shard = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    total = sum(array.nbytes for array in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def cut(folder: Path, *words: str) -> Outcome:
    return here("prune", folder, "-o", folder.parent / "out", "--pattern", "layers", *words)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def blocks_of(folder: Path, prefix: str = "model.layers") -> dict[int, int]:
    """Which block each of the new ones was before, by the numbers in it."""
    found: dict[int, int] = {}
    for file in folder.glob("*.safetensors"):
        for name, array in load_file(file).items():
            if name.startswith(prefix):
                number = int(name.removeprefix(f"{prefix}.").split(".")[0])
                assert found.setdefault(number, int(array.flat[0])) == array.flat[0]
    return found


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("--blocks", "2"), [0, 1, 2, 3]),
        (("-s", "50%"), [0, 1, 2]),
        (("--blocks", "2", "--strategy", "even"), [0, 1, 3, 5]),
        (("--layers", "1-2,4"), [0, 3, 5]),
        (("--layers", "0"), [1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_go_and_the_others_move_up(tmp_path: Path, words: tuple[str, ...], kept: list[int], shards: int) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}), shards)
    done = cut(source, *words)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert blocks_of(out) == dict(enumerate(kept))
    assert config_of(out) == {**LLAMA, "num_hidden_layers": len(kept)}
    assert list(config_of(out)) == list(LLAMA)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert f"num_hidden_layers 6 -> {len(kept)}" in done.err
    removed = ", ".join(map(str, (number for number in range(6) if number not in kept)))
    assert done.rows[0][:3] == ["model.layers", "6", str(6 - len(kept))]
    assert "-" in done.rows[0][3] or done.rows[0][3] == removed


def test_the_index_names_what_is_left_and_empty_shards_are_gone(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}), 6)
    assert cut(source, "--layers", "3-5").code == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) < 6
    stored = {name: array for shard in shards for name, array in load_file(tmp_path / "out" / shard).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())


@pytest.mark.parametrize("is_big", [False, True], ids=["small", "big"])
def test_what_is_left_of_a_big_model_is_compressed_as_little_as_the_model(
    is_big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}))
    if is_big:
        # Less than the model, and more than is left of it.
        for module in (destination, reporting):
            monkeypatch.setattr(module, "BIG_BYTES", open_model(source).nbytes - 1)
    done = cut(source, "--blocks", "2", "--format", "human")
    rows = [line.split() for line in done.out.splitlines() if line.split()[:1] in (["before"], ["after"])]
    assert [row[-1] == "-" for row in rows] == [is_big, is_big]
    assert ("are not measured" in done.out) is is_big


def test_a_stale_file_takes_the_place_of_no_shard_that_was_written(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}), 6)
    for path in source.glob("model-*"):
        path.rename(path.with_name(path.name.replace("model", "weights")))
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "weights-"))
    assert cut(source, "--layers", "3-5").code == 0
    shard = max(path.name for path in (tmp_path / "out").glob("weights-*"))
    (source / shard).write_bytes(b"stale")
    done = here("prune", source, "-o", tmp_path / "again", "--pattern", "layers", "--layers", "3-5")
    assert done.code == 3
    assert f"{shard} of {source} would take the place of weights that were written" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_per_block_lists_and_bounds_of_the_config_follow(tmp_path: Path) -> None:
    config = {
        **LLAMA,
        "model_type": "deepseek_v3",
        "layer_types": list("abcdef"),
        "first_k_dense_replace": 2,
        "max_window_layers": 28,
        "mlp_only_layers": [0, 3, 5],
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "num_nextn_predict_layers": 1,
    }
    source = made(tmp_path / "mixed", config, weights({"model.layers": 7}))
    done = cut(source, "--layers", "1,4")
    assert done.code == 0, done.err
    assert config_of(tmp_path / "out") == {
        **config,
        "num_hidden_layers": 4,
        "layer_types": list("acdf"),
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0, 2, 3],
    }
    # The one that predicts a further token stays behind those that are counted.
    assert blocks_of(tmp_path / "out") == {0: 0, 1: 2, 2: 3, 3: 5, 4: 6}


def test_of_two_stacks_the_named_one_shrinks(tmp_path: Path) -> None:
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": None}
    stacks = {"encoder.block": 3, "decoder.block": 3}
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = weights(stacks) | {f"{name}.0.{bias}": np.full((2, 2), 0, np.float32) for name in stacks}
    source = made(tmp_path / "t5", config, tensors)
    refused = cut(source, "--blocks", "1").err
    assert "has several stacks of blocks: encoder (3), decoder (3)" in refused
    assert "--layers decoder:2" in refused
    done = cut(source, "--layers", "encoder:0")
    assert done.code == 0, done.err
    # What counted both counts one now.
    assert config_of(tmp_path / "out") == {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3}
    found = load_file(tmp_path / "out/model.safetensors")
    assert f"encoder.block.0.{bias}" in found
    assert {name.split(".")[2] for name in found if name.startswith("encoder.block")} == {"0", "1"}
    assert found["encoder.block.0.mlp.up_proj.weight"].flat[0] == 1
    assert blocks_of(tmp_path / "out", "decoder.block") == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize(
    ("inner", "code"),
    [({"model_type": "llama"}, 0), ({"model_type": "gemma2"}, 3), ({"model_type": "new"}, 3), ({}, 0)],
)
def test_in_what_sees_as_well_the_family_of_its_language_decides(
    tmp_path: Path, inner: dict[str, Any], code: int
) -> None:
    config = {"model_type": "llava", "text_config": {**inner, "num_hidden_layers": 3}, "vision_config": {"x": 1}}
    stacks = {"vision_tower.vision_model.encoder.layers": 5, "language_model.model.layers": 3}
    assert cut(made(tmp_path / "llava", config, weights(stacks)), "--layers", "0").code == code
    if code == 0:
        assert config_of(tmp_path / "out") == {**config, "text_config": {**inner, "num_hidden_layers": 2}}
        assert blocks_of(tmp_path / "out", "language_model.model.layers") == {0: 1, 1: 2}
        assert len(blocks_of(tmp_path / "out", "vision_tower.vision_model.encoder.layers")) == 5


def test_a_count_that_stands_in_two_keys_changes_in_both(tmp_path: Path) -> None:
    config = {"model_type": "bart", "encoder_layers": 3, "decoder_layers": 2, "num_hidden_layers": 3}
    source = made(tmp_path / "bart", config, weights({"model.encoder.layers": 3, "model.decoder.layers": 2}))
    assert cut(source, "--layers", "encoder:1,decoder:0").code == 0
    assert config_of(tmp_path / "out") == {
        **config, "encoder_layers": 2, "decoder_layers": 1, "num_hidden_layers": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"model_type": "new"}, ("--blocks", "1"), "does not know: num_hidden_layers counts its blocks"),
        ({"num_hidden_layers": 5}, ("--blocks", "1"), "but its config.json counts 5 (num_hidden_layers)"),
        ({"num_hidden_layers": None}, ("--blocks", "1"), "has no num_hidden_layers, which counts the blocks"),
        ({"decoder_sparse_step": 2}, ("--layers", "0"), "kind of a block by its number (decoder_sparse_step)"),
        ({"model_type": "gemma2"}, ("--layers", "0"), "decides the kind of a block by its number (no layer_types)"),
        ({"num_kv_shared_layers": 2}, ("--blocks", "1"), "lets blocks share their keys (num_kv_shared_layers)"),
        ({"rope_per_block": [1] * 6}, ("--blocks", "1"), "has a list rope_per_block as long as there are blocks (6)"),
    ],
)  # fmt: skip
def test_what_would_not_load_is_refused_with_the_key(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...], message: str
) -> None:
    done = cut(made(tmp_path / "llama", {**LLAMA, **change}, weights({"model.layers": 6})), *words)
    assert done.code == 3
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_names_of_blocks_in_the_config_get_their_new_numbers(tmp_path: Path) -> None:
    kept = {"bits": 4, "modules_to_not_convert": ["lm_head", "model.layers.0", "model.layers.1.mlp", "model.layers.5."]}
    rules = {"ignore": ["re:.*mlp.*"], "per_layer": {"model.layers.2.mlp": 8, "model.layers.0.mlp": 3, "other": 1}}
    config = {**LLAMA, "quantization_config": {**kept, **rules}, "last": "model.layers.4"}
    source = made(tmp_path / "llama", config, weights({"model.layers": 6}))
    done = cut(source, "--layers", "0,3")
    assert done.code == 0, done.err
    assert "quantization_config (names of blocks), last (names of blocks)" in done.err
    new = config_of(tmp_path / "out")
    assert new["last"] == "model.layers.2"
    assert new["quantization_config"] == {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "model.layers.3."],
        "ignore": ["re:.*mlp.*"],
        "per_layer": {"model.layers.1.mlp": 8, "other": 1},
    }


@pytest.mark.parametrize(
    "name", [r"re:.*layers\.1\.mlp", "re:.*layers.1.*", r"re:model\.layers\.[0-2]\..*", "layers.(0|1)"]
)
def test_expressions_of_block_numbers_in_the_config_allow_the_last_blocks_alone(tmp_path: Path, name: str) -> None:
    config = {**LLAMA, "quantization_config": {"ignore": [name]}}
    source = made(tmp_path / "llama", config, weights({"model.layers": 6}))
    done = cut(source, "--layers", "0")
    assert done.code == 3
    assert "names blocks by their numbers" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    assert cut(source, "--blocks", "1").code == 0
    assert config_of(tmp_path / "out") == {**config, "num_hidden_layers": 5}


def test_half_a_character_is_written_as_it_was_escaped(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", {**LLAMA, "x": "\ud800", "y": "é"}, weights({"model.layers": 6}))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"a":"\\ud800x"'))
    assert cut(source, "--blocks", "1").code == 0
    assert config_of(tmp_path / "out")["x"] == "\ud800"
    assert '"é"' in (tmp_path / "out/config.json").read_text(encoding="utf-8")
    assert b'{"__metadata__":{"a":"\\ud800x"}' in (tmp_path / "out/model.safetensors").read_bytes()


def test_a_count_beyond_all_memory_and_endless_blocks_cost_little(tmp_path: Path) -> None:
    words = ("--pattern", "layers", "--blocks", "1", "-o", tmp_path / "out")
    source = made(tmp_path / "llama", {**LLAMA, "num_hidden_layers": 10**15}, weights({"model.layers": 6}))
    assert_refused_cheaply(cost("prune", source, *words, scratch=tmp_path / "scratch"))
    many = {f"layers.{number}.w": np.zeros(1, np.float32) for number in range(40_000)}
    source = made(tmp_path / "many", {**LLAMA, "num_hidden_layers": 39_999, "layer_types": "x"}, many)
    assert_refused_cheaply(cost("prune", source, *words, scratch=tmp_path / "scratch"))


def test_what_goes_by_its_number_may_lose_its_last_blocks(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "gemma2", "decoder_sparse_step": 2}
    assert cut(made(tmp_path / "gemma", config, weights({"model.layers": 6})), "--blocks", "2").code == 0
    assert blocks_of(tmp_path / "out") == {number: number for number in range(4)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs one of --blocks, --sparsity and --layers"),
        (("--blocks", "1", "-s", "50%"), "needs one of --blocks, --sparsity and --layers"),
        (("--blocks", "6"), "6 of 6 blocks cannot be removed"),
        (("-s", "1%"), "0 of 6 blocks cannot be removed"),
        (("--layers", "4-9"), "has the blocks 0 to 5 (num_hidden_layers): 9 is none of them"),
        (("--layers", "0-5"), "has the blocks 0 to 5 (num_hidden_layers): one must stay"),
        (("--layers", "conv*"), "'conv*' does not name blocks"),
        (("--layers", "decoder:1"), "decoder is not a stack of"),
        (("--layers", "1", "--strategy", "even"), "--strategy even chooses them"),
        (("--blocks", "1", "--strategy", "lamp"), "the strategy lamp cannot be used with --pattern layers"),
        (("--blocks", "1", "--strategy", "magnitude"), "the strategy magnitude cannot be used with --pattern layers"),
        (("--blocks", "1", "--scope", "global"), "--scope cannot be used with --pattern layers"),
        (("--blocks", "1", "--samples", "8"), "has no effect with --pattern layers"),
        (("--blocks", "1", "--exclude", "a"), "--exclude cannot be used with --pattern layers"),
        (("--blocks", "1", "--max-drop", "1pp", "--data", "x"), "cannot be used with --pattern layers"),
    ],
)
def test_slips_are_answered_before_anything_is_written(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = cut(made(tmp_path / "llama", LLAMA, weights({"model.layers": 6})), *words)
    assert done.code == 2
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_file_and_an_output_that_is_one_are_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}))
    layers = ("--pattern", "layers", "--blocks", "1")
    assert "needs a model folder" in here("prune", source / "model.safetensors", "-o", tmp_path / "o", *layers).err
    assert "writes a folder" in here("prune", source, "-o", tmp_path / "o.safetensors", *layers).err
    assert "writes a folder" in here("prune", source, "--in-place", *layers).err
    assert "--blocks needs --pattern layers" in here("prune", source, "-o", tmp_path / "o", "--blocks", "1").err
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_dry_run_tells_the_sizes_and_a_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}), 2)
    dry = here("prune", source, "--dry-run", "--pattern", "layers", "--blocks", "3", "--json").json
    record = tmp_path / "run.json"
    real = here("prune", source, "-o", tmp_path / "a", "--pattern", "layers", "--blocks", "3", "--json",
                "--manifest", record).json  # fmt: skip
    assert dry["models"][1]["params"]["total"] == real["models"][1]["params"]["total"]
    assert real["blocks"] == [{"name": "model.layers", "before": 6, "removed": [3, 4, 5]}]
    assert here("prune", source, "-o", tmp_path / "b", "--recipe", record).code == 0
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in "ab"
    ]
    assert hashes[0] == hashes[1]


def test_the_function_takes_the_same_keywords(tmp_path: Path) -> None:
    source = made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}))
    result = prunectl.prune(source, tmp_path / "out", pattern="layers", blocks=2)
    assert "removed   2 of 6 blocks of model.layers" in repr(result)
    with pytest.raises(UsageError, match="the strategy magnitude cannot be used"):
        prunectl.prune(source, tmp_path / "more", pattern="layers", blocks=2, strategy="magnitude")
    assert blocks_of(tmp_path / "out") == {number: number for number in range(4)}


@pytest.mark.parametrize("number", range(1, 12))
def test_even_distances_differ_by_one_at_most_and_keep_both_ends(number: int) -> None:
    gone = sorted(chosen("even", 12, number))
    assert len(gone) == number
    if number <= 10:
        assert not {0, 11} & set(gone)
        distances = np.diff([*gone])
        assert distances.size == 0 or distances.max() - distances.min() <= 1


def test_a_pickle_that_is_named_as_safetensors_is_refused_as_what_it_is(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = made(tmp_path / "model", LLAMA, weights({"model.layers": 6}))
    state = {name: torch.from_numpy(array) for name, array in weights({"model.layers": 6}).items()}
    torch.save(state, folder / "model.safetensors")
    found = cost(
        "prune", folder, "-o", tmp_path / "out", "--pattern", "layers", "--blocks", "1", scratch=tmp_path / "scratch"
    )
    assert_refused_cheaply(found, code=2)
    assert "has model.safetensors, which holds something else" in found.outcome.err
