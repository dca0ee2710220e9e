"""Every kind of data at once: how a SPEC is recognised, what opens it, which options are its own."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature
from prunectl.training.data import functions, images, numpy_files, options, synthetic, tables, tfrecord
from prunectl.training.data import spec as data_spec
from prunectl.training.data.images import SUFFIXES
from prunectl.training.data.source import Source
from prunectl.training.data.spec import DataSpec


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One kind of data."""

    fits: Callable[[str], bool]
    """Whether what stands before the question mark names it."""
    opener: Callable[[DataSpec, ModelSignature | None, int], Source]
    """Given the SPEC, the model's signature and the seed."""
    options: tuple[str, ...] = ()


KINDS = (
    SourceKind(synthetic.fits, synthetic.open_random),
    SourceKind(numpy_files.is_npz, lambda spec, _, __: numpy_files.open_npz(spec)),
    SourceKind(numpy_files.is_npy, lambda spec, _, __: numpy_files.open_npy(spec)),
    SourceKind(tables.is_csv, lambda spec, _, __: tables.open_csv(spec), tables.OPTIONS),
    SourceKind(tables.is_parquet, lambda spec, _, __: tables.open_parquet(spec), tables.OPTIONS),
    SourceKind(tfrecord.fits, lambda spec, _, __: tfrecord.open_records(spec), tfrecord.OPTIONS),
    SourceKind(functions.fits, lambda spec, signature, _: functions.open_function(spec, signature)),
    SourceKind(images.fits, lambda spec, signature, _: images.open_images(spec, signature), images.OPTIONS),
)


def open_source(spec: str, *, signature: ModelSignature | None, seed: int) -> Source:
    """The examples that a SPEC means, as the file has them but for what its options say."""
    parsed = data_spec.parse(spec)
    for kind in KINDS:
        if kind.fits(parsed.where):
            data_spec.check_options(parsed, kind.options)
            return options.apply_options(kind.opener(parsed, signature, seed), parsed, signature)
    raise _unknown(parsed)


def _unknown(spec: DataSpec) -> UsageError:
    data_spec.require_path(spec.path)
    return UsageError(f"{spec.text} is no data that prunectl knows", hint=data_spec.GRAMMAR)


_IN_A_FILE = re.compile(r"(?P<path>[^:]+\.py):[A-Za-z_]\w*(?::(?:max|min))?")
_ARRAYS = re.compile(r"(?P<path>.+\.npz)\[.*\]")
_BETWEEN = re.compile(r"(?<=\.npy)[,+]")


def files_of_spec(text: str) -> tuple[Path, ...]:
    """The files that a data SPEC means."""
    spec = data_spec.parse(text)
    schema = [Path(spec.options["schema"])] if "schema" in spec.options else []
    if code := _IN_A_FILE.fullmatch(spec.where):
        return (Path(code["path"]),)
    if arrays := _ARRAYS.fullmatch(spec.where):
        return (Path(arrays["path"]),)
    if os.path.isdir(spec.where):
        return tuple(picture for folder in class_folders(spec.path) for picture in _pictures(folder))
    names = _BETWEEN.split(spec.where) if spec.where.endswith(".npy") else sorted(glob.glob(spec.where))
    paths = [Path(name) for name in names or [spec.where]]
    return tuple(path for path in (*paths, *schema) if path.is_file())


def class_folders(root: Path) -> tuple[Path, ...]:
    """A folder of pictures with those of its classes, links too: as far down as pictures are looked for."""
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return (root, *classes)


def _pictures(folder: Path) -> list[Path]:
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted(path for path in pictures if path.is_file())


def files_of_references(values: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of the functions that words name as `./file.py:name`."""
    for value in values:
        for reference in value if isinstance(value, list | tuple) else (value,):
            named = _IN_A_FILE.fullmatch(reference) if isinstance(reference, str) else None
            if named is not None and Path(named["path"]).is_file():
                yield Path(named["path"])
