"""Apply and remove the pruning masks in the state dicts of a pickle, and halve the precision of storages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats import masked_params
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import raw_bytes
from prunectl.formats.masked_params import MaskedParam
from prunectl.formats.patch import HALF, HALVED, apply_mask, broadcast_mask, in_storage_order, is_permuted, to_float16
from prunectl.formats.torch.pickle.edit import (
    CheckpointContainer,
    NewStorage,
    called_name,
    dict_of,
    entries,
    replace_entries,
    storage_keys,
    storage_ref,
    storage_refs,
    string_of,
    text_node,
    value_of,
    with_storage,
)
from prunectl.formats.torch.pickle.ir import IRNode, reachable
from prunectl.formats.torch.pickle.opcodes import Global

_SPARSIFIER = {"state", "groups"}


@dataclass(frozen=True, slots=True)
class StateDict:
    """A dictionary in the pickle, and the prefix of its tensors' names."""

    prefix: str
    node: IRNode


@dataclass(frozen=True, slots=True)
class MaskedWeight:
    """A weight to multiply by its masks."""

    parent: StateDict
    name: str
    """Its key in the dictionary once it has no wrapper, such as `conv.weight`."""
    wrapper: str
    tensor: Tensor
    masks: tuple[Tensor, ...]


def iter_nested_dicts(root: IRNode) -> Iterator[StateDict]:
    """Yield a dictionary and all dictionaries nested in it, each once."""
    todo = [StateDict("", root)]
    seen: set[int] = set()
    while todo:
        current = todo.pop()
        pairs = entries(current.node)
        if pairs is None or id(current.node) in seen:
            continue
        seen.add(id(current.node))
        yield current
        named_items = [(name, item) for key, item in pairs if (name := string_of(key)) is not None]
        todo += [StateDict(f"{current.prefix}{name}.", item) for name, item in reversed(named_items)]


def unwrap(root: IRNode, tensors: Mapping[str, Tensor]) -> list[MaskedWeight]:
    """Rename every masked weight to its plain name, drop its masks, and return the weights to multiply by them."""
    state_dicts = list(iter_nested_dicts(root))
    ao_masks = {weight: name for state_dict in state_dicts for weight, name in _sparsifier(state_dict).items()}
    masked: list[MaskedWeight] = []
    for state_dict in state_dicts:
        masked += _unwrap(state_dict, tensors, ao_masks)
    used = {mask.name for weight in masked for mask in weight.masks}
    for state_dict in state_dicts:
        pairs = entries(state_dict.node) or []
        kept = [entry for entry in pairs if not _is_applied(state_dict, string_of(entry[0]), entry[1], used)]
        if len(kept) < len(pairs):
            replace_entries(state_dict.node, kept)
    return masked


def _unwrap(parent: StateDict, tensors: Mapping[str, Tensor], ao_masks: Mapping[str, str]) -> list[MaskedWeight]:
    pairs = entries(parent.node) or []
    names = [name for key, _ in pairs if (name := string_of(key)) is not None]
    candidates = masked_params.find(names, ao_masks)
    matches = [(weight, _match_masks(parent, weight, tensors, ao_masks)) for weight in candidates]
    wrapped = [weight for weight, match in matches if match is not None]
    if not wrapped:
        return []
    masks = {mask for weight in wrapped for mask in weight.masks}
    plain = masked_params.renamed(names, wrapped)
    kept = [
        (key if name is None or plain[name] == name else text_node(plain[name]), item)
        for key, item in pairs
        if (name := string_of(key)) not in masks
    ]
    replace_entries(parent.node, kept)
    _forget_modules(parent.node, wrapped)
    return [match for _, match in matches if match is not None]


def _match_masks(
    parent: StateDict, weight: MaskedParam, tensors: Mapping[str, Tensor], ao_masks: Mapping[str, str]
) -> MaskedWeight | None:
    names = [mask if mask in ao_masks.values() else parent.prefix + mask for mask in weight.masks]
    original = tensors.get(parent.prefix + weight.original)
    masks = tuple(tensors[name] for name in names if name in tensors)
    if original is None or len(masks) != len(names) or not original.is_float:
        return None
    if not all(mask.shape in (original.shape, original.shape[:1]) for mask in masks):
        return None
    return MaskedWeight(parent, weight.plain, weight.wrapper, original, masks)


