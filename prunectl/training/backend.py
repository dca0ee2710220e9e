"""The interface between training or calibration and a framework's model. Tensors go by their names in the file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from prunectl.formats.base import Array
from prunectl.pruning.strategies import BlockContext, Strategy
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.task import DistilledOutput, FinalActivation


class GradientStatistic(StrEnum):
    """A statistic of gradients, summed over the steps since the last mask update, for weights w with gradients g."""

    NONE = ""
    GRADIENT = "gradient"
    """g"""
    SALIENCE = "salience"
    """|w * g|"""
    MOVEMENT = "movement"
    """-w * g, over all of training: how far a weight moved away from zero"""


STATISTIC_OF_STRATEGY: Mapping[str, GradientStatistic] = {
    "magnitude-gradient": GradientStatistic.SALIENCE,
    "movement": GradientStatistic.MOVEMENT,
}
"""The gradient statistic that each strategy for gradual pruning ranks weights by."""


def gradient_statistic(kind: GradientStatistic, weight: Any, gradient: Any) -> Any:
    """The term that one training step adds to a statistic: g, |w g| (saliency) or -w g (movement, Sanh et al. 2020)."""
    if kind is GradientStatistic.GRADIENT:
        return gradient
    product = weight * gradient
    return abs(product) if kind is GradientStatistic.SALIENCE else -product


def with_gradient_scores(strategy: Strategy, statistics: Mapping[str, Array], kept: Mapping[str, Array]) -> Strategy:
    """The same strategy with gradient statistics as its scores; weights that are already pruned score lowest."""
    # One shift for all tensors keeps their order, and scores must not be negative.
    least = min((float(array.min()) for array in statistics.values() if array.size), default=0.0)
    scores = {
        name: np.where(kept[name], array.astype(np.float64) - least + np.finfo(np.float64).tiny, 0.0)
        if name in kept
        else array.astype(np.float64) - least
        for name, array in statistics.items()
    }

    def score(_: Array, context: BlockContext) -> Array:
        return scores[context.name]

    return replace(strategy, score=score, is_elementwise=False, is_precomputed=True)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model."""

    name: str
    shape: tuple[int | None, ...] | None
    """Without the batch axis. An axis of any length is None, and so is the whole shape where it is unknown."""
    dtype: str
    """Such as float32 or int64; empty if unknown."""
    activation: FinalActivation = FinalActivation.UNKNOWN
    """The final activation, for an output."""
    is_binary: bool = False
    """Whether the file says that each number of an output is a logit of binary classification."""
    example: tuple[int | None, ...] | None = None
    """The usual shape of an input that accepts several."""
    is_label: bool = False
    """Whether the file says that an output holds labels, as those of scikit-learn's classifiers do."""


