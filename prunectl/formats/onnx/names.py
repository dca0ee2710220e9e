"""What users call the layers and tensors of an ONNX model."""

from __future__ import annotations

_LEAVES = ("weight", "bias", "running_", "num_batches_tracked", "gamma", "beta", "kernel", "in_proj_", "alpha")
"""How names of parameters begin behind the last dot, by PyTorch's habits."""


def layer_of(name: str, user: str) -> str:
    """Return the layer of a tensor: what its own name says, else the node that uses it."""
    layer, _, leaf = name.rpartition(".")
    if layer and leaf.startswith(_LEAVES):
        return layer
    return user or layer or name


class Names:
    """Names given so far, none of them twice."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Return the name, numbered if it was given before: two nodes may have one name."""
        found = name
        while found in self._given:
            self._counts[name] = self._counts.get(name, 1) + 1
            found = f"{name}#{self._counts[name]}"
        self._given.add(found)
        return found
