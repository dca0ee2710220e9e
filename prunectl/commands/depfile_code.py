"""Which of the modules that a run imported are the user's own."""

from __future__ import annotations

import site
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import prunectl
from prunectl.commands.requests import module_of
from prunectl.plugins import group

_KINDS = ("strategy", "channel strategy", "policy", "schedule", "loss", "metric", "step", "model")


def imported(before: Collection[str], words: Mapping[str, Any], began_ns: int) -> tuple[Path, ...]:
    """Return the files of the modules that came since, but for those of prunectl, Python and what is installed."""
    named = _packages(words)
    # What started Python comes again under other names where a framework has made processes ready.
    start = getattr(sys.modules["__main__"], "__file__", None)
    found = [
        Path(file)
        for name, module in sorted(sys.modules.items())
        if name not in before
        and (file := getattr(module, "__file__", None))
        and file != start
        and (name.partition(".")[0] in named or not _is_installed(Path(file).resolve()))
    ]
    return tuple(dict.fromkeys(path for path in found if path.is_file() and not _is_passing(path, began_ns)))


def _is_passing(path: Path, began_ns: int) -> bool:
    """Whether the run itself has written a module for its own use, as TensorFlow does with what it makes of code."""
    is_temporary = path.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve())
    # A project may well lie there: its files are older than the run.
    return is_temporary and path.stat().st_mtime_ns > began_ns


def _packages(words: Mapping[str, Any]) -> frozenset[str]:
    """Return the packages that words name, as `package.module:function` or by an entry point."""
    groups = [entry_points(group=group(kind)) for kind in _KINDS]
    points = {point.name: point.value for points in groups for point in points}
    values = [word for value in words.values() for word in (value if isinstance(value, list | tuple) else (value,))]
    targets = [points.get(word, word) for word in values if isinstance(word, str)]
    modules = [word.partition(":")[0] for word in targets if ":" in word]
    return frozenset(module.partition(".")[0] for module in [*modules, *map(module_of, words.get("imports") or ())])


def _is_installed(path: Path) -> bool:
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(Path(prunectl.__file__).parent)]
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)
