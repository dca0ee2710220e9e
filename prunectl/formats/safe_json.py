"""JSON from untrusted files: any defect is an InputError, and texts that would take too much memory are not parsed."""

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
"""Guards Python's limit on the digits of integers, which all threads share."""
_PARSED_BYTES = (("{", 200), ("[", 90), (":", 70), (",", 50), ('"', 20))
"""Upper bounds of the memory that parsing takes for each of these characters; at least half is really taken.

Characters inside strings count as well: finding the ends of strings would take as long as parsing does.
"""

SURROGATES = "backslashreplace"
"""The error handler that writes a lone surrogate as an escape, the only way in which JSON can have it."""


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; no more than MAX_JSON_BYTES and one byte are read."""
    with path.open("rb") as file:
        return parse_object(file.read(budgets.MAX_JSON_BYTES + 1), path, what)


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object in the layout of Hugging Face; it is equal when read again."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors=SURROGATES)


def parse_object(text: bytes | str, path: Path, what: str, most: int = budgets.MAX_JSON_OBJECT_BYTES) -> dict[str, Any]:
    """The object in a JSON text, which may take at most so many bytes of memory."""
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
    """Accept no integers of more than 640 digits in the block: parsing one takes time quadratic in its digits."""
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
    """Refuse JSON texts that would take too much memory together, before any of them is parsed."""
    nbytes = parsed_bytes = 0
    for text in texts:
        nbytes += len(text)
        if nbytes > budgets.MAX_JSON_BYTES:
            raise InputError(f"{path} is refused: {what} is longer than {budgets.MAX_JSON_BYTES} bytes of JSON")
        parsed_bytes += _parsed_bytes(text)
        if parsed_bytes > most:
            raise InputError(f"{path} is refused: {what} would create more objects than prunectl allows")


def _parsed_bytes(text: bytes | str) -> int:
    """An upper bound of the memory that a text takes once it is parsed, computed without parsing it."""
    if isinstance(text, str):
        decoded = 0 if text.isascii() else 3 * len(text)
        structure = sum(each * text.count(mark) for mark, each in _PARSED_BYTES)
        has_escapes = "\\u" in text
    else:
        decoded = len(text) if text.isascii() else 4 * len(text)
        structure = sum(each * text.count(mark.encode()) for mark, each in _PARSED_BYTES)
        has_escapes = b"\\u" in text
    # A single wide character makes Python store its whole string with four bytes for each character.
    return structure + decoded + len(text) * (4 if has_escapes or not text.isascii() else 1)


def _is_deeper(value: dict[str, Any], most: int) -> bool:
    """Whether lists and objects are nested deeper than `most`; breadth first, without recursion."""
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
    """Import a module; MissingExtraError with the command that installs its extra if it is missing."""
    # onnxruntime, which other packages import too, sends telemetry about models and machines unless this is set.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the library is installed, but broken, which another message could not explain
        from prunectl.formats.packages import command_for  # noqa: PLC0415 - reading metadata takes long to import

        raise MissingExtraError(
            f"{module} is not installed", hint=f"install it: {command_for(module, extra)}"
        ) from error
