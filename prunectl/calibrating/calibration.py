"""Data that goes through a model, and what is added up on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunectl.calibrating.columns import columns
from prunectl.calibrating.moments import Pairs, Part, Sums, Wide, check_memory, products
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, Tensor
from prunectl.training.data.source import Batch, each, mapped
from prunectl.training.sights import Graded, Observed, Sight, Use

Adder = Callable[[Sight, tuple[int, ...]], tuple[Wide, int]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model and the batches that it is looked at with."""

    network: Observed
    batches: tuple[Batch, ...]
    reference: Observed | None = None
    """The same model once more, which stays as it was."""

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(len(each(batch.x)[0]) for batch in self.batches)

    def sums(self, tensors: Sequence[Tensor], adder: Adder) -> dict[str, Sums]:
        """Return sums of what each tensor meets, in the order in which they meet it.

        None of those that are not seen, or used in two ways whose sums are not of the same things: a matrix as it is
        and turned, as where a decoder has the weights of its encoder.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        found: dict[str, Sums] = {}
        ways: dict[str, Use] = {}
        torn: set[str] = set()

        def see(sight: Sight) -> None:
            way = replace(sight.use, outputs=None, window=None)
            if ways.setdefault(sight.name, way) != way:
                torn.add(sight.name)
            if sight.name not in torn:
                shape = sight.use.shape or shapes[sight.name]
                found.setdefault(sight.name, Sums()).add(sight, shape, adder)

        for batch in self.batches:
            self.network.observe(shapes.keys(), batch.x, see)
        for name in torn:
            found.pop(name, None)
        for name, sums in found.items():
            if not all(np.isfinite(total).all() for total in sums.totals.values()):
                raise WorkError(
                    f"{name} meets inputs that are no finite numbers; nothing was written",
                    hint="is the data scaled as in training (?norm=unit), and the model whole?",
                )
        return found

    def products(self, tensor: Tensor) -> Sums:
        """Return how the inputs of one tensor go together: one at a time, since they are as big as it is squared."""
        checked: list[Sight] = []

        def adder(sight: Sight, kernel: tuple[int, ...]) -> tuple[Wide, int]:
            if not checked:
                checked.append(sight)
                _, groups, features = next(columns(sight.inputs[:1], sight.use, kernel)).shape
                check_memory(sight.name, groups=groups, features=features, kept=1)
            return products(sight, kernel)

        return self.sums([tensor], adder).get(tensor.name, Sums())

    def pairs(self, tensor: Tensor) -> dict[Part, Pairs]:
        """Return how what a tensor meets now goes together with what it met in the model as it was."""
        assert self.reference is not None
        found: dict[Part, Pairs] = {}
        for batch in self.batches:
            now, before = _sights(self.network, tensor, batch), _sights(self.reference, tensor, batch)
            for mine, theirs in zip(now, before, strict=True):
                part = mine.use.outputs
                found.setdefault(part, Pairs(mine.use)).add(mine, theirs, mine.use.shape or tensor.shape)
        return found

    def gradients(self, tensors: Sequence[Tensor], of: Callable[[Wide], Wide]) -> dict[str, Wide]:
        """Return the means over batches of something of their gradients, weighted by the examples in each."""
        network = self.network
        if not isinstance(network, Graded):
            raise UsageError(
                "gradients need a framework that can differentiate the model, and onnxruntime does not",
                hint="--strategy activation-magnitude or obs, or prune the file that the ONNX model was made from",
            )
        found: dict[str, Wide] = {}
        examples = self.examples
        for batch in self.batches:
            share = len(each(batch.x)[0]) / examples
            for name, gradient in network.gradients([tensor.name for tensor in tensors], batch).items():
                seen = of(gradient.astype(np.float64))
                seen *= share
                found[name] = np.add(found[name], seen, out=found[name]) if name in found else seen
        for name, held in found.items():
            if not np.isfinite(held).all():
                raise WorkError(
                    f"the gradient of {name} is no finite number; nothing was written",
                    hint="is the data scaled as in training (?norm=unit), and is it the right --loss?",
                )
        return found


def _sights(network: Observed, tensor: Tensor, batch: Batch) -> list[Sight]:
    found: list[Sight] = []
    network.observe([tensor.name], batch.x, lambda sight: found.append(replace(sight, inputs=sight.inputs.copy())))
    return found


def taken(batches: Iterator[Batch], samples: int) -> tuple[Batch, ...]:
    """Return the first examples of some batches."""
    found: list[Batch] = []
    left = samples

    def first(array: Array) -> Array:
        return array[:left]

    for batch in batches:
        count = len(each(batch.x)[0])
        found.append(Batch(mapped(first, batch.x), None if batch.y is None else mapped(first, batch.y)))
        left -= count
        if left <= 0:
            break
    if not found:
        raise UsageError("the data holds no examples to look at")
    return tuple(found)
