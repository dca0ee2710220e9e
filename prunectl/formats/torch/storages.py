"""The storages that a recorded program asks its container for, and how to ask for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunectl.formats.torch import views
from prunectl.formats.torch.entries import arguments, called, number_node, text, text_node, tuple_node, value
from prunectl.formats.torch.recipe import Bytes, Node, Recipe, reachable

_ASKS = ord("Q")
_KEY, _COUNT = 2, 4


@dataclass(frozen=True, slots=True)
class Ask:
    """One place in a program where a storage is asked for."""

    id: Node
    """What tells the container which one: `("storage", class, key, location, count)`."""
    key: str


@dataclass(frozen=True, slots=True)
class Fresh:
    """A storage with new numbers."""

    nbytes: int
    itemsize: int
    raw: Callable[[], Iterator[Bytes]]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a container is to hold: a changed program, and the storages that are not as they were."""

    recipe: Recipe
    dropped: frozenset[str]
    fresh: Mapping[str, Fresh] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Container:
    """A file as the program in it and the storages beside."""

    recipe: Recipe
    name_of: Callable[[str], str]
    """What the model calls the storage of a key."""
    sizes: Mapping[str, int]
    """Bytes that the storage of a key takes in the file."""
    write: Callable[[Path, Contents], None]


def ask_of(node: Node) -> Ask | None:
    """Return the storage that a value is asked for with; None if it is no such value."""
    if node.code != _ASKS or len(node.parts[0].parts) <= _COUNT:
        return None
    place = node.parts[0]
    if text(place.parts[0]) != "storage":
        return None
    if not place.parts[_KEY].is_atom:
        return None
    key = text(place.parts[_KEY])
    return Ask(place, key if key is not None else str(value(place.parts[_KEY])))


def asks(root: Node) -> list[Ask]:
    """Return every place where a program asks for a storage, in its order."""
    return [ask for node in reachable(root).values() if (ask := ask_of(node)) is not None]


def keys(node: Node) -> frozenset[str]:
    """Return the storages behind a value."""
    return frozenset(ask.key for ask in asks(node))


def is_tensor(node: Node) -> bool:
    """Whether a value is a tensor, not something that holds some."""
    path = called(node)
    return path.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")) or path.endswith(".Parameter")


def moved(node: Node, key: str, shape: tuple[int, ...]) -> Node | None:
    """Return a tensor that sees the whole of another storage, row by row; None where it is not a plain one."""
    given = arguments(node)
    if not given:
        return None
    if called(node) in views.PLAIN:
        ask = ask_of(given[0])
        if ask is None:
            return None
        parts = [*ask.id.parts[:_KEY], text_node(key), ask.id.parts[3], number_node(math.prod(shape))]
        # Older programs say there which part of the storage they mean.
        parts += [Node(b"N")] * (len(ask.id.parts) - len(parts))
        strides = tuple_node([number_node(math.prod(shape[axis + 1 :])) for axis in range(len(shape))])
        inside = Node(given[0].raw, [tuple_node(parts)])
        changed = [inside, number_node(0), given[2], strides, *given[4:]]
    else:
        inner = moved(given[0], key, shape)
        if inner is None:
            return None
        changed = [inner, *given[1:]]
    return Node(node.raw, [node.parts[0], tuple_node(changed)], node.deeds)
