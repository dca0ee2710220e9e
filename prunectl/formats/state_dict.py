"""What the names in a state dict tell: layers and roles, by PyTorch's habits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from prunectl.formats import kernel_names
from prunectl.formats.base import PARAMETRIZATION, PRUNABLE, Role, Tensor, Wrapper

OPTIMIZER_ROOTS = frozenset(
    {"optimizer", "optimizers", "optimizer_state", "optimizer_state_dict", "optimizer_states", "optim"}
)
TRAINING_ROOTS = frozenset(
    {
        *("callbacks", "loops", "lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "scaler", "grad_scaler"),
        *("scheduler_state_dict", "scaler_state_dict", "amp", "rng_state", "rng_states", "cuda_rng_state", "lr_sched"),
    }
)
"""Entries of a checkpoint that, like the optimizer, matter only to go on training."""
MODEL_ROOTS = frozenset(
    {
        *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
        *("ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "model_dict", "net_state_dict"),
    }
)
"""Entries of a checkpoint that say nothing but `here is the model`."""
_EMBEDDING_PARTS = ("embed", "emb.", "wte", "wpe", "lookup")
_NORM_PARTS = ("norm", "bn", "ln_", ".ln")
_NORM_KINDS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "SyncBatchNorm")
_EMBEDDING_KINDS = ("Embedding", "embedding")
_KERNEL_KINDS = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "Linear", "Bilinear", "NonDynamicallyQuantizableLinear"),
    *("LSTM", "GRU", "RNN", "MultiheadAttention"),
)
_TRANSPOSED_KINDS = ("ConvTranspose", "LazyConvTranspose", "conv_transpose")


class Use(NamedTuple):
    """What a graph or a code does with a tensor."""

    role: Role
    kind: str
    """The operation."""
    out_axis: int | None = None
    """Axis of the outputs, where it is not that of the layer's kind."""
    is_weak: bool = False
    """Whether it was calculated with before, as with a mask: then its name must say the same."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Which names stand beside a tensor, and which entries of a checkpoint they lie in: what decides its role."""

    all: frozenset[str]
    training: frozenset[str]
    model: str
    shapes: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, Use | None]

    def has_beside(self, prefix: str, leaf: str) -> bool:
        return (f"{prefix}.{leaf}" if prefix else leaf) in self.all


def describe(
    tensors: Iterable[Tensor],
    sections: frozenset[str] = frozenset(),
    uses: Mapping[str, Use | None] | None = None,
) -> tuple[Tensor, ...]:
    """Return the tensors with the layer, the role and the output axis that their names tell.

    What already has the role of a state, because the file says so, keeps it unless it is a mask.
    The sections are the entries of a checkpoint that hold further entries, such as `state_dict`.
    Where a graph tells what its tensors are used for, it decides what is a kernel; a tensor that is not among its
    uses is judged by its name.
    """
    tensors = tuple(tensors)
    training = OPTIMIZER_ROOTS | {section for section in sections if _is_for_training(section, sections)}
    models = {tensor.name.split(".", 1)[0] for tensor in tensors} & MODEL_ROOTS & sections
    # With two models in one checkpoint, only the whole name tells their layers apart.
    model = f"{models.pop()}." if len(models) == 1 else ""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = _Names(frozenset(shapes), training, model, shapes, uses or {})
    return tuple(_describe(tensor, names) for tensor in tensors)


_AVERAGE = re.compile(r"(^|_)(ema|swa|averaged)(_|$)")
_MOST_ROOTS = 3


