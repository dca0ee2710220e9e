"""Frameworks that a command imports: fast, and announced on a terminal."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from prunectl.reporting.report import Settings
from prunectl.reporting.reporter import escape_unencodable, is_watched

_FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow", "keras": "Keras", "tf_keras": "Keras"}
"""What takes seconds to import, whoever imports it first."""
_FRAMEWORK_NEW_OBJECTS = 700
"""As Python has it by itself."""


class _FrameworkImporter:
    """Imports frameworks without looking for garbage, a sixth of the time; names on a terminal what it imports."""

    def __init__(self, *, is_watched: bool) -> None:
        self._is_watched = is_watched
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Find a framework where Python does, with a loader that says it."""
        if fullname not in _FRAMEWORKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # To look for a framework is not to load it.
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        # Keras brings what it computes on: one notice is enough.
        with self._importing(f"loading {_FRAMEWORKS[module.__name__]} …") if not self._depth else nullcontext():
            self._depth += 1
            try:
                load(module)
            finally:
                self._depth -= 1

    @contextmanager
    def _importing(self, text: str) -> Generator[None]:
        if self._is_watched:
            escape_unencodable(sys.stderr)
            sys.stderr.write(text)
            sys.stderr.flush()
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            # A framework's own functions and classes stay until the end.
            gc.freeze()
            # What runs a framework makes garbage that holds big arrays.
            gc.set_threshold(_FRAMEWORK_NEW_OBJECTS)
            if was_collecting:
                gc.enable()
            if self._is_watched:
                sys.stderr.write(f"\r{' ' * len(text)}\r")
                sys.stderr.flush()


@contextmanager
def framework_imports(settings: Settings) -> Generator[None]:
    """Import frameworks fast, and say on a terminal which, as it takes seconds in which nothing else is seen."""
    importer = _FrameworkImporter(is_watched=is_watched(settings))
    sys.meta_path.insert(0, importer)
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
