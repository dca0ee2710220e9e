"""Restores the state of a program that calls prunectl: log levels, environment, random generators, temporary folder."""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import numpy as np

from prunectl.formats.scratch import temporary_folder_is_shared
from prunectl.training.quiet import LOGGERS, VARIABLES, ignore_warnings

_lock = threading.RLock()
_seeded: ContextVar[dict[str, Callable[[], None]] | None] = ContextVar("seeded", default=None)
"""For each library that a call has seeded: the function that restores its generators. None outside a call."""


def _forget_lock() -> None:
    global _lock  # noqa: PLW0603 - in a forked child, the thread that holds the lock does not exist
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


@contextmanager
def host_settings() -> Iterator[None]:
    """Let only one thread at a time run frameworks, and restore the program's settings afterwards.

    Seeds, exporters and silenced logs are settings of the whole process: two runs at once would each end with the
    other's settings, and the program would draw the same random numbers after every call that seeds.
    """
    with _lock:
        restoring, seeded = ExitStack(), dict[str, Callable[[], None]]()
        restoring.callback(_restore_generators, seeded)
        for name in LOGGERS:
            logger = logging.getLogger(name)
            restoring.callback(logger.setLevel, logger.level)
        for name in VARIABLES:
            restoring.callback(_set_variable, name, os.environ.get(name))
        restoring.callback(temporary_folder_is_shared.reset, temporary_folder_is_shared.set(True))
        restoring.callback(_seeded.reset, _seeded.set(seeded))
        try:
            yield
        except BaseException as error:
            try:
                restoring.close()
            except Exception as failure:  # noqa: BLE001 - a device that fails a run often fails this as well
                error.add_note(f"Not all settings of the program could be restored: {failure}")
            raise
        restoring.close()


def before_seeding(*libraries: str) -> None:
    """Save the random generators of libraries, once in each call; they are restored when the call ends.

    Draws and seeds that came before this, also those of user functions that the call has run, stay in effect.
    """
    seeded = _seeded.get()
    if seeded is None:
        return
    for name in libraries:
        if name not in seeded:
            generators = _GENERATORS[name]
            seeded[name] = partial(generators.restore, generators.save())


def _restore_generators(seeded: Mapping[str, Callable[[], None]]) -> None:
    with ExitStack() as restoring:
        for restore in seeded.values():
            restoring.callback(restore)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


class _Generators(Protocol):
    """The random generators of a library."""

    def save(self) -> Any:
        """Their states."""

    def restore(self, state: Any) -> None:
        """Restore saved states."""


class _Python:
    def save(self) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)


class _NumPy:
    def save(self) -> Any:
        return np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is meant

    def restore(self, state: Any) -> None:
        np.random.set_state(state)  # noqa: NPY002


class _Torch:
    def save(self) -> Any:
        torch: Any = sys.modules["torch"]
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self, state: Any) -> None:
        torch: Any = sys.modules["torch"]
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state_all(state[1])
        else:
            # Before CUDA is initialised, PyTorch queues a seed until it is: a new random seed replaces the queued one.
            torch.cuda.seed_all()


class _TensorFlow:
    """The global seed, and the generator of seeds for operations without one, which exists once a seed is set."""

    def save(self) -> Any:
        if not self._is_imported():
            return None, None, None
        context = self._context()
        generator = getattr(context, "_rng", None)
        return context._seed, generator, None if generator is None else generator.getstate()  # noqa: SLF001

    def restore(self, state: Any) -> None:
        if not self._is_imported():
            return
        # Not by tf.random.set_seed: it restarts operations with a seed of their own.
        context, (seed, generator, inner) = self._context(), state
        context._seed = seed  # noqa: SLF001
        if generator is not None:
            context._rng = generator  # noqa: SLF001
            generator.setstate(inner)

    @staticmethod
    def _is_imported() -> bool:
        """Whether TensorFlow is imported: Keras with another backend imports and seeds it as well, if it can."""
        return hasattr(sys.modules.get("tensorflow"), "random")

    @staticmethod
    def _context() -> Any:
        return importlib.import_module("tensorflow.python.eager.context").context()


class _Keras3:
    _names = ("global_random_seed", "global_seed_generator")

    def save(self) -> Any:
        seed, generator = map(self._state().get_global_attribute, self._names)
        keras: Any = sys.modules["keras"]
        with ignore_warnings():
            inner = None if generator is None else keras.ops.convert_to_numpy(generator.state.value)
        return seed, generator, inner

    def restore(self, state: Any) -> None:
        seed, generator, inner = state
        for name, value in zip(self._names, (seed, generator), strict=True):
            self._state().set_global_attribute(name, value)
        if generator is not None:
            generator.state.assign(inner)

    @staticmethod
    def _state() -> Any:
        return importlib.import_module("keras.src.backend.common.global_state")


class _Keras2:
    def save(self) -> Any:
        generator = getattr(self._generator_store(), "generator", None)
        return generator, None if generator is None else generator.getstate()

    def restore(self, state: Any) -> None:
        generator, inner = state
        self._generator_store().generator = generator
        if generator is not None:
            generator.setstate(inner)

    @staticmethod
    def _generator_store() -> Any:
        return importlib.import_module("tf_keras.src.backend")._SEED_GENERATOR  # noqa: SLF001 - it has no other name


_GENERATORS: dict[str, _Generators] = {
    "python": _Python(),
    "numpy": _NumPy(),
    "torch": _Torch(),
    "tensorflow": _TensorFlow(),
    "keras": _Keras3(),
    "tf_keras": _Keras2(),
}
