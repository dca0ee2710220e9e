"""Takes the masks of pruning out of the state dicts of a recorded program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from prunectl.errors import InputError
from prunectl.formats import state_dict
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.masked import HALF, HALVED, apply_mask, broadcast_mask, to_float16
from prunectl.formats.patch import in_storage_order, is_permuted
from prunectl.formats.state_dict import MaskedParam
from prunectl.formats.torch.pickle.edit import (
    CheckpointContainer,
    NewStorage,
    called,
    entries,
    replace_entries,
    storage_keys,
    storage_ref,
    storage_refs,
    text,
    text_node,
    texts,
    value,
    with_storage,
)
from prunectl.formats.torch.pickle.ir import Bytes, IRNode, reachable
from prunectl.formats.torch.pickle.opcodes import Global

_SPARSIFIER = {"state", "groups"}


@dataclass(frozen=True, slots=True)
class StateDict:
    """A dictionary of a program, and what the names of its tensors begin with."""

    prefix: str
    node: IRNode


@dataclass(frozen=True, slots=True)
class MaskedWeight:
    """A weight that is to become itself times its masks."""

    place: StateDict
    name: str
    """What it is called without its wrapper, in its dictionary."""
    wrapper: str
    tensor: Tensor
    masks: tuple[Tensor, ...]


def iter_nested_dicts(root: IRNode) -> Iterator[StateDict]:
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


def unwrap(root: IRNode, tensors: Mapping[str, Tensor]) -> list[MaskedWeight]:
    """Give every masked weight its plain name, drop its masks, and return what its numbers are to be."""
    places = list(iter_nested_dicts(root))
    others = {weight: name for place in places for weight, name in _sparsifier(place).items()}
    found: list[MaskedWeight] = []
    for place in places:
        found += _unwrap(place, tensors, others)
    used = {mask.name for product in found for mask in product.masks}
    for place in places:
        inside = entries(place.node) or []
        kept = [entry for entry in inside if not _is_applied(place, text(entry[0]), entry[1], used)]
        if len(kept) < len(inside):
            replace_entries(place.node, kept)
    return found


def _unwrap(place: StateDict, tensors: Mapping[str, Tensor], others: Mapping[str, str]) -> list[MaskedWeight]:
    inside = entries(place.node) or []
    names = [name for key, _ in inside if (name := text(key)) is not None]
    wrapped = [
        weight for weight in state_dict.find(names, others) if _product(place, weight, tensors, others) is not None
    ]
    if not wrapped:
        return []
    found = [product for weight in wrapped if (product := _product(place, weight, tensors, others)) is not None]
    masks = {mask for weight in wrapped for mask in weight.masks}
    plain = state_dict.renamed(names, wrapped)
    kept = [
        (key if name is None or plain[name] == name else text_node(plain[name]), item)
        for key, item in inside
        if (name := text(key)) not in masks
    ]
    replace_entries(place.node, kept)
    _forget_modules(place.node, wrapped)
    return found


def _product(
    place: StateDict, weight: MaskedParam, tensors: Mapping[str, Tensor], others: Mapping[str, str]
) -> MaskedWeight | None:
    names = [mask if mask in others.values() else place.prefix + mask for mask in weight.masks]
    original = tensors.get(place.prefix + weight.original)
    masks = tuple(tensors[name] for name in names if name in tensors)
    if original is None or len(masks) != len(names) or not original.is_float:
        return None
    if not all(mask.shape in (original.shape, original.shape[:1]) for mask in masks):
        return None
    return MaskedWeight(place, weight.plain, weight.wrapper, original, masks)


def _sparsifier(place: StateDict) -> dict[str, str]:
    """Return the masks that a sparsifier of torch.ao keeps, by the weights that they belong to."""
    inside = texts(place.node)
    if not inside.keys() >= _SPARSIFIER:
        return {}
    states = texts(inside["state"])
    return {weight: f"{place.prefix}state.{weight}.mask" for weight, kept in states.items() if "mask" in texts(kept)}


def _is_applied(place: StateDict, name: str | None, item: IRNode, used: set[str]) -> bool:
    """Whether an entry is a sparsifier whose masks are all in the weights now."""
    if name is None or entries(item) is None:
        return False
    masks = _sparsifier(StateDict(f"{place.prefix}{name}.", item)).values()
    return bool(masks) and used.issuperset(masks)


def _forget_modules(node: IRNode, wrapped: list[MaskedParam]) -> None:
    """Drop the versions of modules that are gone, which a state dict keeps in `_metadata`."""
    gone = {weight.wrapper for weight in wrapped if weight.wrapper != weight.original}
    above = {wrapper.rpartition(".")[0] for wrapper in gone if ".parametrizations." in f".{wrapper}"}
    for deed in node.deeds:
        state = texts(deed.parts[0]) if deed.code == ord("b") else {}
        metadata = state.get("_metadata")
        inside = entries(metadata) if metadata is not None else None
        if metadata is None or inside is None:
            continue
        kept = [entry for entry in inside if not _is_removed(text(entry[0]), gone | above)]
        if len(kept) < len(inside):
            replace_entries(metadata, kept)


def _is_removed(name: str | None, gone: set[str]) -> bool:
    return name is not None and any(name == wrapper or name.startswith(f"{wrapper}.") for wrapper in gone)


@dataclass(frozen=True, slots=True)
class TensorData:
    """What a storage is to hold, in the order in which it holds it."""

    tensor: Tensor
    """Says the type and the order of bytes."""
    size: int
    blocks: Callable[[], Iterator[Array]]

    def fresh(self) -> NewStorage:
        """Return the storage as bytes."""
        return NewStorage(self.size * self.tensor.dtype.itemsize, self.tensor.dtype.itemsize, self._raw)

    def half(self, model: ModelFile) -> NewStorage:
        """Return the storage as the bytes of 16-bit floats."""

        def raw() -> Iterator[Bytes]:
            for block in to_float16(self.blocks(), model.path, self.tensor.name):
                yield _bytes(block, is_big=self.tensor.storage.big_endian)

        return NewStorage(self.size * HALF.itemsize, HALF.itemsize, raw)

    def _raw(self) -> Iterator[Bytes]:
        for block in self.blocks():
            yield _bytes(block, is_big=self.tensor.storage.big_endian)


def _bytes(block: Array, *, is_big: bool) -> Bytes:
    whole = np.ascontiguousarray(block).reshape(-1)
    raw = whole.view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, whole.itemsize)[:, ::-1]).data if is_big else raw.data


def materialise_masked(
    model: ModelFile, container: CheckpointContainer, products: Collection[MaskedWeight]
) -> dict[str, TensorData]:
    """Return the storages of weights times masks, by their keys; a weight that shares its own gets another."""
    root = container.recipe.root
    used = Counter(container.name_of(ask.key) for ask in storage_refs(root))
    known = {container.name_of(ask.key): ask.key for ask in storage_refs(root)}
    unused = (str(number) for number in count(len(known)) if str(number) not in container.sizes)
    groups: dict[str, list[MaskedWeight]] = {}
    for product in products:
        groups.setdefault(product.tensor.storage.key, []).append(product)
    found: dict[str, TensorData] = {}
    for name, group in groups.items():
        nodes = [_node(product) for product in group]
        own = {id(node) for top in nodes for node in reachable(top).values() if storage_ref(node) is not None}
        if used[name] == len(own) and _are_alike(model, group):
            found[known[name]] = _in_existing_storage(model, group[0])
            continue
        for product, node in zip(group, nodes, strict=True):
            key = next(unused)
            _replace(model, product, with_storage(node, key, product.tensor.shape))
            found[key] = _as_new_storage(model, product)
    return found


def _node(product: MaskedWeight) -> IRNode:
    inside = entries(product.place.node) or ()
    return next(item for key, item in inside if text(key) == product.name)


def _replace(model: ModelFile, product: MaskedWeight, node: IRNode | None) -> None:
    if node is None:
        raise InputError(f"{model.path} keeps {product.tensor.name} in a way that cannot be put together with its mask")
    inside = entries(product.place.node) or ()
    kept = [(key, node if text(key) == product.name else item) for key, item in inside]
    replace_entries(product.place.node, kept)


def _are_alike(model: ModelFile, group: list[MaskedWeight]) -> bool:
    """Whether weights fill one storage, and their masks say the same of it."""
    first = group[0].tensor
    is_dense = first.strides is None or is_permuted(first.shape, first.strides)
    if first.start or first.nbytes != first.storage.nbytes or not is_dense:
        return False
    for product in group[1:]:
        one = product.tensor
        if (one.start, one.shape, one.strides, one.dtype) != (first.start, first.shape, first.strides, first.dtype):
            return False
        masks = zip(_weights(model, product)[1], _weights(model, group[0])[1], strict=False)
        if len(product.masks) != len(group[0].masks) or not all(np.array_equal(*pair) for pair in masks):
            return False
    return True


def _weights(model: ModelFile, product: MaskedWeight) -> tuple[Array, list[Array]]:
    weights = model.read(product.tensor)
    masks = (broadcast_mask(weights, model.read(mask)) for mask in product.masks)
    return weights, [mask for mask in masks if mask is not None]


def _in_existing_storage(model: ModelFile, product: MaskedWeight) -> TensorData:
    def blocks() -> Iterator[Array]:
        weights, masks = _weights(model, product)
        yield from apply_mask(
            in_storage_order(product.tensor, weights), [in_storage_order(product.tensor, mask) for mask in masks]
        )

    return TensorData(product.tensor, product.tensor.size, blocks)


def _as_new_storage(model: ModelFile, product: MaskedWeight) -> TensorData:
    def blocks() -> Iterator[Array]:
        weights, masks = _weights(model, product)
        yield from apply_mask(weights, masks)

    return TensorData(product.tensor, product.tensor.size, blocks)


_TYPED = (
    *("torch._utils._rebuild_qtensor", "torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_tensor_v3"),
    "torch._tensor._rebuild_from_type",
)
"""Calls that say or presume the type of their numbers."""


def halve(model: ModelFile, container: CheckpointContainer, numbers: Mapping[str, TensorData]) -> dict[str, NewStorage]:
    """Return every storage of plain 32-bit and wider floats as one of 16-bit floats, and name it so in the program."""
    named: dict[str, Tensor] = {}
    for tensor in model.tensors:
        named.setdefault(tensor.storage.key, tensor)
    bound = _bound(container.recipe.root)
    found: dict[str, NewStorage] = {}
    classes: dict[str, IRNode] = {}
    done: set[int] = set()
    for ask in storage_refs(container.recipe.root):
        held = numbers.get(ask.key) or _whole(model, named.get(container.name_of(ask.key)))
        if held is None or held.tensor.dtype not in HALVED or ask.key in bound:
            continue
        found.setdefault(ask.key, held.half(model))
        kind = value(ask.id.parts[1])
        if isinstance(kind, Global) and id(ask.id) not in done:
            done.add(id(ask.id))
            raw = f"c{kind.module}\nHalfStorage\n".encode()
            ask.id.parts[1] = classes.setdefault(kind.module, IRNode(raw))
    return found


def _bound(root: IRNode) -> frozenset[str]:
    """Return the storages whose type is also said elsewhere, as that of scales and of wrapper classes is."""
    calls = [node for node in reachable(root).values() if called(node).startswith(_TYPED)]
    return frozenset(key for node in calls for key in storage_keys(node))


def _whole(model: ModelFile, tensor: Tensor | None) -> TensorData | None:
    """Return all that a storage holds, whichever part of it a tensor sees."""
    if tensor is None or tensor.storage.key.startswith("pickle@"):
        return None
    size = tensor.storage.nbytes // tensor.dtype.itemsize
    whole = replace(tensor, shape=(size,), start=0, strides=None)
    return TensorData(whole, size, lambda: iter([model.read(whole)]))
