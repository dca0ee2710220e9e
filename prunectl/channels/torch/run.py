"""Running a program of PyTorch step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.node import map_aggregate

from prunectl.channels.torch.tracing import quietly
from prunectl.training.torch.outputs import leaves


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A program, some of its numbers replaced."""

    module: torch.fx.GraphModule
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the attributes that they are there."""
    is_wide: bool = False
    """Whether every number of it is a float64."""


class Steps(torch.fx.Interpreter):
    """Runs a program, and shows each value to someone."""

    def __init__(self, network: Network, see: Callable[[str, Any], None]) -> None:
        super().__init__(network.module)
        self._values, self._see, self._is_wide = network.values, see, network.is_wide

    def run_node(self, n: torch.fx.Node) -> Any:
        """Return what a node gives."""
        found = super().run_node(n)
        self._see(n.name, found)
        return found

    def fetch_attr(self, target: str) -> Any:
        """Return a weight."""
        found = self._values.get(target)
        found = super().fetch_attr(target) if found is None else found
        is_short = isinstance(found, torch.Tensor) and found.is_floating_point()
        return found.double() if self._is_wide and is_short else found

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a node takes; one that names a type of number makes longer ones."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if not self._is_wide:
            return args, kwargs
        found: tuple[tuple[Any, ...], dict[str, Any]] = map_aggregate((args, kwargs), _widened)
        return found


def _widened(argument: Any) -> Any:
    is_float = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if is_float else argument


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
