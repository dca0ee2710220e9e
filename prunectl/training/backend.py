"""What training and calibration ask of a model in its framework. Every tensor is called what the file calls it."""

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
"""What the strategies that watch training look at."""


def gradient_statistic(kind: GradientStatistic, weight: Any, gradient: Any) -> Any:
    """What a step adds to a gradient statistic: g, |w g| (saliency) or -w g (movement, Sanh et al. 2020)."""
    if kind is GradientStatistic.GRADIENT:
        return gradient
    product = weight * gradient
    return abs(product) if kind is GradientStatistic.SALIENCE else -product


def with_gradient_scores(strategy: Strategy, statistics: Mapping[str, Array], kept: Mapping[str, Array]) -> Strategy:
    """A strategy whose scores are the evidence; what is zero already goes first."""
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
    """Without the batch axis; None where an axis, or all of it, is unknown."""
    dtype: str
    """Such as float32 or int64; empty if unknown."""
    ending: FinalActivation = FinalActivation.UNKNOWN
    """The activation that an output ends with."""
    is_binary: bool = False
    """Whether the file says that each number of an output is the logit of a yes or no."""
    example: tuple[int | None, ...] | None = None
    """The shape that an input usually has, where it may have others."""


@dataclass(frozen=True, slots=True)
class TextInput:
    """How text becomes the token ids that a model takes: by the tokenizer in its folder."""

    folder: Path
    vocabulary: int
    """How many tokens there are."""
    longest: int = 0
    """How many a sequence may have; 0 where nobody says so."""
    is_causal: bool = False
    """Whether the model predicts the next token at each place."""
    shifts_labels: bool = False
    """Whether `transformers` compares each of the `labels` with the output one place before it."""
    is_trusted: bool = False
    """Whether code in the folder may run."""


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """Everything that goes into a model and comes out of it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_channels_first: bool
    """Whether images are CHW, as in PyTorch, and not HWC."""
    text: TextInput | None = None
    """How text goes in, where the model takes some."""
    ignored_label: int | None = None
    """The label of a place that neither the loss nor the metrics look at, where the framework has one."""


Logs = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a model is trained, as far as its framework has to know; what is empty the file or the framework says."""

    loss: str = ""
    """A name, or `mod:fn`, `./file.py:fn`."""
    optimizer: str = ""
    """A name with parameters: `sgd:momentum=0.9,weight_decay=1e-4`."""
    lr: float | None = None
    metrics: tuple[str, ...] = ()
    decides: str = ""
    """The metric that decides, or `loss`; else the first of the metrics, or as the file says."""
    goal: str = ""
    """`max` or `min` where the user says which is better; else its name tells."""
    frozen: frozenset[str] = frozenset()
    """Do not train these tensors, e.g. 'embed*'."""
    clip: float | None = None
    """The largest norm of all gradients together."""
    precision: str = "fp32"
    device: str = "auto"
    is_compiled: bool = False
    is_sharded: bool = False
    """Whether each process keeps only its part of every parameter."""
    custom_step: str = ""
    """A training step of the user's own, `mod:fn`."""
    seed: int = 0
    teacher_share: float = 0.5
    """How much of the loss comes from a teacher's outputs, in steps that are given some."""
    is_matching: bool = False
    """Whether a step works as when it predicts, so that a model is trained towards its own answers: nothing is dropped
    out, weights are not penalised. Batch normalisation alone takes the statistics of the batch."""
    is_evaluated: bool = False
    """Whether it is only evaluated: no step is taken."""
    temperature: float = 2.0
    """What logits are divided by before they are compared with the teacher's."""
    example: Batch | None = field(default=None, compare=False)
    """A first batch: tells labels from numbers where no loss is named, and builds what has no shape yet."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model becomes a network of its framework."""

    model: str = ""
    """What builds it, `mod:fn` or `./file.py:fn`, for a file that holds weights alone."""
    custom_objects: str = ""
    """Where the names of custom layers are explained, `mod:DICT`."""
    is_trusted: bool = False
    """Whether code that comes with the file may run."""
    seed: int = 0
    inputs: tuple[str, ...] = ()
    """Shapes of what goes in, `1,3,224,224`, where it has to be run and nothing says them."""
    arrays: tuple[str, ...] = ()
    """Names of what goes in, where data or `--input` has some: the model of a folder takes those that it knows."""


