"""Families of Hugging Face models: for each model_type, the config key that counts its blocks, and the blocks' names.

The table is data, without code for any single family; blocks of other models are recognised by the tensors' names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import WEIGHTS, ModelFile, Tensor, dtype_name
from prunectl.formats.extents import file_bytes
from prunectl.formats.folder import real_file, training_state
from prunectl.formats.registry import is_inside_folder
from prunectl.formats.safe_json import read_object
from prunectl.units import nbytes

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Stack:
    """A sequence of blocks of the same structure, such as an encoder."""

    key: str
    """The config key with the number of blocks; dots lead into nested objects: `text_config.num_hidden_layers`."""
    prefix: str
    """A regular expression for the part of a tensor's name before the block number, such as "decoder[.]layers"."""
    name: str = ""
    """The stack's name in a model with several: `encoder`."""
    default_key: str = ""
    """The config key that is used where `key` is missing or null."""
    first_only: str = ""
    """Part of the names of tensors that only the first block has, and passes on to the next block if it is removed."""


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Models with the same config keys and tensor names."""

    model_types: frozenset[str]
    stacks: tuple[Stack, ...]
    needs: str = ""
    """The config key that lists the type of each block; without this list, the type depends on the block's number."""


def _row(model_types: str, *stacks: Stack, needs: str = "") -> ModelFamily:
    return ModelFamily(frozenset(model_types.split()), stacks, needs)


_NUM_LAYERS = "num_hidden_layers"
FAMILIES = (
    _row(
        "llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma phi phi3 phimoe starcoder2 olmo olmo2 "
        "olmoe granite granitemoe stablelm deepseek_v2 deepseek_v3 glm glm4 glm4_moe persimmon nemotron helium "
        "seed_oss ernie4_5 hunyuan_v1_dense dots1 bitnet apertus arcee cohere gpt_neox internlm3",
        Stack(_NUM_LAYERS, "layers"),
    ),
    _row("gemma2 gemma3_text cohere2 olmo3 gpt_oss smollm3 exaone4", Stack(_NUM_LAYERS, "layers"), needs="layer_types"),
    _row(
        "gemma3 llava mistral3 paligemma",
        Stack(f"text_config.{_NUM_LAYERS}", r"language_model(?:\.model)?\.layers"),
    ),
    _row("gpt2 gpt_bigcode gptj codegen bloom", Stack("n_layer", "h")),
    _row("falcon", Stack(_NUM_LAYERS, "h")),
    _row("mpt", Stack("n_layers", "blocks")),
    _row("opt", Stack(_NUM_LAYERS, r"decoder\.layers")),
    _row(
        "bert roberta xlm-roberta xlm-roberta-xl camembert electra ernie mpnet deberta deberta-v2 layoutlm rembert "
        "nystromformer megatron-bert vit deit audio-spectrogram-transformer vit_mae vit_msn ijepa "
        "timesformer",
        Stack(_NUM_LAYERS, r"encoder\.layer"),
    ),
    _row("mamba mamba2 falcon_mamba", Stack(_NUM_LAYERS, r"backbone\.layers")),
    _row("distilbert", Stack("n_layers", r"transformer\.layer")),
    _row(
        "wav2vec2 hubert clip_text_model clip_vision_model siglip_text_model siglip_vision_model",
        Stack(_NUM_LAYERS, r"encoder\.layers"),
    ),
    _row(
        "t5 mt5 umt5 longt5",
        Stack("num_layers", r"encoder\.block", "encoder", first_only="relative_attention_bias"),
        Stack("num_decoder_layers", r"decoder\.block", "decoder", "num_layers", "relative_attention_bias"),
    ),
    _row(
        "bart mbart pegasus marian m2m_100 whisper blenderbot plbart",
        Stack("encoder_layers", r"encoder\.layers", "encoder"),
        Stack("decoder_layers", r"decoder\.layers", "decoder"),
    ),
    _row(
        "clip siglip",
        Stack(f"text_config.{_NUM_LAYERS}", r"text_model\.encoder\.layers", "text"),
        Stack(f"vision_config.{_NUM_LAYERS}", r"vision_model\.encoder\.layers", "vision"),
    ),
)
COUNTS = frozenset(stack.key.rpartition(".")[2] for family in FAMILIES for stack in family.stacks)
"""All config keys that count blocks, without their path."""


