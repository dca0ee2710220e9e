"""Folders of Hugging Face that take images, sounds or ids, exported as the hints say, and held against the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from prunectl.training.torch.folder import FolderModule
from tests.running import here

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SOUND = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
HALVES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
DETECTOR = {**HALVES, "num_queries": 5}

WORDS = {"vocab_size": 32, **SIZE}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForTokenClassification": ("BertConfig", {**WORDS, "num_labels": 5}),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {
            **WORDS,
            "pad_token_id": 0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
    ),
    "LayoutLMForTokenClassification": ("LayoutLMConfig", WORDS),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"), 16)
        | dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2)
        | {"head_dim": 8, "n_routed_experts": 4, "layers_block_type": ["moe", "full_attention"], "pad_token_id": 0},
    ),
    "RobertaForSequenceClassification": ("RobertaConfig", {**WORDS, "type_vocab_size": 1}),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            **HALVES,
            "vocab_size": 32,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "XLNetLMHeadModel": ("XLNetConfig", {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}),
}


def configured(name: str) -> Any:
    """A tiny model of a kind."""
    if name == "DetrForObjectDetection":
        backbone = transformers.ResNetConfig(**STAGES, out_features=["stage2"])
        config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **DETECTOR)
    elif name == "ResNetForImageClassification":
        config = transformers.ResNetConfig(**STAGES)
    elif name == "Wav2Vec2ForCTC":
        config = transformers.Wav2Vec2Config(
            vocab_size=32, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **SIZE, **SOUND
        )
    else:
        kind, fields = CONFIGS[name]
        config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize(
    ("name", "hint", "lengths"),
    [
        # As long as the hint says, an export of a detector takes half a minute.
        ("DetrForObjectDetection", "pixel_values:1,3,224,224", "1,3,64,64"),
        ("ResNetForImageClassification", "pixel_values:1,3,224,224", "1,3,32,32"),
        ("Wav2Vec2ForCTC", "input_values:1,16000", "1,16000"),
    ],
)
def test_the_hint_fits_what_a_folder_takes_and_its_export_answers_as_the_library(
    name: str, hint: str, lengths: str, tmp_path: Path
) -> None:
    network = configured(name)
    network.save_pretrained(tmp_path / "folder")
    words = ("export", tmp_path / "folder", "-o", tmp_path / "out.onnx")
    refused = here(*words)
    assert refused.code == 2
    (said,) = re.findall(r"--input (\S+?),? ", refused.err)
    assert said == hint
    given = f"{hint.partition(':')[0]}:{lengths}"
    done = here(*words, "--input", given)
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    random, shape = np.random.default_rng(0), tuple(map(int, lengths.split(",")))
    array = random.standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(array))[0].numpy()
    np.testing.assert_allclose(session.run(None, {port.name: array})[0], expected, rtol=1e-4, atol=1e-4)


def test_that_modules_after_the_network_are_not_exported_is_told(tmp_path: Path) -> None:
    configured("ResNetForImageClassification").save_pretrained(tmp_path / "folder")
    words = ("export", tmp_path / "folder", "-o", tmp_path / "out.onnx", "--input", "pixel_values:1,3,32,32", "--force")
    said = (
        f"The modules after the network in {tmp_path / 'folder/modules.json'}, such as pooling, are not in the output."
    )
    assert said not in here(*words).err
    (tmp_path / "folder/modules.json").write_text("[]")
    done = here(*words)
    assert (done.code, said in done.err) == (0, True)


def test_experts_that_share_a_tensor_are_exported(tmp_path: Path) -> None:
    network = configured("GptOssForCausalLM")
    network.save_pretrained(tmp_path / "folder")
    done = here("export", tmp_path / "folder", "-o", tmp_path / "out.onnx", "--input", "input_ids:1,12:i64")
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, 30, (1, 12))
    with torch.no_grad():
        expected = network(torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, rtol=1e-4, atol=1e-4)


def test_channels_of_a_folder_are_refused_with_a_way_that_works(tmp_path: Path) -> None:
    network = configured("XLNetLMHeadModel")
    network.save_pretrained(tmp_path / "folder")
    cut = ("--pattern", "channel", "-s", "50%")
    refused = here("prune", tmp_path / "folder", "-o", tmp_path / "out", *cut)
    assert refused.code == 2
    assert f"prunectl export {tmp_path / 'folder'} -o model.onnx" in refused.err
    # The exporter has no operator for the mask of this family, and what is said instead can be typed.
    refused = here("export", tmp_path / "folder", "-o", tmp_path / "model.onnx")
    (said,) = re.findall(r"--input (input_ids:\S+)", refused.err)
    assert refused.code == 5
    assert here("export", tmp_path / "folder", "-o", tmp_path / "model.onnx", "--input", said).code == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    ids = np.random.default_rng(0).integers(3, 30, port.shape)
    with torch.no_grad():
        expected = network(torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, rtol=1e-4, atol=1e-4)
    assert here("prune", tmp_path / "model.onnx", "-o", tmp_path / "small.onnx", *cut).code == 0


def test_a_folder_and_its_export_leave_the_same_labels_out_of_the_accuracy(tmp_path: Path) -> None:
    network = configured("BertForTokenClassification")
    network.save_pretrained(tmp_path / "folder")
    random = np.random.default_rng(0)
    ids, labels = random.integers(3, 30, (40, 12)), random.integers(0, 5, (40, 12))
    # In batches of 32, the last has fewer places that count than the first.
    labels[:20, 4:] = labels[32:, 1:] = -100
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    np.savez(tmp_path / "data.npz", **arrays, labels=labels)
    np.savez(tmp_path / "none.npz", **arrays, labels=np.full_like(labels, -100))
    data = ("--data", f"{tmp_path}/data.npz")
    done = here("export", tmp_path / "folder", "-o", tmp_path / "out.onnx", *data)
    assert done.code == 0, done.err
    with torch.no_grad():
        answers = network(torch.from_numpy(ids)).logits.argmax(-1).numpy()
    expected = np.mean(answers[labels != -100] == labels[labels != -100])
    for model in (tmp_path / "folder", tmp_path / "out.onnx"):
        done = here("eval", model, *data, "--json")
        assert json.loads(done.out)["evaluations"][0]["value"] == pytest.approx(expected), done.err
        refused = here("eval", model, "--data", f"{tmp_path}/none.npz")
        assert (refused.code, "has no labels that count" in refused.err) == (3, True), refused.err


@pytest.mark.parametrize("size", [-5, 0, 1_000_000])
def test_a_size_of_images_that_a_config_made_up_is_asked_for(size: int, tmp_path: Path) -> None:
    configured("ConvNextForImageClassification").save_pretrained(tmp_path / "folder")
    fields = json.loads((tmp_path / "folder/config.json").read_text())
    # Nothing is built of it, so that no weight says otherwise.
    fields["image_size"] = size
    (tmp_path / "folder/config.json").write_text(json.dumps(fields))
    refused = here("export", tmp_path / "folder", "-o", tmp_path / "out.onnx")
    assert (refused.code, "--input pixel_values:1,3,224,224" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("RobertaForSequenceClassification", ("input_ids:1,12:i64", "token_type_ids:1,12:i64")),
        ("LayoutLMForTokenClassification", ("input_ids:1,12:i64", "bbox:1,12,4:i64")),
    ],
)
def test_made_up_inputs_are_within_what_a_model_has(name: str, inputs: tuple[str, ...], tmp_path: Path) -> None:
    configured(name).save_pretrained(tmp_path / "folder")
    words = [word for each in inputs for word in ("--input", each)]
    done = here("export", tmp_path / "folder", "-o", tmp_path / "out.onnx", *words)
    assert done.code == 0, done.err


def test_inputs_that_a_model_does_not_take_are_named(tmp_path: Path) -> None:
    configured("BertForTokenClassification").save_pretrained(tmp_path / "folder")
    refused = here("export", tmp_path / "folder", "-o", tmp_path / "out.onnx", "--input", "input_ids:1,600:i64")
    assert (refused.code, "the model does not accept inputs of 1x600" in refused.err) == (2, True), refused.err
    assert "--input input_ids:SHAPE" in refused.err


def test_both_inputs_of_a_model_of_sounds_and_words_are_named_as_it_calls_them(tmp_path: Path) -> None:
    network = configured("WhisperForConditionalGeneration")
    network.save_pretrained(tmp_path / "folder")
    words = ("export", tmp_path / "folder", "-o", tmp_path / "out.onnx")
    refused = here(*words)
    (sounds, ids) = re.findall(r"--input: (\w+) and (\w+)", refused.err)[0]
    done = here(*words, "--input", f"{sounds}:1,8,40", "--input", f"{ids}:1,6:i64")
    assert done.code == 0, done.err
    random = np.random.default_rng(0)
    arrays = {sounds: random.standard_normal((1, 8, 40)).astype(np.float32), ids: random.integers(3, 30, (1, 6))}
    with torch.no_grad():
        expected = network(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, arrays)[0], expected, rtol=1e-4, atol=1e-4)


def test_an_export_leaves_the_experts_of_the_module_as_they_were() -> None:
    network = configured("GptOssForCausalLM")
    before = network.get_experts_implementation()
    with FolderModule(network, ("input_ids",)).plain():
        assert set(network.get_experts_implementation().values()) == {"batched_mm"}
    assert network.get_experts_implementation() == before


def test_no_export_is_offered_of_a_folder_that_cannot_be_built(tmp_path: Path) -> None:
    # Its experts have no gate, so that they are not separated.
    configured("NemotronHForCausalLM").save_pretrained(tmp_path / "folder")
    refused = here("prune", tmp_path / "folder", "-o", tmp_path / "out", "--pattern", "channel", "-s", "50%")
    assert (refused.code, "with --pattern layers" in refused.err, "prunectl export" in refused.err) == (2, True, False)
