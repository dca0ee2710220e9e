"""Does the result answer as its source does?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting.live import Live
from prunectl.exporting.samples import Samples
from prunectl.formats.base import Array

Run = Callable[[tuple[Array, ...]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two numbers may be apart."""

    atol: float
    rtol: float
    share: float = 0.0
    """Of the largest number in the same output, for formats that round."""

    def allowed(self, expected: Array) -> Array:
        """Return how far each number may be away."""
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
            found: Array = np.maximum(self.atol + self.rtol * np.abs(expected), self.share * largest)
        return found


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from that of the source."""

    name: str
    largest: float
    mean: float


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
    def mean(self) -> float:
        """The mean of the means of all outputs."""
        return float(np.mean([one.mean for one in self.outputs])) if self.outputs else 0.0


def compare(source: Live, result: Run, samples: Samples, tolerance: Tolerance) -> Parity:
    """Run both on the same inputs; too far apart is an error that names the first output."""
    pairs = [list(_paired(source.run(batch), result(batch))) for batch in samples.batches]
    found, top1 = [], None
    for at, (name, _, _) in enumerate(pairs[0]):
        expected = np.concatenate([_rows(pair[at][1]) for pair in pairs])
        answered = np.concatenate([_rows(pair[at][2]) for pair in pairs])
        _check(name, expected, answered, tolerance)
        apart = _apart(expected, answered)
        found.append(OutputDifference(name, float(apart.max(initial=0.0)), float(apart.mean()) if apart.size else 0.0))
        if at == 0 and samples.is_data and _is_classes(pairs[0][0][1]):
            top1 = _same_top1([pair[0] for pair in pairs])
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


def _rows(array: Array) -> Array:
    return array.astype(np.float64).reshape(-1)


def _apart(expected: Array, answered: Array) -> Array:
    with np.errstate(invalid="ignore"):
        apart = np.abs(expected - answered)
    is_same = (expected == answered) | (np.isnan(expected) & np.isnan(answered))
    found: Array = np.where(is_same, 0.0, apart)
    return found


def _check(name: str, expected: Array, answered: Array, tolerance: Tolerance) -> None:
    apart = _apart(expected, answered)
    # A NaN beside a number is within no tolerance.
    wrong = np.flatnonzero(~((apart == 0.0) | (apart <= tolerance.allowed(expected))))
    if wrong.size:
        first = int(wrong[0])
        raise WorkError(
            f"the output {name} differs: {answered[first]:.6g} and not {expected[first]:.6g} as in the source, "
            f"in {wrong.size:,} of {apart.size:,} numbers, by {np.nanmax(apart):.3g} at most; nothing was written",
            hint="--atol and --rtol say how far two numbers may be apart",
        )


def _is_classes(array: Array) -> bool:
    return array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind == "f"


def _same_top1(pairs: list[tuple[str, Array, Array]]) -> float:
    same = [expected.argmax(axis=1) == answered.argmax(axis=1) for _, expected, answered in pairs]
    return float(np.concatenate(same).mean())


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
