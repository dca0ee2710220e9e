"""Experts of a mixture as a linear layer for each weight of the file, where `transformers` joins them in one tensor.

Data goes through each expert's own layers, so that these are ranked, reconstructed and trained like any others.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from prunectl.training.torch._compat import is_exporting

IS_ROUTED: ContextVar[bool] = ContextVar("IS_ROUTED", default=False)
"""Whether an expert runs, on rows that a router chose."""
_JOINED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Joined tensors, and the layers of which each is made, in their order."""
_JOINING = {"gate_up_proj": ("MergeModulelist", "Concatenate"), "down_proj": ("MergeModulelist",)}
_FLAGS = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
"""What the library says of experts that are computed as here."""


class _Empty(torch.nn.Linear):
    """A linear layer whose weights come from a file; numbers drawn first take half of the time to open a folder."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class SeparateExperts(torch.nn.Module):
    """Experts with layers of their own, numbered and named as in the file."""

    def __init__(self, joined: Any, names: Mapping[str, str]) -> None:
        super().__init__()
        count, width, inputs = joined.down_proj.shape[0], joined.down_proj.shape[2], joined.down_proj.shape[1]
        sizes = {"gate": (inputs, width), "up": (inputs, width), "down": (width, inputs)}
        self.act_fn = joined.act_fn
        self.names = dict(names)
        for number in range(count):
            expert = torch.nn.Module()
            for part, size in sizes.items():
                expert.add_module(names[part], _Empty(*size, bias=False, device="meta"))
            self.add_module(str(number), expert)
        self.count = count

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts."""
        total = torch.zeros_like(hidden_states)
        if is_exporting():
            # The tokens of an expert are not known: each computes all, of which those count that chose it.
            for number in range(self.count):
                weights = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
                total = total + self._expert(number, hidden_states) * weights
            return total
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        counts = experts.bincount(minlength=self.count).tolist()
        previous = IS_ROUTED.set(True)
        try:
            for number, chosen in enumerate(torch.split(order, counts)):
                if len(chosen):
                    tokens = chosen // top_k_index.shape[-1]
                    outputs = self._expert(number, hidden_states[tokens])
                    total.index_add_(0, tokens, outputs * top_k_weights.reshape(-1)[chosen, None])
        finally:
            IS_ROUTED.reset(previous)
        return total

    def _expert(self, number: int, inputs: torch.Tensor) -> torch.Tensor:
        expert = getattr(self, str(number))
        gate, up, down = (getattr(expert, self.names[part]) for part in ("gate", "up", "down"))
        outputs: torch.Tensor = down(self.act_fn(gate(inputs)) * up(inputs))
        return outputs


class _Source(NamedTuple):
    """Where a tensor of the file goes: its name in the module if experts are separate, and the layer of an expert."""

    name: str
    experts: str
    part: str
    layer: str


def separate_experts(
    networks: Sequence[torch.nn.Module], names: Sequence[str], renamings: Sequence[Any], joins: Sequence[Any]
) -> dict[str, str]:
    """Separate the experts whose weights lie apart in a file; from names in the file to those in the first network."""
    loading = importlib.import_module("transformers.core_model_loading")
    found = [(name, _source(name, loading.rename_source_key, renamings, joins)) for name in names]
    parts: dict[str, dict[str, str]] = {}
    for _, source in found:
        if source is not None:
            parts.setdefault(source.experts, {})[source.part] = source.layer
    separate, *_ = (_separate(network, parts) for network in networks)
    return {name: source.name for name, source in found if source is not None and source.experts in separate}


def _separate(network: torch.nn.Module, parts: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Separate experts, by path their layers in the file; return the paths of those that can be."""
    modules = dict(network.named_modules())
    separate = {path for path, layers in parts.items() if len(layers) == 3 and _is_plain(modules.get(path))}
    for path in separate:
        owner, _, name = path.rpartition(".")
        setattr(network.get_submodule(owner), name, SeparateExperts(modules[path], parts[path]))
    return separate


def _source(name: str, rename: Any, renamings: Sequence[Any], joins: Sequence[Any]) -> _Source | None:
    target, pattern = rename(name, renamings, joins)
    experts, _, joined = target.rpartition(".")
    own = rename(name, renamings, [])[0]
    number, _, layer = own.removeprefix(f"{experts}.").removesuffix(".weight").partition(".")
    if pattern is None or joined not in _JOINED or not number.isdecimal() or not layer or "." in layer:
        return None
    join = next(join for join in joins if pattern in join.source_patterns)
    steps = tuple(type(step).__name__ for step in join.operations)
    if steps != _JOINING[joined] or len(join.source_patterns) != len(_JOINED[joined]):
        return None
    return _Source(own, experts, _JOINED[joined][join.source_patterns.index(pattern)], layer)


def _is_plain(module: Any) -> bool:
    """Whether the library computes these experts as here."""
    usual = getattr(importlib.import_module("transformers.integrations.moe"), "_default_apply_gate", None)
    return (
        usual is not None
        and getattr(type(module), "_apply_gate", None) is usual
        and all(getattr(module, flag, None) is value for flag, value in _FLAGS.items())
    )
