"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prunectl.formats import isolated

TRUSTED = frozenset({"calibrating", "channels", "exporting", "gates", "measuring", "prune", "training"})
"""Folders of tests whose files are sound: what is asked of them is not how files are read."""
TRUSTED_FILES = frozenset({"test_packing.py", "test_strip_keras.py", "test_strip_saved_model.py", "test_inspect.py"})


class Reading:
    """Reads files in a child, as users' files are read, or here: to fork a process full of frameworks takes long."""

    def __init__(self) -> None:
        self.in_child = isolated.in_child
        self.is_apart = True

    def __call__(self, work: Callable[[], bytes], path: Path, *, seconds: float, extra_bytes: int) -> bytes:
        if not self.is_apart:
            return work()
        return self.in_child(work, path, seconds=seconds, extra_bytes=extra_bytes)


reading = Reading()
# Before any handler takes it from there by its name.
isolated.in_child = reading  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _reading(request: pytest.FixtureRequest) -> Iterator[None]:
    folder, *_ = request.path.relative_to(Path(__file__).parent).parts
    reading.is_apart = folder not in TRUSTED and request.path.name not in TRUSTED_FILES
    yield
    reading.is_apart = True
