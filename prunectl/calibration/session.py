"""Calibration sessions: a model in its runtime with calibration batches, and what is accumulated over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunectl.calibration.im2col import im2col
from prunectl.calibration.statistics import (
    CrossStatistics,
    Float64Array,
    InputStatistics,
    OutputRange,
    check_memory,
    gram,
)
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import PARAMETRIZATION, Array, Family, ModelFile, Tensor
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import (
    DifferentiableModel,
    InspectableModel,
    LayerInput,
    LoadOptions,
    ModelSignature,
    TrainableModel,
    TrainOptions,
    WeightUse,
)
from prunectl.training.data.adapt import adapt, check_batches
from prunectl.training.data.registry import open_source
from prunectl.training.data.source import Batch, EpochOrder, as_tuple, map_arrays
from prunectl.training.runtimes import load_onnx_model, load_trainable, seed_everything

Accumulator = Callable[[LayerInput, tuple[int, ...]], tuple[Float64Array, int]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model, calibration batches, and passes over them that accumulate statistics."""

    network: InspectableModel
    batches: tuple[Batch, ...]
    reference: InspectableModel | None = None
    """The dense model, which stays as it was."""

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(len(as_tuple(batch.x)[0]) for batch in self.batches)

    def accumulate(self, tensors: Sequence[Tensor], accumulator: Accumulator) -> dict[str, InputStatistics]:
        """Statistics of each tensor's inputs, in the order in which data reaches them.

        None of those that are not seen, or used in two ways whose sums are not of the same things: a matrix as it is
        and turned, as where a decoder has the weights of its encoder.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        statistics: dict[str, InputStatistics] = {}
        use_keys: dict[str, WeightUse] = {}
        conflicting: set[str] = set()

        def record(sight: LayerInput) -> None:
            use_key = replace(sight.use, outputs=None, window=None)
            if use_keys.setdefault(sight.name, use_key) != use_key:
                conflicting.add(sight.name)
            if sight.name not in conflicting:
                shape = sight.use.shape or shapes[sight.name]
                statistics.setdefault(sight.name, InputStatistics()).add(sight, shape, accumulator)

        for batch in self.batches:
            self.network.observe(shapes.keys(), batch.x, record)
        for name in conflicting:
            statistics.pop(name, None)
        for name, accumulate in statistics.items():
            if not all(np.isfinite(total).all() for total in accumulate.totals.values()):
                raise WorkError(
                    f"the inputs of {name} are NaN or infinite; nothing was written",
                    hint="check that the data is scaled as in training (?norm=unit) and that the model has no NaN",
                )
        return statistics

    def gram(self, tensor: Tensor) -> InputStatistics:
        """Gram matrix of one tensor's inputs: one at a time, since it has the square of the features."""
        checked: list[LayerInput] = []

        def accumulator(sight: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
            if not checked:
                checked.append(sight)
                _, groups, features = next(im2col(sight.inputs[:1], sight.use, kernel)).shape
                check_memory(sight.name, groups=groups, features=features, kept=1)
            return gram(sight, kernel)

        return self.accumulate([tensor], accumulator).get(tensor.name, InputStatistics())

    def cross_gram(self, tensor: Tensor) -> dict[OutputRange, CrossStatistics]:
        """Gram and cross-Gram matrices of a tensor's inputs in the pruned and the dense model."""
        assert self.reference is not None
        statistics: dict[OutputRange, CrossStatistics] = {}
        for batch in self.batches:
            now, before = _captured_inputs(self.network, tensor, batch), _captured_inputs(self.reference, tensor, batch)
            for mine, theirs in zip(now, before, strict=True):
                part = mine.use.outputs
                statistics.setdefault(part, CrossStatistics(mine.use)).add(mine, theirs, mine.use.shape or tensor.shape)
        return statistics

    def gradients(
        self, tensors: Sequence[Tensor], of: Callable[[Float64Array], Float64Array]
    ) -> dict[str, Float64Array]:
        """Means over batches of a function of their gradients, weighted by examples."""
        network = self.network
        if not isinstance(network, DifferentiableModel):
            raise UsageError(
                "this strategy needs gradients, which onnxruntime cannot compute",
                hint="use --strategy activation-magnitude or obs, or prune the Keras or PyTorch file of the model",
            )
        means: dict[str, Float64Array] = {}
        examples = self.examples
        for batch in self.batches:
            share = len(as_tuple(batch.x)[0]) / examples
            for name, gradient in network.gradients([tensor.name for tensor in tensors], batch).items():
                part = of(gradient.astype(np.float64))
                part *= share
                means[name] = np.add(means[name], part, out=means[name]) if name in means else part
        for name, mean in means.items():
            if not np.isfinite(mean).all():
                raise WorkError(
                    f"the gradient of {name} is NaN or infinite; nothing was written",
                    hint="check that the data is scaled as in training (?norm=unit) and that --loss is right",
                )
        return means


def _captured_inputs(network: InspectableModel, tensor: Tensor, batch: Batch) -> list[LayerInput]:
    captured: list[LayerInput] = []
    network.observe([tensor.name], batch.x, lambda sight: captured.append(replace(sight, inputs=sight.inputs.copy())))
    return captured


def take_samples(batches: Iterator[Batch], samples: int) -> tuple[Batch, ...]:
    """The first examples of some batches."""
    taken_batches: list[Batch] = []
    remaining = samples

    def head(array: Array) -> Array:
        return array[:remaining]

    for batch in batches:
        count = len(as_tuple(batch.x)[0])
        taken_batches.append(Batch(map_arrays(head, batch.x), None if batch.y is None else map_arrays(head, batch.y)))
        remaining -= count
        if remaining <= 0:
            break
    if not taken_batches:
        raise UsageError("the data has no examples")
    return tuple(taken_batches)


@dataclass(frozen=True, slots=True)
class CalibrationSession:
    """An open model with its calibration data."""

    calibration: Calibration
    trainable: TrainableModel | None
    """The same model, where it is one that can be trained as well."""
    notes: tuple[str, ...]

    def close(self) -> None:
        """Let go of the model."""
        if self.trainable is not None:
            self.trainable.close()


def open_calibration(
    model: ModelFile, request: PruneRequest, *, is_trusted: bool, needs_targets: bool, has_reference: bool
) -> CalibrationSession:
    """Open a model in its runtime, and the first examples in an order that the seed decides."""
    if any(wrapper.kind != PARAMETRIZATION for wrapper in model.about.wrappers):
        raise UsageError(
            f"{model.path} has pruning wrappers, which change what the model computes",
            hint=f"remove them first: prunectl strip {model.path} -o plain{model.path.suffix}",
        )
    seed_everything(request.seed)
    origin = LoadOptions(request.model, request.custom_objects, is_trusted, request.seed)
    network, trainable = _network(model, origin)
    source, notes = adapt(open_source(request.data, signature=network.signature, seed=request.seed), network.signature)
    if needs_targets and not source.has_targets:
        raise UsageError(
            f"{source.name} has no targets, which the strategy {request.strategy} needs to compute a loss",
            hint="use data with targets, or --strategy activation-magnitude or obs, which need inputs only",
        )
    # A stream is not read to its end for the sake of a few examples.
    order = EpochOrder(request.batch_size, request.seed, is_shuffled=source.count is not None)
    batches = take_samples(source.batches(order), request.samples)
    notes += check_batches(source.first(request.samples), network.signature, needs_targets=needs_targets)
    if trainable is not None and needs_targets:
        trainable.prepare(
            TrainOptions(loss=request.loss, optimizer="sgd", lr=0.0, seed=request.seed, example=batches[0])
        )
    reference = _network(model, origin)[0] if has_reference else None
    return CalibrationSession(Calibration(network, batches, reference), trainable, tuple(dict.fromkeys(notes)))


def _network(model: ModelFile, origin: LoadOptions) -> tuple[InspectableModel, TrainableModel | None]:
    if model.family is Family.ONNX:
        return load_onnx_model(model), None
    network = load_trainable(model, origin)
    if not isinstance(network, InspectableModel):
        raise UsageError(f"the layer inputs of {model.path} cannot be captured")
    return network, network


def load_inputs(
    spec: str, signature: ModelSignature, count: int, order: EpochOrder
) -> tuple[tuple[Array, ...], tuple[str, ...]]:
    """The inputs of so many examples, with notes about them; a stream is never shuffled."""
    source, notes = adapt(open_source(spec, signature=signature, seed=order.seed), signature)
    notes += check_batches(source.first(count), signature, needs_targets=False)
    own = EpochOrder(order.batch_size, order.seed, is_shuffled=order.is_shuffled and source.count is not None)
    parts = [as_tuple(batch.x) for batch in take_samples(source.batches(own), count)]
    inputs = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return inputs, tuple(dict.fromkeys(notes))


def padded_batch_rows(count: int, size: int) -> Array:
    """Which examples each batch holds; the last is filled up with the first ones, again and again."""
    rows: Array = np.arange(-(-count // size) * size).reshape(-1, size) % count
    return rows


_SHOWN = 5


def note_about(statement: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence about some tensors; nothing without any."""
    if not names:
        return ()
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")
    return (f"{shown}: {statement}.",)
