"""Adapt the config of a model folder to fewer blocks: counts, lists with an item for each block, block numbers."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import ModelFile
from prunectl.formats.families import CONFIG, COUNTS, ModelFamily, Stack, family_of, lookup

LISTS = frozenset(
    {
        *("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers", "block_types"),
        *("moe_layer_freq", "intermediate_size", "num_key_value_heads", "num_attention_heads", "num_query_heads"),
        *("num_kv_heads", "ffn_multipliers", "activation_sparsity_pattern", "attn_layer_types", "hybrid_layer_pattern"),
    }
)
"""Keys of lists with an item for each block."""
NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices"})
"""Keys of lists of block numbers."""
BOUNDS = frozenset({"first_k_dense_replace", "max_window_layers", "num_dense_layers"})
"""Keys of the number of first blocks that are of another kind."""
PERIODS = {
    "decoder_sparse_step": "mlp_layer_types",
    "full_attention_interval": "layer_types",
    "sliding_window_pattern": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "global_attn_every_n_layers": "layer_types",
    "moe_layer_freq": "",
    "moe_layer_interval": "",
    "attn_layer_period": "",
    "expert_layer_period": "",
    "scale_attn_by_inverse_layer_idx": "",
}
"""Keys by which the number of a block decides its kind; each with the list that overrides it, if any."""
_NOT_BY_BLOCK = re.compile(r"architectures|.*(_ids?|_tokens|_token_id|_token_ids)")
"""Keys of lists whose length may equal the number of blocks by chance."""
_PLAIN_NAME = re.compile(r"[\w.-]+")
"""A module name, as opposed to a regular expression for module names."""
_SHARED = ("num_kv_shared_layers",)
"""Config keys by which blocks share attention keys and values; if one is set, no block can be removed."""


@dataclass(frozen=True, slots=True)
class BlockCut:
    """A stack of blocks, and the numbers of the blocks to remove, in ascending order."""

    stack: Stack
    count: int
    removed: tuple[int, ...]
    pattern: re.Pattern[str]
    """Matches names in the stack; the first group is the block number."""

    @property
    def kept(self) -> list[int]:
        """The numbers of the blocks that are kept."""
        removed = set(self.removed)
        return [number for number in range(self.count) if number not in removed]

    @property
    def is_at_end(self) -> bool:
        """Whether every kept block keeps its number."""
        return self.kept == list(range(len(self.kept)))

    def new_number(self, number: int) -> int:
        """The number of a kept block after the removal."""
        return number - bisect_left(self.removed, number)


def shortened(
    model: ModelFile, config: Mapping[str, Any], family: ModelFamily, cuts: Sequence[BlockCut]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of the model without these blocks, and a note on what was changed in it."""
    new = copy.deepcopy(dict(config))
    changed: list[str] = []
    for cut in cuts:
        owner, _, key = cut.stack.key.rpartition(".")
        target: dict[str, Any] = lookup(new, owner) if owner else new
        old = lookup(config, owner) if owner else config
        _refuse_by_number(model, old, config, family, cut)
        # A stack counted by the key of this one until now gets its own key; aliases of this key get the new number.
        own = {stack.key.rpartition(".")[2] for stack in family.stacks}
        aliases = COUNTS - own if cut.stack is family.stacks[0] else frozenset()
        for other in family.stacks:
            if other.default_key == key and lookup(config, other.key) is None:
                target[other.key] = cut.count
        for name in (key, *sorted(name for name in aliases if old.get(name) == cut.count)):
            target[name] = len(cut.kept)
            changed.append(f"{name} {cut.count} -> {len(cut.kept)}")
        changed += _shorten_lists(model, target, cut, own)
        if not cut.is_at_end:
            changed += _renumber_names(model, new, cut)
    return new, (f"{CONFIG} was changed: {', '.join(changed)}.",)


