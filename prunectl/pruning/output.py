"""Where a result goes, and where it is made."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats import outputs
from prunectl.formats.base import ModelFile

BIG_BYTES = 16 << 20
"""Above it, compressing for the report would take much longer than the work."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where the result goes, and whether something may be there."""

    target: Path
    is_forced: bool = False
    is_in_place: bool = False
    is_stream: bool = False
    """Whether it is sent on from there as one run of bytes."""


@contextmanager
def workplace(model: ModelFile, output: Output | None) -> Generator[tuple[Path, Path]]:
    """Yield the folder to write into, and the path that the result is named after."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="prunectl-") as scratch:
            yield Path(scratch), Path(scratch) / model.path.name
    else:
        if output.is_stream and (model.path.is_dir() or len(model.files) > 1):
            raise UsageError(f"{model.path} is more than one file, and does not fit through standard output")
        # In place is where the file itself lies: not a link to it, nor the folder or the prefix that it was named by.
        target = model.path.resolve() if output.is_in_place else output.target
        # The output appears when this ends without an error.
        with outputs.replacing(target, may_replace=output.is_forced or output.is_in_place) as folder:
            yield folder, target
