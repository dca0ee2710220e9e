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

from tests.running import here

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SOUND = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DETECTOR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
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
    elif name == "GptOssForCausalLM":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 8}
        config = transformers.GptOssConfig(vocab_size=32, pad_token_id=0, **SIZE, **experts)
    elif name == "BertForTokenClassification":
        config = transformers.BertConfig(vocab_size=32, num_labels=5, **SIZE)
    else:
        config = transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=32)
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
