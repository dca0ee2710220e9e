"""Output matching: train the kept weights until the outputs match those of the dense model, without targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.calibration.reconstruct import Solved, solved_blocks
from prunectl.calibration.session import note_about, open_calibration
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.patch import is_writable
from prunectl.formats.registry import by_name
from prunectl.pruning.engine import PrunedTensors, PruningMethod, keep_masks
from prunectl.pruning.masks import Mask
from prunectl.pruning.plan import Plan, Selection
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import InspectableModel, LoadOptions, TrainableModel, TrainOptions
from prunectl.training.config import DivergedError
from prunectl.training.data.source import Arrays, Batch, as_tuple, map_arrays
from prunectl.training.distillation import compare_answers
from prunectl.training.finetune import write_back
from prunectl.training.runtimes import load_trainable, with_arrays
from prunectl.training.task import DistilledOutput, distillation_loss

STEPS = 2000
"""The number of Adam steps, unless the user gives another."""
RATE = 4e-3
"""The learning rate at the first step; it decays linearly to zero."""
HELD_OUT = 10
"""One in this many examples is held out of training, to tell when matching no longer improves."""
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

Start = Callable[[ModelFile, Plan, PruningMethod], Mapping[str, Solved]]
"""Computes what matching starts from: the pruned weights of each tensor in a plan, and the mask of what was pruned."""


def refuse_untrainable(model: ModelFile, *, has_layers: bool = True) -> None:
    """Refuse a format without gradients, before the data is opened; where there are layers, suggest --repair layers."""
    if model.family is Family.ONNX:
        export = "prune the Keras or PyTorch file of the model and export that"
        raise UsageError(
            f"--repair outputs trains the model, and {model.path} runs in onnxruntime, which computes no gradients",
            hint=f"use --repair layers, or {export}" if has_layers else export,
        )


def masked(model: ModelFile, plan: Plan, method: PruningMethod) -> dict[str, Solved]:
    """The weights with those that the strategy prunes set to zero, and the mask of what was pruned."""
    weights = {cut.tensor.name: np.array(model.read(cut.tensor)) for cut in plan.cuts}
    kept = keep_masks(model, plan, method, Selection((), (), {}), dict(weights))
    return {
        name: (np.where(kept[name], array, np.zeros((), array.dtype)), ~kept[name]) for name, array in weights.items()
    }


@dataclass(frozen=True, slots=True)
class Examples:
    """Calibration inputs, one array for each input of the model, and the outputs of the dense model for them."""

    inputs: tuple[Array, ...]
    answers: tuple[Array, ...]
    dense: InspectableModel | None = None
    """The dense model, which computes the outputs when needed, where all of them would take too much memory."""

    def inputs_of(self, rows: Array) -> Arrays:
        """The inputs of the examples in these rows."""
        return _packed(tuple(array[rows] for array in self.inputs))

    def answers_of(self, rows: Array) -> Arrays:
        """The outputs of the dense model for the examples in these rows."""
        if self.dense is not None:
            return self.dense.predict(self.inputs_of(rows))
        return _packed(tuple(array[rows] for array in self.answers))


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


def _packed(arrays: tuple[Array, ...]) -> Arrays:
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
class OutputMatcher:
    """Trains the kept weights with Adam on calibration batches to match the dense outputs; zeros stay zero."""

    batches: Sequence[Batch]
    network: TrainableModel
    request: PruneRequest
    start: Start = masked
    meter: ProgressFactory = no_progress
    notes: list[str] = field(default_factory=list)
    """Sentences for the user about how matching went."""
    copy: InspectableModel | None = None
    """A second copy of the dense model, which is not pruned or trained."""
    _dense: dict[str, Array] = field(init=False)
    """The tensors of the network before matching."""

    def __post_init__(self) -> None:
        self._dense = self.network.tensors()

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """The pruned and trained tensors of a plan, and other tensors that training changed."""
        network, dense = self.network, self._dense
        # A search for a size calls this repeatedly.
        network.assign(dense)
        self._prepare(model)
        examples = answered(network, self.batches, model.path, self.copy)
        solved = self.start(model, plan, method)
        network.assign({name: values for name, (values, _) in solved.items()})
        after = self.match(model, examples, _masks(model, solved, dense))
        outside = tuple(name for name in solved if name not in dense)
        self.notes += note_about("pruned but not matched, because no data goes through them", outside)
        blocks = []
        for cut in plan.cuts:
            weights, dropped = solved[cut.tensor.name]
            values = np.where(dropped, 0, after.get(cut.tensor.name, weights)).astype(cut.tensor.dtype)
            blocks.append(partial(solved_blocks, cut.tensor, values, dropped))
        others = {
            tensor.name: after[tensor.name]
            for tensor in model.tensors
            if tensor.name in after
            and tensor.name not in solved
            and not np.array_equal(after[tensor.name], dense[tensor.name])
        }
        return PrunedTensors(blocks, others)

    def _prepare(self, model: ModelFile) -> None:
        self.network.prepare(
            TrainOptions(
                loss="mse",
                optimizer="adam",
                lr=RATE,
                seed=self.request.seed,
                teacher_share=1.0,
                temperature=1.0,
                is_matching=True,
                frozen=frozenset(_unwritable(model) & self._dense.keys()),
                example=Batch(self.batches[0].x),
            )
        )

    def match(self, model: ModelFile, examples: Examples, masks: Mapping[str, Mask]) -> Mapping[str, Array]:
        """Train the prepared network to match the dense outputs, under the masks; return all its tensors."""
        self.notes.clear()
        self.network.mask(masks)
        compared = self._compared(examples)
        self.network.compare(compared)
        self._train(model, examples, compared)
        after = self.network.tensors()
        broken = [name for name, mask in masks.items() if np.count_nonzero(after[name][~mask])]
        if broken:
            raise WorkError(f"zeros of {broken[0]} became nonzero while outputs were matched; nothing was written")
        return after

    def match_smaller(self, model: ModelFile, examples: Examples) -> Mapping[str, Array]:
        """Match the outputs with a network that lost channels; zeros that it has already stay zero."""
        self._prepare(model)
        return self.match(model, examples, _masks(model, {}, self._dense))

    @property
    def _batch_size(self) -> int:
        """The batch size of the calibration data, which may be smaller than requested, as it is for long texts."""
        return len(as_tuple(self.batches[0].x)[0])

    def _compared(self, examples: Examples) -> tuple[DistilledOutput, ...]:
        """How each output is compared with the dense one; a note tells the user."""
        rows = np.arange(min(len(examples.inputs[0]), self._batch_size))
        pruned = self.network.predict(examples.inputs_of(rows))
        signature = self.network.signature
        # A causal language model ends in logits, even where its dense outputs are too flat to be recognised as such.
        loss = self.request.loss or ("kl" if signature.text is not None and signature.text.is_causal else "")
        compared, note = compare_answers(_packed(examples.answers), pruned, signature, loss)
        self.notes.append(note)
        return compared

    def _train(self, model: ModelFile, examples: Examples, compared: Sequence[DistilledOutput]) -> None:
        network, seed, count = self.network, self.request.seed, len(examples.inputs[0])
        order = np.random.default_rng((seed, count)).permutation(count)
        held_out, rows = order[: count // HELD_OUT], order[count // HELD_OUT :]
        size = min(self._batch_size, len(rows))
        initial = self._divergence(examples, held_out, compared) if len(held_out) else math.inf
        steps = self.request.repair_steps
        schedule = MatchingSchedule(steps or STEPS, initial, may_end_early=not steps)
        # An incomplete batch at the end of an epoch is skipped: batch normalisation has no statistics of one example.
        steps_per_epoch, interval = len(rows) // size, math.ceil(schedule.steps / _EVALUATIONS)
        best_tensors, step = network.tensors(), 0
        nbytes = sum(array[:1].nbytes for array in examples.inputs) * size
        with self.meter(f"matching the outputs of {model.path.name}", schedule.steps * nbytes) as bar:
            while schedule.continues(step):
                epoch, within = divmod(step, steps_per_epoch)
                if not within:
                    network.reseed(seed * 1_000_003 + epoch)
                    shuffled = np.random.default_rng((seed, epoch)).permutation(rows)
                chosen = shuffled[within * size : (within + 1) * size]
                batch = Batch(examples.inputs_of(chosen))
                network.step(batch, schedule.rate_at(step), examples.answers_of(chosen))
                step += 1
                bar.advance(nbytes)
                if step % interval and step < schedule.last_step:
                    continue
                _check_finite(network.logs()["loss"], step)
                if not len(held_out):
                    continue
                distance = self._divergence(examples, held_out, compared)
                _check_finite(distance, step)
                if schedule.record(step, distance):
                    best_tensors = network.tensors()
                elif schedule.has_overshot:
                    network.assign(best_tensors)
        if len(held_out):
            network.assign(best_tensors)
        self._add_notes(initial, schedule.best_distance, step, count, network.recalibrate(iter(self.batches)))

    def _add_notes(self, initial: float, best: float, steps: int, count: int, norms: int) -> None:
        gain = (
            f": on a tenth of them that was held back the distance fell from {initial:.3g} to {best:.3g}"
            if math.isfinite(initial)
            else ""
        )
        self.notes.insert(
            0,
            f"Kept weights were trained for {steps:,} steps to match the dense outputs for {count:,} examples of "
            f"{self.request.data}{gain}.",
        )
        if norms:
            self.notes.append(
                f"The statistics of {norms} batch normalisation layers were recomputed from the same data."
            )

    def _divergence(self, examples: Examples, rows: Array, compared: Sequence[DistilledOutput]) -> float:
        """The mean distance of the outputs for some examples from the dense ones: the loss that training minimises."""
        total, size = 0.0, self._batch_size
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            pruned = as_tuple(self.network.predict(examples.inputs_of(part)))
            answers = as_tuple(examples.answers_of(part))
            losses = [
                distillation_loss(_OPS, output, dense, mine, 1.0)
                for output, dense, mine in zip(compared, answers, pruned, strict=True)
            ]
            total += len(part) * float(np.sum(losses))
        return total / len(rows)


def match_smaller(
    dense: ModelFile,
    smaller: ModelFile,
    request: PruneRequest,
    places: dict[Path, Path],
    meter: ProgressFactory = no_progress,
    *,
    builder: str,
    is_trusted: bool,
) -> tuple[str, ...]:
    """Train a network that lost channels to match its dense outputs, write it to `places`, and return notes."""
    session = open_calibration(dense, request, is_trusted=is_trusted, needs_targets=False, has_reference=False)
    with closing(session):
        assert session.trainable is not None
        batches = session.calibration.batches
        examples = answered(session.trainable, batches, dense.path)
    origin = LoadOptions(builder or request.model, request.custom_objects, is_trusted, request.seed)
    with closing(load_trainable(smaller, with_arrays(origin, smaller, request.data))) as network:
        matcher = OutputMatcher(batches, network, request, meter=meter)
        write_back(smaller, matcher.match_smaller(smaller, examples), places)
    return tuple(dict.fromkeys((*session.notes, *matcher.notes)))


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the distance to the dense outputs is NaN or infinite after {step} steps; nothing was written",
            hint="check the scale of the data (?norm=unit), or use --repair layers",
        )


def _unwritable(model: ModelFile) -> set[str]:
    """Tensors whose bytes in the file cannot be rewritten in place, and which are therefore not trained."""
    if by_name(model.format).can_reencode:
        return set()
    return {tensor.name for tensor in model.tensors if not is_writable(tensor)}


def _masks(model: ModelFile, solved: Mapping[str, Solved], dense: Mapping[str, Array]) -> dict[str, Mask]:
    """Masks of the nonzero weights: of the tensors that were pruned, and of other prunable tensors that have zeros."""
    masks = {name: np.asarray(values != 0) for name, (values, _) in solved.items() if name in dense}
    for tensor in model.tensors:
        if tensor.is_prunable and tensor.name in dense and tensor.name not in masks:
            mask = np.asarray(dense[tensor.name] != 0)
            if not mask.all():
                masks[tensor.name] = mask
    return masks


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
