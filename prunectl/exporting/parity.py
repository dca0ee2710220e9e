"""Does the result answer as its source does?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting.differences import FEW, OutputDifference, check_each, check_noise, check_top1, difference
from prunectl.exporting.live import Live
from prunectl.exporting.samples import Samples
from prunectl.exporting.tolerances import Tolerance
from prunectl.formats.base import Array

_WORDS = frozenset("OSU")
Run = Callable[[tuple[Array, ...]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Parity:
    """What a comparison found."""

    examples: int
    is_data: bool
    tolerance: Tolerance
    outputs: tuple[OutputDifference, ...]
    top1: float | None
    """Share of the examples whose largest answer is the same one, with data and for vectors of answers."""

    @property
    def largest(self) -> float:
        """The largest difference of all."""
        return max((one.largest for one in self.outputs), default=0.0)

    @property
    def noise(self) -> float:
        """The largest share that differences have of an output."""
        return max((one.noise for one in self.outputs), default=0.0)

    @property
    def mean(self) -> float:
        """The mean of the means of all outputs."""
        return float(np.mean([one.mean for one in self.outputs])) if self.outputs else 0.0


def compare(source: Live, result: Run, samples: Samples, tolerance: Tolerance) -> Parity:
    """Run both on the same inputs; too far apart is an error that names the first output."""
    pairs = [list(_paired(source.run(batch), result(batch))) for batch in samples.batches]
    has_classes = samples.is_data and bool(pairs[0]) and _is_classes(pairs[0][0][1])
    top1 = _same_top1([pair[0] for pair in pairs]) if has_classes else None
    found = []
    for at, (name, _, _) in enumerate(pairs[0]):
        expected, answered = _numbers([pair[at][1] for pair in pairs], [pair[at][2] for pair in pairs])
        found.append(difference(name, expected, answered))
        if tolerance.noise is None:
            check_each(name, expected, answered, tolerance)
        elif at or top1 is None or samples.examples < FEW:
            check_noise(found[-1], tolerance.noise)
    if top1 is not None and tolerance.top1 is not None:
        check_top1(top1, samples.examples, tolerance.top1)
    return Parity(samples.examples, samples.is_data, tolerance, tuple(found), top1)


def _paired(expected: dict[str, Array], answered: dict[str, Array]) -> Iterator[tuple[str, Array, Array]]:
    if len(expected) != len(answered):
        raise WorkError(f"the result gives {len(answered)} outputs, and its source {len(expected)}")
    has_names = expected.keys() == answered.keys()
    for at, (name, value) in enumerate(expected.items()):
        other = answered[name] if has_names else list(answered.values())[at]
        if np.shape(value) != np.shape(other):
            raise WorkError(
                f"the output {name} has the shape {_text(np.shape(other))}, and in the source {_text(np.shape(value))}"
            )
        yield name, np.asarray(value), np.asarray(other)


def _numbers(expected: list[Array], answered: list[Array]) -> tuple[Array, Array]:
    """Return two outputs as rows of numbers; words as the place that each has among all of them."""
    one, other = (np.concatenate([part.reshape(-1) for part in parts]) for parts in (expected, answered))
    if one.dtype.kind in _WORDS or other.dtype.kind in _WORDS:
        _, places = np.unique(np.concatenate([one.astype(str), other.astype(str)]), return_inverse=True)
        one, other = places[: len(one)], places[len(one) :]
    if one.dtype.kind == other.dtype.kind == "c":
        one, other = (part.astype(np.complex128).view(np.float64) for part in (one, other))
    return one.astype(np.float64), other.astype(np.float64)


def _is_classes(array: Array) -> bool:
    return array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind == "f"


def _same_top1(pairs: list[tuple[str, Array, Array]]) -> float:
    same = [expected.argmax(axis=1) == answered.argmax(axis=1) for _, expected, answered in pairs]
    return float(np.concatenate(same).mean())


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
