"""What a program that calls prunectl keeps: log levels, environment, random generators, its temporary folder."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from prunectl.formats.scratch import temporary_folder_is_shared
from prunectl.training.quiet import LOGGERS, VARIABLES, ignore_warnings
from prunectl.training.runtimes import random_state, restore_random_state

_lock = threading.RLock()


def _forget_lock() -> None:
    global _lock  # noqa: PLW0603 - a child of fork has none of the threads, one of which may hold it
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


@contextmanager
def host_settings() -> Iterator[None]:
    """Let one thread at a time run frameworks, and give the program back what they get others of.

    Their seeds, exporters and the silence about them are of the whole process: two runs at once would each end with
    what the other had set, and random draws of the program would be the same after every call.
    """
    with _lock:
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        variables = {name: os.environ.get(name) for name in VARIABLES}
        own, saved = random_state(), {name: generators.save() for name, generators in _loaded().items()}
        token = temporary_folder_is_shared.set(True)
        try:
            yield
        finally:
            temporary_folder_is_shared.reset(token)
            for name, generators in _loaded().items():
                generators.restore(saved.get(name))
            restore_random_state(own)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class _Generators(Protocol):
    """The random generators of a framework."""

    def save(self) -> Any:
        """Their states."""

    def restore(self, state: Any) -> None:
        """Bring them back to states; None where the framework was not imported then: nobody has seeded it."""


class _Torch:
    def save(self) -> Any:
        torch: Any = sys.modules["torch"]
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self, state: Any) -> None:
        torch: Any = sys.modules["torch"]
        if state is None:
            torch.seed()
            return
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state_all(state[1])
        elif torch.cuda.is_initialized():
            torch.cuda.seed_all()


class _TensorFlow:
    def save(self) -> Any:
        generator = self._generator()
        return self._context().global_seed(), None if generator is None else generator.getstate()

    def restore(self, state: Any) -> None:
        if self.save() == (state or (None, None)):
            return
        seed, inner = state or (None, None)
        self._context().set_global_seed(seed)
        if inner is not None:
            self._generator().setstate(inner)

    @staticmethod
    def _context() -> Any:
        return importlib.import_module("tensorflow.python.eager.context")

    def _generator(self) -> Any:
        """What operations without a seed of their own take one from, once there is a global one."""
        return getattr(self._context().context(), "_rng", None)


class _Keras3:
    _names = ("global_random_seed", "global_seed_generator")

    def save(self) -> Any:
        seed, generator = map(self._state().get_global_attribute, self._names)
        keras: Any = sys.modules["keras"]
        with ignore_warnings():
            inner = None if generator is None else keras.ops.convert_to_numpy(generator.state.value)
        return seed, generator, inner

    def restore(self, state: Any) -> None:
        seed, generator, inner = state or (None, None, None)
        for name, value in zip(self._names, (seed, generator), strict=True):
            self._state().set_global_attribute(name, value)
        if generator is not None:
            generator.state.assign(inner)

    @staticmethod
    def _state() -> Any:
        return importlib.import_module("keras.src.backend.common.global_state")


class _Keras2:
    def save(self) -> Any:
        generator = getattr(self._place(), "generator", None)
        return generator, None if generator is None else generator.getstate()

    def restore(self, state: Any) -> None:
        generator, inner = state or (None, None)
        self._place().generator = generator
        if generator is not None:
            generator.setstate(inner)

    @staticmethod
    def _place() -> Any:
        return importlib.import_module("tf_keras.src.backend")._SEED_GENERATOR  # noqa: SLF001 - it has no other name


_FRAMEWORKS: dict[str, _Generators] = {
    "torch": _Torch(),
    "tensorflow": _TensorFlow(),
    "keras": _Keras3(),
    "tf_keras": _Keras2(),
}
_READY = {"torch": "get_rng_state", "tensorflow": "random", "keras": "ops", "tf_keras": "backend"}
"""What a framework has once it is imported; a program may have let the import fail half way."""


def _loaded() -> dict[str, _Generators]:
    return {
        name: generators for name, generators in _FRAMEWORKS.items() if hasattr(sys.modules.get(name), _READY[name])
    }
