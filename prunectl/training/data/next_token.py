"""Labels that are the tokens themselves: a model that predicts the next token is compared with them one place on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature
from prunectl.training.data.registry import open_source
from prunectl.training.data.source import Arrays, Batch, Source, as_tuple, peek
from prunectl.training.task import IGNORED_LABEL, label_axis

LABELS = "labels"
"""What `transformers` calls targets."""
_LEAKED = 1e-3
"""What a later token changes in a causal model, compared with its own output: rounding only."""
_SEEN = 1e-6
"""What a token changes at least in some later output, in the same measure, and ten times what it changes before it."""


def user_function(loss: str, step: str = "") -> str:
    """The option that names a function of the user's own, which may move labels itself as `transformers` does."""
    return "--train-step" if step else "--loss" if ":" in loss else ""


def open_labelled(spec: str, signature: ModelSignature, seed: int, taken_by: str) -> Source:
    """A source for a model whose labels a function of the user's own takes, named by its option, or none."""
    text = signature.text
    if taken_by and text is not None:
        signature = replace(signature, text=replace(text, shifts_labels=False))
    return open_source(spec, signature=signature, seed=seed)


def follow_if_causal(
    source: Source, signature: ModelSignature, predict: Callable[[Arrays], Arrays], taken_by: str = ""
) -> Source:
    """An adapted source whose labels are compared one place on, where nothing but the model and its data tells so."""
    head = peek(source) if source.target_name == LABELS else None
    tokens = None if head is None else _repeated(head)
    if head is None or tokens is None or any(port.name == "decoder_input_ids" for port in signature.inputs):
        return source
    if taken_by:
        return source.changed(
            lambda batch: batch,
            f"{source.name}: {taken_by} gets the labels as they are, and every metric compares them in place",
        )
    # Of a folder, the loss of `transformers` tells.
    if signature.text is not None or not _is_causal(head, tokens, signature, predict):
        return source
    return follow(source) if signature.ignored_label is not None else _cut(source, signature, tokens, predict)


def _note(source: Source) -> str:
    return (
        f"{source.name}: each of the labels is compared with the output one place before it; to compare them in place, "
        "call them y"
    )


def follow(source: Source) -> Source:
    """Targets called `labels` as `transformers` takes them for a causal model: the tokens themselves, one place on."""
    head = peek(source, 1) if source.target_name == LABELS else None
    if head is None or head.y is None or all(x.shape != as_tuple(head.y)[0].shape for x in as_tuple(head.x)):
        return source

    def change(batch: Batch) -> Batch:
        if batch.y is None:
            return batch
        # No token follows the last one. A file may fix the number of tokens, so that one stays in.
        labels = as_tuple(batch.y)[0]
        after = np.full_like(labels[:, :1], IGNORED_LABEL, dtype=np.int64)
        return Batch(batch.x, np.concatenate([labels[:, 1:], after], 1))

    return source.changed(change, _note(source))


def _cut(source: Source, signature: ModelSignature, tokens: int, predict: Callable[[Arrays], Arrays]) -> Source:
    """The same where no label can be ignored: without the last token, which none follows."""
    head = peek(source, 1)
    assert head is not None
    x = as_tuple(head.x)
    # What else goes in with the tokens, such as a mask, has their length, whatever that is.
    is_cut = [
        array.shape[:2] == x[tokens].shape and (port.shape is None or port.shape[:1] == (None,))
        for array, port in zip(x, signature.inputs, strict=True)
    ]

    def change(batch: Batch) -> Batch:
        labels = as_tuple(batch.y)[0] if batch.y is not None else None
        arrays = tuple(array[:, :-1] if cut else array for array, cut in zip(as_tuple(batch.x), is_cut, strict=True))
        return Batch(arrays if isinstance(batch.x, tuple) else arrays[0], None if labels is None else labels[:, 1:])

    reason = "" if is_cut[tokens] else "the model takes sequences of one length only"
    if not reason and sum(is_cut) > 1:
        # Something else may have that length by chance, such as the text that is translated.
        whole, rest = (as_tuple(predict(batch.x))[0] for batch in (head, change(head)))
        if np.abs(whole[:, :-1] - rest).max() > _LEAKED * np.abs(whole).max():
            reason = "another input of their length cannot lose its last place"
    if reason:
        raise UsageError(
            f"no token follows the last one of {source.name}, and {reason}",
            hint="save sequences with a token more: x without the last token of each, y without the first; "
            "or call the labels y to compare them in place",
        )
    return source.changed(change, _note(source))


def _repeated(batch: Batch) -> int | None:
    """The input that the labels repeat wherever they count."""
    x, labels = as_tuple(batch.x), as_tuple(batch.y)[0] if batch.y is not None else np.zeros(0)
    is_kept = labels != IGNORED_LABEL
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or not is_kept.any():
        return None
    same = (i for i, array in enumerate(x) if array.shape == labels.shape and (array == labels)[is_kept].all())
    return next(same, None)


def _is_causal(batch: Batch, tokens: int, signature: ModelSignature, predict: Callable[[Arrays], Arrays]) -> bool:
    """Whether a token changes outputs behind it, but none before: one that is looked at alone predicts nothing."""
    assert batch.y is not None
    x, labels = as_tuple(batch.x), as_tuple(batch.y)[0]
    ids, is_kept = x[tokens], labels != IGNORED_LABEL
    # Another token where it is seen, in place of one that differs from the first, with others that are behind it.
    has_more = np.cumsum(is_kept[:, ::-1], 1)[:, ::-1] > 1
    places = np.argwhere(is_kept & has_more & (ids != ids[:, :1]))
    if not len(places):
        return False
    row, at = places[np.abs(2 * places[:, 1] - ids.shape[1]).argmin()]
    # Together, so that a file that drops the axis of a single example keeps it.
    pair = [np.repeat(array[row : row + 1], 2, 0) for array in x]
    pair[tokens][1, at] = ids[row, 0]
    outputs = as_tuple(predict(tuple(pair) if isinstance(batch.x, tuple) else pair[0]))[0].astype(np.float64)
    axis = label_axis(outputs.shape[1:], labels.shape[1:], is_channels_first=signature.is_channels_first)
    if axis is None or outputs.ndim != 3 or len(outputs) != 2:
        return False
    change = np.abs(outputs[1] - outputs[0]).max(axis - 1)
    earlier, own, later = change[:at].max(), change[at], change[at + 1 :].max()
    return bool(earlier < _LEAKED * own and later > max(_SEEN * own, 10 * earlier))