def family_of(model_type: str) -> ModelFamily | None:
    """The family of a model_type; None if the table does not have it."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def block_pattern(stack: Stack) -> re.Pattern[str]:
    """A pattern whose group 1 is the block number in a tensor's name."""
    return re.compile(rf"(?:^|\.){stack.prefix}\.(\d{{1,6}})\.")


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in nested objects; None if it is missing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def count_of(config: Mapping[str, Any], stack: Stack) -> int | None:
    """The number of blocks of a stack according to a config; None if the config has no such number."""
    for key in filter(None, (stack.key, stack.default_key)):
        value = lookup(config, key)
        if type(value) is int and value > 0:
            return value
    return None


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts."""

    total: int
    """Experts in each block."""
    active: int
    """Experts that process each token."""
    active_params: int
    """Parameters of the whole model that process one token."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The architecture of a model folder, from its config, else from its tensors."""

    model_type: str
    architectures: tuple[str, ...]
    blocks: Mapping[str, int]
    """Number of blocks of each stack, by the name prefix of its tensors: `{"model.layers": 32}`."""
    hidden_size: int | None
    heads: int | None
    key_value_heads: int | None
    vocabulary: int | None
    experts: Experts | None
    dtypes: Mapping[str, int]
    """Number of parameters of each dtype."""
    is_tied: bool | None
    """Whether the output layer shares the embedding's weights; None for other models than language models."""
    shards: int
    base_model: str = ""
    """The model that an adapter (PEFT) was trained for."""
    notes: tuple[str, ...] = ()
    """Remarks on the folder for the user, each a sentence."""


