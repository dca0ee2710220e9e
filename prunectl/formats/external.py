"""Plug-in formats (entry points `prunectl.formats`): read-only, and run only in the sandbox.

A package provides a `Format`, whose `opener` is a function from a path to a ModelFile. It is tried only on files that
no built-in format matches. The plug-in's code runs in a child process, so that a file can crash only that; the child
returns the metadata as JSON, and the values of one tensor at a time.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl import plugins
from prunectl.errors import InputError, WorkError, first_line
from prunectl.formats import extents
from prunectl.formats.base import Array, Family, Format, ModelFile, ModelInfo, Role, Storage, Tensor
from prunectl.formats.detect import FileProbe
from prunectl.formats.registry import FORMATS
from prunectl.formats.safe_json import parse_object
from prunectl.formats.sandbox import Child, run_sandboxed

_SECONDS, _BYTES_PER_SECOND, _EXTRA_BYTES = 10, 4 << 20, 512 << 20


@cache
def installed_formats() -> tuple[Format, ...]:
    """The rows of the installed plug-ins, with functions that run the plug-in's own in the sandbox."""
    return tuple(
        replace(
            _definition(name),
            name=name,
            matches=partial(_matches, name),
            opener=partial(_open, name),
            family=Family.OTHER,
            packer="",
            graph="",
            writer="",
            stripper="",
            can_reencode=False,
        )
        for name in plugins.installed("format")
    )


def by_name(name: str) -> Format:
    """The row of an installed plug-in."""
    return next(row for row in installed_formats() if row.name == name)


@cache
def _definition(name: str) -> Format:
    """The `Format` that a package provides."""
    package = plugins.installed("format")[name]
    try:
        row = plugins.find("format", name, {})
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise WorkError(f"the plug-in {package} cannot be imported: {reason}") from error
    if not isinstance(row, Format) or not callable(row.opener):
        raise WorkError(f"the plug-in {package} must name a prunectl.formats.base.Format whose opener is a function")
    if any(name == builtin.name for builtin in FORMATS):
        raise WorkError(f"the plug-in {package} calls its format {name}, which is the name of a built-in format")
    return row


def _matches(name: str, probe: FileProbe) -> bool:
    return _run(name, probe.path, partial(_match, name, probe), 0) == b"1"


def _open(name: str, path: Path) -> ModelFile:
    nbytes = path.stat().st_size
    facts = parse_object(
        bytes(_run(name, path, partial(_describe, name, path), nbytes)), path, f"the description by {name}"
    )
    try:
        tensors = tuple(map(_tensor, facts["tensors"]))
        about = ModelInfo(facts["producer"], notes=tuple(facts["notes"]), is_compressed=facts["is_compressed"])
        files = tuple(map(Path, facts["files"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read: the plug-in for {name} gave no valid description of it") from error
    child = Child(is_kept=True)
    decode = partial(_decode, name, path, child)
    weakref.finalize(decode, child.close)
    return ModelFile(path, name, tensors, about, files, decode)


def _tensor(facts: dict[str, Any]) -> Tensor:
    shape, dtype = tuple(map(int, facts["shape"])), np.dtype(facts["dtype"])
    if min(shape, default=0) < 0 or dtype.hasobject:
        raise ValueError("no tensor has these")
    storage = Storage(str(facts["key"]), math.prod(shape) * dtype.itemsize, None, int(facts["stored_bytes"]))
    role, out_axis, in_axis = Role(facts["role"]), facts["out_axis"], facts["in_axis"]
    return Tensor(facts["name"], facts["layer"], shape, dtype, role, storage, facts["kind"], out_axis, in_axis)


def _decode(name: str, path: Path, child: Child, tensor: Tensor) -> Array:
    if not tensor.nbytes:
        return np.zeros(tensor.shape, tensor.dtype)
    nbytes = path.stat().st_size + tensor.nbytes
    numbers = _run(name, path, partial(_read, name, path, tensor.name), nbytes, child)
    if len(numbers) != tensor.nbytes:
        raise InputError(f"{path} cannot be read: the plug-in for {name} read it differently from its own description")
    return extents.arrange(np.frombuffer(numbers, np.uint8), dtype=tensor.dtype, shape=tensor.shape)


def _run(
    name: str, path: Path, work: Callable[[], bytes | memoryview], nbytes: int, child: Child | None = None
) -> bytes | bytearray:
    seconds, extra_bytes = _SECONDS + nbytes / _BYTES_PER_SECOND, _EXTRA_BYTES + 2 * nbytes
    try:
        return run_sandboxed(work, path, seconds=seconds, extra_bytes=extra_bytes, child=child)
    except InputError as error:
        raise InputError(f"the plug-in {plugins.installed('format')[name]}: {error.message}") from error


# The functions below run in the child process.


def _match(name: str, probe: FileProbe) -> bytes:
    return b"1" if _definition(name).matches(probe) else b""


@lru_cache(maxsize=1)
def _model(name: str, path: Path, modified: int) -> ModelFile:
    del modified
    opener: Any = _definition(name).opener
    model: ModelFile = opener(path)
    return model


def _describe(name: str, path: Path) -> bytes:
    model = _model(name, path, path.stat().st_mtime_ns)
    tensors = [
        {
            **{key: getattr(tensor, key) for key in ("name", "layer", "shape", "role", "kind", "out_axis", "in_axis")},
            "dtype": tensor.dtype.newbyteorder("=").name,
            "key": repr(tensor.view_key),
            "stored_bytes": tensor.storage.stored_bytes,
        }
        for tensor in model.tensors
    ]
    about, files = model.about, [str(file) for file in model.files]
    facts = {"producer": about.producer, "notes": about.notes, "is_compressed": about.is_compressed, "files": files}
    return json.dumps({**facts, "tensors": tensors}).encode()


def _read(name: str, path: Path, tensor_name: str) -> memoryview:
    model = _model(name, path, path.stat().st_mtime_ns)
    tensor = next(tensor for tensor in model.tensors if tensor.name == tensor_name)
    array = np.ascontiguousarray(model.read(tensor), tensor.dtype.newbyteorder("="))
    return array.reshape(-1).view(np.uint8).data
