"""Parses a data SPEC: where the examples are, and options after a question mark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote

from prunectl.errors import InputError, UsageError
from prunectl.formats.detect import url_error

GRAMMAR = (
    "a SPEC is train.npz, train.npz[x,y], x.npy,y.npy, images/, table.csv?target=label, table.parquet?target=label, "
    "corpus.txt, corpus.jsonl?field=text, "
    "'*.tfrecord?schema=f.json', package.module:function, ./file.py:function or random:64"
)
GENERAL = ("norm", "shape", "flatten", "classes", "relabel", "onehot", "limit")
"""Options of every kind of data."""
TABLE_OPTIONS = ("target", "columns")
RECORD_OPTIONS = ("schema",)
TEXT_OPTIONS = ("length", "field")
TEXT_SUFFIXES = (".txt", ".jsonl")
IMAGE_OPTIONS = ("size", "color")
NPZ_ARRAYS = re.compile(r"(?P<path>.+\.npz)\[(?P<names>.*)\]")
NPY_SEPARATOR = re.compile(r"(?<=\.npy)([,+])")
FUNCTION = re.compile(r"(?P<where>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_OPTIONS = re.compile(r"\?(?=[A-Za-z_]+(?:=[^&]*)?(?:&[A-Za-z_]+(?:=[^&]*)?)*$)")
_FLAGS = {"": True, "1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class DataSpec:
    """A parsed SPEC."""

    text: str
    where: str
    """The part before the question mark."""
    options: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The path of the data, if it is a single file or folder."""
        return Path(self.where)

    def list_option(self, name: str) -> tuple[str, ...]:
        """The comma-separated parts of an option."""
        return tuple(item.strip() for item in self.options.get(name, "").split(",") if item.strip())

    def int_option(self, name: str) -> int | None:
        """An option that is a positive integer, or None if it is not given."""
        if name not in self.options:
            return None
        return parse_count(name, self.options[name])

    def flag(self, name: str) -> bool:
        """The value of a boolean option; False if it is not given."""
        if name not in self.options:
            return False
        value = self.options[name].lower()
        if value not in _FLAGS:
            raise UsageError(f"{name}={self.options[name]} must be 0 or 1", hint=f"write {name}=1 or {name}=0")
        return _FLAGS[value]


def parse(text: str) -> DataSpec:
    """Parse a SPEC."""
    if not text.strip():
        raise UsageError("the data SPEC is empty", hint=GRAMMAR)
    options_match = None if os.path.lexists(text) else _OPTIONS.search(text)
    if options_match is None:
        return DataSpec(text, text, {})
    options: dict[str, str] = {}
    for option in text[options_match.end() :].split("&"):
        name, _, value = option.partition("=")
        if name in options:
            raise UsageError(f"the data SPEC {text} has the option {name} twice")
        options[name] = unquote(value)
    return DataSpec(text, text[: options_match.start()], options)


def check_options(spec: DataSpec, own: Iterable[str]) -> None:
    """Refuse options that this kind of data does not have."""
    known = (*own, *GENERAL)
    for name in spec.options:
        if name not in known:
            raise UsageError(
                f"{spec.where} has no option {name}",
                did_you_mean=tuple(get_close_matches(name, known)),
                hint=f"options: {', '.join(known)}",
            )


def parse_count(name: str, text: str) -> int:
    """Parse a positive integer."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise UsageError(f"{name}={text} is not a count", hint=f"write a whole number above zero, as in {name}=100")
    return int(text)


def parse_shape(name: str, text: str) -> tuple[int, ...]:
    """Parse a shape such as 28x28."""
    return tuple(parse_count(name, length) for length in text.lower().split("x"))


def pictures_in(folder: Path) -> list[Path]:
    """The image files in a folder, by suffix."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
    )


def require_path(path: Path) -> Path:
    """Return the path if it exists; otherwise raise."""
    if not os.path.lexists(path):
        raise url_error(str(path)) or InputError(f"{path} does not exist", hint=_path_hint(str(path)))
    return path


def _path_hint(where: str) -> str:
    if re.search(r"[*?\[&]", where):
        return f"if the shell has expanded * ? [ or &, quote the SPEC: '{where}'"
    return GRAMMAR
