"""What the names in a bare state dict tell: layers and roles, by PyTorch's habits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from prunectl.formats.base import Role, Tensor, Wrapper

OPTIMIZER_ROOTS = frozenset(
    {"optimizer", "optimizers", "optimizer_state", "optimizer_state_dict", "optimizer_states", "optim"}
)
_STATE_LEAVES = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq"})
_EMBEDDING_PARTS = ("embed", "emb.", "wte", "wpe", "lookup")
_NORM_PARTS = ("norm", "bn", "ln_", ".ln")


@dataclass(frozen=True, slots=True)
class _Names:
    """Which names stand beside a tensor: what decides its role."""

    all: frozenset[str]

    def has_beside(self, prefix: str, leaf: str) -> bool:
        return (f"{prefix}.{leaf}" if prefix else leaf) in self.all


def describe(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors with the layer, the role and the output axis that their names tell."""
    tensors = tuple(tensors)
    names = _Names(frozenset(tensor.name for tensor in tensors))
    return tuple(_describe(tensor, names) for tensor in tensors)


def wrappers(tensors: Iterable[Tensor]) -> tuple[Wrapper, ...]:
    """Return the pruning wrappers that the names give away."""
    found = []
    for name in (tensor.name for tensor in tensors):
        if ".parametrizations." in f".{name}" and name.endswith(".mask"):
            layer = f".{name}".split(".parametrizations.")[0].removeprefix(".")
            found.append(Wrapper("parametrization", layer, "mask"))
        elif name.endswith("_mask") and "parametrizations." not in name:
            found.append(Wrapper("torch.nn.utils.prune", name.rpartition(".")[0]))
    return tuple(dict.fromkeys(found))


def _describe(tensor: Tensor, names: _Names) -> Tensor:
    layer, _, leaf = tensor.name.rpartition(".")
    if ".parametrizations." in f".{tensor.name}":
        # conv.parametrizations.weight.original is the weight of conv; …weight.0.mask is its mask.
        layer, _, rest = f".{tensor.name}".partition(".parametrizations.")
        layer, leaf = layer.removeprefix("."), rest.split(".")[0]
        if rest.endswith("mask"):
            return replace(tensor, layer=layer, role=Role.MASK)
    role = _role(tensor, layer, leaf, names)
    out_axis = 0 if role in {Role.KERNEL, Role.RECURRENT} and len(tensor.shape) >= 2 else None
    return replace(tensor, layer=layer, role=role, out_axis=out_axis)


def _role(tensor: Tensor, layer: str, leaf: str, names: _Names) -> Role:
    if tensor.name.split(".", 1)[0] in OPTIMIZER_ROOTS:
        return Role.OPTIMIZER
    if leaf.endswith("_mask") and names.has_beside(layer, f"{leaf.removesuffix('_mask')}_orig"):
        return Role.MASK
    if leaf in _STATE_LEAVES:
        return Role.STATE
    plain = leaf.removesuffix("_orig")
    is_norm = names.has_beside(layer, "running_mean") or any(part in layer.lower() for part in _NORM_PARTS)
    if is_norm and len(tensor.shape) <= 1:
        return Role.NORM
    if plain.startswith("bias") or plain.endswith("bias"):
        return Role.BIAS
    if not tensor.is_float:
        return Role.OTHER
    return _role_of_numbers(tensor, plain)


def _role_of_numbers(tensor: Tensor, leaf: str) -> Role:
    if len(tensor.shape) < 2:
        return Role.NORM if leaf == "weight" else Role.OTHER
    if leaf.startswith("weight_hh"):
        return Role.RECURRENT
    is_embedding = any(part in tensor.name.lower() for part in _EMBEDDING_PARTS)
    return Role.EMBEDDING if is_embedding else Role.KERNEL