def architecture(model: ModelFile) -> Architecture | None:
    """The architecture of a model that was opened by its folder; None for a file."""
    if model.folder is None:
        return None
    notes: list[str] = []
    configs = []
    for name in (CONFIG, "adapter_config.json"):
        try:
            configs.append(read_config(model, name))
        except InputError as error:
            # Without a readable config, the weights can still be inspected and pruned.
            notes.append(f"{error.message}.")
            configs.append({})
    config, adapter = configs
    notes += _note_training_state(model)
    weights = [tensor for tensor in model.tensors if tensor.role in WEIGHTS]
    notes += _note_packed(config, weights)
    kinds = (config.get("model_type"), config.get("_class_name"), adapter.get("peft_type"))
    return Architecture(
        model_type=next(filter(None, map(_text, kinds)), ""),
        architectures=_classes(config),
        blocks=_blocks(config, weights),
        hidden_size=_number(config, "hidden_size", "n_embd", "d_model", "dim"),
        heads=_number(config, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
        key_value_heads=_number(config, "num_key_value_heads"),
        vocabulary=_number(config, "vocab_size"),
        experts=_experts(config, weights),
        dtypes=_dtypes(weights),
        is_tied=_is_tied(config, weights),
        shards=max(len(model.files) - 1, 1) if model.format == "shards" else 1,
        base_model=_text(adapter.get("base_model_name_or_path")),
        notes=tuple(notes),
    )


def _note_training_state(model: ModelFile) -> list[str]:
    """Note the size of the training state in a folder."""
    state = sorted(training_state(model))
    if not state or model.folder is None:
        return []
    size = sum(file_bytes(model.folder / path) for path in state)
    files = "1 file" if len(state) == 1 else f"{len(state)} files"
    what = f"{files} such as {abbreviated(str(state[0]))}, {nbytes(size)}"
    command = "export" if is_inside_folder(model) else "strip"
    return [f"The folder also holds the state of a training ({what}). `prunectl {command}` leaves it out."]


_PACKED = ("int32", "uint8")
"""Dtypes in which GPTQ, AWQ and MXFP4 pack several weights of fewer bits; an int8 element is a single weight."""


def _note_packed(config: Mapping[str, Any], weights: Iterable[Tensor]) -> list[str]:
    """Note that the parameters of a packed, quantised model are counted as stored, not as in the original model."""
    method = _text(lookup(config, "quantization_config.quant_method"))
    sizes: Counter[str] = Counter()
    for tensor in weights:
        sizes[dtype_name(tensor.dtype)] += tensor.nbytes
    packed = [name for name in _PACKED if sizes[name]]
    # A share of 5% is enough: embeddings, which are not quantised, may be most of a small model.
    if not method or 20 * sum(sizes[name] for name in packed) <= sizes.total():
        return []
    numbers = " and ".join(packed)
    return [f"Weights are packed by {method} into {numbers}: parameters, also the active ones, are counted as stored."]


def read_config(model: ModelFile, name: str) -> dict[str, Any]:
    """A JSON file in the folder of a model; empty if it does not exist."""
    path = None if model.folder is None else real_file(model.folder, name)
    return {} if path is None else read_object(path, "it")


def architectures(folder: Path) -> tuple[str, ...]:
    """The classes that the config in a folder names; none for anything else than a readable model folder."""
    with suppress(InputError, OSError):
        if (path := real_file(folder, CONFIG)) is not None:
            return _classes(read_object(path, "it"))
    return ()


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    classes = config.get("architectures")
    return tuple(map(_text, classes[:8])) if isinstance(classes, list) else ()


def _text(value: Any) -> str:
    return abbreviated(value) if isinstance(value, str) else ""


_TEXT_CONFIGS = ("", "text_config.", "llm_config.", "language_config.", "thinker_config.text_config.")
"""Key prefixes of the language model's settings in configs; multimodal models keep them in a nested object."""


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    for inside in _TEXT_CONFIGS:
        for key in keys:
            value = lookup(config, inside + key)
            if type(value) is int and 0 < value < 1 << 40:
                return value
    return None


_ANY_BLOCK = re.compile(r"((?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(\d{1,6})\.")
_MAX_STACKS = 8


def _blocks(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> dict[str, int]:
    """Number of blocks of each stack of its family, else of each prefix with block numbers from 0 without gaps."""
    numbers_of: dict[str, set[int]] = {}
    family = family_of(_text(config.get("model_type")))
    patterns = [block_pattern(stack) for stack in family.stacks] if family is not None else []
    for tensor in tensors:
        if family is None:
            match = _ANY_BLOCK.match(tensor.name)
            if match is not None:
                numbers_of.setdefault(match[1], set()).add(int(match[2]))
            continue
        for pattern in patterns:
            if (match := pattern.search(tensor.name)) is not None:
                numbers_of.setdefault(tensor.name[: match.start(1) - 1], set()).add(int(match[1]))
                break
    counts = {name: len(seen) for name, seen in numbers_of.items() if max(seen) == len(seen) - 1 > 0 or family}
    largest = sorted(counts.items(), key=lambda item: -item[1])[:_MAX_STACKS]
    return {abbreviated(name): count for name, count in largest}


_EXPERT = re.compile(r"(?:^|\.)experts\.(?:\d+\.|(?:gate_up_proj|gate_proj|up_proj|down_proj|w[123])(?:\b|_))")


def _experts(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> Experts | None:
    """The mixture of experts that a config describes, without shared experts, which process every token."""
    total = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = _number(config, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "top_k")
    if total is None or active is None or not 0 < active <= total:
        return None
    tensors = _without_ties(tensors)
    routed = sum(tensor.size for tensor in tensors if _EXPERT.search(tensor.name))
    return Experts(total, active, sum(tensor.size for tensor in tensors) - routed * (total - active) // total)


def _without_ties(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({tensor.view_key: tensor for tensor in tensors}.values())


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in _without_ties(tensors):
        counts[dtype_name(tensor.dtype)] += tensor.size
    return dict(counts.most_common())


HEAD = re.compile(
    r"(?:^|\.)(lm_head|generator_lm_head|embed_out|proj_out|output_projection|predictions\.decoder)\.weight$"
)
"""The weight of an output layer, which may be tied to the embedding."""
_LANGUAGE_MODEL = re.compile(r"(LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration)")


def tie_flags(config: Mapping[str, Any]) -> list[bool]:
    """The values of `tie_word_embeddings` in a config and its nested objects, the outermost first."""
    values = (lookup(config, f"{inside}tie_word_embeddings") for inside in _TEXT_CONFIGS)
    return [value for value in values if type(value) is bool]


def _is_tied(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> bool | None:
    """Whether the output layer is tied to the embedding, by the config, else because there is no other output layer."""
    if not any(map(_LANGUAGE_MODEL.search, _classes(config))):
        return None
    for is_tied in tie_flags(config):
        return is_tied
    return not any(HEAD.search(tensor.name) for tensor in tensors)
