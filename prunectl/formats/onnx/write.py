"""An ONNX model with some numbers changed: in place where they lie flat, else the graph is built again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.onnx import parts
from prunectl.formats.onnx.model import open_model
from prunectl.formats.onnx.pack import INITIALIZER, pack
from prunectl.formats.onnx.proto import RAW, Span
from prunectl.formats.onnx.rebuild import Part, fields, rebuild, relocate
from prunectl.formats.onnx.sparse import DIMS, FIELD, VALUES, facts_of
from prunectl.formats.onnx.wire import Reader, place
from prunectl.formats.protobuf import Field
from prunectl.formats.protobuf_write import head, number
from prunectl.formats.writing import Rewrite, write_flat


@dataclass(frozen=True, slots=True)
class Dense:
    """An initializer with new numbers, as raw bytes."""

    rewrite: Rewrite
    facts: bytes
    """Its name, its type, and what nobody knows."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""
        return len(self._head()) + self.rewrite.tensor.nbytes

    def _head(self) -> bytes:
        tensor = self.rewrite.tensor
        shape = b"".join(number(DIMS, length) for length in tensor.shape)
        before = self.facts + shape + head(RAW, tensor.nbytes)
        return head(INITIALIZER, len(before) + tensor.nbytes) + before

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""
        yield self._head()
        for piece in self.rewrite.raw():
            yield bytes(piece)


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the model with new numbers in it, its data under their new names; one that was packed comes out packed."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        write_flat(model, targets, rewrites)
        _relocate(model, targets)
        return
    beside = {source: target for source, target in targets.items() if source != model.path}
    outside = [rewrite for rewrite in rewrites if _path(rewrite) in beside]
    write_flat(model, beside, outside)
    changed = {rewrite.tensor.name: rewrite for rewrite in rewrites if rewrite not in outside}
    target = targets[model.path]
    done: set[str] = set()

    def dense(reader: Reader, _: Span, field: Field) -> Part | None:
        if field.number == INITIALIZER:
            span = place(field)
        elif field.number == FIELD:
            span = next(place(inner) for _, inner in fields(reader, place(field)) if inner.number == VALUES)
        else:
            return None
        name = parts.tensor(reader, span).name
        if name not in changed:
            return None
        done.add(name)
        return Dense(changed[name], facts_of(reader.data, span))

    rebuild(model.path, target, dense, lambda _: None)
    _relocate(model, targets)
    if left := [name for name in changed if name not in done]:
        raise InputError(f"{model.path} holds {left[0]} in a form that cannot be changed in place: --exclude it")
    if model.about.is_compressed:
        packed = target.with_name(f"{target.name}.packed")
        pack(open_model(target), packed, lambda _: None)
        os.replace(packed, target)


def _relocate(model: ModelFile, targets: Mapping[Path, Path]) -> None:
    names = [file.relative_to(model.path.parent).as_posix() for file in model.files]
    if any(relocated(model, targets, name) for name in names if name != model.path.name):
        relocate(targets[model.path], partial(relocated, model, targets))


def relocated(model: ModelFile, targets: Mapping[Path, Path], location: str) -> str | None:
    """Return what a file of external data is called from now on, as the graph names it; None if it keeps its name."""
    source, folder = model.path.parent / location, targets[model.path].parent
    target = targets.get(source)
    if target is None or target.relative_to(folder) == source.relative_to(model.path.parent):
        return None
    return target.relative_to(folder).as_posix()


def _path(rewrite: Rewrite) -> Path | None:
    extent = rewrite.tensor.storage.extent
    return extent.path if extent is not None else None
