"""Shifts labels of causal language models: labels that repeat the input tokens are compared one position earlier."""

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
"""The name of targets in `transformers`."""
_LEAKED = 1e-3
"""In a causal model, a token changes earlier outputs by less than this share of the change to its own (rounding)."""
_SEEN = 1e-6
"""In a causal model, a token changes some later output by more than this share, and ten times as much as earlier."""


def user_function(loss: str, step: str = "") -> str:
    """The option that names a user's function, which may shift labels itself, as the losses of `transformers` do."""
    return "--train-step" if step else "--loss" if ":" in loss else ""


def open_labelled(spec: str, signature: ModelSignature, seed: int, taken_by: str) -> Source:
    """Open a source; if a user's function (`taken_by`, its option) takes the labels, they are not shifted."""
    text = signature.text
    if taken_by and text is not None:
        signature = replace(signature, text=replace(text, shifts_labels=False))
    return open_source(spec, signature=signature, seed=seed)


def shift_if_causal(
    source: Source, signature: ModelSignature, predict: Callable[[Arrays], Arrays], taken_by: str = ""
) -> Source:
    """Shift the labels of an adapted source if they repeat the tokens and the model proves to be causal."""
    head = peek(source) if source.target_name == LABELS else None
    tokens = None if head is None else _repeated_input(head)
    if head is None or tokens is None or any(port.name == "decoder_input_ids" for port in signature.inputs):
        return source
    if taken_by:
        return source.map_batches(
            lambda batch: batch,
            f"{source.name}: {taken_by} gets the labels as they are, and every metric compares them in place",
        )
    # For a model folder, the loss in `transformers` decides instead.
    if signature.text is not None or not _is_causal(head, tokens, signature, predict):
        return source
    return shift_labels(source) if signature.ignored_label is not None else _cut(source, signature, tokens, predict)


def _note(source: Source) -> str:
    return (
        f"{source.name}: each of the labels is compared with the output one place before it; to compare them in place, "
        "call them y"
    )


def shift_labels(source: Source) -> Source:
    """Shift targets called `labels` by one token, as `transformers` does in the loss of a causal model."""
    head = peek(source, 1) if source.target_name == LABELS else None
    if head is None or head.y is None or all(x.shape != as_tuple(head.y)[0].shape for x in as_tuple(head.x)):
        return source

    def change(batch: Batch) -> Batch:
        if batch.y is None:
            return batch
        # No token follows the last one, but it stays in: a file may fix the length of sequences.
        labels = as_tuple(batch.y)[0]
        after = np.full_like(labels[:, :1], IGNORED_LABEL, dtype=np.int64)
        return Batch(batch.x, np.concatenate([labels[:, 1:], after], 1))

    return source.map_batches(change, _note(source))


def _cut(source: Source, signature: ModelSignature, tokens: int, predict: Callable[[Arrays], Arrays]) -> Source:
    """Shift labels by cutting off the last token, for frameworks without an ignored label."""
    head = peek(source, 1)
    assert head is not None
    x = as_tuple(head.x)
    # Other inputs of the tokens' length, such as a mask, are cut too, if their length is not fixed.
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
        # An input may have that length by coincidence, such as the source text of a translation.
        whole, shortened = (as_tuple(predict(batch.x))[0] for batch in (head, change(head)))
        if np.abs(whole[:, :-1] - shortened).max() > _LEAKED * np.abs(whole).max():
            reason = "another input of their length cannot lose its last place"
    if reason:
        raise UsageError(
            f"no token follows the last one of {source.name}, and {reason}",
            hint="save sequences with a token more: x without the last token of each, y without the first; "
            "or call the labels y to compare them in place",
        )
    return source.map_batches(change, _note(source))


def _repeated_input(batch: Batch) -> int | None:
    """The index of the input that the labels repeat, ignored labels aside; None if there is none."""
    x, labels = as_tuple(batch.x), as_tuple(batch.y)[0] if batch.y is not None else np.zeros(0)
    is_kept = labels != IGNORED_LABEL
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or not is_kept.any():
        return None
    same = (i for i, array in enumerate(x) if array.shape == labels.shape and (array == labels)[is_kept].all())
    return next(same, None)


def _is_causal(batch: Batch, tokens: int, signature: ModelSignature, predict: Callable[[Arrays], Arrays]) -> bool:
    """Whether changing a token changes later outputs but no earlier ones; a model without context is not causal."""
    assert batch.y is not None
    x, labels = as_tuple(batch.x), as_tuple(batch.y)[0]
    ids, is_kept = x[tokens], labels != IGNORED_LABEL
    # Replace a token that has a label and differs from the first one, with further labels after it.
    has_more = np.cumsum(is_kept[:, ::-1], 1)[:, ::-1] > 1
    positions = np.argwhere(is_kept & has_more & (ids != ids[:, :1]))
    if not len(positions):
        return False
    row, position = positions[np.abs(2 * positions[:, 1] - ids.shape[1]).argmin()]
    # Both in one batch: some files drop the batch axis of a single example.
    pair = [np.repeat(array[row : row + 1], 2, 0) for array in x]
    pair[tokens][1, position] = ids[row, 0]
    outputs = as_tuple(predict(tuple(pair) if isinstance(batch.x, tuple) else pair[0]))[0].astype(np.float64)
    axis = label_axis(outputs.shape[1:], labels.shape[1:], is_channels_first=signature.is_channels_first)
    if axis is None or outputs.ndim != 3 or len(outputs) != 2:
        return False
    change = np.abs(outputs[1] - outputs[0]).max(axis - 1)
    earlier, own, later = change[:position].max(), change[position], change[position + 1 :].max()
    return bool(earlier < _LEAKED * own and later > max(_SEEN * own, 10 * earlier))