@dataclass(frozen=True, slots=True)
class TextInput:
    """How text becomes token ids for a model: with the tokenizer in the model's folder."""

    folder: Path
    vocabulary: int
    """The number of token ids."""
    longest: int = 0
    """The maximum number of tokens in a sequence; 0 if it is unknown."""
    is_causal: bool = False
    """Whether the model predicts the next token at each position."""
    shifts_labels: bool = False
    """Whether `transformers` compares each of the `labels` with the output of the position before it."""
    is_trusted: bool = False
    """Whether code in the folder may run."""


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """The inputs and outputs of a model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_channels_first: bool
    """Whether images are CHW, as in PyTorch, rather than HWC."""
    text: TextInput | None = None
    """How text is tokenized, for a model that takes text."""
    ignored_label: int | None = None
    """The label that the loss and the metrics ignore, if the framework has one."""


Logs = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """The training options that a framework needs. Where one is empty, the file's setting or the default applies."""

    loss: str = ""
    """A name, `mod:fn` or `./file.py:fn`."""
    optimizer: str = ""
    """A name with parameters: `sgd:momentum=0.9,weight_decay=1e-4`."""
    lr: float | None = None
    metrics: tuple[str, ...] = ()
    decides: str = ""
    """The monitored metric, or `loss`; if empty, the first of the metrics, or as the file says."""
    goal: str = ""
    """`max` or `min` if the user says which is better; otherwise the metric's name decides."""
    frozen: frozenset[str] = frozenset()
    """Names of the tensors that are not trained."""
    clip: float | None = None
    """The maximum global norm of the gradients."""
    precision: str = "fp32"
    device: str = "auto"
    is_compiled: bool = False
    is_sharded: bool = False
    """Whether each process holds only its shard of every parameter."""
    custom_step: str = ""
    """The user's own training step, `mod:fn`."""
    seed: int = 0
    teacher_share: float = 0.5
    """The weight of the distillation loss, from 0 to 1, in steps that have teacher outputs."""
    is_matching: bool = False
    """Whether a step runs in inference mode, for training a model towards its own dense outputs: no dropout, no
    regularisation penalties. Only batch normalisation uses the statistics of the batch."""
    is_evaluated: bool = False
    """Whether the model is only evaluated, and never takes a training step."""
    temperature: float = 2.0
    """Distillation temperature: logits are divided by it before they are compared with the teacher's."""
    example: Batch | None = field(default=None, compare=False)
    """A first batch, to tell labels from numbers if no loss is named, and to build layers of unknown shape."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a file is loaded as a network of its framework."""

    model: str = ""
    """The function that builds the network, `mod:fn` or `./file.py:fn`, for a file that holds only weights."""
    custom_objects: str = ""
    """A dictionary of custom layers by name, `mod:DICT`."""
    is_trusted: bool = False
    """Whether code from the file may run."""
    seed: int = 0
    inputs: tuple[str, ...] = ()
    """Input shapes such as `1,3,224,224`, for a network that must be run and does not declare them."""
    arrays: tuple[str, ...] = ()
    """Names of the inputs in the data or `--input`; a model from a `transformers` folder takes those that it knows."""


