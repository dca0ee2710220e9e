"""What a model shows of itself while data goes through it: which weights meet which inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature
from prunectl.training.data.source import Arrays, Batch


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


InputCallback = Callable[[LayerInput], None]


@runtime_checkable
class InspectableModel(Protocol):
    """A model that can be looked at. It works as when it predicts: nothing is dropped out, no statistics are taken."""

    @property
    def signature(self) -> ModelSignature:
        """What goes in and comes out, as far as it is known."""

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        """Run one batch through, and show every time that one of these tensors meets inputs.

        What is shown may be overwritten afterwards. A tensor that is used in a way that cannot be told is not shown.
        """

    def predict(self, x: Arrays) -> Arrays:
        """What comes out, for one batch."""

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""


@runtime_checkable
class DifferentiableModel(InspectableModel, Protocol):
    """A model that also knows its gradients, once `prepare` has said which loss."""

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        """The gradient of the mean loss over a batch, in the state in which it predicts."""
