"""Classify TensorFlow variables by name: layer, role, output axis, optimizer state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prunectl.formats.base import Role
from prunectl.formats.keras.config import PRUNED_PREFIX

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
OPTIMIZER_ROOTS = frozenset({"optimizer", "_optimizer", "optimizer_v2"})
_TRAINING_LEAVES = frozenset({"beta1_power", "beta2_power", "save_counter"})
SLOT_LEAVES = frozenset({"adam_m", "adam_v", "lamb_m", "lamb_v"})
"""What the optimizers of BERT and its kin append to the name of a weight."""
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

    ``key`` is where the checkpoint keeps it, ``full_name`` what TensorFlow called it, ``classes`` the Keras class of
    each known layer, ``root`` the name of the model where that begins every name.
    """
    # A variable that nobody named is called after its class; the path to it says more.
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
    if "depthwise" in leaf or kind.startswith("Depthwise"):  # [height, width, channels, multiplier]
        return VariableInfo(layer, role, kind, len(shape) - 2)
    return VariableInfo(layer, role, kind, len(shape) - 1)


def is_training_variable(key: str, full_name: str) -> bool:
    """Whether only training needs it: the state of an optimizer, a metric or the checkpoint's own counter."""
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
    """Whether the way to a variable leads through what is called an optimizer."""
    return not OPTIMIZER_ROOTS.isdisjoint(key.split("/"))


def without_optimizer(name: str) -> str:
    """A name without what optimizers add to that of a weight, as far as it is known."""
    parts = [part for part in name.split("/") if not _OPTIMIZER_PART.fullmatch(part) and part not in SLOT_LEAVES]
    return "/".join(parts)


def optimizer_of(full_name: str) -> str:
    """The optimizer that a variable's name betrays: `Adam` for `dense/kernel/Adam_1`."""
    matches = (_OPTIMIZER_PART.fullmatch(part) for part in full_name.split("/"))
    return next((match[1] for match in matches if match), "")


def _role(leaf: str, name: str, layer: str, shape: tuple[int, ...], *, kind: str, is_float: bool) -> Role:
    role = _LEAVES.get(leaf)
    if role is not None and (role not in _ONLY_WHEN_PRUNED or PRUNED_PREFIX in name):
        return role
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return Role.BIAS
    if not is_float or len(shape) < 2:
        return Role.OTHER
    if kind == "Embedding" or "embed" in leaf.lower() or (leaf == "weights" and "embed" in layer.lower()):
        return Role.EMBEDDING
    return Role.KERNEL
