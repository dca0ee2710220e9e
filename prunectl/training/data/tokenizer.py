"""Runs the tokenizer of a model folder in a sandbox, as its regular expressions may backtrack forever."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prunectl.errors import InputError, abbreviated, first_line
from prunectl.formats import budgets
from prunectl.formats.base import Array
from prunectl.formats.folder import real_file
from prunectl.formats.safe_json import read_object, require
from prunectl.formats.sandbox import Child, run_sandboxed
from prunectl.training.backend import TextInput
from prunectl.training.quiet import ignore_warnings, offline, quiet_logging

_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|spiece|chat_|entity_vocab|emoji|byte_maps|tekken|dict\.txt).*|"
    r".*\.(model|spm|tokenizer|tiktoken)"
)
_TEMPLATES = "additional_chat_templates"
"""A subfolder of which `transformers` reads every file."""
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
"""`transformers` passes the entries of these files to the tokenizer as keyword arguments."""
_PATHS = re.compile(r"vocab|merges|init_inputs|subfolder|.*files?")
"""Names of arguments by which a tokenizer may take a path."""
_HINT = "without it, save token ids: --data ids.npy"
_LOAD_SECONDS, _LOAD_SECONDS_PER_BYTE = 60, 5e-6
"""Limits on processor time for loading: `transformers` takes a few seconds, and a vocabulary of 17 MB two more."""
_SECONDS, _SECONDS_PER_CHARACTER = 10, 1e-4
"""Limits on processor time for a text; tokenizers in Python take a fifth of it, all others a hundredth or less."""
_ROOM, _ROOM_PER_CHARACTER = 4 << 30, 2000
"""Limits on address space; a tokenizer holds about a hundred bytes for each token."""
_MORE_IDS = 1024
"""The number of tokens that a tokenizer may add to a text of any length."""
_NO_MARK = -1
_keys = count()


class Marks(NamedTuple):
    """The special tokens that an encoder was trained with before and after each sequence."""

    before: tuple[int, ...]
    after: tuple[int, ...]


NO_MARKS = Marks((), ())


class Piece(NamedTuple):
    """A piece of text, and the special tokens before it."""

    text: str
    has_marks: bool
    """Whether the tokenizer adds its special tokens, as at the beginning of a text."""
    follows_end: bool
    """Whether the end-of-text token comes before it."""


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """The tokenizer of a folder, in a child process; if code in the folder is trusted, in this one, as the network."""

    text: TextInput
    marks: Marks
    _child: Child | None
    _handle: _Handle

    def encode(self, pieces: Sequence[Piece]) -> Array:
        """The concatenated token ids of pieces of text."""
        characters = sum(len(piece.text) for piece in pieces)
        answer = _run(
            self.text,
            partial(_ids, self._handle, tuple(pieces)),
            self._child,
            seconds=_SECONDS + _SECONDS_PER_CHARACTER * characters,
            extra_bytes=_ROOM + _ROOM_PER_CHARACTER * characters,
        )
        if len(answer) % np.dtype(np.int64).itemsize:
            raise InputError(f"the tokenizer in {self.text.folder} answers no token ids")
        ids = np.frombuffer(answer, np.int64)
        if len(ids) > budgets.MAX_TEXT_GROWTH * (characters + len(pieces)) + _MORE_IDS:
            raise InputError(
                f"the tokenizer in {self.text.folder} is refused: it makes {len(ids):,} tokens of "
                f"{characters:,} characters",
                hint=_HINT,
            )
        return ids


@dataclass(frozen=True, slots=True)
class _Handle:
    """The key of an opened tokenizer in the cache of its process."""

    folder: str
    is_trusted: bool
    process: int = field(default_factory=os.getpid)
    """The id of the process that requested it."""
    key: int = field(default_factory=lambda: next(_keys))


@contextmanager
def open_tokenizer(text: TextInput) -> Generator[FolderTokenizer]:
    """Open the tokenizer of a model folder; nothing is downloaded, and no code of the folder runs without trust."""
    require("transformers", extra="transformers")
    nbytes = _checked_bytes(text.folder)
    handle = _Handle(str(text.folder), text.is_trusted)
    child = None if text.is_trusted else Child(is_kept=True)
    try:
        seconds = _LOAD_SECONDS + _LOAD_SECONDS_PER_BYTE * nbytes
        answer = _run(text, partial(_marks, handle), child, seconds=seconds, extra_bytes=_ROOM)
        yield FolderTokenizer(text, _parse_marks(text, bytes(answer)), child, handle)
    finally:
        if child is not None:
            child.close()


def _run(
    text: TextInput,
    work: Callable[[], bytes],
    child: Child | None,
    *,
    seconds: float,
    extra_bytes: int,
) -> bytes | bytearray:
    what = Path(f"the tokenizer in {text.folder}")
    try:
        return (
            work()
            if child is None
            else run_sandboxed(work, what, seconds=seconds, extra_bytes=extra_bytes, child=child)
        )
    except InputError as error:
        error.hint = error.hint or _HINT
        raise


def _parse_marks(text: TextInput, answer: bytes) -> Marks:
    if len(answer) != 2 * np.dtype(np.int64).itemsize:
        raise InputError(f"the tokenizer in {text.folder} answers no token ids")
    before, after = (() if mark == _NO_MARK else (mark,) for mark in np.frombuffer(answer, np.int64).tolist())
    return Marks(before, after)


def _checked_bytes(folder: Path) -> int:
    """The total size of a tokenizer's files; refuse files that are too large, outside the folder, or not regular."""
    nbytes = 0
    for path in sorted((*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"))):
        if path.is_dir():
            continue
        if path.exists() and not path.is_file():
            # Reading a pipe or a terminal would block without using processor time, so no limit would end it.
            raise InputError(f"{path} is not a regular file")
        if path.parent != folder or _FILES.fullmatch(path.name):
            if real_file(folder, path.relative_to(folder)) is None:
                raise InputError(f"{path} is a link that leads out of the folder of the model")
            nbytes += path.stat().st_size
    if nbytes > budgets.MAX_TOKENIZER_BYTES:
        raise InputError(f"the tokenizer in {folder} is refused: it has {nbytes:,} bytes")
    return nbytes


# Everything below runs in the child process.


def _marks(handle: _Handle) -> bytes:
    _check_paths(Path(handle.folder))
    _check_growth(Path(handle.folder))
    tokenizer = _load_cached(handle)
    marks = (getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id"))
    return np.array([_NO_MARK if mark is None else mark for mark in marks], np.int64).tobytes()


def _check_paths(folder: Path) -> None:
    """Refuse a tokenizer whose configuration names files outside its folder.

    Paths that do not exist are allowed: many configurations contain one of the cache in which they were written.
    """
    for name in _CONFIGS:
        if (path := real_file(folder, name)) is None:
            continue
        values: list[tuple[str, object]] = list(read_object(path, "it").items())
        while values:
            key, value = values.pop()
            if isinstance(value, dict):
                values += value.items()
            elif isinstance(value, list) and key not in {"vocab", "merges"}:
                # Those are lists of tokens, and "/" may be a token.
                values += [(key, inner) for inner in value]
            elif isinstance(value, str) and _PATHS.fullmatch(key) and _leads_out(folder, value):
                raise InputError(
                    f"{folder / name} is refused: {abbreviated(key)} names {abbreviated(value)}, "
                    "which is not a file of the folder"
                )


def _leads_out(folder: Path, value: str) -> bool:
    """Whether a path exists, relative to this or the model's folder, and is not a file of the model's folder."""
    named = [Path(os.path.abspath(root), value) for root in (folder, ".")] if value else []
    return any(os.path.exists(path) and real_file(folder, path) is None for path in named)


def _check_growth(folder: Path) -> None:
    """Refuse a tokenizer whose normalizer may multiply the length of a text."""
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
        raise InputError(f"{path} is refused: its normalizer may make a text {factor:,} times as long")


def _ids(handle: _Handle, pieces: Sequence[Piece]) -> bytes:
    tokenizer = _load_cached(handle)
    end = getattr(tokenizer, "eos_token_id", None)
    parts: list[Array] = []
    for piece in pieces:
        if piece.follows_end and end is not None:
            parts.append(np.array([end], np.int64))
        if piece.text:
            parts.append(_encode(tokenizer, piece.text, has_marks=piece.has_marks))
    return b"".join(part.tobytes() for part in parts)


def _encode(tokenizer: Any, text: str, *, has_marks: bool) -> Array:
    try:
        with quiet_logging(), ignore_warnings():
            encoding = tokenizer(text, add_special_tokens=has_marks, return_attention_mask=False, verbose=False)
        return np.asarray(encoding["input_ids"], np.int64)
    except BaseException as error:
        raise _failure(error, "the tokenizer cannot read the text") from error


@lru_cache(maxsize=1)
def _load_cached(handle: _Handle) -> Any:
    if handle.process != os.getpid():
        # The tokenizer does not need PyTorch, which would take longer to import than everything else.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    return load_tokenizer(handle.folder, is_trusted=handle.is_trusted)


def load_tokenizer(folder: str, *, is_trusted: bool) -> Any:
    """Load a tokenizer with `transformers`."""
    try:
        with quiet_logging(), ignore_warnings():
            library: Any = importlib.import_module("transformers")
            with offline():
                return library.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=is_trusted
                )
    except BaseException as error:
        raise _failure(error, f"the tokenizer in {folder} cannot be opened") from error


def _failure(error: BaseException, what: str) -> BaseException:
    """Convert the library's failures to an error; panics of Rust are not ordinary exceptions."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return InputError(f"{what}: {first_line(Exception(*error.args))}")
