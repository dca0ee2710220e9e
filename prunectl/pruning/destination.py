"""Destinations: where an output goes, and the staging folder in which it is written."""

from __future__ import annotations

import keyword
import os
import sys
from collections.abc import Callable, Container, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats import atomic, scratch
from prunectl.formats.base import Capability, ModelFile
from prunectl.formats.extents import unchanged
from prunectl.formats.registry import FORMATS, SUFFIXES, by_name, load, open_model, require

_ANYTHING = frozenset({"", ".bin", ".json", ".index"})
"""Suffixes that do not promise a format, though some formats use them."""
_TAKEN = frozenset({"torch", "safetensors", "numpy", *sys.stdlib_module_names, *keyword.kwlist})
"""Names that a Python file should not have: it would shadow a module, or could not be imported."""
BIG_BYTES = 16 << 20
"""Above this size, compressing for the report would take much longer than the pruning."""


@dataclass(frozen=True, slots=True)
class Destination:
    """An output path, whether it may exist already, and what happens to the output after it is written."""

    target: Path
    is_forced: bool = False
    is_in_place: bool = False
    to_stdout: bool = False
    """Whether the file at `target` is then sent to standard output."""
    url: str = ""
    """The URL to which `target` is then uploaded; empty for a local output."""
    then: list[Callable[[], object]] = field(default_factory=list)
    """Functions to call once the output is in its final place, such as one that writes the manifest."""


def check(model: ModelFile, output: Destination | None) -> None:
    """Refuse an output that may not be written, before any work begins."""
    require(model, Capability.WRITE)
    if output is not None:
        model = _source(model, output)
        if not (output.to_stdout or output.is_in_place or model.folder):
            _check_name(model, output.target)
        atomic.check_target(model, output.target, is_forced=output.is_forced, is_in_place=output.is_in_place)


def _source(model: ModelFile, output: Destination) -> ModelFile:
    """The model to write: with its folder, unless the output is a single file with a name of its own."""
    is_file = output.is_in_place or output.to_stdout or output.target.suffix.lower() in SUFFIXES
    return replace(model, folder=None) if is_file else model


def planned_files(model: ModelFile, target: Path) -> tuple[Path, ...]:
    """The files that an output will consist of, if the format of the model does not change."""
    return tuple(target.parent / name for name in atomic.planned_files(_source(model, Destination(target)), target))


def is_folder(model: ModelFile, output: Destination | None) -> bool:
    """Whether the output is a folder with the companion files of the weights, rather than a single file."""
    return (model if output is None else _source(model, output)).folder is not None


def notes_on_folder(model: ModelFile, output: Destination | None) -> tuple[str, ...]:
    """Notes on the files of a model folder that are not copied to the output."""
    if model.has_neighbours:
        # In place, all other files of the folder stay where they are.
        return () if output is not None and output.is_in_place else model.about.notes
    source = None if output is None else _source(model, output)
    if source is None or source.folder is None:
        return ()
    from prunectl.formats.folder import companions  # noqa: PLC0415 - most models are files

    return companions(source).notes(source.folder)


def _check_name(model: ModelFile, target: Path) -> None:
    """Refuse a file name whose suffix promises another format than the model's own, which the output keeps."""
    suffix, format_row = target.suffix.lower(), by_name(model.format)
    if suffix in {model.path.suffix.lower(), *format_row.suffixes, *_ANYTHING}:
        return
    rows = [row for row in FORMATS if suffix in row.suffixes]
    # A .pth.tar may be a PyTorch file of any version.
    if rows and not any(set(row.suffixes) & set(format_row.suffixes) for row in rows):
        # The most usual one: a row for a kind of .pt has no other suffix.
        promised = max(rows, key=lambda row: len(row.suffixes))
        own_suffix = model.path.suffix or format_row.suffixes[0]
        raise UsageError(
            f"{target} has the suffix of {promised.title}, but {model.path} keeps its format, {format_row.title}",
            hint=f"use the suffix {own_suffix or '(none)'}, or change the format with prunectl export",
        )


def staged_paths(model: ModelFile, folder: Path, target: Path) -> dict[Path, Path]:
    """The path in the staging folder for each file of a model; parent folders are created."""
    staged = {source: folder / name for source, name in atomic.targets(model, target).items()}
    for path in staged.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    return staged


def pack(written: Path, folder: Path) -> None:
    """Compress a written file in place, with the compression of its container format."""
    model = open_model(written)
    packed = folder.parent / scratch.PACKED
    load(by_name(model.format).packer)(model, packed, lambda _: None)
    os.replace(packed, written)


@contextmanager
def staging_dir(
    model: ModelFile, output: Destination | None, left_out: Container[Path] = ()
) -> Generator[tuple[Path, Path]]:
    """Yield the folder to write into, and the path that the result is named after.

    The companion files in a model's folder are copied at the end, except those in `left_out`. If the files of the model
    have changed since it was opened, the output is refused and does not appear.
    """
    if output is None:
        with scratch.temporary_folder() as folder, unchanged(model.states):
            yield folder, folder / model.path.name
    else:
        if output.to_stdout and (model.path.is_dir() or len(model.files) > 1):
            raise UsageError(f"{model.path} consists of several files, which cannot be written to standard output")
        # In place means the path of the file itself, not of a link to it, or of the folder or prefix it was given by.
        target = model.path.resolve() if output.is_in_place else output.target
        # The output appears when this ends without an error.
        may_replace = output.is_forced or output.is_in_place
        source = _source(model, output)
        with atomic.atomic_replace(target, may_replace=may_replace, model=source) as folder, unchanged(model.states):
            if source.folder is None:
                yield folder, target
            else:
                inside = folder / target.name
                inside.mkdir()
                yield inside, target / model.path.name
                from prunectl.formats.folder import copy_companions  # noqa: PLC0415 - most models are files

                copy_companions(model, inside, left_out)


def code_beside(target: Path) -> Path:
    """The path of the Python file with the class for the weights in a target: `my_net_v2.py` for `my-net.v2.pt`."""
    stem = target.stem.removesuffix(".pth")
    name = "".join(letter if letter.isalnum() else "_" for letter in stem.strip("."))
    if name in _TAKEN or not name[:1].isidentifier():
        name = f"net_{name}"
    return target.with_name(f"{name}.py")
