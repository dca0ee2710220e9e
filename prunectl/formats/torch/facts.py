"""What a checkpoint says around its tensors: optimizer, progress, copies of the weights."""

from __future__ import annotations

import math
from typing import Any

from prunectl.formats.torch.leaves import unwrapped
from prunectl.formats.torch.values import Global, Made, Pairs, shown

MAX_FACTS = 20
MAX_VALUE_CHARACTERS = 60
MAX_SEARCHED = 1000
"""How many entries of a checkpoint are looked at for facts."""

_OPTIMIZERS: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = (
    ("NAdam", frozenset({"betas", "momentum_decay"}), frozenset()),
    ("Adam", frozenset({"betas", "eps", "amsgrad"}), frozenset()),
    ("Adamax", frozenset({"betas", "eps"}), frozenset({"amsgrad", "decoupled_weight_decay"})),
    ("RAdam", frozenset({"betas", "eps", "decoupled_weight_decay"}), frozenset({"amsgrad"})),
    ("SGD", frozenset({"momentum", "dampening"}), frozenset()),
    ("RMSprop", frozenset({"alpha", "eps", "centered"}), frozenset()),
    ("ASGD", frozenset({"lambd", "alpha", "t0"}), frozenset()),
    ("Rprop", frozenset({"etas", "step_sizes"}), frozenset()),
    ("Adadelta", frozenset({"rho", "eps"}), frozenset()),
    ("Adagrad", frozenset({"lr_decay", "initial_accumulator_value"}), frozenset()),
    ("LBFGS", frozenset({"max_iter", "history_size"}), frozenset()),
    ("Adafactor", frozenset({"beta2_decay", "d"}), frozenset()),
    ("Muon", frozenset({"momentum", "ns_steps"}), frozenset()),
)
"""Name, settings that its groups have, settings that they have not; the first row that fits."""

_AVERAGES = frozenset(
    {"ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "swa_model", "averaged_model"}
)


def optimizer(root: Any) -> str:
    """Return the name of the optimizer whose state the checkpoint holds."""
    if not isinstance(root, Pairs):
        return _name(root)
    candidates = [root, *(value for key, value in root.items[:MAX_SEARCHED] if _is_about_optimizer(key))]
    for candidate in candidates:
        items = candidate if isinstance(candidate, list | tuple) else [candidate]
        for item in items[:8]:
            if name := _name(item):
                return name
    return (
        "optimizer state"
        if len(candidates) > 1 and any(isinstance(c, Pairs) and c.items for c in candidates[1:])
        else ""
    )


def _is_about_optimizer(key: Any) -> bool:
    return isinstance(key, str) and "optim" in key.lower()


def _name(value: Any) -> str:
    if isinstance(value, Made) and isinstance(value.function, Global) and value.path.startswith("torch.optim."):
        return value.function.name
    groups = value.plain().get("param_groups") if isinstance(value, Pairs) and len(value.items) < MAX_SEARCHED else None
    group = groups[0] if isinstance(groups, list | tuple) and groups else None
    if not isinstance(group, Pairs):
        return ""
    settings = group.plain()
    for name, present, absent in _OPTIMIZERS:
        if present <= settings.keys() and not absent & settings.keys():
            return "AdamW" if name == "Adam" and settings.get("decoupled_weight_decay") is True else name
    return "optimizer state"


def training(root: Any) -> tuple[str, ...]:
    """Return the plain values that stand beside the tensors: `epoch 12`, `best_acc 0.93`."""
    if not isinstance(root, Pairs):
        return ()
    facts = [
        f"{_words(key)} {_value(value)}"
        for key, value in root.items[:MAX_SEARCHED]
        if isinstance(key, str) and _is_short(value)
    ]
    return tuple(facts[:MAX_FACTS])


def _words(key: str) -> str:
    return "pytorch-lightning" if key == "pytorch-lightning_version" else shown(key)


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= MAX_VALUE_CHARACTERS
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(str(value))


def notes(root: Any) -> tuple[str, ...]:
    """Return what a user should know of a checkpoint before pruning it."""
    if not isinstance(root, Pairs):
        return ()
    keys = [
        key for key, value in root.items[:MAX_SEARCHED] if isinstance(key, str) and key in _AVERAGES and _holds(value)
    ]
    return tuple(f"It holds a second copy of the weights under {key}, averaged over the training." for key in keys)


def _holds(value: Any) -> bool:
    return isinstance(unwrapped(value), Pairs | Made)


def sections(root: Any) -> frozenset[str]:
    """Return the entries of a checkpoint that hold more values, such as `state_dict`."""
    if not isinstance(root, Pairs):
        return frozenset()
    return frozenset(
        key
        for key, value in root.items
        if isinstance(key, str)
        and (isinstance(value, Pairs | list | tuple) or (isinstance(value, Made) and value.state is not None))
    )
