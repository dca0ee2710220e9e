"""Model folders with text, held against what Hugging Face's own libraries give (`make hf` installs these)."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prunectl
from prunectl.formats import sandbox
from prunectl.formats.registry import open_model
from prunectl.formats.sandbox import SandboxPolicy
from prunectl.training.backend import LoadOptions, ModelSignature, TextInput, TrainOptions
from prunectl.training.data import tokenizer
from prunectl.training.data.registry import open_source
from prunectl.training.data.source import Batch, EpochOrder
from prunectl.training.runtimes import load_trainable
from prunectl.training.torch import blockwise
from prunectl.training.torch import folder as folders
from tests.running import here

transformers: Any = pytest.importorskip("transformers")
tokenizers: Any = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 32}
LLAMA = {**SIZE, **WORDS, "num_key_value_heads": 1}
TEXT = "\n".join(f"Line {number} of a text says that {number % 7} is not {number % 5}." for number in range(200))
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "deep": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": 6}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "bos_token_id": 0},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
    "bert": ("BertForMaskedLM", "BertConfig", {**SIZE, **WORDS}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZE, **WORDS}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZE, "image_size": 8, "patch_size": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "bart-decoder": (
        "BartForCausalLM",
        "BartConfig",
        {
            "vocab_size": 300,
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 32,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**LLAMA, "model_type": "llama"},
            "vision_config": {**SIZE, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
            "image_token_index": 0,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**SIZE, "vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 2},
            "vision_config": {**SIZE, "image_size": 8, "patch_size": 4},
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **SIZE,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "conv_dim": (8, 8),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 4),
            "classifier_proj_size": 8,
        },
    ),
}
# One layer is exported as three are, in less time.
for _name in ("llama", "gpt2", "bert", "vit"):
    _kind, _config, _fields = MODELS[_name]
    _layers = "n_layer" if _name == "gpt2" else "num_hidden_layers"
    MODELS[f"flat {_name}"] = (_kind, _config, {**_fields, _layers: 1})


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Let the library say nothing, and look nowhere."""
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(AttributeError):
        transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, in which all folders of models are made."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "corpus.txt").write_text(TEXT)
    (folder / "test.txt").write_text(TEXT[::-1])
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes and their commonest pairs."""
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = bytewise
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=bytewise.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(home: Path) -> Callable[..., Path]:
    """Folders of some families, each made when it is first asked for."""

    def make(name: str, **settings: Any) -> Path:
        folder = home / "-".join([name, *settings])
        if folder.exists():
            return folder
        kind, config, fields = MODELS[name]
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at the start of training, so that what one layer does can be seen in the next.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.to(settings.pop("dtype", torch.float32)).save_pretrained(folder, **settings)
        save_tokenizer(folder)
        (folder / "README.md").write_text(f"# {name}")
        return folder

    return make


def loaded(folder: Path) -> Any:
    """The model in a folder, which has all keys that it should have and no others."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, found = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    return model.eval()


