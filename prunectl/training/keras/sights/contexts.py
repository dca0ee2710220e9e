"""What is otherwise while a model is listened to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prunectl.training.keras.library import Library


@contextmanager
def functions(library: Library, *, eagerly: bool) -> Iterator[None]:
    """Run what TensorFlow traces as it stands, or step by step."""
    config = library.tensorflow.config
    before = config.functions_run_eagerly()
    config.run_functions_eagerly(eagerly)
    try:
        yield
    finally:
        config.run_functions_eagerly(before)


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for a while, past all that keeps count of its attributes."""
    held = vars(thing)
    missing = object()
    before = held.get(name, missing)
    held[name] = value
    try:
        yield
    finally:
        if before is missing:
            held.pop(name)
        else:
            held[name] = before
