"""Model folders exported to folders: containers, shards and precision change, all else stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from tests.formats.test_families import MIXTURE, made, weights_of
from tests.running import here

BESIDE = {"tokenizer.json": "{}", "README.md": "# moe", "1_Pooling/config.json": "{}"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of two shards, with what lies beside them."""
    folder = made(tmp_path / "moe", {**MIXTURE, "dtype": "float32", "tie_word_embeddings": True}, weights_of(3, 4))
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def same(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether the safetensors of a folder hold these arrays and no others, bit by bit."""
    found = {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def test_shards_become_one_file_and_back_with_all_that_lies_beside(source: Path, tmp_path: Path) -> None:
    assert here("export", source, "-o", tmp_path / "one", "--shard-size", "1GB").code == 0
    assert same(tmp_path / "one", weights_of(3, 4))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"config.json", "tokenizer.json", "README.md", "1_Pooling", "model.safetensors"}
    for name in ("config.json", *BESIDE):
        assert (tmp_path / "one" / name).read_bytes() == (source / name).read_bytes()
    assert here("export", tmp_path / "one", "-o", tmp_path / "many", "--shard-size", "600").code == 0
    assert same(tmp_path / "many", weights_of(3, 4))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    sizes: dict[str, int] = {}
    for name, array in weights_of(3, 4).items():
        shard = index["weight_map"][name]
        sizes[shard] = sizes.get(shard, 0) + array.nbytes
    assert max(sizes.values()) <= 600
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert sorted(sizes) == [f"model-{n:05}-of-{len(sizes):05}.safetensors" for n in range(1, len(sizes) + 1)]


def test_without_a_size_the_shards_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    assert here("export", source, "-o", tmp_path / "same").code == 0
    old, new = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (source, tmp_path / "same"))
    assert new["weight_map"] == old["weight_map"]


def test_a_folder_goes_to_bin_and_back_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    assert here("export", source, "-o", tmp_path / "bin", "--to", "torch").code == 0
    index = json.loads((tmp_path / "bin/pytorch_model.bin.index.json").read_text())
    for name, array in weights_of(3, 4).items():
        shard = torch.load(tmp_path / "bin" / index["weight_map"][name], weights_only=True)
        assert shard[name].numpy().tobytes() == array.tobytes()
    assert here("export", tmp_path / "bin", "-o", tmp_path / "back").code == 0
    assert same(tmp_path / "back", weights_of(3, 4))


@pytest.mark.parametrize(("option", "dtype"), [("--bf16", "bfloat16"), ("--half", "float16")])
def test_the_config_says_the_precision_that_was_asked_for(
    source: Path, tmp_path: Path, option: str, dtype: str
) -> None:
    done = here("export", source, "-o", tmp_path / "small", option)
    assert f"config.json was changed: its dtype is {dtype} now." in done.err
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "small"))
    assert after == {**before, "dtype": dtype}
    shards = [load_torch(path) for path in (tmp_path / "small").glob("*.safetensors")]
    found = {name: tensor for shard in shards for name, tensor in shard.items()}
    # What has 16 bits already stays.
    assert found["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16


BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": BITS},
        {"compression_config": {"format": "int-quantized"}},
        {"text_config": {"quantization_config": BITS}},
    ],
    ids=["transformers", "older compressed-tensors", "multimodal"],
)
def test_scales_of_quantized_weights_keep_their_types(config: dict[str, Any], tmp_path: Path) -> None:
    weights = weights_of(2, 1)
    scales = {"model.layers.0.self_attn.q_proj.weight_scale": np.full((8, 1), 1e-9, np.float32)}
    source = made(tmp_path / "m", {**MIXTURE, **config}, {**weights, **scales})
    done = here("export", source, "-o", tmp_path / "out", "--half")
    assert (done.code, "their scales keep their types" in done.err) == (2, True)
    assert here("export", source, "-o", tmp_path / "out", "--shard-size", "1TB").code == 0


def test_a_config_that_says_that_nothing_is_quantized_is_believed(tmp_path: Path) -> None:
    nothing = {"quantization_config": {**BITS, "load_in_8bit": False, "load_in_4bit": False}}
    source = made(tmp_path / "m", {**MIXTURE, **nothing}, weights_of(2, 1))
    done = here("export", source, "-o", tmp_path / "out", "--bf16")
    assert done.code == 0, done.err


def test_values_beyond_the_precision_leave_nothing_behind(tmp_path: Path) -> None:
    weights = {**weights_of(2, 1), "lm_head.weight": np.full((16, 8), 1e9, np.float32)}
    source = made(tmp_path / "big", MIXTURE, weights)
    done = here("export", source, "-o", tmp_path / "out", "--half")
    assert done.code == 5
    assert "lm_head.weight has values beyond 65504" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_what_is_tied_in_bin_is_written_once(source: Path, tmp_path: Path) -> None:
    weight = torch.arange(128, dtype=torch.float32).reshape(16, 8)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, "model.norm.weight": torch.ones(8)}
    for path in source.glob("*.safetensors*"):
        path.unlink()
    torch.save(state, source / "pytorch_model.bin")
    done = here("export", source, "-o", tmp_path / "out")
    assert "lm_head.weight: not written, because it is tied to the embedding." in done.err
    assert load_file(tmp_path / "out/model.safetensors").keys() == {"model.embed_tokens.weight", "model.norm.weight"}
    (source / "config.json").write_text('{"tie_word_embeddings": false}')
    assert here("export", source, "-o", tmp_path / "all").code == 0
    assert load_file(tmp_path / "all/model.safetensors").keys() == state.keys()


@pytest.mark.parametrize(
    "config", [{"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, None], ids=["inner", "none"]
)
def test_a_head_that_no_config_ties_is_kept(tmp_path: Path, config: dict[str, Any] | None) -> None:
    weight = torch.arange(128, dtype=torch.float32).reshape(16, 8)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    source = tmp_path / "source"
    source.mkdir()
    if config is not None:
        (source / "config.json").write_text(json.dumps(config))
    torch.save(state, source / "pytorch_model.bin")
    assert here("export", source, "-o", tmp_path / "out").code == 0
    found = load_torch(tmp_path / "out/model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == dict.fromkeys(state, weight.tolist())


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_config_that_already_fits_is_copied_without_a_note(source: Path, tmp_path: Path, dtype: str | None) -> None:
    (source / "config.json").write_text(json.dumps({**MIXTURE, "torch_dtype": dtype}, indent=4))
    done = here("export", source, "-o", tmp_path / "out", "--half")
    assert "was changed" not in done.err
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_half_a_character_is_written_as_it_was_escaped(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text('{"dtype": "float32", "x": "\\ud800"}')
    assert here("export", source, "-o", tmp_path / "out", "--half").code == 0
    assert json.loads((tmp_path / "out/config.json").read_bytes()) == {"dtype": "float16", "x": "\ud800"}


def test_an_adapter_keeps_its_name(tmp_path: Path) -> None:
    source = tmp_path / "lora"
    source.mkdir()
    torch.save({"q.lora_A.weight": torch.ones(2, 8)}, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text("{}")
    assert here("export", source, "-o", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_is_not_run_without_its_base_model(tmp_path: Path) -> None:
    source = tmp_path / "lora"
    source.mkdir()
    torch.save({"q.lora_A.weight": torch.ones(2, 8)}, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("words")
    done = here("eval", source, "--data", tmp_path / "text.txt")
    assert (done.code, f"{source} holds an adapter" in done.err, "merge_and_unload" in done.err) == (2, True, True)
    done = here("eval", source / "adapter_model.bin", "--data", tmp_path / "text.txt")
    assert (done.code, "adapter_model.bin holds an adapter" in done.err, "--builder" in done.err) == (2, True, False)


def test_a_folder_without_a_known_model_is_named_before_the_format_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    torch.save({}, tmp_path / "m/weights.fp16.bin")
    done = here("export", tmp_path / "m", "-o", tmp_path / "out", "--bf16")
    assert done.code == 3
    assert "SavedModel," not in done.err


def test_training_state_and_other_forms_of_the_weights_stay_behind(source: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", "pytorch_model.bin"):
        (source / name).write_bytes(b"x")
    done = here("export", source, "-o", tmp_path / "out")
    assert "pytorch_model.bin in " in done.err
    assert "the same weights in another form, and not copied" in done.err
    assert not {"optimizer.pt", "pytorch_model.bin"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_one_file_is_written_where_its_name_or_its_format_asks_for_it(source: Path, tmp_path: Path) -> None:
    assert here("export", source, "-o", tmp_path / "out.safetensors").code == 0
    assert load_file(tmp_path / "out.safetensors").keys() == weights_of(3, 4).keys()
    assert here("export", source, "-o", tmp_path / "out", "--to", "npz").code == 0
    assert (tmp_path / "out").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bf16", "--half"), "--half and --bf16 cannot be used together"),
        (("--to", "torch", "--pack"), "--pack cannot be used with a folder as output"),
        (("--to", "torch", "--sparse"), "--sparse cannot be used with a folder as output"),
        (("--shard-size", "0"), "--shard-size must be at least 1 byte, not 0"),
        (("--to", "onnx", "--shard-size", "1MB"), "--shard-size needs a model folder, and a folder as output"),
        (("--opset", "18"), "--opset cannot be used with safetensors"),
    ],
)
def test_options_that_a_folder_does_not_have_are_refused(source: Path, words: tuple[str, ...], message: str) -> None:
    done = here("export", source, "-o", source.parent / "out", *words)
    assert done.code == 2
    assert message in done.err
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_bits_that_torch_alone_has_survive(tmp_path: Path) -> None:
    weights = {f"{i}.weight": np.arange(64).reshape(8, 8).astype(ml_dtypes.bfloat16) for i in range(4)}
    source = made(tmp_path / "bf16", None, weights)
    assert here("export", source, "-o", tmp_path / "bin", "--to", "torch", "--shard-size", "1GB").code == 0
    state = torch.load(tmp_path / "bin/pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert here("export", tmp_path / "bin", "-o", tmp_path / "back").code == 0
    assert load_torch(tmp_path / "back/model.safetensors")["1.weight"].tolist() == weights["1.weight"].tolist()