class TrainableModel(Protocol):
    """A model that can be trained."""

    @property
    def signature(self) -> ModelSignature:
        """Inputs and outputs, as far as they are known."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the model is trained: defaults that were chosen, and settings that were skipped."""

    @property
    def ranks(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes that share each batch."""

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and prints."""

    def is_true_everywhere(self, mine: bool) -> bool:
        """Whether `mine` is true in every process; all processes must make this call."""

    def place(self, device: str) -> None:
        """Choose the device of a model that only predicts, without `prepare`."""

    def prepare(self, options: TrainOptions) -> None:
        """Choose loss, optimizer and metrics; required before training or evaluation."""

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of some weights."""

    def tensors(self) -> dict[str, Array]:
        """Copies of all tensors of the file that training may change, without the optimizer's state."""

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the values of some tensors."""

    def mask(self, masks: Mapping[str, Array]) -> None:
        """Zero the weights that the masks prune, and their momentum in the optimizer, now and after every step."""

    def track_gradients(self, statistic: GradientStatistic, names: Sequence[str]) -> None:
        """Accumulate a gradient statistic of some weights from the next step on."""

    def gradient_statistics(self) -> dict[str, Array]:
        """The accumulated gradient statistics, the same in every process."""

    def reset_gradient_statistics(self) -> None:
        """Reset the gradient statistics."""

    def compare(self, outputs: Sequence[DistilledOutput]) -> None:
        """Choose how each output is compared with the teacher's, instead of deriving it from the loss."""

    def step(self, batch: Batch, rate: float, teacher_outputs: Arrays | None = None) -> None:
        """Train on a batch with a fraction of the learning rate, and towards the teacher's outputs if they are given.

        The teacher's outputs must have this model's output shapes, and be probabilities where this model outputs those.
        """

    def logs(self) -> Logs:
        """The mean loss and metrics over the examples since the last call."""

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        """The mean loss and metrics over the batches; the model stays unchanged."""

    def predict(self, x: Arrays) -> Arrays:
        """The outputs for one batch."""

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        """Recompute the statistics of batch normalisation, and return the number of layers that have them."""

    def reseed(self, number: int) -> None:
        """Seed every random generator that training uses."""

    def save(self, folder: Path | None) -> None:
        """Save every tensor, the state of the optimizer and of random generators, and the gradient statistics.

        Every process must call it; only the first gets a folder.
        """

    def restore(self, folder: Path) -> None:
        """Restore the state that `save` wrote."""

    def close(self) -> None:
        """Release its resources."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """How a convolution kernel moves over its inputs, with one entry for each spatial axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    """Zero padding before and after. In a transposed convolution: the length cropped from the full result, or added to
    it where the number is negative."""
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class WeightUse:
    """How an operation multiplies a weight tensor with its inputs."""

    out_axis: int
    """The tensor's axis of output channels."""
    in_axis: int | None
    """The axis of input channels; None where each group has a single one, as in a depthwise convolution."""
    groups: int = 1
    """The number of groups, as in a grouped convolution: outputs and inputs are split into equal, independent runs."""
    group_axis: int | None = None
    """The axis of the groups, if they have one; else they run along the output axis (the input axis if transposed)."""
    shape: tuple[int, ...] | None = None
    """The shape that the tensor is reshaped to first, if any; the axes above refer to this shape."""
    outputs: tuple[int, int] | None = None
    """The range of outputs that are used, from and to; None for all."""
    window: SlidingWindow | None = None
    """None for a matrix product; in a convolution the remaining axes are those of the window."""


@dataclass(frozen=True, slots=True)
class LayerInput:
    """A weight tensor and the inputs of an operation that uses it."""

    name: str
    """The tensor's name in the file."""
    inputs: Array
    """For a matrix product: any axes, then the features, group by group. For a convolution: examples, channels, then
    spatial axes, whatever the layout."""
    use: WeightUse
    is_routed: bool = False
    """Whether other values would choose other rows, as for an expert: its rows in two models are not the same."""


class PassEnd(Exception):  # noqa: N818 - it is not an error
    """Raised by an `InputCallback` to stop the forward pass early, once it has all the inputs that it needs."""


InputCallback = Callable[[LayerInput], None]
"""Receives the captured inputs; its exceptions propagate to the caller of `observe`."""


class PredictingModel(Protocol):
    """A model that can predict."""

    @property
    def signature(self) -> ModelSignature:
        """Inputs and outputs, as far as they are known."""

    def predict(self, x: Arrays) -> Arrays:
        """The outputs for one batch."""


@runtime_checkable
class InspectableModel(PredictingModel, Protocol):
    """A model whose layer inputs can be captured. It runs in inference mode: no dropout, no update of statistics."""

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        """Run one batch, and call `callback` each time an operation uses one of these tensors.

        The captured array may be overwritten after the call. Uses that are not understood are not reported.
        """

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the values of some tensors."""


class RepeatedPass(Protocol):
    """Repeated passes over one batch, which cache the activations that do not change between passes."""

    @property
    def nbytes(self) -> int:
        """The size of the cache in bytes."""

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        """Run the batch as `InspectableModel.observe` does."""

    def clear(self) -> None:
        """Release its resources."""


@runtime_checkable
class CachingModel(InspectableModel, Protocol):
    """A model that reuses cached activations when only some of its weights have changed."""

    def cached_pass(self) -> RepeatedPass:
        """A new cache for observing one batch repeatedly."""


class BlockwiseModel(Protocol):
    """A model that is run one block at a time; the hidden states of all batches are stored between blocks."""

    @property
    def signature(self) -> ModelSignature:
        """Inputs and outputs, as far as they are known."""

    @property
    def parts(self) -> int:
        """The number of parts: one for each block, and a last one for all tensors outside blocks."""

    def part_of(self, name: str) -> int:
        """The number of the part that holds a tensor."""

    def begin(self, batches: Sequence[Arrays]) -> None:
        """Run batches up to the first block."""

    def open(self, number: int, *, has_copy: bool) -> tuple[InspectableModel, InspectableModel | None]:
        """Open a part, and if wanted a copy that stays unchanged; both take the number of a batch as their input.

        The copy gets the hidden states of the original model, the part those of the model as it is now.
        """

    def advance(self, number: int) -> float:
        """Run the open part and release it; returns the mean cosine similarity between its inputs and its outputs."""


@runtime_checkable
class DifferentiableModel(InspectableModel, Protocol):
    """A model that can also compute gradients, once `prepare` has chosen the loss."""

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        """Gradients of the mean loss over a batch, in inference mode."""
