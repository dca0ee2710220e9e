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
"""Packages that take seconds to import, with the name to show."""
_FRAMEWORK_NEW_OBJECTS = 700
"""Python's own threshold of the garbage collector."""


class _FrameworkImporter:
    """Imports frameworks with the garbage collector off, a sixth faster, and with a notice on a terminal."""

    def __init__(self, *, is_watched: bool) -> None:
        self._is_watched = is_watched
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Find a framework as Python does, with a loader that shows a notice."""
        if fullname not in _FRAMEWORKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # Whether a framework is installed is also asked without loading it.
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        # Keras imports its backend: one notice is enough.
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
            # The framework's functions and classes live until the end: the collector need not look at them again.
            gc.freeze()
            # From now on garbage may hold large arrays.
            gc.set_threshold(_FRAMEWORK_NEW_OBJECTS)
            if was_collecting:
                gc.enable()
            if self._is_watched:
                sys.stderr.write(f"\r{' ' * len(text)}\r")
                sys.stderr.flush()


@contextmanager
def framework_imports(settings: Settings) -> Generator[None]:
    """Import frameworks fast, with a notice on a terminal, as it takes seconds in which nothing else is shown."""
    importer = _FrameworkImporter(is_watched=is_watched(settings))
    sys.meta_path.insert(0, importer)
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
