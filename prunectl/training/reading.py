"""The data of a run, opened, fitted to the model, and looked over before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunectl.errors import InputError
from prunectl.training.data.adapt import adapt
from prunectl.training.data.check import check, require_targets
from prunectl.training.data.pieces import length
from prunectl.training.data.source import Batch, Order, Source, each, peek
from prunectl.training.data.spec import open_source
from prunectl.training.data.split import split
from prunectl.training.network import Network
from prunectl.training.request import Request
from prunectl.training.signature import Signature

_COUNTED_BY = 4096


@dataclass(frozen=True, slots=True)
class Read:
    """Examples that fit a model."""

    train: Source
    val: Source | None
    example: Batch
    notes: tuple[str, ...]


def read(network: Network, request: Request) -> Read:
    """Open what is learned from and what is judged by."""
    seed, val, val_split = request.means.seed, request.val, request.val_split
    train, notes = _fitted(request.data, network, seed)
    if request.needs_targets:
        require_targets(train)
    judged: Source | None = None
    if val:
        judged, more = _fitted(val, network, seed)
        notes += more
    elif val_split:
        train, judged = split(train, val_split, seed)
    if judged is not None and not request.means.custom_step:
        require_targets(judged)
    example = peek(train)
    if example is None:
        raise InputError(f"{train.name} has no examples")
    return Read(train, judged, example, tuple(dict.fromkeys(notes)))


def look_over(found: Read, signature: Signature, request: Request) -> tuple[str, ...]:
    """Refuse examples that the model cannot learn from, now that it is known what comes out of it."""
    notes: list[str] = []
    for source in filter(None, (found.train, found.val)):
        classes = _classes(signature, found.example)
        notes += check(source, signature, needs_targets=request.needs_targets, classes=classes)
    return tuple(dict.fromkeys(notes))


def count(source: Source) -> int:
    """Return how many examples there are; those of a stream are counted by going through them once."""
    if source.count is not None:
        return source.count
    return sum(length(batch) for batch in source.batches(Order(_COUNTED_BY)))


def _fitted(spec: str, network: Network, seed: int) -> tuple[Source, tuple[str, ...]]:
    return adapt(open_source(spec, signature=network.signature, seed=seed), network.signature)


def _classes(signature: Signature, example: Batch) -> int | None:
    """Return how many classes labels may name; None where the targets are no labels."""
    if example.y is None or isinstance(example.y, tuple) or not signature.outputs:
        return None
    shape: Sequence[int | None] = signature.outputs[0].shape or ()
    targets = each(example.y)[0]
    is_label = targets.dtype.kind in "iu" and (targets.ndim == len(shape) or targets.shape[1:] == (1,))
    return shape[-1] if is_label and shape and (shape[-1] or 0) > 1 else None
