"""Storages of 32-bit and wider floats as ones of 16-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.numbers_masked import HALVED
from prunectl.formats.torch.entries import called, value
from prunectl.formats.torch.recipe import Node, reachable
from prunectl.formats.torch.renumber import Numbers
from prunectl.formats.torch.storages import Container, Fresh, asks, keys
from prunectl.formats.torch.values import Global

_TYPED = (
    *("torch._utils._rebuild_qtensor", "torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_tensor_v3"),
    "torch._tensor._rebuild_from_type",
)
"""Calls that say or presume the type of their numbers."""


def halve(model: ModelFile, container: Container, numbers: Mapping[str, Numbers]) -> dict[str, Fresh]:
    """Return every storage of plain 32-bit and wider floats as one of 16-bit floats, and name it so in the program."""
    named: dict[str, Tensor] = {}
    for tensor in model.tensors:
        named.setdefault(tensor.storage.key, tensor)
    bound = _bound(container.recipe.root)
    found: dict[str, Fresh] = {}
    classes: dict[str, Node] = {}
    done: set[int] = set()
    for ask in asks(container.recipe.root):
        held = numbers.get(ask.key) or _whole(model, named.get(container.name_of(ask.key)))
        if held is None or held.tensor.dtype not in HALVED or ask.key in bound:
            continue
        found.setdefault(ask.key, held.half(model))
        kind = value(ask.id.parts[1])
        if isinstance(kind, Global) and id(ask.id) not in done:
            done.add(id(ask.id))
            raw = f"c{kind.module}\nHalfStorage\n".encode()
            ask.id.parts[1] = classes.setdefault(kind.module, Node(raw))
    return found


def _bound(root: Node) -> frozenset[str]:
    """Return the storages whose type is also said elsewhere, as that of scales and of wrapper classes is."""
    calls = [node for node in reachable(root).values() if called(node).startswith(_TYPED)]
    return frozenset(key for node in calls for key in keys(node))


def _whole(model: ModelFile, tensor: Tensor | None) -> Numbers | None:
    """Return all that a storage holds, whichever part of it a tensor sees."""
    if tensor is None or tensor.storage.key.startswith("pickle@"):
        return None
    size = tensor.storage.nbytes // tensor.dtype.itemsize
    whole = replace(tensor, shape=(size,), start=0, strides=None)
    return Numbers(whole, size, lambda: iter([model.read(whole)]))
