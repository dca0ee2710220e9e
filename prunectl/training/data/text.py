"""Text for the language model in a folder: tokenised by its own tokenizer, and cut into sequences of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats import budgets
from prunectl.formats.base import Array
from prunectl.formats.folder import real_file
from prunectl.formats.safe_json import require
from prunectl.training.backend import ModelSignature, TextInput
from prunectl.training.data.numpy_files import map_npy
from prunectl.training.data.readers import IndexedSource, from_arrays
from prunectl.training.data.source import Source, as_tuple, peek
from prunectl.training.data.spec import GRAMMAR, DataSpec, require_path
from prunectl.training.quiet import ignore_warnings, offline, quiet_logging

LENGTH = 512
"""Tokens in a sequence, where neither the user nor the model says that there are fewer."""
FIELD = "text"
"""The field of each line of a .jsonl that holds its text."""
_PIECE = 4 << 20
"""Characters that are tokenised at once: a tokenizer keeps a hundred bytes for each token."""
_MOST_LOGITS = 1 << 26
"""Numbers that come out of a batch: each token of it has as many as there are words."""


def batch_size(source: Source, signature: ModelSignature, size: int) -> int:
    """How many examples of a source to run at once: fewer where each token has a logit for every word."""
    head = peek(source, 1) if signature.text is not None else None
    if signature.text is None or head is None:
        return size
    return max(1, min(size, _MOST_LOGITS // (as_tuple(head.x)[0].size * signature.text.vocabulary)))


def open_text(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IndexedSource:
    """The sequences that `corpus.txt`, `corpus.jsonl?field=text` or `ids.npy` holds for a language model."""
    path, text = require_path(spec.path), signature.text if signature is not None else None
    if text is None:
        raise UsageError(
            f"{path} is text, but the model does not come in a folder with a tokenizer",
            hint=f"name the folder of the model, or save token ids; {GRAMMAR}",
        )
    if "field" in spec.options and path.suffix != ".jsonl":
        raise UsageError(f"field has no effect on {path}", hint="leave it out, or use .jsonl")
    ids = _ids_in(path) if path.suffix == ".npy" else _tokenised(spec, text)
    return sequences(spec, ids, text)


def sequences(spec: DataSpec, ids: Array, text: TextInput) -> IndexedSource:
    """Token ids, all in a row or already in rows, as sequences; the target of each token is the one that follows it."""
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high >= text.vocabulary:
        raise InputError(
            f"{spec.where} has the token {low if low < 0 else high}, but the model knows 0 to {text.vocabulary - 1}",
            hint="use the data of this model's own tokenizer",
        )
    notes = []
    if ids.ndim != 1 and spec.int_option("length") is not None:
        raise UsageError(f"length has no effect on {spec.where}, which holds sequences already", hint="leave it out")
    if ids.ndim == 1:
        ids, note = _rows(spec, ids, text)
        notes.append(note)
    if text.longest and ids.shape[1] - text.is_causal > text.longest:
        raise UsageError(f"{spec.where} has sequences of {ids.shape[1]} tokens, but the model takes {text.longest}")
    if not text.is_causal:
        return from_arrays(spec.text, {"input_ids": ids}, {}, *notes)
    if ids.shape[1] < 2:
        raise InputError(f"{spec.where} has sequences of {ids.shape[1]} tokens: none is followed by another")
    return from_arrays(spec.text, {"input_ids": ids[:, :-1]}, {"y": ids[:, 1:]}, *notes)


def _rows(spec: DataSpec, ids: Array, text: TextInput) -> tuple[Array, str]:
    """Rows of a text; in those of a causal model the last token is the first of the next row."""
    wanted = spec.int_option("length")
    if wanted is not None and text.longest and wanted > text.longest:
        raise UsageError(f"length={wanted} is more than the {text.longest} tokens that the model takes")
    available = len(ids) - text.is_causal
    if available < 1:
        raise InputError(f"{spec.where} has {len(ids)} tokens, which is too few for a sequence")
    around = _around(text)
    length = min(wanted or min(LENGTH, text.longest or LENGTH), available + len(around(ids[:0])))
    inside = length - len(around(ids[:0]))
    if inside < 1:
        raise UsageError(f"length={length} leaves no room for text beside what the tokenizer adds")
    count = available // inside
    begins = np.arange(count)[:, np.newaxis] * inside
    rows = ids[begins + np.arange(inside + text.is_causal)]
    if not text.is_causal:
        rows = np.stack([around(row) for row in rows])
    note = f"{spec.where}: {len(ids):,} tokens in {count:,} sequences of {length}"
    return rows, f"{note}." if wanted else f"{note}; for another length add ?length=N."


def _around(text: TextInput) -> Any:
    """What puts a sequence between the marks that an encoder was trained with."""
    if text.is_causal:
        return lambda ids: ids
    tokenizer = load_tokenizer(text)
    begin, end = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    marks = [[] if mark is None else [mark] for mark in (begin, end)]
    return lambda ids: np.concatenate([marks[0], ids, marks[1]]).astype(np.int64)


def _ids_in(path: Path) -> Array:
    ids = map_npy(path)
    if ids.dtype.kind not in "iu" or ids.ndim not in {1, 2} or not ids.size:
        raise InputError(
            f"{path} holds {ids.dtype} of the shape {ids.shape}, not token ids",
            hint="save whole numbers, all in a row or as sequences by tokens",
        )
    return ids


def _tokenised(spec: DataSpec, text: TextInput) -> Array:
    """The ids of a file of text, as the tokenizer gives them for it; between documents stands its end of text."""
    tokenizer = load_tokenizer(text)
    end = getattr(tokenizer, "eos_token_id", None)
    parts: list[Array] = []
    for number, document in enumerate(_documents(spec)):
        if number and end is not None:
            parts.append(np.array([end], np.int64))
        for at, piece in enumerate(_pieces(document)):
            # What the tokenizer adds at the beginning of a text stands there once.
            parts.append(_encoded(tokenizer, piece, has_marks=text.is_causal and not number and not at))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _encoded(tokenizer: Any, piece: str, *, has_marks: bool) -> Array:
    try:
        with quiet_logging(), ignore_warnings():
            encoding = tokenizer(piece, add_special_tokens=has_marks, return_attention_mask=False, verbose=False)
        return np.asarray(encoding["input_ids"], np.int64)
    except BaseException as error:
        raise _failed(error, "the tokenizer cannot read the text") from error


def _documents(spec: DataSpec) -> Iterator[str]:
    """Yield the texts in a file: a .txt is one, a .jsonl has one in each line."""
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
    # Half a character, which JSON has as an escape, is none that a tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that end with a line, where they can."""
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def load_tokenizer(text: TextInput) -> Any:
    """The tokenizer in the folder of a model; nothing is fetched, and no code of the folder runs without trust."""
    library = require("transformers", extra="transformers")
    nbytes = 0
    for path in sorted(text.folder.iterdir()):
        if path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "chat_")):
            if real_file(text.folder, path.name) is None and not path.is_dir():
                raise InputError(f"{path} is a link that leads out of the folder of the model")
            nbytes += path.stat().st_size
    if nbytes > budgets.MAX_TOKENIZER_BYTES:
        raise InputError(f"the tokenizer in {text.folder} is refused: it has {nbytes:,} bytes")
    _check_growth(text.folder)
    try:
        with quiet_logging(), ignore_warnings(), offline():
            return library.AutoTokenizer.from_pretrained(
                str(text.folder), local_files_only=True, trust_remote_code=text.is_trusted
            )
    except BaseException as error:
        raise _failed(error, f"the tokenizer in {text.folder} cannot be opened") from error


def _check_growth(folder: Path) -> None:
    """Refuse a tokenizer whose normalizer may make a text many times as long."""
    path = real_file(folder, "tokenizer.json")
    if path is None:
        return
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON") from error
    steps, factor = [whole.get("normalizer") if isinstance(whole, dict) else None], 1
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            steps += step["normalizers"] if isinstance(step.get("normalizers"), list) else []
            content = step.get("content", step.get("prepend", ""))
            factor *= max(len(content), 1) if isinstance(content, str) else 1
    if factor > budgets.MAX_TEXT_GROWTH:
        raise InputError(
            f"{path} is refused: its normalizer may make a text {factor:,} times as long",
            hint="without it, save token ids: --data ids.npy",
        )


def _failed(error: BaseException, what: str) -> BaseException:
    """The refusal of what went wrong in the library, which for panics of Rust is no ordinary exception."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return InputError(
        f"{what}: {first_line(Exception(*error.args))}", hint="without it, save token ids: --data ids.npy"
    )
