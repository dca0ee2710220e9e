"""Running a program of PyTorch step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prunectl.channels.torch.tracing import quietly
from prunectl.training.torch.outputs import leaves


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A program, some of its numbers replaced."""

    module: torch.fx.GraphModule
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the attributes that they are there."""


class Steps(torch.fx.Interpreter):
    """Runs a program, and shows each value to someone."""

    def __init__(self, network: Network, see: Callable[[str, Any], None]) -> None:
        super().__init__(network.module)
        self._values, self._see = network.values, see

    def run_node(self, n: torch.fx.Node) -> Any:
        """Return what a node gives."""
        found = super().run_node(n)
        self._see(n.name, found)
        return found

    def fetch_attr(self, target: str) -> Any:
        """Return a weight."""
        found = self._values.get(target)
        return super().fetch_attr(target) if found is None else found


def shapes_of(network: Network, inputs: Iterable[torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every value, as seen on an example; of several that come out, each by its number."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = tuple(value.shape)
        elif isinstance(value, list | tuple):
            found.update({f"{name}.{at}": tuple(one.shape) for at, one in enumerate(value) if hasattr(one, "shape")})

    outcome(network, inputs, see)
    return found


def outcome(network: Network, inputs: Iterable[torch.Tensor], see: Callable[[str, Any], None]) -> list[torch.Tensor]:
    """Return the tensors that come out."""
    with quietly():
        found = Steps(network, see).run(*inputs, enable_io_processing=False)
    return leaves(found)
