"""The import of frameworks by a command: announced on a terminal, and the process set up for what they do."""

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
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""What `malloc.h` of glibc calls them."""
_KEPT_BYTES, _MAPPED_BYTES = 1 << 30, 1 << 26
"""Of memory that was freed, so much is kept for what comes next; bigger arrays go back to the system at once."""


class _FrameworkImporter:
    """Imports frameworks without looking for garbage, a sixth of the time; names on a terminal what it imports."""

    def __init__(self, *, is_watched: bool, keeps_memory: bool) -> None:
        self._is_watched, self._keeps_memory = is_watched, keeps_memory
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
            if self._keeps_memory:
                keep_freed_memory()
            if was_collecting:
                gc.enable()
            if self._is_watched:
                sys.stderr.write(f"\r{' ' * len(text)}\r")
                sys.stderr.flush()


def keep_freed_memory() -> None:
    """Have the allocator of glibc keep what a step of training frees, since the next one takes as much.

    Otherwise the system clears these pages anew in each step, up to half of the time of one.
    """
    import ctypes  # noqa: PLC0415 - most commands need none

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def framework_imports(settings: Settings, *, keeps_memory: bool) -> Generator[None]:
    """Import frameworks fast, and say on a terminal which, as it takes seconds in which nothing else is seen."""
    importer = _FrameworkImporter(is_watched=is_watched(settings), keeps_memory=keeps_memory)
    sys.meta_path.insert(0, importer)
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
