"""New numbers for the storages of weights that had masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.numbers_masked import HALF, fitting, halved, masked
from prunectl.formats.torch.entries import entries, replace_entries, text
from prunectl.formats.torch.recipe import Bytes, Node, reachable
from prunectl.formats.torch.storages import Container, Fresh, ask_of, asks, moved
from prunectl.formats.torch.unwrap import Product
from prunectl.formats.writing import in_storage_order, is_permuted


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a storage is to hold, in the order in which it holds it."""

    tensor: Tensor
    """Says the type and the order of bytes."""
    size: int
    blocks: Callable[[], Iterator[Array]]

    def fresh(self) -> Fresh:
        """Return the storage as bytes."""
        return Fresh(self.size * self.tensor.dtype.itemsize, self.tensor.dtype.itemsize, self._raw)

    def half(self, model: ModelFile) -> Fresh:
        """Return the storage as the bytes of 16-bit floats."""

        def raw() -> Iterator[Bytes]:
            for block in halved(self.blocks(), model.path, self.tensor.name):
                yield _bytes(block, is_big=self.tensor.storage.big_endian)

        return Fresh(self.size * HALF.itemsize, HALF.itemsize, raw)

    def _raw(self) -> Iterator[Bytes]:
        for block in self.blocks():
            yield _bytes(block, is_big=self.tensor.storage.big_endian)


def _bytes(block: Array, *, is_big: bool) -> Bytes:
    whole = np.ascontiguousarray(block).reshape(-1)
    raw = whole.view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, whole.itemsize)[:, ::-1]).data if is_big else raw.data


def multiply(model: ModelFile, container: Container, products: Collection[Product]) -> dict[str, Numbers]:
    """Return the storages of weights times masks, by their keys; a weight that shares its own gets another."""
    root = container.recipe.root
    used = Counter(container.name_of(ask.key) for ask in asks(root))
    known = {container.name_of(ask.key): ask.key for ask in asks(root)}
    unused = (str(number) for number in count(len(known)) if str(number) not in container.sizes)
    groups: dict[str, list[Product]] = {}
    for product in products:
        groups.setdefault(product.tensor.storage.key, []).append(product)
    found: dict[str, Numbers] = {}
    for name, group in groups.items():
        nodes = [_node(product) for product in group]
        own = {id(node) for top in nodes for node in reachable(top).values() if ask_of(node) is not None}
        if used[name] == len(own) and _are_alike(model, group):
            found[known[name]] = _in_place(model, group[0])
            continue
        for product, node in zip(group, nodes, strict=True):
            key = next(unused)
            _replace(model, product, moved(node, key, product.tensor.shape))
            found[key] = _apart(model, product)
    return found


def _node(product: Product) -> Node:
    inside = entries(product.place.node) or ()
    return next(item for key, item in inside if text(key) == product.name)


def _replace(model: ModelFile, product: Product, node: Node | None) -> None:
    if node is None:
        raise InputError(f"{model.path} keeps {product.tensor.name} in a way that cannot be put together with its mask")
    inside = entries(product.place.node) or ()
    kept = [(key, node if text(key) == product.name else item) for key, item in inside]
    replace_entries(product.place.node, kept)


def _are_alike(model: ModelFile, group: list[Product]) -> bool:
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


def _weights(model: ModelFile, product: Product) -> tuple[Array, list[Array]]:
    weights = model.read(product.tensor)
    masks = (fitting(weights, model.read(mask)) for mask in product.masks)
    return weights, [mask for mask in masks if mask is not None]


def _in_place(model: ModelFile, product: Product) -> Numbers:
    def blocks() -> Iterator[Array]:
        weights, masks = _weights(model, product)
        yield from masked(
            in_storage_order(product.tensor, weights), [in_storage_order(product.tensor, mask) for mask in masks]
        )

    return Numbers(product.tensor, product.tensor.size, blocks)


def _apart(model: ModelFile, product: Product) -> Numbers:
    def blocks() -> Iterator[Array]:
        weights, masks = _weights(model, product)
        yield from masked(weights, masks)

    return Numbers(product.tensor, product.tensor.size, blocks)
