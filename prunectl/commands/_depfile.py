"""A depfile for make: a rule that lists which files an output was made from."""

from __future__ import annotations

import importlib
import os
import re
import site
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import prunectl
from prunectl.commands._command import STDIN
from prunectl.commands._requests import module_of
from prunectl.errors import UsageError
from prunectl.formats import atomic
from prunectl.formats.registry import open_model
from prunectl.plugins import group
from prunectl.pruning.manifest import read_manifest

_EQUALS = "prunectl_equals"
_HEAD = f"{_EQUALS} := =\n"
_ESCAPES = {" ": "\\ ", "#": "\\#", ":": "\\:", "*": "\\*", "?": "\\?", "[": "\\[", "$": "$$", "=": f"$({_EQUALS})"}
_UNSPEAKABLE = re.compile(r"[;|%\\]|[\x00-\x1f\x7f]|^~|[ &]$")
"""Characters that make interprets and that cannot be escaped."""


def make_rule(target: str, prerequisites: Iterable[str], *, main: str) -> str:
    """A rule without a recipe, and an empty one for every prerequisite but the main one, as `gcc -MP` does."""
    names = [make_escaped(name) for name in prerequisites]
    lines = [
        f"{make_escaped(target)}: {' '.join(names)}",
        *(f"\n{name}:" for name in names if name != make_escaped(main)),
    ]
    # An equals sign would turn the rule into a variable assignment, and cannot be escaped in another way.
    head = _HEAD if any(f"$({_EQUALS})" in line for line in lines) else ""
    return head + "\n".join(lines) + "\n"


def make_escaped(name: str) -> str:
    """A file name with the characters escaped that make interprets."""
    if _UNSPEAKABLE.search(name):
        raise UsageError(f"a makefile cannot contain the file name {name!r}", hint="rename it, or leave out --depfile")
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def check(depfile: Path, target: Path, models: Iterable[Path]) -> None:
    """Refuse a path that cannot be written, or holds another file, before any work begins."""
    if str(depfile) == STDIN:
        raise UsageError("--depfile cannot write to standard output", hint="write --depfile OUT.d")
    atomic.check_parent(depfile)
    if depfile.is_dir() or depfile.resolve() in {path.resolve() for path in models}:
        raise UsageError(f"{depfile} cannot be a depfile: it is not a file", hint="write --depfile OUT.d")
    _check_free(depfile, target)
    atomic.check_folder(depfile.absolute().parent)


def write(depfile: Path, target: Path, text: str) -> None:
    """Write the fragment, atomically."""
    # A file that appeared while the command ran is not replaced.
    _check_free(depfile, target)
    atomic.write_text(depfile, text, is_forced=True)


def _check_free(depfile: Path, target: Path) -> None:
    if os.path.lexists(depfile) and not (depfile.is_file() and _is_fragment(depfile.read_bytes(), target)):
        raise UsageError(
            f"{depfile} exists and is not a depfile of {target}", hint="choose another file, or remove this one"
        )


def _is_fragment(content: bytes, target: Path) -> bool:
    """Whether a file holds nothing but a fragment for a target.

    It cannot be marked by a comment: other programs than make that read depfiles know no comments.
    """
    lines = content.decode(errors="replace").removeprefix(_HEAD).splitlines() or [""]
    name, separator, prerequisites = lines[0].partition(": ")
    known = {f"{name}:" for name in re.split(r"(?<!\\) ", prerequisites)}
    is_about = f"/{name}".endswith(f"/{make_escaped(target.name)}")
    return not content or (bool(separator) and is_about and all(not line or line in known for line in lines[1:]))


_KINDS = ("strategy", "channel strategy", "policy", "schedule", "loss", "metric", "step", "model")


def user_modules(before: Collection[str], options: Mapping[str, Any], began_ns: int) -> tuple[Path, ...]:
    """The files of modules imported since, without those of prunectl, Python and installed packages."""
    packages = _packages(options)
    # The main script appears again under other names where a framework has prepared child processes.
    start = getattr(sys.modules["__main__"], "__file__", None)
    files = [
        Path(file)
        for name, module in sorted(sys.modules.items())
        if name not in before
        and (file := getattr(module, "__file__", None))
        and file != start
        and (name.partition(".")[0] in packages or not _is_installed(Path(file).resolve()))
    ]
    return tuple(dict.fromkeys(path for path in files if path.is_file() and not _is_generated(path, began_ns)))


def _is_generated(path: Path, began_ns: int) -> bool:
    """Whether a module was written by this run for its own use, as TensorFlow's AutoGraph does."""
    is_temporary = path.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve())
    # A project may lie in the folder for temporary files as well: its files are older than the run.
    return is_temporary and path.stat().st_mtime_ns > began_ns


def _packages(options: Mapping[str, Any]) -> frozenset[str]:
    """The packages that options name, as `package.module:function` or by an entry point."""
    # Read once: a large environment has hundreds of packages.
    installed = entry_points()
    points = {point.name: point.value for kind in _KINDS for point in installed.select(group=group(kind))}
    values = [part for value in options.values() for part in (value if isinstance(value, list | tuple) else (value,))]
    targets = [points.get(part, part) for part in values if isinstance(part, str)]
    modules = [part.partition(":")[0] for part in targets if ":" in part]
    return frozenset(module.partition(".")[0] for module in [*modules, *map(module_of, options.get("imports") or ())])


def _is_installed(path: Path) -> bool:
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(Path(prunectl.__file__).parent)]
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


MODELS = ("distill",)
"""Options other than MODEL that name a model."""
_NO_FILES = {None, "", "input"}
"""Values that stand for no model, or for MODEL itself."""
CALLABLE_OPTIONS = ("data", "val")
FILES = ("recipe",)


def of_spec(text: str) -> tuple[Path, ...]:
    """The files that a data SPEC names."""
    files: tuple[Path, ...] = _data().files_of_spec(text)
    return files


def _grammar() -> ModuleType:
    return importlib.import_module("prunectl.training.data.spec")


def _data() -> ModuleType:
    """The table of data sources, which few commands need."""
    return importlib.import_module("prunectl.training.data.registry")


def options_of_recipe(recipe: Path, *, is_trusted: bool) -> dict[str, Any]:
    """The options in a recipe, which may name further files."""
    request = asdict(read_manifest(recipe, is_trusted=is_trusted))
    # `model` in a recipe is the builder; MODEL is the file.
    return {"builder": request.pop("model"), **request}


def files_of(options: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files that options name, those of the model first, without modules of the user's functions."""
    models = [name for name in MODELS if options.get(name) not in _NO_FILES]
    files = [
        *open_model(Path(options["model"])).files,
        *(file for name in models for file in open_model(Path(options[name])).files),
        *(file for name in CALLABLE_OPTIONS if options.get(name) for file in of_spec(options[name])),
        *(Path(options[name]) for name in FILES if options.get(name) is not None),
        *_data().files_of_references(
            value for name, value in options.items() if name not in {"model", "output", *CALLABLE_OPTIONS}
        ),
    ]
    return tuple(dict.fromkeys(files))


def folders_of(options: Mapping[str, Any]) -> tuple[Path, ...]:
    """The folders whose files are examples: a file that is added or removed changes the data."""
    roots = [Path(_grammar().parse(options[name]).where) for name in CALLABLE_OPTIONS if options.get(name)]
    return tuple(folder for root in roots if root.is_dir() for folder in _data().class_folders(root))


def is_callable_spec(text: str) -> bool:
    """Whether a data SPEC is a function, which may read any files."""
    source: str = _grammar().parse(text).where
    return not os.path.lexists(source) and ":" in source and not source.startswith("random:")
