"""What lies in a checkpoint beside the weights, and what of it is cut as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


def kept_of(root: Any, order: Mapping[str, str], shapes: Shapes, path: str) -> dict[str, str]:
    """Return what optimizers keep of each weight, by its name in the file; they know weights by numbers.

    The order is that of the parameters of the module, with their names in the file.
    """
    found: dict[str, str] = {}
    for name, optimizer in _optimizers(root, ""):
        groups = optimizer["param_groups"]
        numbers = [number for group in groups for number in group.get("params", ())]
        said = [word for group in groups for word in group.get("param_names", ())]
        words = said if len(said) == len(numbers) and set(said) <= order.keys() else list(order)
        owners = {number: order[word] for number, word in zip(numbers, words, strict=False)}
        for number, state in optimizer["state"].items():
            for key, value in state.items() if isinstance(state, dict) else ():
                # A count of steps is a tensor as well.
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    if tuple(value.shape) != shapes.get(owners.get(number, "")):
                        raise InputError(
                            f"{path} holds the state of an optimizer, and which weight is number {number} in it "
                            "cannot be told",
                            hint=f"leave it out first: prunectl strip {path} -o weights.pt --only optimizer",
                        )
                    found[_below(_below(_below(name, "state"), number), key)] = owners[number]
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of the tensors of a file."""

    axes: Axes
    numbers: Mapping[str, Array]
    """What takes the place of some before they are cut."""


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