class Named(Protocol):
    """A tensor, or a row about one."""

    @property
    def name(self) -> str:
        """What the file calls it."""

    @property
    def role(self) -> Role:
        """What it is for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""


def averaged_copies(tensors: Iterable[Named]) -> tuple[str, str, int] | None:
    """Where a file holds its weights twice, as trained and as an average (EMA, SWA): both places, and how many.

    A copy is known by a part of its names, and by the rest of them: `ema_model_state_dict.ema_model.a.weight` beside
    `model_state_dict.a.weight`, `model_ema.aweight` beside `model.a.weight`.
    """
    averages: dict[str, list[Named]] = {}
    others: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        if tensor.role in {Role.OPTIMIZER, Role.MASK}:
            continue
        parts = tensor.name.split(".")
        at = next((at for at, part in enumerate(parts[:_MOST_ROOTS]) if _AVERAGE.search(part.lower())), None)
        if at is not None:
            averages.setdefault(".".join(parts[: at + 1]), []).append(tensor)
            continue
        for skip in range(min(_MOST_ROOTS, len(parts))):
            others.setdefault("".join(parts[skip:]), (".".join(parts[:skip]), tensor.shape))
    for place, held in averages.items():
        found = [other for tensor in held if (other := _other(tensor, place, others)) is not None]
        if 2 * len(found) >= len(held):
            return max(set(found), key=found.count), place, len(found)
    return None


def _other(tensor: Named, place: str, others: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    parts = tensor.name.removeprefix(f"{place}.").split(".")
    for skip in range(min(_MOST_ROOTS, len(parts))):
        where, shape = others.get("".join(parts[skip:]), ("", None))
        if shape == tensor.shape:
            return where
    return None


def _is_for_training(section: str, sections: frozenset[str]) -> bool:
    # A bare optimizer state is {"state": ..., "param_groups": ...}.
    is_bare = section == "state" and "param_groups" in sections
    return is_bare or section in TRAINING_ROOTS or "optim" in section.lower()


def wrappers(tensors: Iterable[Tensor]) -> tuple[Wrapper, ...]:
    """Return the wrappers that the names give away, those that prune first."""
    found = []
    names = {tensor.name: tensor for tensor in tensors}
    for name, tensor in names.items():
        if ".parametrizations." in f".{name}":
            is_mask = name.endswith(".mask")
            found.append(Wrapper("torch.ao.pruning" if is_mask else PARAMETRIZATION, tensor.layer))
        elif name.endswith("_mask"):
            owner, _, leaf = name.rpartition(".")
            plain = leaf.removesuffix("_mask")
            if f"{name.removesuffix('_mask')}_orig" in names:
                found.append(Wrapper("torch.nn.utils.prune", tensor.layer))
            elif f"{owner}.module.{plain}" in names:
                found.append(Wrapper("nni", tensor.layer))
    pruning = {wrapper.layer for wrapper in found if wrapper.kind != "parametrization"}
    unique = dict.fromkeys(found)
    return tuple(wrapper for wrapper in unique if wrapper.kind != "parametrization" or wrapper.layer not in pruning)


def _describe(tensor: Tensor, names: _Names) -> Tensor:
    layer, _, leaf = tensor.name.rpartition(".")
    if ".parametrizations." in f".{tensor.name}":
        # conv.parametrizations.weight.original is the weight of conv; …weight.0.mask is its mask.
        layer, _, rest = f".{tensor.name}".partition(".parametrizations.")
        layer, leaf = layer.removeprefix("."), rest.split(".")[0]
        if rest.endswith("mask"):
            return replace(tensor, layer=layer.removeprefix(names.model), role=Role.MASK)
    role = _role(tensor, layer, leaf, names)
    layer = layer.removeprefix(names.model) if layer != names.model.rstrip(".") else layer
    use = names.uses.get(tensor.name)
    kind = tensor.kind or (use.kind if use is not None else "")
    tensor = replace(tensor, layer=layer, role=role, kind=kind)
    return replace(tensor, out_axis=_out_axis(tensor, role, use))


def _out_axis(tensor: Tensor, role: Role, use: Use | None) -> int | None:
    if role not in PRUNABLE or len(tensor.shape) < 2:
        return None
    if use is not None and use.out_axis is not None:
        return use.out_axis % len(tensor.shape)
    is_transposed = tensor.kind.startswith(_TRANSPOSED_KINDS) or (use is not None and use.kind == "conv_transpose")
    return 1 if is_transposed else 0


def _role(tensor: Tensor, layer: str, leaf: str, names: _Names) -> Role:
    if tensor.name.split(".", 1)[0] in names.training:
        return Role.OPTIMIZER
    if leaf.endswith("_mask") and _is_masked(layer, leaf.removesuffix("_mask"), names):
        return Role.MASK
    if tensor.role == Role.STATE or kernel_names.is_constant(tensor.name):
        return Role.STATE
    plain = leaf.removesuffix("_orig")
    is_norm = names.has_beside(layer, "running_mean") or any(part in layer.lower() for part in _NORM_PARTS)
    if (is_norm or tensor.kind.startswith(_NORM_KINDS)) and len(tensor.shape) <= 1:
        return Role.NORM
    if plain.startswith("bias") or plain.endswith("bias"):
        return Role.BIAS
    if not tensor.is_float:
        return Role.OTHER
    return _role_of_numbers(tensor, plain, names)


def _is_masked(layer: str, plain: str, names: _Names) -> bool:
    return names.has_beside(layer, f"{plain}_orig") or names.has_beside(layer, f"module.{plain}")


def _role_of_numbers(tensor: Tensor, leaf: str, names: _Names) -> Role:
    if len(tensor.shape) < 2:
        use = names.uses.get(tensor.name)
        if use is not None and use.role is not Role.EMBEDDING:
            return Role.BIAS if use.role in PRUNABLE else use.role
        return Role.NORM if leaf == "weight" else Role.OTHER
    if tensor.kind.startswith(_EMBEDDING_KINDS) or any(part in tensor.name.lower() for part in _EMBEDDING_PARTS):
        return Role.EMBEDDING
    if not _is_used_as_kernel(tensor, names):
        use = names.uses.get(tensor.name)
        return Role.EMBEDDING if use is not None and use.role is Role.EMBEDDING else Role.OTHER
    return Role.RECURRENT if leaf.startswith("weight_hh") else Role.KERNEL


def _is_used_as_kernel(tensor: Tensor, names: _Names) -> bool:
    """Whether a layer multiplies by it: as the graph says, else as the names of a layer say; never by rank alone."""
    if tensor.name not in names.uses:
        return kernel_names.is_kernel(tensor, names.shapes)
    use = names.uses[tensor.name]
    if use is not None and use.role in PRUNABLE and not use.is_weak:
        return True
    if use is None and not tensor.kind.startswith(_KERNEL_KINDS):
        # No product takes it, and it is no layer of PyTorch's own, whose code may be left out of a trace.
        return False
    return (use is None or use.role in PRUNABLE) and kernel_names.is_kernel(tensor, names.shapes)