class TrainableModel(Protocol):
    """A model that can be trained."""

    @property
    def signature(self) -> ModelSignature:
        """What goes in and comes out, as far as it is known."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how it is trained: what was chosen for want of a word, what is skipped."""

    @property
    def ranks(self) -> tuple[int, int]:
        """Which process this is, of how many that read their own part of every batch."""

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and speaks."""

    def is_true_everywhere(self, mine: bool) -> bool:
        """Whether something is true in every process; all of them have to ask."""

    def place(self, device: str) -> None:
        """Choose the device of a model that only predicts, and is never prepared."""

    def prepare(self, options: TrainOptions) -> None:
        """Choose loss, optimizer and metrics, before anything is trained or evaluated."""

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of some weights."""

    def tensors(self) -> dict[str, Array]:
        """Copies of all that the file holds and training may change; not the optimizer's state."""

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""

    def mask(self, masks: Mapping[str, Array]) -> None:
        """Zero what the masks do not keep, now and after every step; the optimizer's momentum of it too."""

    def watch(self, evidence: GradientStatistic, names: Sequence[str]) -> None:
        """Accumulate a gradient statistic of some weights from the next step on."""

    def evidence(self) -> dict[str, Array]:
        """The accumulated gradient statistics, the same in every process."""

    def forget(self) -> None:
        """Reset the gradient statistics."""

    def compare(self, outputs: Sequence[DistilledOutput]) -> None:
        """Choose how each output is compared with a teacher's, where that is not to follow from the loss."""

    def step(self, batch: Batch, rate: float, guide: Arrays | None = None) -> None:
        """Train on a batch with a share of the learning rate, also towards what a teacher makes of it.

        The teacher's outputs come as this model would give them: in their shapes, as probabilities where it ends so.
        """

    def logs(self) -> Logs:
        """The means of loss and metrics over the examples since the last call."""

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        """The means of loss and metrics, without a change to the model."""

    def predict(self, x: Arrays) -> Arrays:
        """What comes out, for one batch."""

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        """Recalibrate the statistics of batch normalisation, and return how many layers have some."""

    def reseed(self, number: int) -> None:
        """Make what is random from here on depend on a number alone."""

    def save(self, folder: Path | None) -> None:
        """Keep every tensor, the state of the optimizer and of what is random, the evidence.

        Every process takes part in it; only the first is given a folder.
        """

    def restore(self, folder: Path) -> None:
        """Take up what `save` kept."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """How a kernel moves over its inputs, an entry for each spatial axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    """Zeros before and after; where inputs are spread out (transposed), what is cut from the full result instead,
    or added to it where the number is negative."""
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class WeightUse:
    """How a tensor of the file meets its inputs."""

    out_axis: int
    """Axis of the tensor over what comes out."""
    in_axis: int | None
    """Axis over what goes in; None where each group has a single input channel that has no axis."""
    groups: int = 1
    """Outputs and inputs fall into so many equal runs that do not see each other."""
    group_axis: int | None = None
    """Axis of the groups, where it is one of its own; else they run along the outputs (the inputs if transposed)."""
    shape: tuple[int, ...] | None = None
    """The shape in which to see the tensor, if not in its own: the axes are those of this one."""
    outputs: tuple[int, int] | None = None
    """Only these outputs, from and to; all if it is None."""
    window: SlidingWindow | None = None
    """None for a product of matrices; else the remaining axes are those of the window."""


@dataclass(frozen=True, slots=True)
class LayerInput:
    """A tensor that meets some inputs."""

    name: str
    """As the file has it."""
    inputs: Array
    """Of a product: any axes, the features last, those of each group side by side.
    Of a window: examples, channels, then space, whatever the layout."""
    use: WeightUse


class PassEnd(Exception):  # noqa: N818 - it is no error
    """Raised by an `InputCallback` that has seen enough: the rest of the network need not run."""


InputCallback = Callable[[LayerInput], None]
"""What it raises goes through."""


class PredictingModel(Protocol):
    """A model that answers."""

    @property
    def signature(self) -> ModelSignature:
        """What goes in and comes out, as far as it is known."""

    def predict(self, x: Arrays) -> Arrays:
        """What comes out, for one batch."""


@runtime_checkable
class InspectableModel(PredictingModel, Protocol):
    """A model that can be looked at. It works as when it predicts: nothing is dropped out, no statistics are taken."""

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        """Run one batch through, and show every time that one of these tensors meets inputs.

        What is shown may be overwritten afterwards. A tensor that is used in a way that cannot be told is not shown.
        """

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""


class RepeatedPass(Protocol):
    """The passes of one batch, which hold what is the same in the next one."""

    @property
    def nbytes(self) -> int:
        """How much memory that takes."""

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        """Run the batch through, as the model itself does."""

    def clear(self) -> None:
        """Let go of what it holds."""


@runtime_checkable
class CachingModel(InspectableModel, Protocol):
    """A model that need not compute everything anew where only some of its weights have changed."""

    def cached_pass(self) -> RepeatedPass:
        """What a batch that is run through again and again is observed with."""


class BlockwiseModel(Protocol):
    """A model that is run one block at a time, with the hidden states of some batches held between two blocks."""

    @property
    def signature(self) -> ModelSignature:
        """What goes in and comes out, as far as it is known."""

    @property
    def parts(self) -> int:
        """How many parts there are: the blocks, and last what is not in a block."""

    def part_of(self, name: str) -> int:
        """In which part a tensor is."""

    def begin(self, batches: Sequence[Arrays]) -> None:
        """Run some batches as far as the first block."""

    def open(self, number: int, *, has_copy: bool) -> tuple[InspectableModel, InspectableModel | None]:
        """A part, and where it is wanted a copy that stays as it is; both take the number of a batch for its inputs.

        What goes into the copy is what the model gives as it was, and into the part what it gives by now.
        """

    def advance(self, number: int) -> float:
        """Go through the open part, and let go of it; how alike is what goes in and what comes out (mean cosine)."""


@runtime_checkable
class DifferentiableModel(InspectableModel, Protocol):
    """A model that also knows its gradients, once `prepare` has said which loss."""

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        """The gradient of the mean loss over a batch, in the state in which it predicts."""
