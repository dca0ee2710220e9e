"""Does the result answer as its source does?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.analysis.stats import ModelStats
from prunectl.errors import WorkError
from prunectl.exporting.inputs import RunnableModel
from prunectl.exporting.job import Samples
from prunectl.exporting.request import ExportRequest
from prunectl.formats.base import Array


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a result may be from its source."""

    atol: float = 0.0
    rtol: float = 0.0
    share: float = 0.0
    """Of the largest number in the same output, for formats that round."""
    noise: float | None = None
    """Of all numbers of an output together, judged in place of one by one."""
    top1: float | None = None
    """Share of the examples whose largest answer has to be the same one, judged where that is known."""

    def allowed(self, expected: Array) -> Array:
        """Return how far each number may be away."""
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
            found: Array = np.maximum(self.atol + self.rtol * np.abs(expected), self.share * largest)
        return found


EXACT = Tolerance(1e-4, 1e-4)
HALF = Tolerance(1e-4, 1e-2, 1e-2)
BFLOAT16 = Tolerance(1e-4, 1e-2, 4e-2)
"""Its rounding is eight times that of 16-bit floats, but of weights alone: what is summed up stays in 32 bits."""
INTEGERS = Tolerance(noise=0.05, top1=0.98)
"""5 % is 26 decibels of signal over noise. Small networks of every kind, by every converter, come to 0.2 to 2 %, and
on the digits to 99.2 to 100 % of top-1."""


def tolerance_of(request: ExportRequest) -> Tolerance:
    """Return what the user says, and else what the bits of the result let expect."""
    usual = HALF if request.is_half else BFLOAT16 if request.is_bf16 else INTEGERS if request.is_int8 else EXACT
    if request.atol is None and request.rtol is None:
        return usual
    atol = usual.atol if request.atol is None else request.atol
    return Tolerance(atol, usual.rtol if request.rtol is None else request.rtol)


FEW = 50
"""Of fewer examples one alone is more than the share whose largest answer may be another."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from that of the source."""

    name: str
    largest: float
    mean: float
    noise: float
    """Root of the mean square of the differences, as a share of that of the output."""


def difference(name: str, expected: Array, answered: Array) -> OutputDifference:
    """Return how far numbers are from those of the source."""
    apart = _apart(expected, answered)
    mean = float(apart.mean()) if apart.size else 0.0
    return OutputDifference(name, float(apart.max(initial=0.0)), mean, _noise(expected, apart))


def _apart(expected: Array, answered: Array) -> Array:
    with np.errstate(invalid="ignore"):
        apart = np.abs(expected - answered)
    is_same = (expected == answered) | (np.isnan(expected) & np.isnan(answered))
    found: Array = np.where(is_same, 0.0, apart)
    return found


def _noise(expected: Array, apart: Array) -> float:
    """Return the root of the mean square of differences, as a share of that of the numbers; NaN is beyond all."""
    with np.errstate(all="ignore"):
        finite = expected[np.isfinite(expected)]
        whole, wrong = float(np.square(finite).sum()), float(np.square(apart).sum())
    if wrong == 0.0:
        return 0.0
    return float(np.sqrt(wrong / whole)) if whole > 0.0 and np.isfinite(wrong) else float("inf")


def check_each(name: str, expected: Array, answered: Array, tolerance: Tolerance) -> None:
    """Refuse a number that is too far away."""
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


def check_noise(found: OutputDifference, limit: float) -> None:
    """Refuse an output that is too far away as a whole."""
    if not found.noise <= limit:
        raise WorkError(
            f"the output {found.name} differs by {found.noise:.1%} of its size (root mean square), and "
            f"{limit:.0%} would do; nothing was written",
            hint="examples of the kind it is made for may help: --data SPEC; else --atol and --rtol say what will do",
        )


def check_top1(same: float, examples: int, least: float) -> None:
    """Refuse too many examples whose largest answer is another one."""
    # One of few may lie between two answers; how far all numbers are away is judged as well then.
    wrong = round((1 - same) * examples)
    if wrong > max(int(examples < FEW), int((1 - least) * examples)):
        raise WorkError(
            f"the largest answer is the same one for {same:.1%} of {examples:,} examples, and {least:.0%} would do; "
            "nothing was written",
            hint="more examples may help: --samples N; else --atol and --rtol say what will do",
        )


_WORDS = frozenset("OSU")
Run = Callable[[tuple[Array, ...]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Comparison:
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


def compare(source: RunnableModel, result: Run, samples: Samples, tolerance: Tolerance) -> Comparison:
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
    return Comparison(samples.examples, samples.is_data, tolerance, tuple(found), top1)


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


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written, and how it compares with what it was made of."""

    before: ModelStats
    after: ModelStats
    source: str
    """The format, as people call it."""
    target: str
    parity: Comparison | None
    """None for weights alone, which are the same to the bit."""
    remarks: tuple[str, ...]
    beside: tuple[tuple[str, int], ...] = ()
    """Other files that were written: their paths, and their bytes."""
