"""Folders of many families, as Hugging Face's own libraries write and load them (`make hf` installs these).

Each is made from a configuration, goes through the commands, and is loaded again: no key is missing or unexpected, and
it answers as the original does with the same weights masked in memory, or with the same blocks passed by.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunectl.formats.base import Role, Storage, Tensor
from prunectl.formats.state_dict import describe
from tests.running import here

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = {**WORDS, **SIZE, "num_key_value_heads": 1}
IDS = torch.arange(3, 15).reshape(1, 12)


@dataclass(frozen=True)
class Made:
    """A tiny model of a family, and how it is asked."""

    config: Callable[[], Any]
    model: str
    inputs: dict[str, Any]
    blocks: tuple[str, ...] = ("",)
    """Its stacks, as `--layers` names them."""
    beside: dict[str, str] | None = None


def of(name: str, model: str, inputs: dict[str, Any] | None = None, /, **settings: Any) -> Made:
    return Made(lambda: getattr(transformers, name)(**settings), model, inputs or {"input_ids": IDS})


PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
IMAGES = {"image_size": 16, "patch_size": 8}
BERT = {**WORDS, **SIZE, "max_position_embeddings": 32}
MODULES = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}])
T5_SIZE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2, "decoder_start_token_id": 0}
SPEECH = {
    "d_model": 16,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}
LATENT = {
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS = {
    "bert": of("BertConfig", "BertForMaskedLM", **BERT),
    "minilm": Made(
        lambda: transformers.BertConfig(**BERT),
        "BertModel",
        {"input_ids": IDS},
        beside={"modules.json": MODULES, "1_Pooling/config.json": '{"word_embedding_dimension": 16}'},
    ),
    "t5": Made(
        lambda: transformers.T5Config(**WORDS, **T5_SIZE),
        "T5ForConditionalGeneration",
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        ("encoder", "decoder"),
    ),
    "whisper": Made(
        lambda: transformers.WhisperConfig(**WORDS, **SPEECH),
        "WhisperForConditionalGeneration",
        {"input_features": torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16), "decoder_input_ids": IDS[:, :4]},
        ("encoder", "decoder"),
    ),
    "vit": of("ViTConfig", "ViTForImageClassification", {"pixel_values": PIXELS}, **SIZE, **IMAGES),
    "timesformer": of(
        "TimesformerConfig",
        "TimesformerForVideoClassification",
        {"pixel_values": torch.stack([PIXELS, -PIXELS], 1)},
        **SIZE,
        **IMAGES,
        num_frames=2,
    ),
    "mamba": of("MambaConfig", "MambaForCausalLM", **WORDS, hidden_size=16, num_hidden_layers=4, state_size=4),
    "clip": Made(
        lambda: transformers.CLIPConfig(
            text_config={**WORDS, **SIZE, "max_position_embeddings": 16},
            vision_config={**SIZE, **IMAGES},
            projection_dim=8,
        ),
        "CLIPModel",
        {"input_ids": IDS, "pixel_values": PIXELS},
        ("text", "vision"),
    ),
    "gpt2": of("GPT2Config", "GPT2LMHeadModel", **WORDS, n_embd=16, n_layer=4, n_head=2, n_positions=16),
    "llama": of("LlamaConfig", "LlamaForCausalLM", **GROUPED),
    "qwen3": of("Qwen3Config", "Qwen3ForCausalLM", **GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma": of("GemmaConfig", "GemmaForCausalLM", **GROUPED, head_dim=8),
    "mixtral": of("MixtralConfig", "MixtralForCausalLM", **GROUPED, num_local_experts=3),
    "deepseek": of(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", **{**GROUPED, "num_key_value_heads": 2}, **LATENT
    ),
}  # fmt: skip
CASES = [
    *((name, "single") for name in MODELS),
    # Containers know nothing of families, but for tensors that are one and the same, files beside, and experts in
    # stacks, which the library takes apart.
    *((name, layout) for name in ("minilm", "t5", "qwen3", "mixtral") for layout in ("shards", "bin")),
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Let the library say nothing, and look nowhere."""
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(AttributeError):
        transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Folders of all families, each made when it is first asked for."""
    home = tmp_path_factory.mktemp("families")

    def made(name: str, layout: str) -> Path:
        folder: Path = home / f"{name}-{layout}"
        if folder.exists():
            return folder
        family = MODELS[name]
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(family.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at the start of training: what a block does can then be seen in the outputs.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, max_shard_size="8KB" if layout == "shards" else "5GB")
        for path, text in {"tokenizer.json": "{}", "README.md": f"# {name}", **(family.beside or {})}.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
        if layout == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        return folder

    return made


def loaded(name: str, folder: Path) -> Any:
    """The model in a folder, which has all keys that it should have and no others."""
    kind = getattr(transformers, MODELS[name].model)
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def outputs(name: str, model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**MODELS[name].inputs, return_dict=True)
    keys = ("logits", "last_hidden_state", "text_embeds", "image_embeds")
    return [found[key] for key in keys if key in found]


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    assert len(first) == len(second) > 0
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(names: dict[str, str]) -> set[str]:
    return {name for name in names if name.startswith(("model", "pytorch_model")) and not name.startswith("modules")}


def masked(original: Any, pruned: Any) -> Any:
    """A copy of the original with zeros where the pruned one has them, whose other weights are the same."""
    reference = copy.deepcopy(original)
    state, zeros = reference.state_dict(), 0
    for key, tensor in pruned.state_dict().items():
        gone = (tensor == 0) & (state[key] != 0)
        zeros += int(gone.sum())
        state[key] = torch.where(gone, torch.zeros_like(tensor), state[key])
        assert torch.equal(state[key], tensor), key
    assert zeros > 0
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_pruned_folders_load_and_answer_as_their_masks_do(
    name: str, layout: str, sources: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = sources(name, layout)
    before, original = hashes(source), loaded(name, source)
    runs = {"half": ("-s", "50%", "--manifest", tmp_path / "run.json"), "2of4": ("--pattern", "2:4")}
    for out in {"single": ("half", "2of4"), "shards": ("half",), "bin": ("2of4",)}[layout]:
        assert here("prune", source, "-o", tmp_path / out, *runs[out]).code == 0
        after = hashes(tmp_path / out)
        assert {key: after[key] for key in after.keys() - weights(after)} == {
            key: before[key] for key in before.keys() - weights(before)
        }
        pruned = loaded(name, tmp_path / out)
        assert distance(outputs(name, pruned), outputs(name, masked(original, pruned))) <= 1e-6
    if layout != "bin":
        assert here("prune", source, "-o", tmp_path / "again", "--recipe", tmp_path / "run.json").code == 0
        assert hashes(tmp_path / "again") == hashes(tmp_path / "half")
        # Of a pickle, which is written anew, the bytes may differ; of the others there is nothing to strip.
        assert here("strip", source, "-o", tmp_path / "stripped").code == 0
        assert hashes(tmp_path / "stripped") == before
    # The other container, with one file for shards and shards for one file.
    to, size = {"single": ("torch", "8KB"), "shards": ("torch", "1GB"), "bin": ("safetensors", "8KB")}[layout]
    assert here("export", source, "-o", tmp_path / "other", "--to", to, "--shard-size", size).code == 0
    assert distance(outputs(name, loaded(name, tmp_path / "other")), outputs(name, original)) <= 1e-6


def stack_of(model: Any, stack: str) -> Any:
    """The list of blocks of a model, by its length and by what stands in its name."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 4 and stack in path
    ]
    ((_, found),) = lists
    return found


