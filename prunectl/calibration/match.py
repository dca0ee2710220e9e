"""Output matching: train the kept weights until the outputs match those of the dense model, without targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.analysis.patterns import NMPattern
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.calibration.match_steps import Examples, Training, answered, packed
from prunectl.calibration.reconstruct import Solved, scaled, solved_blocks
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
from prunectl.training.data.source import Batch, as_tuple
from prunectl.training.distillation import compare_answers
from prunectl.training.finetune import write_back
from prunectl.training.runtimes import load_trainable, with_arrays
from prunectl.training.task import DistilledOutput

STEPS = 2000
"""The number of Adam steps, unless the user gives another."""
RATE = 4e-3
"""The learning rate at the first step after the last weights are pruned; it decays linearly to zero."""
RAMP_SHARE, STAGES = 0.5, 30
"""In this share of the steps the weights are pruned, in so many stages, if the strategy ranks trained weights."""
_STEPS_OF_STAGE = 5
"""The least number of steps in a stage."""
_FIRST_STAGE, _RAMP_RATE = 0.5, 0.5
"""The share of what is to be pruned that the first stage prunes, and that of the learning rate in all stages."""
_RANKS_TRAINED = frozenset({"magnitude", "lamp", "activation-magnitude"})
"""Strategies that rank weights as they are now, and zeros last."""
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


def masked(
    model: ModelFile, plan: Plan, method: PruningMethod, trained: Mapping[str, Array] | None = None
) -> Mapping[str, Solved]:
    """The weights, also those trained, with those that the strategy prunes set to zero, and the mask of these."""
    weights = dict(trained or {})
    weights |= {
        cut.tensor.name: np.array(model.read(cut.tensor)) for cut in plan.cuts if cut.tensor.name not in weights
    }
    kept = keep_masks(model, plan, method, Selection((), (), {}), dict(weights))
    return {
        name: (np.where(kept[name], array, np.zeros((), array.dtype)), ~kept[name]) for name, array in weights.items()
    }


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
    _stages: str = ""
    """A sentence for the user about the stages in which weights were pruned."""

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
        self._set(model, solved)
        with self._training(model, examples) as training:
            is_ranked_anew = method.strategy.name in _RANKS_TRAINED and not isinstance(method.pattern, NMPattern)
            if is_ranked_anew and training.is_slow():
                solved = self._prune_in_stages(training, model, plan, method, solved)
            after = self._match(training, _masks(model, solved, dense))
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

    def match_smaller(self, model: ModelFile, examples: Examples) -> Mapping[str, Array]:
        """Match the outputs with a network that lost channels; zeros that it has already stay zero."""
        self._prepare(model)
        masks = _masks(model, {}, self._dense)
        self.network.mask(masks)
        with self._training(model, examples) as training:
            return self._match(training, masks)

    @property
    def _steps(self) -> int:
        return self.request.repair_steps or STEPS

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
        compared, note = compare_answers(packed(examples.answers), pruned, signature, loss)
        self.notes.append(note)
        return compared

    @contextmanager
    def _training(self, model: ModelFile, examples: Examples) -> Iterator[Training]:
        self.notes.clear()
        self._stages = ""
        compared = self._compared(examples)
        self.network.compare(compared)
        nbytes = sum(array[:1].nbytes for array in examples.inputs) * min(self._batch_size, len(examples.inputs[0]))
        with self.meter(f"matching the outputs of {model.path.name}", self._steps * nbytes) as bar:
            size, may_end_early = self._batch_size, not self.request.repair_steps
            yield Training(
                self.network, examples, compared, size, self.request.seed, self._steps, may_end_early, bar.advance
            )

    def _prune_in_stages(
        self, training: Training, model: ModelFile, plan: Plan, method: PruningMethod, at_once: Mapping[str, Solved]
    ) -> Mapping[str, Solved]:
        """Prune the dense model in stages, and train what each leaves; weights that look small matter once others go.

        All stay pruned at once if the outputs are further from the dense ones after some stage than they are now.
        """
        network, limit, taken = self.network, training.schedule.best_distance, training.steps
        names, steps = [name for name in at_once if name in self._dense], int(self._steps * RAMP_SHARE) - taken
        stages = min(STAGES, steps // _STEPS_OF_STAGE)
        if stages < 2:
            return at_once
        network.assign(self._dense)
        training.restart()
        for stage in range(stages):
            # The cubic ramp of Zhu and Gupta (2017).
            part = scaled(plan, 1 - (1 - _FIRST_STAGE) * (1 - stage / stages) ** 3)
            network.mask(_masks(model, masked(model, part, method, network.weights(names)), self._dense))
            while training.steps < steps * (stage + 1) // stages:
                training.take_step(_RAMP_RATE)
            if not (math.isfinite(network.logs()["loss"]) and training.distance() <= limit):
                break
        else:
            solved = masked(model, plan, method, network.weights(names))
            network.mask(_masks(model, solved, self._dense))
            training.begin_decay(self._steps - taken - steps)
            if training.schedule.best_distance <= limit:
                self._stages = f" Weights were pruned in {stages} stages during the first {steps:,} of these steps."
                return solved
        network.assign(self._dense)
        self._prepare(model)
        network.compare(training.compared)
        self._set(model, at_once)
        training.restart()
        return at_once

    def _set(self, model: ModelFile, solved: Mapping[str, Solved]) -> None:
        """Set the weights of the network, and hold their zeros."""
        self.network.assign({name: values for name, (values, _) in solved.items()})
        self.network.mask(_masks(model, solved, self._dense))

    def _match(self, training: Training, masks: Mapping[str, Mask]) -> Mapping[str, Array]:
        """Train the prepared network to match the dense outputs, under the masks; return all its tensors."""
        network = self.network
        training.run()
        self._add_notes(training, network.recalibrate(iter(self.batches)))
        after = network.tensors()
        broken = [name for name, mask in masks.items() if np.count_nonzero(after[name][~mask])]
        if broken:
            raise WorkError(f"zeros of {broken[0]} became nonzero while outputs were matched; nothing was written")
        return after

    def _add_notes(self, training: Training, norms: int) -> None:
        first, best = training.first_distance, training.schedule.best_distance
        gain = (
            f": on a tenth of them that was held back the distance fell from {first:.3g} to {best:.3g}"
            if math.isfinite(first)
            else ""
        )
        self.notes.insert(
            0,
            f"Kept weights were trained for {training.steps:,} steps to match the dense outputs for "
            f"{len(training.examples.inputs[0]):,} examples of {self.request.data}{gain}.{self._stages}",
        )
        if norms:
            self.notes.append(
                f"The statistics of {norms} batch normalisation layers were recomputed from the same data."
            )


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
