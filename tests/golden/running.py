"""Runs a case in a folder of its own, and brings what came of it into a form that is the same on every machine."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunectl import __version__
from tests.golden.cases import Case, Keep
from tests.running import FIXTURES, ROOT, here

EXPECTED = Path(__file__).with_name("expected.json")
WIDTH = 120
VARYING = frozenset({"version", "library", "python", "seconds"})
"""Keys whose values say when, where or with what something was made."""
MEASURED = frozenset({"channels", "parity"})
"""Keys below which numbers are what a runtime answered."""
RECORD = ".json"
"""What a stamp has the digest of, and which says by which version it was written."""
SIGNIFICANT = 6
OF_OTHERS = re.compile(r"__pycache__|(^|/)events\.out\.")
"""Files that Python and TensorBoard write beside, where they are there."""
JSON_LINES, JSON, TEXT = {".jsonl"}, {".json", ".sarif", ".prunectl"}, {".xml", ".md", ".d", ".toml", ".csv", ".txt"}
_SCRATCH = re.compile(r"[^\s\"']*/prunectl-[0-9a-f]{16}(?=/)")
_TIMES = re.compile(r"\b\d+(\.\d+)? (ms|s|seconds|minutes)\b")


def result(case: Case, folder: Path, *, is_whole: bool = False) -> dict[str, Any]:
    """Run a case in an empty folder: exit codes, what was printed, and every file that is there afterwards."""
    for name, content in case.given.items():
        _put(folder / name, content)
    given = {name: _digest(folder / name) for name in _files(folder)}
    keep = Keep.DOCUMENTS if is_whole and case.keep is Keep.DIGESTS else case.keep
    same = normaliser(folder)
    with calm(), _without(case.without):
        steps = [_step(line, folder, same, keep) for line in case.lines]
    made = [name for name in _files(folder) if _digest(folder / name) != given.get(name)]
    files = {name: _file(folder / name, same, keep) for name in made}
    gone = sorted(name for name in given if not (folder / name).exists())
    return {"steps": steps} | ({"files": files} if files else {}) | ({"gone": gone} if gone else {})


def probe() -> str:
    """Tell stock zlib from libraries that take its place and compress otherwise."""
    return hashlib.sha256(
        gzip.compress((FIXTURES / "digits_cnn.safetensors").read_bytes(), 6, mtime=0)[10:]
    ).hexdigest()


def as_text(value: Any, indent: int = 0) -> str:
    """Return sorted JSON in which whatever fits stands on one line: small, and a change shows where it is."""
    flat = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if indent + len(flat) < WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        rows = [
            f"{pad}{json.dumps(key, ensure_ascii=False)}: {as_text(value[key], indent + 1)}" for key in sorted(value)
        ]
        return "{\n" + ",\n".join(rows) + f"\n{' ' * indent}}}"
    return "[\n" + ",\n".join(f"{pad}{as_text(item, indent + 1)}" for item in value) + f"\n{' ' * indent}]"


def _step(line: str, folder: Path, same: Callable[[str], str], keep: Keep) -> dict[str, Any]:
    words = [word.format(fixtures=FIXTURES, out=folder) for word in shlex.split(line)]
    done = here(*words, cwd=folder)
    if "--json" in words:
        return {"code": done.code, "json": _kept(_walk(json.loads(done.out), same), keep)}
    return {"code": done.code, "out": _kept(same(done.out), keep)}


def _file(path: Path, same: Callable[[str], str], keep: Keep) -> Any:
    if path.suffix in JSON:
        return _kept(_walk(json.loads(path.read_text()), same), keep)
    if path.suffix in JSON_LINES:
        return _kept([_walk(json.loads(line), same) for line in path.read_text().splitlines()], keep)
    if path.suffix in TEXT:
        return _kept(same(path.read_text()), keep)
    return "there" if keep is Keep.SHAPES else _digest(path)


def _kept(document: Any, keep: Keep) -> Any:
    match keep:
        case Keep.DOCUMENTS:
            return document.splitlines() if isinstance(document, str) else document
        case Keep.SHAPES:
            return _shape(document)
        case Keep.DIGESTS:
            text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()


def _shape(document: Any) -> Any:
    """Return keys and types alone: of what a processor's own floating point decides."""
    match document:
        case dict():
            return {key: _shape(value) for key, value in document.items()}
        case list():
            shapes = [_shape(item) for item in document]
            return [shape for n, shape in enumerate(shapes) if shape not in shapes[:n]]
        case None:
            return None
        case _:
            return type(document).__name__


def _walk(document: Any, same: Callable[[str], str], *keys: str) -> Any:
    match document:
        case dict():
            return {same(name): _walk(value, same, *keys, name) for name, value in document.items()}
        case list():
            return [_walk(item, same, *keys) for item in document]
        case str() if keys[-2:-1] == ("written",) and keys[-1].endswith(RECORD):
            return "*"
        case _ if keys[-1:] and keys[-1] in VARYING and document is not None:
            return "*"
        case float() if MEASURED & set(keys):
            return "float"
        case str():
            return same(document)
        case float():
            return float(f"{document:.{SIGNIFICANT}g}")
        case _:
            return document


def normaliser(folder: Path) -> Callable[[str], str]:
    """Return what takes folders, versions and times out of a text."""
    places = {
        str(FIXTURES): "{fixtures}",
        os.path.relpath(FIXTURES, folder.resolve()): "{fixtures}",
        str(folder): "{out}",
        str(folder.resolve()): "{out}",
        str(ROOT): "{root}",
        sys.executable: "{python}",
    }
    pattern = re.compile("|".join(map(re.escape, sorted(places, key=len, reverse=True))))
    version = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")

    def same(text: str) -> str:
        text = pattern.sub(lambda found: places[found.group()], text)
        # Which of both is told depends on what comes first in the PATH of who runs the tests.
        text = text.replace("{python} -m pip install", "pip install")
        return _TIMES.sub("* s", _SCRATCH.sub("{scratch}", version.sub("*", text)))

    return same


def _put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = Path(content.format(fixtures=FIXTURES)) if content.startswith("{fixtures}") else None
    if source is None:
        path.write_text(content.replace("{version}", __version__))
    elif source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not OF_OTHERS.search(name))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _without(modules: tuple[str, ...]) -> Iterator[None]:
    """Let modules be missing."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Take what the machine's environment would change out of the way: CI's variables, widths, colours."""
    names = [*(name for name in os.environ if name.startswith(("GITHUB_", "CI"))), "COLUMNS", "FORCE_COLOR", "NO_COLOR"]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