def pass_by(block: Any) -> None:
    """Let a block hand on what it gets."""

    def hand_on(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.register_forward_hook(hand_on, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "single") for name in MODELS), ("deepseek", "shards"), ("t5", "shards")]
)
def test_without_blocks_a_model_answers_as_if_they_passed_by(
    name: str, layout: str, sources: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = sources(name, layout)
    before, original = hashes(source), loaded(name, source)
    dense = outputs(name, original)
    stacks = MODELS[name].blocks
    wanted = ",".join(f"{stack}:0,2" if stack else "0,2" for stack in stacks)
    done = here("prune", source, "-o", tmp_path / "short", "--pattern", "layers", "--layers", wanted)
    assert done.code == 0, done.err
    after = hashes(tmp_path / "short")
    changed = weights(after) | {"config.json"}
    assert {key: after[key] for key in after.keys() - changed} == {
        key: before[key] for key in before.keys() - weights(before) - {"config.json"}
    }
    short = loaded(name, tmp_path / "short")
    for stack in stacks:
        blocks = stack_of(original, stack)
        for number in (0, 2):
            pass_by(blocks[number])
    reference = outputs(name, original)
    assert distance(reference, dense) > 1e-3
    assert distance(outputs(name, short), reference) <= 1e-5


KINDS = {
    "kernel": ("Linear", "Conv1d", "Conv2d", "ConvTranspose2d"),
    "embedding": ("Embedding", "T5Gemma2TextScaledWordEmbedding"),
    "norm": ("LayerNorm", "SamLayerNorm", "RMSNorm", "DeformableDetrFrozenBatchNorm2d"),
    "router": ("TopKRouter", "TopkRouter"),
}
"""What the library's modules are, by the ends of their names."""


def unread(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of which no more is known."""
    return Tensor(name, "", shape, np.dtype(np.float32), Role.OTHER, Storage(name, 0, None, 0))


@pytest.mark.parametrize(
    ("config", "model"),
    [
        *(("SamConfig", "SamModel"), ("DacConfig", "DacModel"), ("MambaConfig", "MambaForCausalLM")),
        *(("Qwen3MoeConfig", "Qwen3MoeForCausalLM"), ("GraniteMoeConfig", "GraniteMoeForCausalLM")),
        *(("JambaConfig", "JambaForCausalLM"), ("Mask2FormerConfig", "Mask2FormerModel")),
        *(("Gemma3nTextConfig", "Gemma3nTextModel"), ("BlipConfig", "BlipForConditionalGeneration")),
        ("JetMoeConfig", "JetMoeForCausalLM"),
    ],
)
def test_roles_are_those_of_the_modules_that_the_tensors_are_in(config: str, model: str) -> None:
    with torch.device("meta"):
        network = getattr(transformers, model)(getattr(transformers, config)())
    expected = {
        f"{name}.weight": role
        for name, module in network.named_modules()
        for role, ends in KINDS.items()
        if type(module).__name__.endswith(ends) and getattr(module, "weight", None) is not None
    }
    # Where the router is a linear layer within.
    gates = [name for name, module in network.named_modules() if type(module).__name__.endswith("TopKGating")]
    expected |= {f"{name}.layer.weight": "router" for name in gates}
    given = [unread(name, tuple(one.shape)) for name, one in network.state_dict().items()]
    # What is tied to a table has two modules.
    tied = {name for name in network.all_tied_weights_keys if name in expected}
    found = {tensor.name: str(tensor.role) for tensor in describe(given)}
    assert len(expected) > 10
    assert {name: found[name] for name in expected.keys() - tied} == {
        name: role for name, role in expected.items() if name not in tied
    }


def test_a_layer_is_no_table_for_its_name_alone() -> None:
    kernels = {
        "vit.to_tokens.weight": (8, 16),
        "x_token.weight": (64, 16),
        "head.codebook.weight": (64, 16),
        # Experts that each have a gate are no stacks, and the gate is no router.
        "experts.0.gate.weight": (64, 16),
        "experts.0.input_linear.weight": (64, 16),
    }
    tables = {"mask_tokens.weight": (4, 16), "quantizer.0.codebook.weight": (64, 16), "tokens.weight": (64, 16)}
    given = [unread(name, shape) for name, shape in {**kernels, **tables}.items()]
    found = {tensor.name: tensor.role for tensor in describe(given)}
    assert found == dict.fromkeys(kernels, Role.KERNEL) | dict.fromkeys(tables, Role.EMBEDDING)


def test_a_strangers_name_takes_steps_by_its_length() -> None:
    # Where they grow with the square of it, this takes a quarter of an hour.
    (tensor,) = describe([unread("a" + ".1" * 128_000 + ".b.weight", (8, 8))])
    assert tensor.role is Role.KERNEL


def test_an_adapter_loads_into_its_base_again(sources: Callable[[str, str], Path], tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    base = loaded("llama", sources("llama", "single"))
    torch.manual_seed(1)
    adapter = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapter.save_pretrained(tmp_path / "lora")
    before = hashes(tmp_path / "lora")
    assert here("prune", tmp_path / "lora", "-o", tmp_path / "small", "-s", "50%").code == 0
    assert here("export", tmp_path / "lora", "-o", tmp_path / "bin", "--to", "torch").code == 0
    after = hashes(tmp_path / "small")
    assert {name for name in before if after.get(name) != before[name]} == {"adapter_model.safetensors"}
    pruned = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small").eval()
    reference = masked(adapter, pruned)
    assert distance(outputs("llama", pruned), outputs("llama", reference)) <= 1e-6
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "bin").eval()
    assert distance(outputs("llama", again), outputs("llama", adapter)) == 0


def test_a_checkpoint_of_diffusers_loads_as_it_was_trained_and_as_its_average(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    training: Any = pytest.importorskip("diffusers.training_utils")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    kind = diffusers.UNet2DModel
    network = kind(sample_size=8, layers_per_block=1, norm_num_groups=8, **blocks).eval()
    average = training.EMAModel(network.parameters(), decay=0.5, model_cls=kind, model_config=network.config)
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        average.step(network.parameters())
    network.save_pretrained(tmp_path / "checkpoint-3/unet")
    average.save_pretrained(str(tmp_path / "checkpoint-3/unet_ema"))
    expected = {"raw": "unet", "ema": "unet_ema"}
    for keep, folder in expected.items():
        assert here("strip", tmp_path / "checkpoint-3", "-o", tmp_path / keep, "--keep", keep).code == 0
        state = kind.from_pretrained(tmp_path / "checkpoint-3" / folder).state_dict()
        loaded_again, facts = kind.from_pretrained(tmp_path / keep / "unet", output_loading_info=True)
        assert not any(facts.values()), facts
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded_again.state_dict().items())
        assert [path.name for path in (tmp_path / keep).iterdir()] == ["unet"]
        # What averaged is no setting of the network.
        assert hashes(tmp_path / keep)["unet/config.json"] == hashes(tmp_path / "checkpoint-3")["unet/config.json"]
    raw, ema = (load_file(tmp_path / keep / "unet/diffusion_pytorch_model.safetensors") for keep in expected)
    assert not all(torch.equal(tensor, ema[name]) for name, tensor in raw.items())


def test_a_pipeline_and_a_part_of_it_load_again(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    network = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=8, **blocks).eval()
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipe")
    before = hashes(tmp_path / "pipe")
    assert here("prune", tmp_path / "pipe", "-o", tmp_path / "out", "-s", "50%").code == 0
    after = hashes(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} == {"unet/diffusion_pytorch_model.safetensors"}
    assert here("prune", tmp_path / "pipe/unet", "-o", tmp_path / "unet", "-s", "50%").code == 0
    assert hashes(tmp_path / "unet") == {
        path.removeprefix("unet/"): digest for path, digest in after.items() if path.startswith("unet/")
    }
    pruned = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet.eval()
    reference = masked(network, pruned)
    noise = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    with torch.no_grad():
        assert float((pruned(noise, 1).sample - reference(noise, 1).sample).abs().max()) <= 1e-6
