"""Numerical comparison of an exported model with its source, run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.analysis.stats import ModelStats
from prunectl.errors import WorkError
from prunectl.exporting.job import RunnableModel, Samples
from prunectl.exporting.request import ExportRequest
from prunectl.formats.base import Array


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Tolerances of a comparison: elementwise (atol, rtol), or by root mean square and top-1 agreement."""

    atol: float = 0.0
    rtol: float = 0.0
    share: float = 0.0
    """Allowed difference as a share of the largest number in the same output, for reduced precision."""
    relative_rms: float | None = None
    """Limit on the relative root mean square of the differences, in place of elementwise limits."""
    top1_agreement: float | None = None
    """Smallest share of the examples with the same arg max, checked where outputs are class scores."""

    def allowed(self, expected: Array) -> Array:
        """The largest difference allowed for each number."""
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
            limits: Array = np.maximum(self.atol + self.rtol * np.abs(expected), self.share * largest)
        return limits


EXACT = Tolerance(1e-4, 1e-4)
HALF = Tolerance(1e-4, 1e-2, 1e-2)
BFLOAT16 = Tolerance(1e-4, 1e-2, 4e-2)
"""Bfloat16 rounds eight times as coarsely as float16, but only weights are rounded: sums stay in 32 bits."""
INTEGERS = Tolerance(relative_rms=0.05, top1_agreement=0.98)
"""5 % is a signal-to-noise ratio of 26 dB. Small networks of every kind, by every converter, were measured at 0.2 to
2 %, and at a top-1 agreement of 99.2 to 100 % on the digits data."""


def tolerance_of(request: ExportRequest) -> Tolerance:
    """The tolerance of --atol and --rtol, or else the default of the precision that is written."""
    usual = HALF if request.half else BFLOAT16 if request.bf16 else INTEGERS if request.int8 else EXACT
    if request.atol is None and request.rtol is None:
        return usual
    atol = usual.atol if request.atol is None else request.atol
    return Tolerance(atol, usual.rtol if request.rtol is None else request.rtol)


SMALL_SAMPLE = 50
"""With fewer examples than this, a single example exceeds the share that may differ in top-1."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """The difference between one output and that of the source."""

    name: str
    largest: float
    mean: float
    relative_rms: float
    """Root mean square of the differences, divided by that of the source's output."""


def difference(name: str, expected: Array, actual: Array) -> OutputDifference:
    """Largest, mean and relative root-mean-square difference of one output."""
    deviations = _deviations(expected, actual)
    mean = float(deviations.mean()) if deviations.size else 0.0
    return OutputDifference(name, float(deviations.max(initial=0.0)), mean, _relative_rms(expected, deviations))


def _deviations(expected: Array, actual: Array) -> Array:
    with np.errstate(invalid="ignore"):
        deviations = np.abs(expected - actual)
    is_same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    result: Array = np.where(is_same, 0.0, deviations)
    return result


def _relative_rms(expected: Array, deviations: Array) -> float:
    """RMS of the differences over RMS of the expected numbers; infinite if a difference is NaN."""
    with np.errstate(all="ignore"):
        finite = expected[np.isfinite(expected)]
        signal, error = float(np.square(finite).sum()), float(np.square(deviations).sum())
    if error == 0.0:
        return 0.0
    return float(np.sqrt(error / signal)) if signal > 0.0 and np.isfinite(error) else float("inf")


def check_elementwise(name: str, expected: Array, actual: Array, tolerance: Tolerance) -> None:
    """Refuse an output with a number that differs by more than atol + rtol |expected|."""
    deviations = _deviations(expected, actual)
    # A NaN in only one of the two outputs is within no tolerance.
    wrong = np.flatnonzero(~((deviations == 0.0) | (deviations <= tolerance.allowed(expected))))
    if wrong.size:
        first = int(wrong[0])
        raise WorkError(
            f"the output {name} differs from the source: {actual[first]:.6g} instead of {expected[first]:.6g}, "
            f"in {wrong.size:,} of {deviations.size:,} values, by at most {np.nanmax(deviations):.3g}; "
            "nothing was written",
            hint="raise --atol or --rtol to allow larger differences",
        )


def check_rms(difference: OutputDifference, limit: float, *, is_data: bool) -> None:
    """Refuse an output whose relative root-mean-square difference exceeds a limit."""
    if not difference.relative_rms <= limit:
        raise WorkError(
            f"the output {difference.name} differs by {difference.relative_rms:.1%} of its RMS; "
            f"{limit:.0%} is allowed; nothing was written",
            hint=f"{'use more examples (--samples N)' if is_data else 'calibrate with real examples (--data SPEC)'}, "
            "or allow more with --atol and --rtol",
        )


def check_top1(same: float, examples: int, least: float) -> None:
    """Refuse a top-1 agreement below a limit."""
    # In a small sample, one example may lie between two classes; compare() checks the RMS as well then.
    wrong = round((1 - same) * examples)
    if wrong > max(int(examples < SMALL_SAMPLE), int((1 - least) * examples)):
        raise WorkError(
            f"the top-1 answer is the same for {same:.1%} of {examples:,} examples; {least:.0%} is required; "
            "nothing was written",
            hint="use more examples (--samples N), or allow more with --atol and --rtol",
        )


