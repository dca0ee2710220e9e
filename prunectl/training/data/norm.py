"""Numbers brought to the range that a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.training.data.source import Arrays, Batch, Source, each, peek

_BYTE_MAX = 255
_IMAGENET = "0.485,0.456,0.406:0.229,0.224,0.225"
_HINT = "write norm=unit (x / 255), norm=imagenet, norm=none, norm=/16 (x / 16), or norm=MEAN:STD of x / 255"


@dataclass(frozen=True, slots=True)
class Norm:
    """x / 255, or over another number, less a mean, over a deviation: of all channels, or of each."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scale: float = _BYTE_MAX

    def apply(self, x: Array, channel_axis: int) -> Array:
        """Return the numbers as 32-bit floats."""
        along = [1] * x.ndim
        along[channel_axis] = -1
        mean = np.array(self.mean, np.float32)
        deviation = np.array(self.deviation, np.float32)
        if mean.size > 1:
            mean, deviation = mean.reshape(along), deviation.reshape(along)
        found: Array = (x.astype(np.float32) / np.float32(self.scale) - mean) / deviation
        return found


def normed(source: Source, text: str, *, is_channels_first: bool) -> Source:
    """Return a source whose inputs are normalised as the option `norm` says."""
    if text == "none":
        return source.changed(lambda batch: Batch(_each_float(batch.x), batch.y))
    norm = _parsed(text)
    head = peek(source)
    if head is None:
        return source
    first = each(head.x)
    chosen = {0} if len(first) == 1 else {place for place, x in enumerate(first) if x.dtype == np.uint8}
    if not chosen:
        raise UsageError(f"norm={text}: none of the inputs of {source.name} consists of bytes")
    for place in chosen:
        is_byte = norm.scale == _BYTE_MAX
        if is_byte and first[place].dtype.kind == "f" and np.abs(first[place]).max(initial=0) <= 1:
            raise UsageError(
                f"norm={text} divides by {_BYTE_MAX}, and the inputs of {source.name} are within -1 and 1 already",
                hint="leave out norm",
            )
    places = {place: _channel_axis(first[place], norm, is_channels_first=is_channels_first) for place in chosen}

    def change(batch: Batch) -> Batch:
        found = tuple(norm.apply(x, places[place]) if place in places else x for place, x in enumerate(each(batch.x)))
        return Batch(found if isinstance(batch.x, tuple) else found[0], batch.y)

    return source.changed(change)


def _each_float(arrays: Arrays) -> Arrays:
    found = tuple(x.astype(np.float32) if x.dtype == np.uint8 else x for x in each(arrays))
    return found if isinstance(arrays, tuple) else found[0]


def _parsed(text: str) -> Norm:
    if text.startswith("/"):
        return _divided(text)
    mean, sign, deviation = {"unit": "0:1", "imagenet": _IMAGENET}.get(text, text).partition(":")
    try:
        norm = Norm(tuple(map(float, mean.split(","))), tuple(map(float, deviation.split(","))))
    except ValueError as error:
        raise UsageError(f"norm={text} is not known", hint=_HINT) from error
    numbers = (*norm.mean, *norm.deviation)
    if not sign or len(norm.mean) != len(norm.deviation) or not np.isfinite(numbers).all() or min(norm.deviation) <= 0:
        raise UsageError(f"norm={text} needs as many means as deviations above zero", hint=_HINT)
    return norm


def _channel_axis(x: Array, norm: Norm, *, is_channels_first: bool) -> int:
    """Return the axis that is as long as there are means: where both ends are, the model's own layout decides."""
    places = [axis for axis in (1, x.ndim - 1) if axis and x.shape[axis] == len(norm.mean)]
    if len(norm.mean) == 1:
        return x.ndim - 1
    if not places or x.ndim < 3:
        raise UsageError(f"the norm has {len(norm.mean)} channels, and an input of the shape {x.shape[1:]} has not")
    return places[0 if is_channels_first else -1]


def _divided(text: str) -> Norm:
    try:
        scale = float(text[1:])
    except ValueError as error:
        raise UsageError(f"norm={text} divides by what?", hint=_HINT) from error
    if not np.isfinite(scale) or scale <= 0:
        raise UsageError(f"norm={text} divides by no number above zero", hint=_HINT)
    return Norm((0.0,), (1.0,), scale)
