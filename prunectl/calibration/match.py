"""Output matching: what is kept is trained until the model answers as it did when it was dense. No target is read."""

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
from prunectl.calibration.session import open_calibration
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
"""Of Adam, unless the user says how many."""
RATE = 4e-3
"""The learning rate at the first step, from which it falls to zero in a straight line."""
HELD = 10
"""One of so many examples is not trained on: it tells when no more is won."""
_LOOKS = 40
"""How often the held examples are looked at while all steps are done."""
ANSWER_BYTES = 1 << 30
"""Dense outputs beyond this are computed again in each step, where a copy of the dense model is at hand."""
_PATIENCE = 10
"""Looks without an improvement after which matching ends."""
_FAR, _STALE_LOOKS, _STEP_DECAY = 0.5, 3, 0.25
"""While more than this share of the distance is left, so many looks without a gain make steps so much shorter."""
_NEAR, _LANDING = 0.02, 4
"""Once less than this share of the distance is left, the rate falls to zero in a fourth of the steps, unless given."""

Start = Callable[[ModelFile, Plan, PruningMethod], Mapping[str, Solved]]
"""What matching begins with: the weights of the tensors of a plan, and what is pruned of them."""


def refuse_untrainable(model: ModelFile, *, has_layers: bool = True) -> None:
    """Refuse a format without gradients before its data is opened; --repair layers may be what can be used."""
    if model.family is Family.ONNX:
        export = "prune the Keras or PyTorch file of the model and export that"
        raise UsageError(
            f"--repair outputs trains the model, and {model.path} runs in onnxruntime, which computes no gradients",
            hint=f"use --repair layers, or {export}" if has_layers else export,
        )


