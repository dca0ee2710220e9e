"""Arrays made to fit what a model takes, where only one way is possible, and said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data import casts, layout
from prunectl.training.data.casts import Cast
from prunectl.training.data.layout import Layout
from prunectl.training.data.source import Arrays, Batch, Source, each, peek
from prunectl.training.signature import Port, Signature


@dataclass(frozen=True, slots=True)
class Fit:
    """What is done to one array of every batch."""

    title: str
    layout: Layout | None = None
    cast: Cast | None = None

    def apply(self, array: Array) -> Array:
        """Return the array as the model takes it."""
        shaped = self.layout.apply(array) if self.layout else array
        return self.cast.apply(shaped, self.title) if self.cast else shaped

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done, in sentences."""
        said = (self.layout.said if self.layout else "", self.cast.said if self.cast else "")
        return tuple(f"{self.title}: {words}" for words in said if words)


def adapt(source: Source, signature: Signature) -> tuple[Source, tuple[str, ...]]:
    """Return a source that fits a model as far as that is clear, and in sentences all that was decided for it."""
    head = peek(source, 1)
    if head is None:
        raise InputError(f"{source.name} has no examples")
    inputs, targets = each(head.x), () if head.y is None else each(head.y)
    if len(inputs) != len(signature.inputs):
        names = ", ".join(port.name for port in signature.inputs)
        raise UsageError(
            f"{source.name} has {_inputs(len(inputs))}, and the model has {len(signature.inputs)} ({names})",
            hint="several are joined with + in the model's order, as in train.npz[a+b,labels] or a.npy+b.npy,y.npy",
        )
    xs = [
        _input_fit(title(source, "x", place, len(inputs)), array, port)
        for place, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True))
    ]
    ys = [
        Fit(title(source, "y", place, len(targets)), None, casts.of_target(array.dtype))
        for place, array in enumerate(targets)
    ]

    def change(batch: Batch) -> Batch:
        return Batch(_applied(xs, batch.x), None if batch.y is None else _applied(ys, batch.y))

    notes = (*source.notes, *(note for fit in (*xs, *ys) for note in fit.notes))
    return source.changed(change), tuple(dict.fromkeys(notes))


def title(source: Source, side: str, place: int, count: int) -> str:
    """Return what to call an array of a source."""
    return f"{side} of {source.name}" if count == 1 else f"{side}[{place}] of {source.name}"


def _input_fit(name: str, array: Array, port: Port) -> Fit:
    return Fit(name, layout.between(array.shape[1:], port.shape), casts.of_input(array.dtype, port.dtype))


def _applied(fits: Sequence[Fit], arrays: Arrays) -> Arrays:
    found = tuple(fit.apply(array) for fit, array in zip(fits, each(arrays), strict=True))
    return found if isinstance(arrays, tuple) else found[0]


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"
