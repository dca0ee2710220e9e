"""Labels that are the tokens themselves: a model that predicts the next token is compared with them one place on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature
from prunectl.training.data.source import Arrays, Batch, Source, as_tuple, map_arrays, peek
from prunectl.training.task import IGNORED_LABEL

LABELS = "labels"
"""What `transformers` calls targets."""
_LEAKED = 1e-3
"""What a later token changes in a causal model, compared with its own output: rounding only."""


def follow_if_causal(source: Source, signature: ModelSignature, predict: Callable[[Arrays], Arrays]) -> Source:
    """An adapted source whose labels are compared one place on, where nothing but the model and its data tells so."""
    names = [port.name for port in signature.inputs]
    # Of a folder, the loss of `transformers` tells.
    if signature.text is not None or source.target_name != LABELS or not _predicts_next(predict, source, names):
        return source
    return follow(source) if signature.ignored_label is not None else _cut(source, signature)


def _note(source: Source) -> str:
    return f"{source.name}: each of the labels is compared with the output one place before it"


def follow(source: Source) -> Source:
    """Targets called `labels` as `transformers` takes them for a causal model: the tokens themselves, one place on."""
    head = peek(source, 1) if source.target_name == LABELS else None
    if head is None or head.y is None or as_tuple(head.x)[0].shape != as_tuple(head.y)[0].shape:
        return source

    def change(batch: Batch) -> Batch:
        if batch.y is None:
            return batch
        # No token follows the last one. A file may fix the number of tokens, so that one stays in.
        labels = as_tuple(batch.y)[0]
        after = np.full_like(labels[:, :1], IGNORED_LABEL, dtype=np.int64)
        return Batch(batch.x, np.concatenate([labels[:, 1:], after], 1))

    return source.changed(change, _note(source))


def _cut(source: Source, signature: ModelSignature) -> Source:
    """The same where no label can be ignored: without the last token, which none follows."""
    if any(port.shape is not None and None not in port.shape for port in signature.inputs):
        raise UsageError(
            f"no token follows the last one of {source.name}, and the model takes sequences of one length only",
            hint="save sequences with a token more: x without the last token of each, y without the first",
        )

    def change(batch: Batch) -> Batch:
        labels = as_tuple(batch.y)[0] if batch.y is not None else None
        return Batch(map_arrays(lambda x: x[:, :-1], batch.x), None if labels is None else labels[:, 1:])

    return source.changed(change, _note(source))


def _predicts_next(predict: Callable[[Arrays], Arrays], source: Source, names: Sequence[str]) -> bool:
    """Whether labels are the tokens that go in, and no output depends on a later one: a causal model, in any file."""
    head = peek(source)
    if head is None or head.y is None or "decoder_input_ids" in names:
        return False
    x, labels = as_tuple(head.x), as_tuple(head.y)[0]
    is_kept = labels != IGNORED_LABEL
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or not is_kept.any():
        return False
    repeated = [
        index for index, array in enumerate(x) if array.shape == labels.shape and (array == labels)[is_kept].all()
    ]
    if not repeated:
        return False
    at, ids = repeated[0], x[repeated[0]]
    # Another token where it is seen: in place of one that differs from the first.
    places = np.argwhere(is_kept & (ids != ids[:, :1]))
    if not len(places):
        return False
    row, last = places[-1]
    other = ids.copy()
    other[row, last] = ids[row, 0]
    changed = other if len(x) == 1 else (*x[:at], other, *x[at + 1 :])
    before, after = (as_tuple(predict(arrays))[0][row] for arrays in (head.x, changed))
    change = np.abs(after.astype(np.float64) - before)
    return before.ndim == 2 and bool(change[:last].max(initial=0) < _LEAKED * change[last].max())
