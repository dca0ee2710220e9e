"""Plug-ins, such as strategies, by name: built in, installed by another package, or in a file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from prunectl.errors import UntrustedError, UsageError, abbreviated

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Thing = TypeVar("Thing")
_modules: dict[Path, tuple[tuple[int, int], ModuleType]] = {}
"""Modules that were executed from files, each with the modification time and the size of its file then."""
_importing = threading.RLock()


def find(kind: str, name: str, builtin: Mapping[str, Thing], titles: Mapping[str, str] | None = None) -> Thing | object:
    """Resolve a name: a built-in, an entry point, `package.module:name` or `./file.py:name`.

    A name that stands in a title, as that of a paper, is what the thing with the title is called elsewhere.
    """
    if name in builtin:
        return builtin[name]
    if ":" in name:
        return attribute(*name.rsplit(":", 1))
    installed = _entry_points(kind)
    if name in installed:
        loaded: object = installed[name].load()
        return loaded
    known = [*builtin, *installed]
    choose = f"choose one of {', '.join(known)}, or " if known else ""
    word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    meant = [one for one, title in (titles or {}).items() if word.search(title)]
    raise UsageError(
        f"{name} is not a known {kind}",
        did_you_mean=tuple(meant or get_close_matches(name, known, n=3, cutoff=0.5)),
        hint=f"{choose}name a function: package.module:name or ./file.py:name",
    )


def check_untrusted(names: Iterable[str], source: str) -> None:
    """Refuse to import code that a file names: a recipe or a configuration may come from a stranger.

    Any name with a colon counts as code: refusing too many is safe, refusing too few is not.
    """
    code = list(dict.fromkeys(name for name in names if ":" in name))
    if code:
        raise UntrustedError(
            f"{source} names code that prunectl would run: {', '.join(map(abbreviated, code[:3]))}",
            hint="if you trust who wrote that file: --trust",
        )


def group(kind: str) -> str:
    """The name of the entry points for a kind of plug-in."""
    irregular = {"policy": "policies", "strategy": "strategies", "channel strategy": "channels"}
    return f"prunectl.{irregular.get(kind, f'{kind}s')}"


def attribute(source: str, name: str) -> object:
    """An attribute of a module or of a file (`./file.py`)."""
    module = import_source(source)
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(f"{source} has no {name}", did_you_mean=tuple(get_close_matches(name, public, n=3)))
    return getattr(module, name)


def import_source(source: str) -> object:
    """A module by its name or by its file (`./file.py`)."""
    return _from_file(Path(source)) if source.endswith(".py") else _from_name(source)


def source_file(kind: str, name: str) -> Path | None:
    """The file that a plug-in comes from; None for a built-in."""
    point = None if ":" in name else _entry_points(kind).get(name)
    source = name.rpartition(":")[0] or (None if point is None else point.module)
    file = None if source is None else getattr(import_source(source), "__file__", None)
    return None if file is None else Path(file)


def _from_name(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is installed, but one that it imports is not
        raise UsageError(f"there is no module {name}", hint="for a file, write ./file.py:name") from error


def _from_file(path: Path) -> object:
    """Import a module from a file: once, and again after the file has changed."""
    if not path.is_file():
        raise UsageError(f"{path} is not a Python file")
    real, facts = path.resolve(), path.stat()
    state = facts.st_mtime_ns, facts.st_size
    with _importing:
        known = _modules.get(real)
        if known is None or known[0] != state:
            known = _modules[real] = state, _execute(path, real)
        return known[1]


def _execute(path: Path, real: Path) -> ModuleType:
    # Files of the same name in two folders are two modules.
    name = f"prunectl_plugin_{path.stem}_{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        with _importable_folder(str(real.parent)):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _importable_folder(folder: str) -> Generator[None]:
    """Let a file import what lies beside it, as `python file.py` would."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
        # For imports inside its functions. Last, so that no file of the folder hides a module that prunectl imports.
        if folder not in sys.path:
            sys.path.append(folder)


def installed(kind: str) -> Mapping[str, str]:
    """Entry points of a kind, each with the package that it comes from."""
    return {name: point.dist.name if point.dist else "" for name, point in _entry_points(kind).items()}


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # noqa: PLC0415 - slow to import, and only plug-ins need it

    return {point.name: point for point in entry_points(group=group(kind))}