def _shorten_lists(model: ModelFile, config: dict[str, Any], cut: BlockCut, counts: Collection[str]) -> list[str]:
    changed = []
    for key, value in config.items():
        if key in BOUNDS and type(value) is int and value < cut.count:
            config[key] = sum(1 for number in cut.kept if number < value)
            changed += [f"{key} {value} -> {config[key]}"] if config[key] != value else []
        elif not isinstance(value, list) or key in counts:
            continue
        elif key in NUMBERS:
            removed = set(cut.removed)
            config[key] = [cut.new_number(number) for number in value if type(number) is int and number not in removed]
            changed += [key] if config[key] != value else []
        elif key in LISTS and len(value) == cut.count:
            config[key] = [value[number] for number in cut.kept]
            changed.append(f"{key} (an item for each block)")
        elif len(value) == cut.count and not _NOT_BY_BLOCK.fullmatch(key):
            raise InputError(
                f"the {CONFIG} of {model.folder} has a list {abbreviated(key)} as long as there are blocks "
                f"({cut.count}), which prunectl does not know how to shorten"
            )
    return changed


def _renumber_names(model: ModelFile, config: dict[str, Any], cut: BlockCut) -> list[str]:
    """Renumber the names of blocks anywhere in a config, such as in `modules_to_not_convert`."""
    changed = []
    for key, value in config.items():
        new = _renumbered(model, value, cut)
        if new != value:
            config[key] = new
            changed.append(f"{abbreviated(key)} (names of blocks)")
    return changed


def _renumbered(model: ModelFile, value: Any, cut: BlockCut) -> Any:
    """A config value with renumbered block names; names of removed blocks in lists and keys are left out."""
    if isinstance(value, str):
        new = _new_name(model, value, cut)
        if new is None:
            raise _named_by_number(model, value)
        return new
    if isinstance(value, list):
        names = [item for item in value if not isinstance(item, str) or _new_name(model, item, cut) is not None]
        return [_renumbered(model, item, cut) for item in names]
    if isinstance(value, dict):
        keys = {key: new for key in value if (new := _new_name(model, key, cut)) is not None}
        return {new: _renumbered(model, value[key], cut) for key, new in keys.items()}
    return value


def _new_name(model: ModelFile, text: str, cut: BlockCut) -> str | None:
    """The new name of a block or of a part of it; None if the block is removed. Other text is returned unchanged."""
    if match := cut.pattern.search(f"{text}."):
        number = int(match[1])
        if _PLAIN_NAME.fullmatch(text):
            is_removed = number in cut.removed
            return None if is_removed else f"{text[: match.start(1)]}{cut.new_number(number)}{text[match.end(1) :]}"
        raise _named_by_number(model, text)
    # Names may also be written as regular expressions: `re:.*layers\\.(0|3)\\..*`.
    if re.search(rf"(?<![A-Za-z0-9_]){cut.stack.prefix}\\?\.[\[(\d]", text):
        raise _named_by_number(model, text)
    return text


def _named_by_number(model: ModelFile, text: str) -> InputError:
    return InputError(
        f"the {CONFIG} of {model.folder} names blocks by their numbers ({abbreviated(text)}), which prunectl cannot "
        "change: only the last blocks can be removed",
        hint="--strategy last",
    )


def _refuse_by_number(
    model: ModelFile, owner: Mapping[str, Any], config: Mapping[str, Any], family: ModelFamily, cut: BlockCut
) -> None:
    """Refuse to renumber blocks if the number of a block decides its kind."""
    for key in _SHARED:
        if owner.get(key):
            raise InputError(
                f"the {CONFIG} of {model.folder} lets blocks share their keys ({key}): no block can be removed"
            )
    if cut.is_at_end:
        return
    reasons = [
        key
        for key, instead in PERIODS.items()
        if _is_period(owner.get(key)) and not isinstance(owner.get(instead), list)
    ]
    # A vision-language model has the config of its language model inside, which is of another family.
    is_own = owner is config or "model_type" not in owner
    inner = family if is_own else family_of(str(owner.get("model_type")))
    if inner is None or (inner.needs and not isinstance(owner.get(inner.needs), list)):
        reasons.append(f"no {inner.needs}" if inner is not None else "an unknown model_type in it")
    if reasons:
        raise InputError(
            f"the {CONFIG} of {model.folder} decides the kind of a block by its number ({reasons[0]}): only the last "
            "blocks can be removed",
            hint="--strategy last",
        )


def _is_period(value: object) -> bool:
    return value is True or (type(value) is int and value > 1)
