"""The variables of a TensorFlow bundle as tensors; layer, role, axes and optimizer are derived from their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import Array, NameAllocator, Role, Storage, Tensor
from prunectl.formats.extents import view
from prunectl.formats.keras.config import LORA_PREFIX, PRUNED_PREFIX
from prunectl.formats.kernel_axes import attention_axes, depthwise_axes
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry
from prunectl.formats.tensorflow.object_graph import OPTIMIZER_ROOTS, ObjectGraph, find_ownership

_EXPORT_LISTS = ("_all_variables/", "_operations/")
"""Prefixes under which Keras 3 lists the variables of an exported model, besides `variables/`."""


def tensors_of(bundle: Bundle, graph: ObjectGraph, classes: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The variables of a bundle, in the order of its index."""
    entries = bundle.numbers()
    full_names, ownership = graph.full_names, find_ownership(graph)
    state = ownership.keys(graph)
    root = _root(entries, full_names)
    allocator = NameAllocator()
    variables = []
    for entry in entries:
        key = entry.name
        name = key.removesuffix(VALUE_SUFFIX)
        # An optimizer of Keras 3 lists the weights too, so a weight's key may be a path through the optimizer.
        info = classify_variable(
            ownership.paths.get(key, name) if looks_like_optimizer(name) else name,
            full_names.get(key, name),
            entry.shape,
            is_float=entry.dtype.kind == "f" or "float" in entry.dtype.name,
            classes=classes,
            root=root,
            is_of_optimizer=key in state,
        )
        variables.append(
            Tensor(
                name=allocator.unique(name),
                layer=info.layer,
                shape=entry.shape,
                dtype=entry.dtype,
                role=info.role,
                storage=_storage(bundle, entry, key),
                kind=info.kind,
                out_axis=info.out_axis,
                in_axis=info.in_axis,
            )
        )
    return tuple(variables)


def _storage(bundle: Bundle, entry: BundleEntry, key: str) -> Storage:
    if entry.slices:
        nbytes = sum(piece.nbytes for _, piece in bundle.pieces(entry))
        return Storage(key, nbytes, None, nbytes)
    leader = bundle.shared.get(entry.key, entry)
    key = leader.name
    return Storage(key, leader.nbytes, bundle.extent(leader), leader.nbytes, bundle.is_big_endian)


def decoder(bundle: Bundle) -> Callable[[Tensor], Array]:
    """A reader of tensors that are stored in slices."""
    by_key = {entry.name: entry for entry in bundle.numbers()}

    def decode(tensor: Tensor) -> Array:
        array = np.zeros(tensor.shape, tensor.dtype)
        for location, piece in bundle.pieces(by_key[tensor.storage.key]):
            array[location] = view(
                bundle.extent(piece), dtype=tensor.dtype, shape=piece.shape, big_endian=bundle.is_big_endian
            )
        array.flags.writeable = False
        return array

    return decode


def optimizer(tensors: Iterable[Tensor], full_names: Mapping[str, str]) -> str:
    """The optimizer whose state is among the variables: `unknown` if it is in no name, empty if there is no state."""
    names = [full_names.get(tensor.storage.key, tensor.name) for tensor in tensors if tensor.role == "optimizer"]
    named = next(filter(None, map(optimizer_of, names)), "")
    has_state = any("optimizer" in tensor.name.lower() for tensor in tensors if tensor.role == "optimizer")
    return named or ("unknown" if has_state else "")


def copies(bundle: Bundle, full_names: Mapping[str, str]) -> dict[str, str]:
    """Duplicate tensors (same name, shape and checksum as an earlier one), each with its original."""
    seen: dict[tuple[str, tuple[int, ...], int, int], str] = {}
    originals: dict[str, str] = {}
    for entry in bundle.numbers():
        key = entry.name
        name = full_names.get(key, "")
        if "/" in name and entry.crc:
            copy = key.removesuffix(VALUE_SUFFIX)
            original = seen.setdefault((name, entry.shape, entry.nbytes, entry.crc), copy)
            if original != copy:
                originals[copy] = original
    return originals


def _root(entries: Iterable[BundleEntry], full_names: Mapping[str, str]) -> str:
    """The name of the model, which begins all variable names in an export of Keras 3; else empty."""
    keys = [entry.name for entry in entries]
    if not any(key.startswith(_EXPORT_LISTS) for key in keys):
        return ""
    parts = [full_names.get(key, "").split("/") for key in keys]
    roots = {steps[0] for steps in parts if len(steps) > 2}
    return roots.pop() if len(roots) == 1 else ""