_STRING_KINDS = frozenset("OSU")
Run = Callable[[tuple[Array, ...]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison: the difference of every output."""

    examples: int
    is_data: bool
    tolerance: Tolerance
    outputs: tuple[OutputDifference, ...]
    top1_agreement: float | None
    """Share of the examples with the same arg max, with data and for vectors of class scores."""

    @property
    def largest(self) -> float:
        """The largest difference of all."""
        return max((output.largest for output in self.outputs), default=0.0)

    @property
    def relative_rms(self) -> float:
        """The largest relative root-mean-square difference of all outputs."""
        return max((output.relative_rms for output in self.outputs), default=0.0)

    @property
    def mean(self) -> float:
        """The mean difference, averaged over the outputs."""
        return float(np.mean([output.mean for output in self.outputs])) if self.outputs else 0.0


def compare(source: RunnableModel, result: Run, samples: Samples, tolerance: Tolerance) -> Comparison:
    """Run both on the same inputs; a difference beyond the tolerance is an error that names the output."""
    pairs = [list(_paired(source.run(batch), result(batch))) for batch in samples.batches]
    has_classes = samples.is_data and bool(pairs[0]) and _is_classes(pairs[0][0][1])
    top1 = _same_top1([pair[0] for pair in pairs]) if has_classes else None
    differences = []
    for index, (name, _, _) in enumerate(pairs[0]):
        expected, actual = _numbers([pair[index][1] for pair in pairs], [pair[index][2] for pair in pairs])
        differences.append(difference(name, expected, actual))
        if tolerance.relative_rms is None:
            check_elementwise(name, expected, actual, tolerance)
        elif not _are_labels(pairs[0][index][1]):
            if index or top1 is None or samples.examples < SMALL_SAMPLE:
                check_rms(differences[-1], tolerance.relative_rms, is_data=samples.is_data)
        elif tolerance.top1_agreement is not None:
            check_top1(float(np.mean(expected == actual)), expected.size, tolerance.top1_agreement)
    if top1 is not None and tolerance.top1_agreement is not None:
        check_top1(top1, samples.examples, tolerance.top1_agreement)
    return Comparison(samples.examples, samples.is_data, tolerance, tuple(differences), top1)


def _paired(expected: dict[str, Array], actual: dict[str, Array]) -> Iterator[tuple[str, Array, Array]]:
    if len(expected) != len(actual):
        outputs = f"{len(actual)} output{'s' * (len(actual) != 1)}"
        raise WorkError(f"the result has {outputs}, its source {len(expected)}; nothing was written")
    has_names = expected.keys() == actual.keys()
    for index, (name, value) in enumerate(expected.items()):
        other = actual[name] if has_names else list(actual.values())[index]
        if np.shape(value) != np.shape(other):
            raise WorkError(
                f"the output {name} has the shape {_shape_text(np.shape(other))} "
                f"instead of {_shape_text(np.shape(value))} as in the source; nothing was written"
            )
        yield name, np.asarray(value), np.asarray(other)


def _numbers(expected: list[Array], actual: list[Array]) -> tuple[Array, Array]:
    """Two outputs as vectors of float64; strings become their ranks in the sorted union, complex numbers pairs."""
    first, second = (np.concatenate([part.reshape(-1) for part in parts]) for parts in (expected, actual))
    if first.dtype.kind in _STRING_KINDS or second.dtype.kind in _STRING_KINDS:
        _, ranks = np.unique(np.concatenate([first.astype(str), second.astype(str)]), return_inverse=True)
        first, second = ranks[: len(first)], ranks[len(first) :]
    if first.dtype.kind == second.dtype.kind == "c":
        first, second = (part.astype(np.complex128).view(np.float64) for part in (first, second))
    return first.astype(np.float64), second.astype(np.float64)


def _are_labels(array: Array) -> bool:
    """Whether an output is one label for each example: a word or an int64, as ArgMax and classifiers write."""
    has_kind = array.dtype == np.int64 or array.dtype.kind in _STRING_KINDS
    return has_kind and array.ndim > 0 and array.size == len(array)


def _is_classes(array: Array) -> bool:
    return array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind == "f"


def _same_top1(pairs: list[tuple[str, Array, Array]]) -> float:
    same = [expected.argmax(axis=1) == actual.argmax(axis=1) for _, expected, actual in pairs]
    return float(np.concatenate(same).mean())


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export: statistics before and after, and the comparison."""

    before: ModelStats
    after: ModelStats
    source: str
    """Title of the source format."""
    target: str
    comparison: Comparison | None
    """None if only weights were exported: these are equal bit by bit."""
    notes: tuple[str, ...]
    companion_files: tuple[tuple[str, int], ...] = ()
    """Other files that were written: paths and sizes in bytes."""
