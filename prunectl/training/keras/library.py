"""Which Keras is it: the second, or the third on one of its backends?"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunectl.errors import MissingExtraError, UsageError
from prunectl.formats.optional import require

_EXTRAS = frozenset({"tensorflow", "torch"})
TRAINING_BACKENDS = ("tensorflow", "torch", "jax")


@dataclass(frozen=True, slots=True)
class Library:
    """A Keras that is imported."""

    keras: Any
    is_two: bool
    backend: str

    @property
    def is_on_tensorflow(self) -> bool:
        """Whether TensorFlow does the work."""
        return self.backend == "tensorflow"

    @property
    def tensorflow(self) -> Any:
        """TensorFlow, where it does the work."""
        return require("tensorflow", extra="tensorflow")

    @property
    def torch(self) -> Any:
        """PyTorch, where it does the work."""
        return require("torch", extra="torch")

    @property
    def jax(self) -> Any:
        """JAX, where it does the work."""
        try:
            return require("jax", extra="jax")
        except MissingExtraError as error:
            # Nothing but Keras 3 on its own backend asks for it, and prunectl has no extra that brings it.
            raise MissingExtraError(str(error), hint="pip install jax") from error


def keras_two() -> Library:
    """Return Keras 2."""
    with hushed():
        return Library(require("tf_keras", extra="tensorflow"), is_two=True, backend="tensorflow")


def keras_three() -> Library:
    """Return Keras 3 on the backend that the user set it to."""
    try:
        with hushed():
            keras = require("keras", extra="tensorflow")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = f"'prunectl[{missing}]'" if missing in _EXTRAS else missing
        raise MissingExtraError(
            f"Keras is set to work on {missing}, which is not installed",
            hint=f"pip install {package}, or set KERAS_BACKEND to what there is",
        ) from error
    backend = keras.backend.backend()
    if backend not in TRAINING_BACKENDS:
        raise UsageError(
            f"Keras is set to the backend {backend}, which cannot train",
            hint=f"set KERAS_BACKEND to one of {', '.join(TRAINING_BACKENDS)}",
        )
    return Library(keras, is_two=False, backend=backend)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what frameworks say of themselves to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def hushed() -> Iterator[None]:
    """Let TensorFlow and JAX write errors alone while they are imported and after, unless the user asked for more."""
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("tensorflow", "absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if level != "3" or "tensorflow" in sys.modules:
        with quietly():
            yield
        return
    # What TensorFlow's libraries find while they are loaded goes to the file itself, whatever that level.
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with quietly():
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
