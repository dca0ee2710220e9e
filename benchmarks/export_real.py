"""`python -m benchmarks.export_real FOLDER [WORD...]`: files that nobody here wrote, each to what it could ship as.

One row a file and target: the exit code, how far the result is from its source, or the sentence that says why not.
Words choose the files whose path has one of them. It is no part of `make bench`, which knows no such folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import PRUNECTL, QUIET
from prunectl.errors import PrunectlError
from prunectl.formats.registry import open_model

_SECONDS, _FAILED = 240, 5
_WIDTH = 300
_KERAS = (".onnx", ".tflite")
_WAYS: dict[str, tuple[str, ...]] = {
    "keras": _KERAS,
    "keras-h5": _KERAS,
    "saved-model": _KERAS,
    "torch": (".onnx", ".pt"),
    "torch-export": (".onnx", ".pt"),
    "onnx": (".onnx",),
}
_SHAPES = {
    "keras-h5": ("?,?,4",),
    "torch": ("?,3,224,224", "?,3,32,32", "?,1,28,28", "?,4"),
}
"""What is tried, one after the other, where a file does not say what goes in."""


def main(folder: Path, words: list[str]) -> None:
    """Print a row as soon as it is known."""
    print("| file | to | exit | apart | what it says |\n| --- | --- | ---: | ---: | --- |")
    for path in _models(folder):
        if not words or any(word in str(path) for word in words):
            kind = _format(path)
            for suffix in _WAYS.get(kind, ()):
                print(_row(path.relative_to(folder), suffix, *_best(path, kind, suffix)), flush=True)


def _models(folder: Path) -> Iterator[Path]:
    """Yield files, and folders that are a model; nothing of what was made to do harm."""
    for path in sorted(folder.iterdir()):
        if path.name == "evil":
            continue
        if (path / "saved_model.pb").is_file():
            yield path
        elif path.is_dir():
            yield from _models(path)
        else:
            yield path


def _format(path: Path) -> str:
    try:
        return open_model(path).format
    except PrunectlError:
        return ""


def _best(path: Path, kind: str, suffix: str) -> tuple[int, dict[str, Any]]:
    """Return what comes of it, with the shape that it takes if one has to be said."""
    code, found = _export(path, suffix)
    fixed = re.findall(r"--input \S+", (found.get("error") or {}).get("hint", "")) if code == _FAILED else []
    if fixed:
        # What the hint says is what a user would type.
        code, found = _export(path, suffix, *" ".join(fixed).split())
    for shape in _SHAPES.get(kind, ()) if code == 2 and "--input" in str(found) else ():
        other = _export(path, suffix, "--input", shape)
        if other[0] != 2:
            return other
    return code, found


def _export(path: Path, suffix: str, *words: str) -> tuple[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        return _run("export", str(path), "-o", f"{scratch}/m{suffix}", "--json", *words)


def _run(*words: str) -> tuple[int, dict[str, Any]]:
    try:
        done = subprocess.run(
            [PRUNECTL, *words],
            capture_output=True,
            text=True,
            env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"},
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, {"error": {"message": f"not done after {_SECONDS} s"}}
    try:
        return done.returncode, json.loads(done.stdout)
    except json.JSONDecodeError:
        return done.returncode, {"error": {"message": (done.stderr or done.stdout).strip()}}


def _row(path: Path, suffix: str, code: int, found: dict[str, Any]) -> str:
    parity = found.get("parity") or {}
    apart = f"{parity['max_difference']:.1e}" if "max_difference" in parity else "to the bit" if parity else "-"
    said = "" if code == 0 else " ".join(str(found["error"]["message"]).split())[:_WIDTH]
    return f"| {path} | {suffix} | {code} | {apart} | {said.replace('|', '/')} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
