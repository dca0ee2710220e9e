"""Which tensor of a file does a layer multiply by? Found by names, by role and by shape."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from prunectl.formats.base import Role, Tensor
from prunectl.formats.keras.config import PRUNED_PREFIX
from prunectl.formats.keras.products import Product
from prunectl.formats.keras.roles import modern_name
from prunectl.formats.lengths import Shape

MULTIPLIED = frozenset({Role.KERNEL, Role.RECURRENT})
MAX_CANDIDATES = 256
"""More weights than one layer has."""
_BY_LEAF, _BY_ROLE = 2, 1


class Weights:
    """The weights of a model by the names that stand in theirs."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._parts: dict[str, tuple[str, ...]] = {}
        self._named: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...], Product], tuple[Tensor, ...]] = {}
        for tensor in tensors:
            if tensor.role in MULTIPLIED:
                self._parts[tensor.name] = _parts(tensor)
                for part in dict.fromkeys(self._parts[tensor.name]):
                    self._named[part].append(tensor)

    def owns(self, names: Iterable[str]) -> bool:
        """Whether there are weights of a layer of one of these names."""
        return any(name in self._named for name in names)

    def of(self, names: tuple[str, ...], around: tuple[str, ...], product: Product, turn: int) -> tuple[Tensor, ...]:
        """Return the weight of a product, or its parts where it is split by gates; nothing if there is none.

        One of the layer's own names must stand in the weight's; the models around it decide between several.
        """
        key = (names, around, product)
        if key not in self._known:
            self._known[key] = self._of(names, around, product)
        found = self._known[key]
        whole = 1 if found and agrees(product.shape, found[0].shape) else product.gates
        if len(found) < whole or not product.leaf:
            return ()
        begin = (product.turn + turn) * whole % len(found)
        return tuple(found[(begin + place) % len(found)] for place in range(whole))

    def _of(self, names: tuple[str, ...], around: tuple[str, ...], product: Product) -> tuple[Tensor, ...]:
        """Return the weights that fit best, equally well."""
        near = {tensor.name: tensor for name in names for tensor in self._named.get(name, ())[:MAX_CANDIDATES]}
        shape = product.shape
        fitting = [tensor for tensor in near.values() if agrees(shape, tensor.shape)]
        if not fitting and product.gates > 1 and shape[-1] is not None:
            gate = (*shape[:-1], shape[-1] // product.gates)
            fitting = [tensor for tensor in near.values() if agrees(gate, tensor.shape)]
        scores = {tensor.name: self._score(tensor, names, around, product.leaf) for tensor in fitting}
        best = max(scores.values(), default=(0, 0, 0))
        return tuple(tensor for tensor in fitting if scores[tensor.name] == best and best[0])

    def _score(
        self, tensor: Tensor, names: tuple[str, ...], around: tuple[str, ...], leaf: str
    ) -> tuple[int, int, int]:
        parts = self._parts[tensor.name]
        inside, _, last = leaf.rpartition("/")
        is_recurrent = last == "recurrent_kernel"
        strength = 0
        if (tensor.role == Role.RECURRENT) == is_recurrent:
            strength = _BY_ROLE
        if parts[-1] == last and (not inside or any(inside in part for part in parts[:-1])):
            strength = _BY_LEAF
        explained = set(parts) & {*names, *around}
        return strength, len(explained), len(explained) - len(set(parts))


def agrees(wanted: Shape, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can have a shape, whichever order of axes and however many axes of 1 Keras 1 gave it."""
    if len(wanted) == len(shape) and all(one in {None, length} for one, length in zip(wanted, shape, strict=True)):
        return True
    return None not in wanted and Counter(one for one in wanted if one != 1) == Counter(
        length for length in shape if length != 1
    )


def _parts(tensor: Tensor) -> tuple[str, ...]:
    """Return the names that a weight's name consists of, the last of them its own."""
    # Some layers have a slash in their name.
    whole = (tensor.layer, tensor.name.rpartition("/")[0])
    steps = [*whole, *tensor.layer.split("/"), *tensor.name.removesuffix(":0").split("/")]
    steps[-1] = modern_name(steps[-1]) if "/" not in tensor.name else steps[-1]
    return tuple(step.removeprefix(PRUNED_PREFIX) for step in steps)