def masked(model: ModelFile, plan: Plan, method: PruningMethod) -> dict[str, Solved]:
    """The weights as they are, and what a strategy prunes of them."""
    weights = {cut.tensor.name: np.array(model.read(cut.tensor)) for cut in plan.cuts}
    kept = keep_masks(model, plan, method, Selection((), (), {}), dict(weights))
    return {
        name: (np.where(kept[name], array, np.zeros((), array.dtype)), ~kept[name]) for name, array in weights.items()
    }


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs, one array for each input of the model, and what the dense model answers."""

    inputs: tuple[Array, ...]
    answers: tuple[Array, ...]
    dense: InspectableModel | None = None
    """What gives the answers each time, where all of them would take too much memory."""

    def inputs_of(self, rows: Array) -> Arrays:
        """The inputs of some examples."""
        return _packed(tuple(array[rows] for array in self.inputs))

    def answers_of(self, rows: Array) -> Arrays:
        """The dense answers to them."""
        if self.dense is not None:
            return self.dense.predict(self.inputs_of(rows))
        return _packed(tuple(array[rows] for array in self.answers))


def answered(
    network: TrainableModel, batches: Sequence[Batch], path: Path, copy: InspectableModel | None = None
) -> Examples:
    """The examples with the outputs of the dense model, which is what the network still is, or those of a copy."""
    first = as_tuple(network.predict(batches[0].x))
    alone = as_tuple(network.predict(map_arrays(lambda array: array[:1], batches[0].x)))
    if any(one.shape[1:] != array.shape[1:] for one, array in zip(alone, first, strict=True)):
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
class Pace:
    """How long steps are and when they end, by the distance of the examples that are held out."""

    steps: int
    first: float
    """The distance before the first step."""
    may_end_early: bool
    """Whether to end where little is left; where nothing is won, it ends anyway."""
    last: int = field(init=False)
    """So many steps are taken, unless nothing is won any more."""
    _landing: int = field(init=False)
    """The step from which the rate falls to zero until the last one."""
    best: float = field(init=False)
    """The least distance so far."""
    _stale: int = 0
    _share: float = 1.0

    def __post_init__(self) -> None:
        self.last = self._landing = self.steps
        self.best = self.first

    def goes_on(self, step: int) -> bool:
        """Whether this step is still to be taken."""
        return step < self.last and self._stale < _PATIENCE

    def rate_at(self, step: int) -> float:
        """The share of the learning rate at a step."""
        left = self._share * (1 - min(step, self._landing) / self.steps)
        return left if step < self._landing else left * (self.last - step) / (self.last - self._landing)

    def look(self, step: int, distance: float) -> bool:
        """Take note of a distance; whether it is the least so far."""
        is_best = distance < self.best
        self._stale = 0 if is_best else self._stale + 1
        self.best = min(distance, self.best)
        if self.is_astray:
            self._share *= _STEP_DECAY
        if self.may_end_early and self._landing == self.steps and self.best < _NEAR * self.first:
            self._landing, self.last = step, min(self.steps, step + math.ceil(self.steps / _LANDING))
        return is_best

    @property
    def is_astray(self) -> bool:
        """Whether steps as long as these only throw off what lost little, as a language model in 2:4."""
        return self._stale > 0 and self._stale % _STALE_LOOKS == 0 and self.best > self.first * _FAR


@dataclass(slots=True)
class OutputMatcher:
    """Trains what is kept, with Adam, towards the outputs of the dense model; zeros stay zero."""

    batches: Sequence[Batch]
    """Calibration data."""
    network: TrainableModel
    request: PruneRequest
    start: Start = masked
    meter: ProgressFactory = no_progress
    notes: list[str] = field(default_factory=list)
    """What came of it, each a full sentence."""
    copy: InspectableModel | None = None
    """The dense model once more, which stays as it was."""
    _first: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        self._first = self.network.tensors()

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """The pruned and trained tensors of a plan, and what else was trained with them."""
        network, dense = self.network, self._first
        # A search for a size solves repeatedly.
        network.assign(dense)
        self._prepare(model)
        examples = answered(network, self.batches, model.path, self.copy)
        solved = self.start(model, plan, method)
        network.assign({name: values for name, (values, _) in solved.items()})
        after = self.match(model, examples, _masks(model, solved, dense))
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
                frozen=frozenset(_unwritable(model) & self._first.keys()),
                example=Batch(self.batches[0].x),
            )
        )

    def match(self, model: ModelFile, examples: Examples, masks: Mapping[str, Mask]) -> Mapping[str, Array]:
        """Train the network, which is prepared, towards some answers; all its tensors, zero where the masks say so."""
        self.notes.clear()
        self.network.mask(masks)
        compared = self._compared(examples)
        self.network.compare(compared)
        self._train(model, examples, compared)
        after = self.network.tensors()
        lost = [name for name, mask in masks.items() if np.count_nonzero(after[name][~mask])]
        if lost:
            raise WorkError(f"zeros of {lost[0]} became nonzero while outputs were matched; nothing was written")
        return after

    def match_smaller(self, model: ModelFile, examples: Examples) -> Mapping[str, Array]:
        """The same for a network that lost channels: the zeros that it has stay."""
        self._prepare(model)
        return self.match(model, examples, _masks(model, {}, self._first))

    @property
    def _batch_size(self) -> int:
        """As was asked for, unless the outputs of so many examples are too much at once, as those of long texts are."""
        return min(self.request.batch_size, len(as_tuple(self.batches[0].x)[0]))

    def _compared(self, examples: Examples) -> tuple[DistilledOutput, ...]:
        """How each output is compared with the dense one; what is taken for logits is told."""
        rows = np.arange(min(len(examples.inputs[0]), self._batch_size))
        pruned = self.network.predict(examples.inputs_of(rows))
        signature = self.network.signature
        # What predicts the next token ends in logits, however unsure of it it is.
        loss = self.request.loss or ("kl" if signature.text is not None and signature.text.is_causal else "")
        compared, note = compare_answers(_packed(examples.answers), pruned, signature, loss)
        self.notes.append(note)
        return compared

    def _train(self, model: ModelFile, examples: Examples, compared: Sequence[DistilledOutput]) -> None:
        network, seed, count = self.network, self.request.seed, len(examples.inputs[0])
        order = np.random.default_rng((seed, count)).permutation(count)
        held, rows = order[: count // HELD], order[count // HELD :]
        size = min(self._batch_size, len(rows))
        first = self._divergence(examples, held, compared) if len(held) else math.inf
        steps = self.request.repair_steps
        pace = Pace(steps or STEPS, first, may_end_early=not steps)
        # What is left over in an epoch comes in another: a batch of one has no statistics.
        steps_per_epoch, every = len(rows) // size, math.ceil(pace.steps / _LOOKS)
        best_tensors, step = network.tensors(), 0
        nbytes = sum(array[:1].nbytes for array in examples.inputs) * size
        with self.meter(f"matching the outputs of {model.path.name}", pace.steps * nbytes) as bar:
            while pace.goes_on(step):
                epoch, within = divmod(step, steps_per_epoch)
                if not within:
                    network.reseed(seed * 1_000_003 + epoch)
                    shuffled = np.random.default_rng((seed, epoch)).permutation(rows)
                chosen = shuffled[within * size : (within + 1) * size]
                batch = Batch(examples.inputs_of(chosen))
                network.step(batch, pace.rate_at(step), examples.answers_of(chosen))
                step += 1
                bar.advance(nbytes)
                if step % every and step < pace.last:
                    continue
                _check_finite(network.logs()["loss"], step)
                if not len(held):
                    continue
                distance = self._divergence(examples, held, compared)
                _check_finite(distance, step)
                if pace.look(step, distance):
                    best_tensors = network.tensors()
                elif pace.is_astray:
                    network.assign(best_tensors)
        if len(held):
            network.assign(best_tensors)
        self._tell(pace.first, pace.best, step, count, network.recalibrate(iter(self.batches)))

    def _tell(self, first: float, best: float, steps: int, count: int, norms: int) -> None:
        won = (
            f": on a tenth of them that was held back the distance fell from {first:.3g} to {best:.3g}"
            if math.isfinite(first)
            else ""
        )
        self.notes.insert(
            0,
            f"Kept weights were trained for {steps:,} steps to match the dense outputs for {count:,} examples of "
            f"{self.request.data}{won}.",
        )
        if norms:
            self.notes.append(
                f"The statistics of {norms} batch normalisation layers were recomputed from the same data."
            )

    def _divergence(self, examples: Examples, rows: Array, compared: Sequence[DistilledOutput]) -> float:
        """How far the outputs for some examples are from the dense ones: what training makes small."""
        total, size = 0.0, self._batch_size
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            found = as_tuple(self.network.predict(examples.inputs_of(part)))
            answers = as_tuple(examples.answers_of(part))
            losses = [
                distillation_loss(_OPS, output, dense, now, 1.0)
                for output, dense, now in zip(compared, answers, found, strict=True)
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
    """Train a network that lost channels towards the outputs that it had; write it to some places, and return notes."""
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
    """Tensors whose place in the file cannot be written to: they stay as they are."""
    if by_name(model.format).can_reencode:
        return set()
    return {tensor.name for tensor in model.tensors if not is_writable(tensor)}


def _masks(model: ModelFile, solved: Mapping[str, Solved], dense: Mapping[str, Array]) -> dict[str, Mask]:
    """What is not zero now, of the tensors that were pruned, and of others that could be and have zeros."""
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