def _sparsifier(parent: StateDict) -> dict[str, str]:
    """The names of the masks that a sparsifier of torch.ao keeps, by the names of their weights."""
    inside = dict_of(parent.node)
    if not inside.keys() >= _SPARSIFIER:
        return {}
    states = dict_of(inside["state"])
    return {weight: f"{parent.prefix}state.{weight}.mask" for weight, kept in states.items() if "mask" in dict_of(kept)}


def _is_applied(parent: StateDict, name: str | None, item: IRNode, used: set[str]) -> bool:
    """Whether an entry is a sparsifier whose masks have all been applied."""
    if name is None or entries(item) is None:
        return False
    masks = _sparsifier(StateDict(f"{parent.prefix}{name}.", item)).values()
    return bool(masks) and used.issuperset(masks)


def _forget_modules(node: IRNode, wrapped: list[MaskedParam]) -> None:
    """Drop the versions of removed modules, which a state dict keeps in `_metadata`."""
    removed = {weight.wrapper for weight in wrapped if weight.wrapper != weight.original}
    above = {wrapper.rpartition(".")[0] for wrapper in removed if ".parametrizations." in f".{wrapper}"}
    for mutation in node.mutations:
        state = dict_of(mutation.parts[0]) if mutation.code == ord("b") else {}
        metadata = state.get("_metadata")
        pairs = entries(metadata) if metadata is not None else None
        if metadata is None or pairs is None:
            continue
        kept = [entry for entry in pairs if not _is_removed(string_of(entry[0]), removed | above)]
        if len(kept) < len(pairs):
            replace_entries(metadata, kept)


def _is_removed(name: str | None, removed: set[str]) -> bool:
    return name is not None and any(name == wrapper or name.startswith(f"{wrapper}.") for wrapper in removed)


@dataclass(frozen=True, slots=True)
class TensorData:
    """The new elements of a storage, in storage order."""

    tensor: Tensor
    """Gives the dtype and the byte order."""
    size: int
    blocks: Callable[[], Iterator[Array]]

    def to_storage(self) -> NewStorage:
        """The storage as bytes."""
        return self._storage(self.tensor.dtype, self.blocks)

    def half(self, model: ModelFile) -> NewStorage:
        """The storage as the bytes of 16-bit floats."""
        return self._storage(HALF, lambda: to_float16(self.blocks(), model.path, self.tensor.name))

    def _storage(self, dtype: np.dtype[Any], blocks: Callable[[], Iterator[Array]]) -> NewStorage:
        raw = partial(raw_bytes, big_endian=self.tensor.storage.big_endian)
        return NewStorage(self.size * dtype.itemsize, dtype.itemsize, lambda: map(raw, blocks()))


def materialise_masked(
    model: ModelFile, container: CheckpointContainer, masked_weights: Collection[MaskedWeight]
) -> dict[str, TensorData]:
    """The products of weights and masks, by the keys of their storages; a weight in a shared storage gets a new one."""
    root = container.ir.root
    used = Counter(container.name_of(ref.key) for ref in storage_refs(root))
    key_of = {container.name_of(ref.key): ref.key for ref in storage_refs(root)}
    unused = (str(number) for number in count(len(key_of)) if str(number) not in container.sizes)
    groups: dict[str, list[MaskedWeight]] = {}
    for masked in masked_weights:
        groups.setdefault(masked.tensor.storage.key, []).append(masked)
    data: dict[str, TensorData] = {}
    for name, group in groups.items():
        nodes = [_node(masked) for masked in group]
        own = {id(node) for top in nodes for node in reachable(top).values() if storage_ref(node) is not None}
        if used[name] == len(own) and _are_alike(model, group):
            data[key_of[name]] = _masked_data(model, group[0], is_in_place=True)
            continue
        for masked, node in zip(group, nodes, strict=True):
            key = next(unused)
            _replace(model, masked, with_storage(node, key, masked.tensor.shape))
            data[key] = _masked_data(model, masked, is_in_place=False)
    return data