VALUE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
OPTIMIZERS = (
    "Adam",
    "AdamW",
    "Adamax",
    "Nadam",
    "SGD",
    "Momentum",
    "RMSprop",
    "RMSProp",
    "Adagrad",
    "Adadelta",
    "Ftrl",
)
_OPTIMIZER_PART = re.compile(rf"({'|'.join(OPTIMIZERS)})(_\d+)?")
_TRAINING_LEAVES = frozenset({"beta1_power", "beta2_power", "save_counter"})
SLOT_LEAVES = frozenset({"adam_m", "adam_v", "lamb_m", "lamb_v"})
"""Name parts that the optimizers of BERT and similar models append to the name of a weight."""
METRICS = "keras_api/metrics/"
_LEAVES = {
    "recurrent_kernel": Role.RECURRENT,
    "gamma": Role.NORM,
    "beta": Role.NORM,
    "moving_mean": Role.STATE,
    "moving_variance": Role.STATE,
    "global_step": Role.STATE,
    "step": Role.STATE,
    "seed_generator_state": Role.STATE,
    "mask": Role.MASK,
    "threshold": Role.SCHEDULE,
    "pruning_step": Role.SCHEDULE,
    # Scales of layers that Keras 3 quantised
    "kernel_scale": Role.OTHER,
    "embeddings_scale": Role.OTHER,
}
_ONLY_WHEN_PRUNED = frozenset({Role.MASK, Role.SCHEDULE})


@dataclass(frozen=True, slots=True)
class VariableInfo:
    """The layer, role and channel axes of a variable."""

    layer: str
    role: Role
    kind: str
    out_axis: int | None = None
    in_axis: int | None = None


def classify_variable(
    key: str,
    full_name: str,
    shape: tuple[int, ...],
    *,
    is_float: bool,
    classes: Mapping[str, str],
    root: str = "",
    is_of_optimizer: bool = False,
) -> VariableInfo:
    """Classify a variable by its name, unless its optimizer is known to own it.

    ``key`` is its path in the checkpoint, ``full_name`` its name in TensorFlow, ``classes`` the Keras class of each
    known layer, ``root`` the name of the model if that begins every name.
    """
    # The default name of a variable is its class; its path in the checkpoint says more.
    name = full_name if "/" in full_name else key
    parts = [part for part in name.removeprefix(f"{root}/").split("/") if not _OPTIMIZER_PART.fullmatch(part)]
    known = next((part for part in parts if part.removeprefix(PRUNED_PREFIX) in classes), "")
    layer = known or "/".join(parts[:-1]) or name
    layer = layer.removeprefix(PRUNED_PREFIX)
    kind, leaf = classes.get(layer, ""), parts[-1] if parts else ""
    if is_of_optimizer or is_training_variable(key, full_name):
        return VariableInfo(layer, Role.OPTIMIZER, kind)
    role = _role(leaf, name, layer, shape, kind=kind, is_float=is_float)
    if role not in {Role.KERNEL, Role.RECURRENT}:
        return VariableInfo(layer, role, kind)
    if kind.endswith("Transpose"):  # [height, width, out, in]
        return VariableInfo(layer, role, kind, len(shape) - 2, len(shape) - 1)
    step = parts[-2] if len(parts) > 1 else ""
    axes = depthwise_axes(leaf, kind or step, shape) or attention_axes(step, kind, shape)
    return VariableInfo(layer, role, kind, *(axes or (len(shape) - 1,)))


def is_training_variable(key: str, full_name: str) -> bool:
    """Whether only training needs the variable: optimizer state, a metric or the checkpoint's own counter."""
    parts = key.split("/")
    return (
        ".OPTIMIZER_SLOT" in parts
        or looks_like_optimizer(key)
        or parts[-1] in _TRAINING_LEAVES
        or parts[-1] in SLOT_LEAVES
        or key.startswith(METRICS)
        or optimizer_of(full_name) != ""
    )


def looks_like_optimizer(key: str) -> bool:
    """Whether the path to a variable contains an object that is named like an optimizer."""
    return not OPTIMIZER_ROOTS.isdisjoint(key.split("/"))


def without_optimizer(name: str) -> str:
    """A name without the parts that known optimizers add to the name of a weight."""
    parts = [part for part in name.split("/") if not _OPTIMIZER_PART.fullmatch(part) and part not in SLOT_LEAVES]
    return "/".join(parts)


def optimizer_of(full_name: str) -> str:
    """The optimizer in a variable's name: `Adam` for `dense/kernel/Adam_1`; empty if there is none."""
    matches = (_OPTIMIZER_PART.fullmatch(part) for part in full_name.split("/"))
    return next((match[1] for match in matches if match), "")


def _role(leaf: str, name: str, layer: str, shape: tuple[int, ...], *, kind: str, is_float: bool) -> Role:
    role = _LEAVES.get(leaf)
    if role is not None and (role not in _ONLY_WHEN_PRUNED or PRUNED_PREFIX in name):
        return role
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return Role.BIAS
    if not is_float or len(shape) < 2 or leaf.startswith(LORA_PREFIX):
        return Role.OTHER
    if kind == "Embedding" or "embed" in leaf.lower() or (leaf == "weights" and "embed" in layer.lower()):
        return Role.EMBEDDING
    return Role.KERNEL
