"""JSON from strangers: one sentence for whatever is wrong with it, and nothing made of what would take too much."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, MissingExtraError
from prunectl.formats import budgets

_LOCK = threading.Lock()
"""The limit on digits is one for all threads."""
_MADE_BYTES = (("{", 200), ("[", 90), (":", 70), (",", 50), ('"', 20))
"""What Python makes of a text for each of these characters: between half of this and all of it.

Those inside strings count as well: looking for the ends of strings would take as long as parsing does.
"""

SURROGATES = "backslashreplace"
"""How half a character is encoded, which JSON has only as an escape: as just that escape."""


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a file of JSON holds, of which no more is read than may be parsed."""
    with path.open("rb") as file:
        return parse_object(file.read(budgets.MAX_JSON_BYTES + 1), path, what)


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as Hugging Face does, so that reading it again gives the same one."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors=SURROGATES)


def parse_object(text: bytes | str, path: Path, what: str, most: int = budgets.MAX_JSON_OBJECT_BYTES) -> dict[str, Any]:
    """The object that a JSON text holds, which may take so much memory at most."""
    refuse_too_much([text], path, what, most)
    try:
        with _short_numbers():
            value = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{path} is refused: {what} is nested too deep") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {what} is not JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: {what} is not a JSON object")
    if _is_deeper(value, budgets.MAX_JSON_DEPTH):
        raise InputError(f"{path} is refused: {what} is nested too deep")
    return value


@contextmanager
def _short_numbers() -> Generator[None]:
    """Take no number of more than some hundred digits meanwhile: the time for each grows with their square."""
    with _LOCK:
        usual = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)
        try:
            yield
        finally:
            sys.set_int_max_str_digits(usual)


def refuse_too_much(
    texts: Iterable[bytes | str], path: Path, what: str, most: int = budgets.MAX_JSON_OBJECT_BYTES
) -> None:
    """Refuse JSON texts that would take too much together, before the first of them is parsed."""
    nbytes = made_bytes = 0
    for text in texts:
        nbytes += len(text)
        if nbytes > budgets.MAX_JSON_BYTES:
            raise InputError(f"{path} is refused: {what} is longer than {budgets.MAX_JSON_BYTES} bytes of JSON")
        made_bytes += _made_bytes(text)
        if made_bytes > most:
            raise InputError(f"{path} is refused: {what} would create more objects than prunectl allows")


def _made_bytes(text: bytes | str) -> int:
    """An upper bound of the memory that a text takes once it is parsed, told without parsing it."""
    if isinstance(text, str):
        decoded = 0 if text.isascii() else 3 * len(text)
        structure = sum(each * text.count(mark) for mark, each in _MADE_BYTES)
        has_escapes = "\\u" in text
    else:
        decoded = len(text) if text.isascii() else 4 * len(text)
        structure = sum(each * text.count(mark.encode()) for mark, each in _MADE_BYTES)
        has_escapes = b"\\u" in text
    # One wide character makes its whole string four bytes a character.
    return structure + decoded + len(text) * (4 if has_escapes or not text.isascii() else 1)


def _is_deeper(value: dict[str, Any], most: int) -> bool:
    """Whether lists and objects stand in each other more than so deep, found breadth first."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def require(module: str, *, extra: str) -> Any:
    """A module, or say what brings it and all else that this extra lacks."""
    # onnxruntime, which other packages import too, reports to its maker about models and machines unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the library is there, but broken: that is not ours to explain
        from prunectl.formats.packages import command_for  # noqa: PLC0415 - reading metadata takes long to import

        raise MissingExtraError(
            f"{module} is not installed", hint=f"install it: {command_for(module, extra)}"
        ) from error
