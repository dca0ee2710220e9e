"""What lies in a checkpoint beside the weights, and what of it is cut as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prunectl.channels.labels import LabelArray
from prunectl.channels.torch.cut import sliced
from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.training.torch.arrays import to_torch

Axes = Mapping[str, Mapping[int, LabelArray]]
"""The indices that go from each axis, by tensor of the file."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What optimizers in a checkpoint keep of weights."""

    owners: Mapping[str, str] = field(default_factory=dict)
    """The weight of each tensor of their states, both by their names in the file."""
    unmatched: tuple[str, ...] = ()
    """Optimizers of which nobody can tell which weights their states belong to, by their place."""


def kept_of(root: Any, order: Mapping[str, str], shapes: Shapes) -> Kept:
    """Return what optimizers keep of each weight, by its name in the file; they know weights by numbers.

    The order is that of the parameters of the module, with their names in the file.
    """
    found: dict[str, str] = {}
    unmatched: list[str] = []
    for name, optimizer in _optimizers(root, ""):
        groups = optimizer["param_groups"]
        numbers = [number for group in groups for number in group.get("params", ())]
        said = [word for group in groups for word in group.get("param_names", ())]
        words = said if len(said) == len(numbers) and set(said) <= order.keys() else list(order)
        owners = {number: order[word] for number, word in zip(numbers, words, strict=False)}
        own = {
            _below(_below(_below(name, "state"), number), key): (owners.get(number, ""), tuple(value.shape))
            for number, state in optimizer["state"].items()
            for key, value in (state.items() if isinstance(state, dict) else ())
            # A count of steps is a tensor as well.
            if isinstance(value, torch.Tensor) and value.numel() > 1
        }
        if all(shape == shapes.get(owner) for owner, shape in own.values()):
            found |= {slot: owner for slot, (owner, _) in own.items()}
        else:
            unmatched.append(name)
    return Kept(found, tuple(unmatched))


def leave_out(root: Any, optimizers: Collection[str]) -> None:
    """Empty the states of optimizers, as they are before the first step."""
    for name, optimizer in _optimizers(root, ""):
        if name in optimizers:
            optimizer["state"].clear()


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of the tensors of a file."""

    axes: Axes
    numbers: Mapping[str, Array]
    """What takes the place of some before they are cut."""
    left_out: tuple[str, ...] = ()
    """Optimizers whose states are not written, by their place."""


def smaller(value: Any, change: Change, path: str, name: str = "") -> Any:
    """Return a value with the tensors in it cut; dictionaries and lists stay the same ones."""
    if isinstance(value, torch.nn.Module):
        raise InputError(
            f"{path} holds a whole module, {name}, beside other things",
            hint="save its state_dict() in its place, and say --model",
        )
    if isinstance(value, torch.Tensor):
        if name not in change.axes and name not in change.numbers:
            return value
        whole = to_torch(change.numbers[name]).to(value.dtype) if name in change.numbers else value
        made = sliced(whole, change.axes.get(name, {}))
        is_parameter = isinstance(value, torch.nn.Parameter)
        return torch.nn.Parameter(made, requires_grad=value.requires_grad) if is_parameter else made
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            value[key] = smaller(inner, change, path, _below(name, key))
    elif isinstance(value, list):
        value[:] = [smaller(inner, change, path, _below(name, at)) for at, inner in enumerate(value)]
    return value


def home_of(root: Any, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that a tensor lies in, and its key there."""
    while name not in root:
        key = next(key for key in root if name.startswith(f"{key}."))
        root, name = root[key], name[len(str(key)) + 1 :]
    return root, name


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _optimizers(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the states of optimizers in a checkpoint, and where they are."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _optimizers(inner, _below(name, key))
