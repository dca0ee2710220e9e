"""Takes the masks of pruning out of the state dicts of a recorded program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prunectl.formats import wrapped_names
from prunectl.formats.base import Tensor
from prunectl.formats.torch.entries import entries, replace_entries, text, text_node, texts
from prunectl.formats.torch.recipe import Node
from prunectl.formats.wrapped_names import Wrapped

_SPARSIFIER = {"state", "groups"}


@dataclass(frozen=True, slots=True)
class StateDict:
    """A dictionary of a program, and what the names of its tensors begin with."""

    prefix: str
    node: Node


@dataclass(frozen=True, slots=True)
class Product:
    """A weight that is to become itself times its masks."""

    place: StateDict
    name: str
    """What it is called without its wrapper, in its dictionary."""
    wrapper: str
    tensor: Tensor
    masks: tuple[Tensor, ...]


def dictionaries(root: Node) -> Iterator[StateDict]:
    """Yield the dictionaries inside dictionaries, each once."""
    todo = [StateDict("", root)]
    seen: set[int] = set()
    while todo:
        found = todo.pop()
        inside = entries(found.node)
        if inside is None or id(found.node) in seen:
            continue
        seen.add(id(found.node))
        yield found
        below = [(name, item) for key, item in inside if (name := text(key)) is not None]
        todo += [StateDict(f"{found.prefix}{name}.", item) for name, item in reversed(below)]


def unwrap(root: Node, tensors: Mapping[str, Tensor]) -> list[Product]:
    """Give every masked weight its plain name, drop its masks, and return what its numbers are to be."""
    places = list(dictionaries(root))
    others = {weight: name for place in places for weight, name in _sparsifier(place).items()}
    found: list[Product] = []
    for place in places:
        found += _unwrap(place, tensors, others)
    used = {mask.name for product in found for mask in product.masks}
    for place in places:
        inside = entries(place.node) or []
        kept = [entry for entry in inside if not _is_spent(place, text(entry[0]), entry[1], used)]
        if len(kept) < len(inside):
            replace_entries(place.node, kept)
    return found


def _unwrap(place: StateDict, tensors: Mapping[str, Tensor], others: Mapping[str, str]) -> list[Product]:
    inside = entries(place.node) or []
    names = [name for key, _ in inside if (name := text(key)) is not None]
    wrapped = [
        weight for weight in wrapped_names.find(names, others) if _product(place, weight, tensors, others) is not None
    ]
    if not wrapped:
        return []
    found = [product for weight in wrapped if (product := _product(place, weight, tensors, others)) is not None]
    masks = {mask for weight in wrapped for mask in weight.masks}
    plain = wrapped_names.renamed(names, wrapped)
    kept = [
        (key if name is None or plain[name] == name else text_node(plain[name]), item)
        for key, item in inside
        if (name := text(key)) not in masks
    ]
    replace_entries(place.node, kept)
    _forget_modules(place.node, wrapped)
    return found


def _product(
    place: StateDict, weight: Wrapped, tensors: Mapping[str, Tensor], others: Mapping[str, str]
) -> Product | None:
    names = [mask if mask in others.values() else place.prefix + mask for mask in weight.masks]
    original = tensors.get(place.prefix + weight.original)
    masks = tuple(tensors[name] for name in names if name in tensors)
    if original is None or len(masks) != len(names) or not original.is_float:
        return None
    if not all(mask.shape in (original.shape, original.shape[:1]) for mask in masks):
        return None
    return Product(place, weight.plain, weight.wrapper, original, masks)


def _sparsifier(place: StateDict) -> dict[str, str]:
    """Return the masks that a sparsifier of torch.ao keeps, by the weights that they belong to."""
    inside = texts(place.node)
    if not inside.keys() >= _SPARSIFIER:
        return {}
    states = texts(inside["state"])
    return {weight: f"{place.prefix}state.{weight}.mask" for weight, kept in states.items() if "mask" in texts(kept)}


def _is_spent(place: StateDict, name: str | None, item: Node, used: set[str]) -> bool:
    """Whether an entry is a sparsifier whose masks are all in the weights now."""
    if name is None or entries(item) is None:
        return False
    masks = _sparsifier(StateDict(f"{place.prefix}{name}.", item)).values()
    return bool(masks) and used.issuperset(masks)


def _forget_modules(node: Node, wrapped: list[Wrapped]) -> None:
    """Drop the versions of modules that are gone, which a state dict keeps in `_metadata`."""
    gone = {weight.wrapper for weight in wrapped if weight.wrapper != weight.original}
    above = {wrapper.rpartition(".")[0] for wrapper in gone if ".parametrizations." in f".{wrapper}"}
    for deed in node.deeds:
        state = texts(deed.parts[0]) if deed.code == ord("b") else {}
        metadata = state.get("_metadata")
        inside = entries(metadata) if metadata is not None else None
        if metadata is None or inside is None:
            continue
        kept = [entry for entry in inside if not _is_gone(text(entry[0]), gone | above)]
        if len(kept) < len(inside):
            replace_entries(metadata, kept)


def _is_gone(name: str | None, gone: set[str]) -> bool:
    return name is not None and any(name == wrapper or name.startswith(f"{wrapper}.") for wrapper in gone)
