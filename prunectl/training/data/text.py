"""Text for language models in folders: tokenised by the folder's tokenizer, and cut into sequences of equal length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats import budgets
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TextInput
from prunectl.training.data.numpy_files import map_npy
from prunectl.training.data.readers import IndexedSource, from_arrays
from prunectl.training.data.source import Source, as_tuple, peek
from prunectl.training.data.spec import GRAMMAR, DataSpec, require_path
from prunectl.training.data.tokenizer import NO_MARKS, FolderTokenizer, Marks, Piece, open_tokenizer

LENGTH = 512
"""Default number of tokens in a sequence, unless the model takes fewer."""
FIELD = "text"
"""The default field of a .jsonl line that holds its text."""
_PIECE = 4 << 20
"""Maximum number of characters tokenised at once: a tokenizer holds about a hundred bytes for each token."""
_MOST_PIECES = 10_000
"""Maximum number of texts tokenised at once."""
_MOST_LOGITS = 1 << 26
"""Maximum number of logits of a batch, which has a logit for each token and each entry of the vocabulary."""


def batch_size(source: Source, signature: ModelSignature, size: int) -> int:
    """The batch size for a source, reduced where the logits of a language model would be too large."""
    head = peek(source, 1) if signature.text is not None else None
    if signature.text is None or head is None:
        return size
    return max(1, min(size, _MOST_LOGITS // (as_tuple(head.x)[0].size * signature.text.vocabulary)))


def open_text(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IndexedSource:
    """Open `corpus.txt`, `corpus.jsonl?field=text` or `ids.npy` as sequences for a language model."""
    path, text = require_path(spec.path), signature.text if signature is not None else None
    if text is None:
        raise UsageError(
            f"{path} is text, but the model does not come in a folder with a tokenizer",
            hint=f"name the folder of the model, or save token ids; {GRAMMAR}",
        )
    if "field" in spec.options and path.suffix != ".jsonl":
        raise UsageError(f"field has no effect on {path}", hint="leave it out, or use .jsonl")
    marks = NO_MARKS
    if path.suffix == ".npy":
        ids = _read_ids(path)
        if ids.ndim == 1 and not text.is_causal:
            marks = _marks_for(path, text)
    else:
        with open_tokenizer(text) as tokenizer:
            ids = _tokenise(spec, text, tokenizer)
            marks = NO_MARKS if text.is_causal else tokenizer.marks
    return _sequences(spec, ids, text, marks)


def _marks_for(path: Path, text: TextInput) -> Marks:
    """The special tokens that belong around sequences cut from one row of token ids."""
    try:
        with open_tokenizer(text) as tokenizer:
            return tokenizer.marks
    except InputError as error:
        error.hint = f"save the ids of {path} in rows, with their marks: then no tokenizer is needed"
        raise


def _sequences(spec: DataSpec, ids: Array, text: TextInput, marks: Marks) -> IndexedSource:
    """A source of token ids, in one row or already in sequences; targets are the next tokens."""
    _check_ids(spec.where, ids, text, "use the data of this model's own tokenizer")
    notes = []
    if ids.ndim != 1 and spec.int_option("length") is not None:
        raise UsageError(f"length has no effect on {spec.where}, which holds sequences already", hint="leave it out")
    if ids.ndim == 1:
        ids, note = _cut_sequences(spec, ids, text, marks)
        notes.append(note)
    if text.longest and ids.shape[1] - text.is_causal > text.longest:
        raise UsageError(f"{spec.where} has sequences of {ids.shape[1]} tokens, but the model takes {text.longest}")
    if not text.is_causal:
        return from_arrays(spec.text, {"input_ids": ids}, {}, *notes)
    if ids.shape[1] < 2:
        raise InputError(f"{spec.where} has sequences of {ids.shape[1]} tokens: none is followed by another")
    return from_arrays(spec.text, {"input_ids": ids[:, :-1]}, {"y": ids[:, 1:]}, *notes)


def _cut_sequences(spec: DataSpec, ids: Array, text: TextInput, marks: Marks) -> tuple[Array, str]:
    """Cut token ids into sequences; those of a causal model overlap by one token, the last target."""
    wanted = spec.int_option("length")
    if wanted is not None and text.longest and wanted > text.longest:
        raise UsageError(f"length={wanted} is more than the {text.longest} tokens that the model takes")
    available = len(ids) - text.is_causal
    if available < 1:
        raise InputError(f"{spec.where} has {len(ids)} tokens, which is too few for a sequence")
    count_of_marks = len(marks.before) + len(marks.after)
    length = min(wanted or min(LENGTH, text.longest or LENGTH), available + count_of_marks)
    inside = length - count_of_marks
    _check_ids(
        f"the tokenizer in {text.folder}", np.array([*marks.before, *marks.after]), text, "save token ids in rows"
    )
    if inside < 1:
        raise UsageError(f"length={length} leaves no room for text beside what the tokenizer adds")
    count = available // inside
    begins = np.arange(count)[:, np.newaxis] * inside
    rows = ids[begins + np.arange(inside + text.is_causal)]
    if not text.is_causal:
        rows = np.stack([np.concatenate([marks.before, row, marks.after]).astype(np.int64) for row in rows])
    note = f"{spec.where}: {len(ids):,} tokens in {count:,} sequences of {length}"
    return rows, f"{note}." if wanted else f"{note}; for another length add ?length=N."


def _check_ids(what: str, ids: Array, text: TextInput, hint: str) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high >= text.vocabulary:
        token = low if low < 0 else high
        raise InputError(f"{what} has the token {token}, but the model knows 0 to {text.vocabulary - 1}", hint=hint)


def _read_ids(path: Path) -> Array:
    ids = map_npy(path)
    if ids.dtype.kind not in "iu" or ids.ndim not in {1, 2} or not ids.size:
        raise InputError(
            f"{path} holds {ids.dtype} of the shape {ids.shape}, not token ids",
            hint="save whole numbers, all in a row or as sequences by tokens",
        )
    return ids


def _tokenise(spec: DataSpec, text: TextInput, tokenizer: FolderTokenizer) -> Array:
    """The token ids of a file of text; documents are separated by the end-of-text token."""
    parts: list[Array] = []
    waiting: list[Piece] = []
    characters = 0
    for number, document in enumerate(_documents(spec)):
        for index, piece in enumerate(_pieces(document)):
            # The special tokens at the beginning of a text occur only once.
            has_marks = text.is_causal and not number and not index and bool(piece)
            waiting.append(Piece(piece, has_marks=has_marks, follows_end=number > 0 and not index))
            characters += len(piece)
            if characters >= _PIECE or len(waiting) >= _MOST_PIECES:
                parts.append(tokenizer.encode(waiting))
                waiting, characters = [], 0
    parts.append(tokenizer.encode(waiting))
    return np.concatenate(parts)


def _documents(spec: DataSpec) -> Iterator[str]:
    """Yield the documents in a file: the whole of a .txt, or each line of a .jsonl."""
    path, field = spec.path, spec.options.get("field", FIELD)
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if (size := path.stat().st_size) > budgets.MAX_TEXT_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes of text, and prunectl tokenises at most {budgets.MAX_TEXT_BYTES:,}",
            hint="a few megabytes are enough: take a part of it",
        )
    try:
        whole = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: byte {error.start:,} does not fit") from error
    if path.suffix != ".jsonl":
        yield whole
        return
    for number, line in enumerate(whole.split("\n"), 1):
        if line.strip():
            yield _text_of(line, f"line {number} of {path}", field)


def _text_of(line: str, what: str, field: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON") from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{what} has no text under {field!r}", hint="name the field: corpus.jsonl?field=NAME")
    # JSON escapes may hold lone surrogates, which tokenizers do not accept.
    return text.encode("utf-8", "replace").decode("utf-8")


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that end at a line break if possible; an empty text yields itself."""
    if not text:
        yield text
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end
