"""What an optimizer keeps of each weight, and which weight that is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from prunectl.channels.keras.read import Opened
from prunectl.formats.base import Role, Tensor
from prunectl.formats.keras.config import part

_STATISTICS = frozenset({"moving_mean", "moving_variance"})


def matched(opened: Opened) -> Mapping[str, str] | None:
    """Return the weight that each slot of the optimizer belongs to; None if that cannot be told for sure."""
    slots = _slots(opened)
    weights = list(_trained(opened))
    return _by_name(slots, weights) or _by_place(opened, slots, weights)


def strange(opened: Opened) -> frozenset[str]:
    """Return the whole state of an optimizer of which nobody can tell which weights it belongs to."""
    if not _slots(opened) or matched(opened) is not None:
        return frozenset()
    return frozenset(tensor.name for tensor in opened.model.tensors if tensor.role is Role.OPTIMIZER)


def _slots(opened: Opened) -> list[Tensor]:
    return [tensor for tensor in opened.model.tensors if _is_slot(opened, tensor)]


def _is_slot(opened: Opened, tensor: Tensor) -> bool:
    path = opened.stored.path(tensor)
    return tensor.role is Role.OPTIMIZER and "optimizer" in path.partition("/")[0] and bool(tensor.shape)


def _trained(opened: Opened) -> Iterator[Tensor]:
    """Yield the weights that are trained, in the order of the layers."""
    known = {met.spot: met.leaves for met in opened.net.met}
    for layer in opened.layers:
        if part(layer.found, "config").get("trainable") is not False:
            for leaf, tensor in known.get(layer.spot, {}).items():
                if leaf not in _STATISTICS:
                    yield tensor


def _by_name(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str] | None:
    """Match where a slot has the name of a weight in its own: `Adam/m/a/kernel`, `adam/a_kernel_momentum`."""
    named = {re.sub(r":\d+$", "", tensor.name): tensor for tensor in weights}
    found = {}
    for slot in slots:
        path = f"/{re.sub(r':[0-9]+$', '', slot.name)}/"
        near = [
            name
            for name, tensor in named.items()
            if (f"/{name}/" in path or f"/{name.replace('/', '_')}_" in path) and tensor.shape == slot.shape
        ]
        longest = [name for name in near if len(name) == max(map(len, near))]
        if len(longest) != 1:
            return None
        found[slot.name] = named[longest[0]].name
    return found


def _by_place(opened: Opened, slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str] | None:
    """Match slots that have only numbers: weight by weight, or one kind of slot after the other."""
    ordered = sorted(slots, key=lambda tensor: _natural(opened.stored.path(tensor)))
    times, rest = divmod(len(ordered), len(weights)) if weights else (0, 1)
    if rest:
        return None
    turns = ([weight for weight in weights for _ in range(times)], [*weights] * times)
    fits = [turn for turn in turns if [one.shape for one in turn] == [slot.shape for slot in ordered]]
    found = [_paired(ordered, turn) for turn in fits]
    return found[0] if found and all(one == found[0] for one in found) else None


def _paired(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str]:
    return {slot.name: weight.name for slot, weight in zip(slots, weights, strict=True)}


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdecimal() else (0, step) for step in re.split(r"(\d+)", path)]
