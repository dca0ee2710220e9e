"""Calibration sessions: a model in its runtime, calibration batches, and statistics accumulated over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prunectl.calibration.passes import AHEAD_BYTES, InputCounts, Passes
from prunectl.calibration.statistics import (
    CrossStatistics,
    Float64Array,
    InputStatistics,
    OutputRange,
    available_bytes,
    check_memory,
    gram,
    sum_inputs,
)
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, Family, ModelFile, Tensor
from prunectl.pruning import BATCH_SIZE, MATCHED_BATCH_SIZE
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
from prunectl.training.data.next_token import open_labelled, shift_if_causal, user_function
from prunectl.training.data.registry import check_exists, open_source
from prunectl.training.data.source import Batch, EpochOrder, Source, as_tuple, map_arrays, peek
from prunectl.training.data.text import batch_size
from prunectl.training.runtimes import load_blockwise, load_onnx_model, load_trainable, seed_everything, with_arrays
from prunectl.units import listed

Accumulator = Callable[[LayerInput, tuple[int, ...]], tuple[Float64Array, int]]


def groups_in_memory(names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield names in groups whose bytes fit in `AHEAD_BYTES` and a quarter of free memory; each has at least one."""
    limit = min(AHEAD_BYTES, (available_bytes() or 4 * AHEAD_BYTES) // 4)
    group: list[str] = []
    nbytes = 0
    for name in names:
        if group and nbytes + sizes.get(name, 0) > limit:
            yield group
            group, nbytes = [], 0
        group.append(name)
        nbytes += sizes.get(name, 0)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class CrossInputs:
    """Statistics of a tensor's inputs in the pruned and in the dense model."""

    statistics: Mapping[OutputRange, CrossStatistics]
    sums: InputStatistics
    """The sums of its inputs in the pruned model."""
    first_sums: InputStatistics
    """The sums over the first batch alone."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model, calibration batches, and passes over them that accumulate statistics."""

    network: InspectableModel
    batches: tuple[Batch, ...]
    reference: InspectableModel | None = None
    """A second copy of the dense model, which is never pruned."""
    _passes: Passes = field(default_factory=Passes)
    _dense: dict[str, list[list[LayerInput]]] = field(default_factory=dict)
    """Dense layer inputs of the tensors that are fitted next: by tensor, a list for each batch."""

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(len(as_tuple(batch.x)[0]) for batch in self.batches)

    def accumulate(self, tensors: Sequence[Tensor], accumulator: Accumulator) -> dict[str, InputStatistics]:
        """Statistics of each tensor's inputs, in the order in which data reaches the tensors.

        Tensors are left out if their inputs are not captured, or if they are used in two ways whose sums do not add up,
        such as a matrix and its transpose in an autoencoder with tied weights.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        statistics: dict[str, InputStatistics] = {}
        use_keys: dict[str, WeightUse] = {}
        conflicting: set[str] = set()

        def record(capture: LayerInput) -> None:
            use_key = replace(capture.use, outputs=None, window=None)
            if use_keys.setdefault(capture.name, use_key) != use_key:
                conflicting.add(capture.name)
            if capture.name not in conflicting:
                shape = capture.use.shape or shapes[capture.name]
                statistics.setdefault(capture.name, InputStatistics()).add(capture, shape, accumulator)

        seen = InputCounts()
        for index, batch in enumerate(self.batches):

            def counted(capture: LayerInput, index: int = index) -> None:
                seen.add(index, capture)
                record(capture)

            self._passes.run(self.network, shapes, index, batch.x, counted)
        self._passes.input_counts.learn(seen)
        for name in conflicting:
            statistics.pop(name, None)
        for name, sums in statistics.items():
            _check_finite(name, sums)
        return statistics

    def grams(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, InputStatistics]]:
        """Gram matrices (features by features) of the tensors' inputs, as many in each pass as fit in memory."""
        by_name = {tensor.name: tensor for tensor in tensors}
        # One batch tells how many features each tensor has.
        shapes = replace(self, batches=self.batches[:1], _passes=Passes()).accumulate(tensors, sum_inputs)
        sizes: dict[str, int] = {}
        for name, sums in shapes.items():
            groups, features = sums.size
            check_memory(name, groups=groups, features=features, kept=1)
            sizes[name] = 8 * groups * features**2
        for names in groups_in_memory(by_name, sizes):
            group = self.accumulate([by_name[name] for name in names], gram)
            for name in names:
                yield by_name[name], group.pop(name, InputStatistics())

    def cross_inputs(self, tensor: Tensor, following: Sequence[str] = ()) -> CrossInputs:
        """Statistics of a tensor's inputs in the pruned and in the dense model.

        The dense model does not change: one pass through it also captures the following tensors that fit in memory.
        """
        if tensor.name not in self._dense:
            self._dense.clear()
            ahead = next(groups_in_memory((tensor.name, *following), self._passes.input_counts.nbytes))
            if len(ahead) > 1:
                self._capture_dense(ahead)
        captured = self._dense.pop(tensor.name, None)
        statistics: dict[OutputRange, CrossStatistics] = {}
        sums, first_sums = InputStatistics(), InputStatistics()
        for index, batch in enumerate(self.batches):
            inputs: list[LayerInput] = []

            def record(capture: LayerInput, index: int = index, inputs: list[LayerInput] = inputs) -> None:
                shape = capture.use.shape or tensor.shape
                sums.add(capture, shape, sum_inputs)
                if index == 0:
                    first_sums.add(capture, shape, sum_inputs)
                inputs.append(_copied(capture))

            self._passes.run(self.network, [tensor.name], index, batch.x, record)
            before = captured[index] if captured is not None else self._dense_inputs([tensor.name], index)[tensor.name]
            if any(capture.is_routed for capture in (*inputs, *before)):
                # Their rows cannot be paired: the pruned model's inputs stand for both, as in SparseGPT. An expert that
                # no row reaches any more is fitted for the inputs that it had.
                for capture in before if not inputs else ():
                    record(capture)
                before = inputs
            for pruned, dense in zip(inputs, before, strict=True):
                use = pruned.use
                statistics.setdefault(use.outputs, CrossStatistics(use)).add(pruned, dense, use.shape or tensor.shape)
        _check_finite(tensor.name, sums)
        return CrossInputs(statistics, sums, first_sums)

    def _capture_dense(self, names: Sequence[str]) -> None:
        """Keep the inputs of some tensors in the dense model."""
        for index in range(len(self.batches)):
            for name, inputs in self._dense_inputs(names, index).items():
                self._dense.setdefault(name, []).append(inputs)

    def _dense_inputs(self, names: Sequence[str], index: int) -> dict[str, list[LayerInput]]:
        assert self.reference is not None
        inputs: dict[str, list[LayerInput]] = {name: [] for name in names}

        def record(capture: LayerInput) -> None:
            inputs[capture.name].append(_copied(capture))

        self._passes.run(self.reference, names, index, self.batches[index].x, record)
        return inputs

    def sums_after(self, tensor: Tensor, before: CrossInputs | None) -> InputStatistics:
        """The sums of a tensor's inputs after its weights have changed.

        They are as before unless its inputs depend on its own weights, as in a recurrent layer: the first batch tells.
        """
        if before is None or len(self.batches) == 1:
            return self.accumulate([tensor], sum_inputs)[tensor.name]
        totals = replace(self, batches=self.batches[:1]).accumulate([tensor], sum_inputs)[tensor.name].totals
        if totals.keys() == before.first_sums.totals.keys() and all(
            np.array_equal(total, before.first_sums.totals[part]) for part, total in totals.items()
        ):
            return before.sums
        return self.accumulate([tensor], sum_inputs)[tensor.name]

    def gradients(
        self, tensors: Sequence[Tensor], reduction: Callable[[Float64Array], Float64Array]
    ) -> dict[str, Float64Array]:
        """The mean of `reduction` of each batch's gradients; a batch counts by its number of examples."""
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
                part = reduction(gradient.astype(np.float64))
                part *= share
                means[name] = np.add(means[name], part, out=means[name]) if name in means else part
        for name, mean in means.items():
            if not np.isfinite(mean).all():
                raise WorkError(
                    f"the gradient of {name} is NaN or infinite; nothing was written",
                    hint="check that the data is scaled as in training (?norm=unit) and that --loss is right",
                )
        return means


@dataclass(frozen=True, slots=True)
class BlockwiseCalibration(Calibration):
    """A calibration of a model of which only one block at a time is in memory, from the first to the last."""

    network: Any
    """A `BlockwiseModel`."""

    def parts(self, *, has_reference: bool) -> Iterator[tuple[int, Calibration]]:
        """Yield the calibration of each part in turn; the next part gets the outputs of its changed weights."""
        self.network.begin([batch.x for batch in self.batches])
        # A part finds its inputs by the number of the batch.
        counts = [len(as_tuple(batch.x)[0]) for batch in self.batches]
        batches = tuple(Batch(np.full(count, index)) for index, count in enumerate(counts))
        for number in range(self.network.parts):
            network, reference = self.network.open(number, has_copy=has_reference)
            yield number, Calibration(network, batches, reference)
            self.network.advance(number)

    def accumulate(self, tensors: Sequence[Tensor], accumulator: Accumulator) -> dict[str, InputStatistics]:
        """Statistics of each tensor's inputs in the dense model, one part after the other."""
        statistics: dict[str, InputStatistics] = {}
        for number, part in self.parts(has_reference=False):
            own = [tensor for tensor in tensors if self.network.part_of(tensor.name) == number]
            statistics |= part.accumulate(own, accumulator) if own else {}
        return statistics

    def influence(self) -> list[float]:
        """Block influence (ShortGPT, Men et al. 2024): 1 - the mean cosine similarity of a block's input and output."""
        self.network.begin([batch.x for batch in self.batches])
        influences = []
        for number in range(self.network.parts - 1):
            self.network.open(number, has_copy=False)
            influence = 1 - self.network.advance(number)
            if not math.isfinite(influence):
                raise WorkError(
                    f"what comes out of block {number} is NaN or infinite; nothing was written",
                    hint="check that the model has no NaN: prunectl inspect",
                )
            influences.append(influence)
        return influences


def _copied(capture: LayerInput) -> LayerInput:
    return replace(capture, inputs=capture.inputs.copy())


def _check_finite(name: str, sums: InputStatistics) -> None:
    if not all(np.isfinite(total).all() for total in sums.totals.values()):
        raise WorkError(
            f"the inputs of {name} are NaN or infinite; nothing was written",
            hint="check that the data is scaled as in training (?norm=unit) and that the model has no NaN",
        )


def take_samples(batches: Iterator[Batch], samples: int) -> tuple[Batch, ...]:
    """The first `samples` examples, in batches."""
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
        raise UsageError("the data has no examples", hint="name data with some: --data train.npz")
    return tuple(taken_batches)


@dataclass(frozen=True, slots=True)
class CalibrationSession:
    """An open model with its calibration data."""

    calibration: Calibration
    trainable: TrainableModel | None
    """The same model, if it can be trained as well; None in onnxruntime and where blocks are loaded one by one."""
    notes: tuple[str, ...]

    def close(self) -> None:
        """Close the model."""
        if self.trainable is not None:
            self.trainable.close()


def open_calibration(
    model: ModelFile,
    request: PruneRequest,
    *,
    is_trusted: bool,
    needs_targets: bool,
    has_reference: bool,
    is_blockwise: bool = False,
) -> CalibrationSession:
    """Open a model in its runtime, and read the first examples in an order that depends on the seed.

    With `is_blockwise`, a model folder that allows it is loaded one block at a time.
    """
    if model.about.pruning_wrappers:
        raise UsageError(
            f"{model.path} has pruning wrappers, which change what the model computes",
            hint=f"remove them first; this does: prunectl strip {model.path} -o plain{model.path.suffix}",
        )
    check_exists(request.data)
    seed_everything(request.seed)
    origin = LoadOptions(request.model, request.custom_objects, is_trusted, request.seed)
    origin = with_arrays(origin, model, request.data)
    blockwise = load_blockwise(model, origin) if is_blockwise else None
    network: Any
    network, trainable = _network(model, origin) if blockwise is None else (blockwise, None)
    taken_by = user_function(request.loss)
    source, notes = adapt(open_labelled(request.data, network.signature, request.seed, taken_by), network.signature)
    if needs_targets and not source.has_targets:
        raise UsageError(
            f"{source.name} has no targets, which the strategy {request.strategy} needs to compute a loss",
            hint="use data with targets, or --strategy activation-magnitude or obs, which need inputs only",
        )
    if trainable is not None and needs_targets:
        source = shift_if_causal(source, network.signature, network.predict, taken_by)
        notes += source.notes
    # A stream would have to be read to its end to be shuffled, which a few examples do not justify.
    size = batch_size(source, network.signature, request.batch_size or _matched_batch_size(source))
    order = EpochOrder(size, request.seed, is_shuffled=source.count is not None)
    batches = take_samples(source.batches(order), request.samples)
    notes += check_batches(source.first(request.samples), network.signature, needs_targets=needs_targets)
    if blockwise is not None:
        return CalibrationSession(BlockwiseCalibration(blockwise, batches), None, tuple(dict.fromkeys(notes)))
    if trainable is not None and needs_targets:
        trainable.prepare(
            TrainOptions(loss=request.loss, optimizer="sgd", lr=0.0, seed=request.seed, example=batches[0])
        )
    reference = _network(model, origin)[0] if has_reference else None
    return CalibrationSession(Calibration(network, batches, reference), trainable, tuple(dict.fromkeys(notes)))


def _matched_batch_size(source: Source) -> int:
    """The default batch size of output matching, half as large for sequences of tokens, which have many positions."""
    head = peek(source, 1)
    arrays = as_tuple(head.x) if head is not None else ()
    # Pixels and flags are whole numbers too, but of a byte.
    has_tokens = any(array.ndim == 2 and array.dtype.kind in "iu" and array.itemsize > 1 for array in arrays)
    return BATCH_SIZE if has_tokens else MATCHED_BATCH_SIZE


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
    """The inputs of the first `count` examples, and notes about the data; a stream is never shuffled."""
    source, notes = adapt(open_source(spec, signature=signature, seed=order.seed), signature)
    notes += check_batches(source.first(count), signature, needs_targets=False)
    own = EpochOrder(order.batch_size, order.seed, is_shuffled=order.is_shuffled and source.count is not None)
    parts = [as_tuple(batch.x) for batch in take_samples(source.batches(own), count)]
    inputs = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return inputs, tuple(dict.fromkeys(notes))


def padded_batch_rows(count: int, size: int) -> Array:
    """The row numbers of each batch; the last batch is filled up by starting over at row 0."""
    rows: Array = np.arange(-(-count // size) * size).reshape(-1, size) % count
    return rows


_SHOWN = 5


def note_about(statement: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence about some tensors; empty if there are none."""
    if not names:
        return ()
    return (f"{listed(names, _SHOWN, 'others')}: {statement}.",)
