"""The parts of output matching: its examples, its steps and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array
from prunectl.training.backend import InspectableModel, TrainableModel
from prunectl.training.config import DivergedError
from prunectl.training.data.source import Arrays, Batch, as_tuple, map_arrays
from prunectl.training.task import DistilledOutput, distillation_loss

HELD_OUT = 10
"""One in this many examples is held out of training, to tell when matching no longer improves."""
_PROBE_DIVISOR, _SLOW = 20, 0.07
"""If more than this share of the distance is left after a twentieth of the steps, weights are pruned in stages."""
_EVALUATIONS = 40
"""How often the held-out examples are evaluated if all steps are taken."""
ANSWER_BYTES = 1 << 30
"""Dense outputs that take more bytes are computed again in each step, if there is a copy of the dense model."""
_PATIENCE = 10
"""Evaluations without an improvement after which matching stops early."""
_FAR, _RATE_PATIENCE, _RATE_FACTOR = 0.5, 3, 0.25
"""While more than this share of the distance is left, so many evaluations without a gain multiply the rate by this."""
_NEAR, _DECAY_DIVISOR = 0.015, 3
"""Once less than this share of the first distance is left, the rate decays to zero over a third of the steps."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Calibration inputs, one array for each input of the model, and the outputs of the dense model for them."""

    inputs: tuple[Array, ...]
    answers: tuple[Array, ...]
    dense: InspectableModel | None = None
    """The dense model, which computes the outputs when needed, where all of them would take too much memory."""

    def inputs_of(self, rows: Array) -> Arrays:
        """The inputs of the examples in these rows."""
        return packed(tuple(array[rows] for array in self.inputs))

    def answers_of(self, rows: Array) -> Arrays:
        """The outputs of the dense model for the examples in these rows."""
        if self.dense is not None:
            return self.dense.predict(self.inputs_of(rows))
        return packed(tuple(array[rows] for array in self.answers))


def answered(
    network: TrainableModel, batches: Sequence[Batch], path: Path, copy: InspectableModel | None = None
) -> Examples:
    """The examples with the outputs of the network, which is still dense, or with a dense copy that computes them."""
    first = as_tuple(network.predict(batches[0].x))
    alone = as_tuple(network.predict(map_arrays(lambda array: array[:1], batches[0].x)))
    if any(single.shape[1:] != array.shape[1:] for single, array in zip(alone, first, strict=True)):
        raise UsageError(
            f"the outputs of {path} compare the examples of a batch with each other, and cannot be matched one by one",
            hint="use --repair layers, or --strategy obs",
        )
    nbytes = sum(array[:1].nbytes for array in first) * sum(len(as_tuple(batch.x)[0]) for batch in batches)
    dense = copy if nbytes > ANSWER_BYTES else None
    parts = [first, *(as_tuple(network.predict(batch.x)) for batch in (batches[1:] if dense is None else ()))]
    answers = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not any(array.dtype.kind == "f" for array in answers):
        raise UsageError(
            f"the outputs of {path} are whole numbers, which cannot be matched", hint="leave out --repair outputs"
        )
    for number, array in enumerate(answers):
        if not np.isfinite(array).all():
            where = f"output {number + 1}" if len(answers) > 1 else "the output"
            raise WorkError(
                f"{where} of the dense model is NaN or infinite for some examples; nothing was written",
                hint="check that the data is scaled as in training (?norm=unit) and that the model has no NaN",
            )
    inputs = zip(*(as_tuple(batch.x) for batch in batches), strict=True)
    return Examples(tuple(np.concatenate(arrays) for arrays in inputs), answers, dense)


def packed(arrays: tuple[Array, ...]) -> Arrays:
    """A tuple of several arrays, or a single one by itself, as models take and give them."""
    return arrays if len(arrays) > 1 else arrays[0]


@dataclass(slots=True)
class MatchingSchedule:
    """Learning-rate schedule with early stopping, driven by the distance to the dense outputs on held-out examples."""

    steps: int
    first_distance: float  # before the first step
    may_end_early: bool
    """Whether to end once little of the distance is left; it stops anyway if the distance no longer improves."""
    last_step: int = field(init=False)
    """The number of steps after which matching ends, unless it stops earlier because nothing improves."""
    _decay_start: int = field(init=False)
    """The step from which the rate decays to zero, at `last_step`, faster than before; `steps` if it never does."""
    best_distance: float = field(init=False)
    """The smallest distance so far."""
    _stale: int = 0
    """Evaluations in a row without an improvement."""
    _rate_factor: float = 1.0

    def __post_init__(self) -> None:
        self.last_step = self._decay_start = self.steps
        self.best_distance = self.first_distance

    def continues(self, step: int) -> bool:
        """Whether this step is still to be taken."""
        return step < self.last_step and self._stale < _PATIENCE

    def rate_at(self, step: int) -> float:
        """The learning rate at a step, as a share of the initial one."""
        rate = self._rate_factor * (1 - min(step, self._decay_start) / self.steps)
        last, start = self.last_step, self._decay_start
        return rate * (last - step) / (last - start) if step >= start else rate

    def record(self, step: int, distance: float) -> bool:
        """Record the distance on the held-out examples; return whether it is the smallest so far."""
        is_best = distance < self.best_distance
        self._stale = 0 if is_best else self._stale + 1
        self.best_distance = min(distance, self.best_distance)
        if self.has_overshot:
            self._rate_factor *= _RATE_FACTOR
        if self.may_end_early and self._decay_start == self.steps and self.best_distance < _NEAR * self.first_distance:
            self._decay_start, self.last_step = step, min(self.steps, step + math.ceil(self.steps / _DECAY_DIVISOR))
        return is_best

    @property
    def has_overshot(self) -> bool:
        """Whether the rate is too high: it only worsens a model that lost little, such as a 2:4 language model."""
        return self._stale > 0 and self._stale % _RATE_PATIENCE == 0 and self.best_distance > self.first_distance * _FAR