def _node(masked: MaskedWeight) -> IRNode:
    pairs = entries(masked.parent.node) or ()
    return next(item for key, item in pairs if string_of(key) == masked.name)


def _replace(model: ModelFile, masked: MaskedWeight, node: IRNode | None) -> None:
    if node is None:
        raise InputError(f"{model.path} stores {masked.tensor.name} in a way that prevents applying its mask")
    pairs = entries(masked.parent.node) or ()
    kept = [(key, node if string_of(key) == masked.name else item) for key, item in pairs]
    replace_entries(masked.parent.node, kept)


_LAYOUT = attrgetter("start", "shape", "strides", "dtype")


def _are_alike(model: ModelFile, group: list[MaskedWeight]) -> bool:
    """Whether all weights are the same view of a whole storage, and their masks are equal."""
    first = group[0].tensor
    is_dense = first.strides is None or is_permuted(first.shape, first.strides)
    if first.start or first.nbytes != first.storage.nbytes or not is_dense:
        return False
    for masked in group[1:]:
        if _LAYOUT(masked.tensor) != _LAYOUT(first):
            return False
        masks = zip(_weights(model, masked)[1], _weights(model, group[0])[1], strict=False)
        if len(masked.masks) != len(group[0].masks) or not all(np.array_equal(*pair) for pair in masks):
            return False
    return True


def _weights(model: ModelFile, masked: MaskedWeight) -> tuple[Array, list[Array]]:
    weights = model.read(masked.tensor)
    masks = (broadcast_mask(weights, model.read(mask)) for mask in masked.masks)
    return weights, [mask for mask in masks if mask is not None]


def _masked_data(model: ModelFile, masked: MaskedWeight, *, is_in_place: bool) -> TensorData:
    """A weight times its masks, in the order of its storage or in C order."""

    def blocks() -> Iterator[Array]:
        weights, masks = _weights(model, masked)
        if is_in_place:
            weights, *masks = (in_storage_order(masked.tensor, array) for array in (weights, *masks))
        yield from apply_mask(weights, masks)

    return TensorData(masked.tensor, masked.tensor.size, blocks)


_TYPED = (
    *("torch._utils._rebuild_qtensor", "torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_tensor_v3"),
    "torch._tensor._rebuild_from_type",
)
"""Calls that state or presume the dtype of their storages."""


def halve(model: ModelFile, container: CheckpointContainer, numbers: Mapping[str, TensorData]) -> dict[str, NewStorage]:
    """16-bit copies of the storages of wider floats; their classes in the pickle become HalfStorage."""
    first_tensors: dict[str, Tensor] = {}
    for tensor in model.tensors:
        first_tensors.setdefault(tensor.storage.key, tensor)
    calls = [node for node in reachable(container.ir.root).values() if called_name(node).startswith(_TYPED)]
    typed = frozenset(key for node in calls for key in storage_keys(node))
    halved: dict[str, NewStorage] = {}
    classes: dict[str, IRNode] = {}
    renamed_ids: set[int] = set()
    for ref in storage_refs(container.ir.root):
        data = numbers.get(ref.key) or _whole(model, first_tensors.get(container.name_of(ref.key)))
        if data is None or data.tensor.dtype not in HALVED or ref.key in typed:
            continue
        halved.setdefault(ref.key, data.half(model))
        storage_class = value_of(ref.id.parts[1])
        if isinstance(storage_class, Global) and id(ref.id) not in renamed_ids:
            renamed_ids.add(id(ref.id))
            raw = f"c{storage_class.module}\nHalfStorage\n".encode()
            ref.id.parts[1] = classes.setdefault(storage_class.module, IRNode(raw))
    return halved


def _whole(model: ModelFile, tensor: Tensor | None) -> TensorData | None:
    """All elements of the storage that a tensor is a view of."""
    if tensor is None or tensor.storage.key.startswith("pickle@"):
        return None
    size = tensor.storage.nbytes // tensor.dtype.itemsize
    whole = replace(tensor, shape=(size,), start=0, strides=None)
    return TensorData(whole, size, lambda: iter([model.read(whole)]))