def sequences(folder: Path, text: str, length: int) -> torch.Tensor:
    """The text as the tokenizer of a folder reads it, in rows that share one token with the next."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    count = (len(ids) - 1) // length
    return torch.stack([torch.tensor(ids[row * length : (row + 1) * length + 1]) for row in range(count)])


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """As the library counts it: e to the loss of a model that is given its own inputs as labels."""
    with torch.no_grad():
        return math.exp(float(model(rows, labels=rows).loss))


def files(folder: Path) -> dict[str, str]:
    """What lies in a folder beside its weights."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith("model")
    }


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@contextlib.contextmanager
def watched(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep what goes into every linear layer."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_perplexity_is_that_of_the_library(name: str, home: Path, made: Callable[..., Path]) -> None:
    folder = made(name)
    done = here("eval", folder, "--data", f"{home}/test.txt?length=24", "--metric", "perplexity", "--json")
    assert done.code == 0, done.err
    (found,) = done.json["evaluations"]
    expected = perplexity(loaded(folder), sequences(folder, TEXT[::-1], 24))
    assert found["value"] == pytest.approx(expected, rel=1e-5)
    assert found["higher_is_better"] is False


def test_an_encoder_has_no_perplexity_and_is_told_so(home: Path, made: Callable[..., Path]) -> None:
    done = here("eval", made("bert"), "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 2
    assert "is not a causal language model, whose target is the next token" in done.err
    assert "text alone trains and measures causal models" in done.err


def test_perplexity_is_compared_and_held_to_a_limit(home: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = made("llama"), home / "test.txt"
    assert here("prune", folder, "-o", tmp_path / "small", "-s", "60%").code == 0
    words = ("eval", folder, tmp_path / "small", "--data", data, "--metric", "perplexity", "--json")
    dense, pruned = here(*words, "--against", folder).json["evaluations"][1:]
    assert dense["drop"] == 0
    assert pruned["drop"] == pytest.approx(pruned["value"] - dense["value"], abs=1e-4)
    between = (pruned["value"] + dense["value"]) / 2
    done = here(*words, "--max", str(between))
    assert done.code == 1
    assert sorted(gate["ok"] for gate in done.json["gates"]) == [False, True]
    assert here(*words, "--min", "1").code == 2


def lowest(scores: torch.Tensor, zeros: int) -> torch.Tensor:
    """Where the lowest of each row are."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.argsort(dim=-1, stable=True)[..., :zeros], value=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_wanda_is_the_weight_times_the_norm_of_its_input(
    name: str, home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(name)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"][: 30 * 24]
    rows = torch.tensor(ids).reshape(24, 30)
    np.save(tmp_path / "ids.npy", torch.cat([rows, rows[:, :1]], 1).numpy() if name != "bert" else rows.numpy())
    model = loaded(folder)
    with watched(model) as seen, torch.no_grad():
        model(rows)
    for out, words in {"half": ("-s", "50%"), "2of4": ("--pattern", "2:4")}.items():
        options = ("--strategy", "activation-magnitude", "--data", tmp_path / "ids.npy", *words)
        done = here("prune", folder, "-o", tmp_path / out, *options)
        assert done.code == 0, done.err
        assert files(tmp_path / out) == files(folder)
        before, after, checked = state(folder), state(tmp_path / out), 0
        loaded(tmp_path / out)
        for layer, inputs in seen.items():
            weight = f"{layer}.weight"
            if weight not in before or torch.equal(before[weight], after[weight]):
                continue
            scores = before[weight].double().abs() * torch.cat(inputs).double().square().mean(0).sqrt()
            if out == "half":
                gone = lowest(scores, scores.shape[1] // 2)
            else:
                gone = lowest(scores.reshape(len(scores), -1, 4), 2).reshape(scores.shape)
            assert torch.equal(after[weight], before[weight].masked_fill(gone, 0)), weight
            checked += 1
        assert checked >= 18


@pytest.mark.parametrize("words", [("-s", "50%"), ("--pattern", "2:4")])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_sparsegpt_answers_more_like_the_dense_model_than_magnitude(
    name: str, words: tuple[str, ...], home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(name, max_shard_size="12KB") if name == "qwen3" else made(name)
    data = ("--data", f"{home}/corpus.txt?length=24", "--samples", "48")
    done = here("prune", folder, "-o", tmp_path / "obs", "--strategy", "obs", *data, *words)
    assert done.code == 0, done.err
    assert here("prune", folder, "-o", tmp_path / "plain", *words).code == 0
    assert files(tmp_path / "obs") == files(folder)
    assert {path.name for path in (tmp_path / "obs").iterdir()} == {path.name for path in folder.iterdir()}
    dense, obs, plain = map(loaded, (folder, tmp_path / "obs", tmp_path / "plain"))
    rows = sequences(folder, TEXT, 24)
    with torch.no_grad():
        answer = dense(rows).logits
        error = [float((model(rows).logits - answer).square().mean()) for model in (obs, plain)]
    assert error[0] < 0.7 * error[1]
    if name == "qwen3":
        assert obs.lm_head.weight is obs.model.embed_tokens.weight


def test_blocks_that_are_done_are_let_go(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []
    open_part = blockwise.TorchBlockwise.open

    def watched_open(self: Any, number: int, *, has_copy: bool) -> Any:
        alive.append(sum(module() is not None for module in opened))
        parts = open_part(self, number, has_copy=has_copy)
        opened.append(weakref.ref(parts[1].module if has_copy else parts[0].module))
        return parts

    monkeypatch.setattr(blockwise.TorchBlockwise, "open", watched_open)
    gc.disable()
    try:
        done = here(
            *("prune", made("deep"), "-o", tmp_path / "out", "-s", "50%", "--strategy", "obs"),
            *("--data", f"{home}/corpus.txt?length=24", "--samples", "8"),
        )
    finally:
        gc.enable()
    assert done.code == 0, done.err
    assert len(alive) == 7
    assert max(alive) == 1


def test_numbers_of_16_bits_stay_such_and_a_recipe_repeats_the_run(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made("llama", dtype=torch.bfloat16)
    options = ("--strategy", "obs", "-s", "50%", "--data", home / "corpus.txt", "--manifest", tmp_path / "run.json")
    assert here("prune", folder, "-o", tmp_path / "out", *options).code == 0
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.bfloat16}
    done = here("prune", folder, "-o", tmp_path / "again", "--recipe", tmp_path / "run.json")
    assert done.code == 0, done.err
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    assert here("verify", tmp_path / "out", "--manifest", tmp_path / "run.json").code == 0


def test_repaired_outputs_are_nearer_to_those_of_the_dense_model(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("qwen3")
    words = ("--data", f"{home}/corpus.txt?length=24", "-s", "50%", "--scope", "layer", "--samples", "48")
    matched = ("--repair", "outputs", "--repair-steps", "30", "--batch-size", "16")
    done = here("prune", folder, "-o", tmp_path / "matched", *words, *matched)
    assert done.code == 0, done.err
    assert "KL divergence" in done.err
    # What the dense model says is the same, whether it is kept or asked each time.
    monkeypatch.setattr("prunectl.calibration.match_steps.ANSWER_BYTES", 0)
    assert here("prune", folder, "-o", tmp_path / "asked", *words, *matched).code == 0
    assert here("prune", folder, "-o", tmp_path / "plain", "-s", "50%", "--scope", "layer").code == 0
    rows = sequences(folder, TEXT, 24)
    dense, *others = (loaded(path) for path in (folder, *(tmp_path / name for name in ("matched", "asked", "plain"))))
    with torch.no_grad():
        answer = dense(rows).logits.log_softmax(-1)
        far = [
            float(torch.nn.functional.kl_div(model(rows).logits.log_softmax(-1), answer, log_target=True))
            for model in others
        ]
    assert far[0] < 0.5 * far[2]
    assert far[1] == pytest.approx(far[0], rel=0.05)
    assert others[0].lm_head.weight is others[0].model.embed_tokens.weight
    zeros = {name: (tensor == 0).float().mean() for name, tensor in state(tmp_path / "matched").items()}
    assert all(share == pytest.approx(0.5, abs=0.01) for name, share in zeros.items() if "proj" in name)


def test_names_without_what_stands_before_them_in_the_model_are_known(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made("gpt2")
    shutil.copytree(folder, tmp_path / "short")
    short = {name.removeprefix("transformer."): tensor for name, tensor in state(folder).items()}
    save_file(short, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    words = ("--data", home / "test.txt", "--metric", "perplexity", "--json")
    values = [row["value"] for row in here("eval", folder, tmp_path / "short", *words).json["evaluations"]]
    assert values[0] == values[1]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("name", ["neox", "vit"])
def test_tensors_that_the_library_calls_otherwise_than_the_file_are_matched(
    name: str, made: Callable[..., Path]
) -> None:
    network = folders.open_network(open_model(made(name)), LoadOptions())
    assert set(network.names) == {tensor.name for tensor in open_model(made(name)).tensors}
    assert set(network.names) != set(network.names.values())
    network.fill()
    inputs = torch.randn(2, 3, 8, 8) if name == "vit" else torch.randint(300, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(network.module(inputs), loaded(made(name))(inputs)[0])


def padded(count: int, length: int, vocabulary: int = 300) -> dict[str, Any]:
    """Sequences of different lengths, padded with zeros, a mask of what is not padding, and labels for each token."""
    random = np.random.default_rng(0)
    mask = (np.arange(length) < random.integers(2, length + 1, (count, 1))).astype(np.int64)
    ids = random.integers(1, vocabulary, (count, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)}


def tensors_of(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize(("name", "moved"), [("flat bert", 0), ("flat gpt2", 1), ("flat llama", 1)])
def test_masks_go_in_and_padding_counts_for_nothing_as_the_library_has_it_and_in_the_export_too(
    name: str, moved: int, made: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = padded(33, 11)
    # All of an example may be padding, and an array may have nothing to do with the model.
    arrays["labels"][5] = -100
    np.savez(tmp_path / "d.npz", **arrays, number=np.arange(33))
    assert here("export", made(name), "-o", tmp_path / "m.onnx", "--data", tmp_path / "d.npz").code == 0
    words = ("--data", tmp_path / "d.npz", "--batch-size", "8", "--metric", "accuracy", "--json")
    done = here("eval", made(name), tmp_path / "m.onnx", *words)
    assert done.code == 0, done.err
    with torch.no_grad():
        outputs = loaded(made(name))(**tensors_of(arrays))
    assert f"{tmp_path / 'd.npz'}: number is not used" in done.json["warnings"]
    labels = torch.from_numpy(arrays["labels"])[:, moved:]
    right = (outputs.logits[:, : 11 - moved].argmax(-1) == labels)[labels != -100].float().mean()
    values, exported = (each["logs"] for each in done.json["evaluations"])
    assert exported["accuracy"] == pytest.approx(float(right), rel=1e-6)
    assert values["loss"] == pytest.approx(float(outputs.loss), rel=1e-5)
    assert values["accuracy"] == pytest.approx(float(right), rel=1e-6)


@pytest.mark.parametrize(("name", "is_moved"), [("bart-decoder", False), ("llava", True)])
def test_labels_are_moved_where_the_loss_of_the_library_moves_them(
    name: str, is_moved: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = padded(9, 6)
    np.savez(tmp_path / "d.npz", **arrays)
    done = here("eval", made(name), "--data", tmp_path / "d.npz", "--metric", "loss", "--json")
    assert done.code == 0, done.err
    with torch.no_grad():
        expected = loaded(made(name))(**tensors_of(arrays)).loss
    assert done.json["evaluations"][0]["value"] == pytest.approx(float(expected), rel=1e-5)
    assert any("one place before" in warning for warning in done.json["warnings"]) is is_moved


OWN = """
from torch.nn.functional import cross_entropy

def loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
"""


def test_a_loss_of_the_user_moves_labels_itself(made: Callable[..., Path], tmp_path: Path) -> None:
    arrays = padded(9, 6)
    np.savez(tmp_path / "d.npz", **arrays)
    (tmp_path / "own.py").write_text(OWN)
    own = ("--loss", f"{tmp_path / 'own.py'}:loss")
    done = here("eval", made("gpt2"), "--data", tmp_path / "d.npz", "--metric", "loss", *own, "--json")
    assert done.code == 0, done.err
    with torch.no_grad():
        expected = loaded(made("gpt2"))(**tensors_of(arrays)).loss
    assert done.json["evaluations"][0]["value"] == pytest.approx(float(expected), rel=1e-5)
    assert any("--loss gets the labels as they are" in warning for warning in done.json["warnings"])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dictionaries_in_memory_are_read_as_an_archive_of_them_is(
    name: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = padded(12, 7)
    np.savez(tmp_path / "d.npz", **arrays)

    class Examples(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {name: array[number] for name, array in arrays.items()}

    loader = torch.utils.data.DataLoader(Examples(), batch_size=5)
    targets = {"labels": arrays["labels"]}
    inputs = {key: array for key, array in arrays.items() if key not in targets}
    lists = {key: array.tolist() for key, array in arrays.items()}
    logs = [
        prunectl.eval(made(name), data, metric="accuracy").logs
        for data in (
            tmp_path / "d.npz",
            arrays,
            lists,
            Examples(),
            loader,
            lambda: iter(loader),
            lambda: (inputs, targets),
        )
    ]
    assert all(each == pytest.approx(logs[0], rel=1e-5) for each in logs)


def test_a_batch_whose_places_are_all_ignored_teaches_nothing(made: Callable[..., Path], tmp_path: Path) -> None:
    network, arrays = load_trainable(open_model(made("bert")), LoadOptions(arrays=("input_ids",))), padded(8, 8)
    ignored = Batch(arrays["input_ids"], np.full((8, 8), -100))
    network.prepare(TrainOptions(example=Batch(arrays["input_ids"], arrays["labels"]), optimizer="sgd", device="cpu"))
    before = network.tensors()
    network.step(ignored, 1.0)
    assert all(np.array_equal(array, before[name]) for name, array in network.tensors().items())
    arrays["labels"][:] = -100
    np.savez(tmp_path / "d.npz", **arrays)
    for command in (("eval",), ("finetune", "-o", tmp_path / "out", "--epochs", "1")):
        done = here(*command, made("bert"), "--data", tmp_path / "d.npz")
        assert (done.code, "has no labels that count" in done.err) == (3, True)


def test_an_export_takes_ids_and_masks_of_any_length_under_their_own_names(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    assert here("export", made("flat bert"), "-o", tmp_path / "m.onnx").code == 0
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    arrays = padded(3, 23)
    del arrays["labels"]
    assert [port.name for port in session.get_inputs()] == list(arrays)
    assert [port.name for port in session.get_outputs()] == ["logits"]
    with torch.no_grad():
        expected = loaded(made("flat bert"))(**tensors_of(arrays)).logits
    np.testing.assert_allclose(session.run(None, arrays)[0], expected, atol=1e-4)


def test_images_are_exported_in_the_size_that_the_config_names(made: Callable[..., Path], tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    done = here("export", made("flat vit"), "-o", tmp_path / "m.onnx")
    assert done.code == 0, done.err
    (port,) = runtime.InferenceSession(tmp_path / "m.onnx").get_inputs()
    assert (port.name, port.shape[1:]) == ("pixel_values", [3, 8, 8])


def test_pairs_of_texts_and_images_are_pruned_by_data_and_not_matched_one_by_one(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = padded(9, 6)
    del arrays["labels"]
    images = np.random.default_rng(2).standard_normal((9, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", **arrays, pixel_values=images)
    words = ("prune", made("clip"), "-o", tmp_path / "out", "-s", "60%", "--data", tmp_path / "d.npz")
    done = here(*words, "--strategy", "activation-magnitude", "--scope", "layer")
    assert done.code == 0, done.err
    pruned = {name for name, tensor in state(tmp_path / "out").items() if float((tensor == 0).float().mean()) > 0.5}
    assert {name.partition(".")[0] for name in pruned} >= {"text_model", "vision_model"}
    done = here(*words, "--repair", "outputs", "--force")
    assert (done.code, "compare the examples of a batch" in done.err) == (2, True)


def test_a_folder_with_a_parametrized_layer_is_evaluated_as_the_library_has_it(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    sounds, labels = np.random.default_rng(3).standard_normal((7, 400)).astype(np.float32), np.arange(7) % 2
    np.savez(tmp_path / "d.npz", input_values=sounds, labels=labels)
    done = here("eval", made("wav2vec2"), "--data", tmp_path / "d.npz", "--metric", "loss", "--json")
    assert done.code == 0, done.err
    with torch.no_grad():
        expected = loaded(made("wav2vec2"))(torch.from_numpy(sounds), labels=torch.from_numpy(labels)).loss
    assert done.json["evaluations"][0]["value"] == pytest.approx(float(expected), rel=1e-5)


def test_an_encoder_with_a_decoder_takes_the_arrays_of_both(made: Callable[..., Path], tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = {"input_ids": random.integers(300, size=(12, 9)), "decoder_input_ids": random.integers(300, size=(12, 5))}
    labels = random.integers(300, size=(12, 5))
    np.savez(tmp_path / "d.npz", **arrays, labels=labels)
    done = here("eval", made("t5"), "--data", tmp_path / "d.npz", "--metric", "accuracy", "--json")
    assert done.code == 0, done.err
    with torch.no_grad():
        outputs = loaded(made("t5"))(**tensors_of(arrays), labels=torch.from_numpy(labels))
    assert done.json["evaluations"][0]["logs"]["loss"] == pytest.approx(float(outputs.loss), rel=1e-5)
    words = ("--data", tmp_path / "d.npz", "-s", "60%", "--strategy", "obs", "--scope", "layer", "--json")
    done = here("prune", made("t5"), "-o", tmp_path / "pruned", *words)
    assert done.code == 0, done.err
    pruned = {name for name, tensor in state(tmp_path / "pruned").items() if float((tensor == 0).float().mean()) > 0.5}
    assert {name.partition(".")[0] for name in pruned} == {"encoder", "decoder"}
    done = here("eval", made("t5"), "--data", tmp_path / "d.npz[input_ids,labels]")
    assert (done.code, "input_ids and decoder_input_ids" in done.err) == (2, True)


def test_code_in_a_folder_runs_only_with_trust(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made("llama"), tmp_path / "own")
    mark, config = tmp_path / "ran", tmp_path / "own" / "config.json"
    (tmp_path / "own" / "own.py").write_text(CODE.format(mark=str(mark)))
    references = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields = {**json.loads(config.read_text()), "model_type": "own", "auto_map": references}
    config.write_text(json.dumps({**fields, "architectures": ["OwnModel"]}))
    words = ("eval", tmp_path / "own", "--data", home / "test.txt", "--metric", "perplexity")
    done = here(*words)
    assert done.code == 3
    assert "--trust" in done.err
    assert not mark.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    done = here(*words, "--trust")
    assert done.code == 0, done.err
    assert mark.exists()


def test_nothing_is_fetched_and_the_program_around_may_go_on_to(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")
    was_offline: list[bool] = []
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        opened = kind.from_pretrained

        def watch(*words: Any, opened: Any = opened, **more: Any) -> Any:
            was_offline.append(hub.constants.is_offline_mode() and more["local_files_only"])
            return opened(*words, **more)

        monkeypatch.setattr(kind, "from_pretrained", watch)
    before = hub.constants.is_offline_mode()
    assert here("eval", made("llama"), "--data", home / "test.txt", "--metric", "perplexity").code == 0
    assert len(was_offline) >= 2
    assert all(was_offline)
    assert hub.constants.is_offline_mode() is before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is"),
        ({"depths": [3_000_000, 2]}, "depths is 3000000"),
        ({"num_hidden_layers": 2}, ""),
        ({"num_hidden_layers": 4}, "no tensor"),
        ({"hidden_size": 1 << 40}, ""),
        ({"vocab_size": 10**12}, ""),
        ({"hidden_size": "x"}, "cannot build"),
        ({"model_type": "unheard"}, "no model_type 'unheard'"),
        ({"model_type": ["llama"]}, "cannot build"),
        ({"architectures": ["AutoModel"]}, "'AutoModel'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'"),
        ({"architectures": 7}, "cannot build"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "an encoder with a decoder"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    changed: dict[str, Any], message: str, home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == (0 if changed == {"num_hidden_layers": 2} else done.code)
    assert done.code in {0, 2, 3}
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_tokenizer_that_makes_a_text_many_times_as_long_is_refused(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    path = tmp_path / "odd" / "tokenizer.json"
    step = {"type": "Replace", "pattern": {"String": " "}, "content": "xyz"}
    whole = json.loads(path.read_text()) | {"normalizer": {"type": "Sequence", "normalizers": [step] * 9}}
    path.write_text(json.dumps(whole))
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 3
    assert "19,683 times as long" in done.err


def test_a_tokenizer_that_puts_a_million_tokens_around_a_text_is_refused(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    path, sequence = tmp_path / "odd" / "tokenizer.json", {"Sequence": {"id": "A", "type_id": 0}}
    step = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000 + [sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0] * 1000, "tokens": ["<s>"] * 1000}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": step}))
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 3
    assert "it makes 1,00" in done.err


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "vocab", "{outside}"),
        ("tokenizer_config.json", "vocab_file", "../outside.txt"),
        ("tokenizer_config.json", "merges", "outside.txt"),
        ("tokenizer_config.json", "init_inputs", ["{outside}"]),
        ("tokenizer_config.json", "sp_model_kwargs", {"model_file": "/dev/null"}),
        ("tokenizer_config.json", "vocab", "{pipe}"),
        ("special_tokens_map.json", "vocab", "{outside}"),
    ],
)
def test_a_tokenizer_reads_no_file_outside_its_folder(
    name: str,
    key: str,
    value: Any,
    home: Path,
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    (tmp_path / "odd" / "tokenizer.json").unlink()
    (tmp_path / "odd" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (outside := tmp_path / "outside.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nLine\n")
    os.mkfifo(pipe := tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"tokenizer_class": "BertTokenizer", key: value})
    (tmp_path / "odd" / name).write_text(text.replace("{outside}", str(outside)).replace("{pipe}", str(pipe)))
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 3
    assert "which is not a file of the folder" in re.sub(r"\s+", " ", done.err)


def test_a_path_that_leads_to_nothing_is_kept_in_many_configurations(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "same")
    path = tmp_path / "same" / "tokenizer_config.json"
    more = {"special_tokens_map_file": "/nowhere/.cache/special_tokens_map.json", "vocab_file": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert here("eval", tmp_path / "same", "--data", home / "test.txt", "--metric", "perplexity").code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece.bpe.model", "additional_chat_templates/a.jinja"])
def test_a_pipe_in_a_folder_is_not_waited_for(name: str, home: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    path = tmp_path / "odd" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 3
    assert "is not a regular file" in re.sub(r"\s+", " ", done.err)


@pytest.mark.usefixtures("own_process")
def test_what_a_tokenizer_would_be_is_made_in_its_own_process(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    (tmp_path / "odd" / "tokenizer.json").write_text('{"normalizer": {"content": "' + "x" * 999 + '"}}')
    read: list[object] = []
    monkeypatch.setattr(tokenizer, "_check_growth", read.append)
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert not read
    assert done.code == 3


def test_a_folder_is_trained_on_text_with_its_zeros_kept(home: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    words = ("--data", home / "corpus.txt", "--epochs", "2")
    done = here("finetune", made("llama"), "-o", tmp_path / "out", *words, "-s", "50%", "--scope", "layer")
    assert done.code == 0, done.err
    before, after = loaded(made("llama")), loaded(tmp_path / "out")
    weight = after.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert torch.count_nonzero(weight) == weight.numel() // 2
    kept = weight != 0
    assert not torch.equal(weight[kept], before.get_parameter("model.layers.1.mlp.up_proj.weight")[kept])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in made("llama").iterdir()}
    rows = sequences(made("llama"), TEXT, 24)
    assert perplexity(after, rows) < perplexity(before, rows)
    done = here("finetune", made("bert"), "-o", tmp_path / "no", *words)
    assert done.code == 2
    assert "is not a causal language model" in done.err
    assert "name data with targets" in done.err


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tokenizers in a process of their own, as users have them."""
    monkeypatch.setattr(sandbox, "policy", SandboxPolicy.SANDBOX)


@pytest.mark.usefixtures("own_process")
def test_a_tokenizer_that_searches_for_ever_is_given_up(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    path = tmp_path / "odd" / "tokenizer.json"
    # From each place, all ways to part what follows are tried: two minutes for 3,000 letters.
    step = {"type": "Split", "pattern": {"Regex": r"(a*)(a*)\b\d"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": step}))
    (tmp_path / "long.txt").write_text("a" * 3_000 + " and so on " * 40)
    monkeypatch.setattr(tokenizer, "_SECONDS", 1)
    words = ("eval", tmp_path / "odd", "--metric", "perplexity", "--data")
    done = here(*words, tmp_path / "long.txt")
    assert done.code == 3
    assert f"the tokenizer in {tmp_path}/odd takes too long" in done.err
    assert "--data ids.npy" in done.err
    assert here(*words, home / "test.txt").code == 0


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("is_causal", [True, False])
def test_in_its_own_process_a_tokenizer_gives_what_it_gives_here(
    is_causal: bool, home: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextInput(made("llama" if is_causal else "bert"), 300, 32, is_causal)
    signature = ModelSignature((), (), is_channels_first=True, text=text)
    found = []
    for policy in SandboxPolicy:
        monkeypatch.setattr(sandbox, "policy", policy)
        source = open_source(str(home / "test.txt"), signature=signature, seed=0)
        found.append(next(source.batches(EpochOrder(9))).x)
    assert np.array_equal(*found)


def test_a_block_that_gives_no_numbers_is_not_taken_for_the_least_important(
    home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    (path,) = (tmp_path / "odd").glob("*.safetensors")
    arrays = load_file(path)
    arrays["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(arrays, path, {"format": "pt"})
    words = ("--pattern", "layers", "--blocks", "1", "--strategy", "block-influence")
    done = here("prune", tmp_path / "odd", "-o", tmp_path / "out", *words, "--data", home / "test.txt")
    assert done.code == 5
    assert "block 0 is NaN or infinite" in done.err


def test_tables_that_only_a_config_asks_for_are_refused(home: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("bert"), tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 10**10}))
    data = ("--data", home / "test.txt", "-s", "50%", "--strategy", "activation-magnitude")
    done = here("prune", tmp_path / "odd", "-o", tmp_path / "out", *data)
    assert done.code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"{}", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}', None]
)
def test_a_broken_tokenizer_is_refused_and_ids_need_none(
    content: bytes | None, home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made("llama"), tmp_path / "odd")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "odd" / name).unlink()
    if content is not None:
        (tmp_path / "odd" / "tokenizer.json").write_bytes(content)
    done = here("eval", tmp_path / "odd", "--data", home / "test.txt", "--metric", "perplexity")
    assert done.code == 3, done.err
    assert "tokenizer" in done.err
    np.save(tmp_path / "ids.npy", np.arange(290))
    assert here("eval", tmp_path / "odd", "--data", tmp_path / "ids.npy", "--metric", "perplexity").code == 0


FITTED = ("--strategy", "obs", "-s", "60%", "--repair")
RANKED = (
    ("--strategy", "activation-magnitude", "-s", "50%"),
    ("--strategy", "activation-magnitude", "-s", "50%", "--scope", "global"),
    ("--strategy", "activation-magnitude", "--pattern", "2:4", "--repair"),
)


# Every family is walked through in the way that asks most of it, and every way with a decoder and an encoder.
@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, FITTED) for name in ("llama", "deep", "qwen3", "gpt2", "gemma2", "bert", "neox")),
        *((name, words) for name in ("llama", "bert") for words in RANKED),
    ],
)
def test_one_block_at_a_time_gives_what_the_whole_model_gives(
    name: str,
    words: tuple[str, ...],
    home: Path,
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, data = made(name), ("--data", f"{home}/corpus.txt?length=24", "--samples", "12", "--batch-size", "8")
    seen: list[object] = []
    begin = blockwise.TorchBlockwise.begin
    monkeypatch.setattr(blockwise.TorchBlockwise, "begin", lambda *words: (seen.append(words[0]), begin(*words)))
    done = here("prune", folder, "-o", tmp_path / "blocks", *data, *words)
    assert done.code == 0, done.err
    assert seen
    monkeypatch.setattr(blockwise, "open_blockwise", lambda *_: None)
    assert here("prune", folder, "-o", tmp_path / "whole", *data, *words).code == 0
    first, second = state(tmp_path / "blocks"), state(tmp_path / "whole")
    for key, tensor in first.items():
        # What goes into a block is rounded in the same way, but for what reaches it through an exported product.
        assert float(((tensor == 0) != (second[key] == 0)).float().mean()) < 0.01, key
        assert float((tensor - second[key]).abs().mean()) < 1e-3, key
    zeros = [sum(int((tensor == 0).sum()) for tensor in found.values()) for found in (first, second)]
    assert zeros[0] == zeros[1]


def test_the_weights_of_one_block_are_in_memory(home: Path, made: Callable[..., Path]) -> None:
    model = open_model(made("llama"))
    network = blockwise.open_blockwise(model, LoadOptions())
    assert network is not None
    network.begin([np.arange(24).reshape(2, 12)])
    inner = network._network.module.inner

    def in_memory() -> set[int]:
        names = {name for name, parameter in inner.named_parameters() if parameter.device.type != "meta"}
        return {network.part_of(name) for name in names}

    assert in_memory() == {3}
    for number in range(3):
        network.open(number, has_copy=True)
        assert in_memory() == {number, 3}
        assert 0 < network.advance(number) < 1
    assert in_memory() == {3}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_blocks_that_change_least_are_removed(
    name: str, home: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(name)
    np.save(tmp_path / "ids.npy", rows := np.arange(3, 3 + 5 * 13).reshape(5, 13))
    words = ("--pattern", "layers", "--strategy", "block-influence", "--data", tmp_path / "ids.npy")
    done = here("prune", folder, "-o", tmp_path / "short", "--blocks", "2", *words)
    assert done.code == 0, done.err
    ids = torch.tensor(rows if name == "bert" else rows[:, :-1])
    with torch.no_grad():
        states = loaded(folder)(ids, output_hidden_states=True).hidden_states[:4]
    if name != "bert":
        # What the library gives as the last has gone through the norm at the end: only the first two can be told.
        states = states[:3]
    expected = [
        1 - float(torch.nn.functional.cosine_similarity(one, two, dim=-1).mean())
        for one, two in itertools.pairwise(states)
    ]
    found = dict(re.findall(r"(\d) \(([\d.e-]+)\)", done.err.replace("\n", " ")))
    assert len(found) == 2
    for number, value in found.items():
        if int(number) < len(expected):
            assert float(value) == pytest.approx(expected[int(number)], rel=2e-2)
    loaded(tmp_path / "short")
    assert here("prune", folder, "--dry-run", "--pattern", "layers", "--blocks", "3", *words[2:]).code == 2


def test_influence_needs_data_and_blocks_that_run_one_by_one(
    home: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("prune", made("llama"), "-o", tmp_path / "out", "--pattern", "layers", "--blocks", "1")
    influence, data = ("--strategy", "block-influence"), ("--data", home / "corpus.txt")
    assert "needs data" in here(*words, *influence).err
    assert "has no effect" in here(*words, *data).err
    assert "leave out one" in here(*words[:-2], "--layers", "1", *influence, *data).err
    monkeypatch.setattr(blockwise, "open_blockwise", lambda *_: None)
    assert "one by one" in here(*words, *influence, *data).err
    assert not (tmp_path / "out").exists()