@dataclass(slots=True)
class Training:
    """Steps on batches of the examples in another order in each epoch, and the distance on those that are held out."""

    network: TrainableModel
    examples: Examples
    compared: Sequence[DistilledOutput]
    batch_size: int
    seed: int
    most_steps: int
    """The most steps that may be taken in all."""
    may_end_early: bool
    advance: Callable[[int], None]
    """Moves the progress bar on by a number of bytes."""
    steps: int = field(init=False)
    """The number of steps since the start, or the last restart."""
    held_out: Array = field(init=False)
    """The rows of examples that are not trained on."""
    first_distance: float = field(init=False)
    """The distance before the first step, with all weights pruned."""
    schedule: MatchingSchedule = field(init=False)
    _begun: int = field(init=False)
    """The number of steps before those of the schedule."""
    _best_tensors: dict[str, Array] = field(init=False)
    _rows: Array = field(init=False)
    _batches: Iterator[Array] = field(init=False)
    _taken: int = 0
    """The number of steps that were taken in all."""

    def __post_init__(self) -> None:
        number = len(self.examples.inputs[0])
        order = np.random.default_rng((self.seed, number)).permutation(number)
        self.held_out, self._rows = order[: number // HELD_OUT], order[number // HELD_OUT :]
        self.first_distance = self.distance()
        self.restart()

    def restart(self) -> None:
        """Begin with the first batch again, and with the weights as they are."""
        self.steps, self._batches = 0, self._shuffled()
        self._begin(self.most_steps, may_end_early=self.may_end_early)

    def begin_decay(self, left: int) -> None:
        """Begin to lower the learning rate to zero in the steps that are left, from the weights as they are."""
        # To end early would save a few seconds, and lose a tenth of a point.
        self._begin(left, may_end_early=False)
        self.schedule.best_distance = self.distance()

    def _begin(self, steps: int, *, may_end_early: bool) -> None:
        self.schedule = MatchingSchedule(steps, self.first_distance, may_end_early)
        self._begun, self._best_tensors = self.steps, self.network.tensors()

    def _shuffled(self) -> Iterator[Array]:
        rows, size = self._rows, min(self.batch_size, len(self._rows))
        # An incomplete batch at the end of an epoch is skipped: batch normalisation has no statistics of one example.
        for epoch in count():
            self.network.reseed(self.seed * 1_000_003 + epoch)
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(rows)
            yield from (shuffled[begin : begin + size] for begin in range(0, len(rows) - size + 1, size))

    def take_step(self, rate: float) -> None:
        """Train on the next batch with a share of the learning rate."""
        rows = next(self._batches)
        inputs = self.examples.inputs_of(rows)
        self.network.step(Batch(inputs), rate, self.examples.answers_of(rows))
        self.steps += 1
        self._taken += 1
        if self._taken <= self.most_steps:
            self.advance(sum(array.nbytes for array in as_tuple(inputs)))

    def is_slow(self) -> bool:
        """Whether much of the distance is left after the first steps; false if no examples are held out to tell."""
        if not len(self.held_out):
            return False
        self._run(self.schedule.steps // _PROBE_DIVISOR)
        return self.schedule.best_distance > _SLOW * self.first_distance

    def run(self) -> None:
        """Take the steps of the schedule that are left, and go back to the best weights."""
        self._run(self.schedule.steps)
        if len(self.held_out):
            self.network.assign(self._best_tensors)

    def _run(self, end: int) -> None:
        schedule, interval = self.schedule, math.ceil(self.schedule.steps / _EVALUATIONS)
        while schedule.continues(step := self.steps - self._begun) and step < end:
            self.take_step(schedule.rate_at(step))
            step += 1
            if step % interval and step < schedule.last_step:
                continue
            _check_finite(self.network.logs()["loss"], self.steps)
            if not len(self.held_out):
                continue
            distance = self.distance()
            _check_finite(distance, self.steps)
            if schedule.record(step, distance):
                self._best_tensors = self.network.tensors()
            elif schedule.has_overshot:
                self.network.assign(self._best_tensors)

    def distance(self) -> float:
        """The mean distance from the dense outputs, which training minimises; infinite if no examples are held out."""
        total = 0.0
        for begin in range(0, len(self.held_out), self.batch_size):
            rows = self.held_out[begin : begin + self.batch_size]
            pruned = as_tuple(self.network.predict(self.examples.inputs_of(rows)))
            answers = as_tuple(self.examples.answers_of(rows))
            losses = [
                distillation_loss(_OPS, output, dense, mine, 1.0)
                for output, dense, mine in zip(self.compared, answers, pruned, strict=True)
            ]
            total += len(rows) * float(np.sum(losses))
        return total / len(self.held_out) if len(self.held_out) else math.inf


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the distance to the dense outputs is NaN or infinite after {step} steps; nothing was written",
            hint="check the scale of the data (?norm=unit), or use --repair layers",
        )


def _log_softmax(logits: Array, axis: int) -> Array:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return result


_OPS = SimpleNamespace(
    cast=lambda array, _: np.asarray(array, np.float64),
    exp=np.exp,
    log=np.log,
    log_sigmoid=lambda logits: -np.logaddexp(0.0, -logits),
    log_softmax=_log_softmax,
    mean=np.mean,
    sigmoid=lambda logits: np.exp(-np.logaddexp(0.0, -logits)),
    square=np.square,
    sum=np.sum,
)
