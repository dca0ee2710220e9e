"""Runs the command as a user would: in a process of its own, in a pipe or at a terminal; or here, which is faster."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from prunectl import cli

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
COMMAND = [sys.executable, "-m", "prunectl"]
PLAIN = {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "CI", "GITHUB_ACTIONS", "TERM"}
HANG_SECONDS = 240
_INSTALLED = (sys.prefix, sys.base_prefix, str(ROOT))


_BUILT = frozenset({"__pycache__", "build", "demo", "dist", "node_modules", "site"})


def files_by_suffix(*endings: str) -> list[Path]:
    """Files of the project, without what is built or installed in its folder, maybe while tests run."""
    files: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in _BUILT and (name[0] != "." or name in {".ci", ".github"})]
        files += [Path(folder, name) for name in names if name.endswith(endings)]
    return sorted(files)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def rows(self) -> list[list[str]]:
        """Plain rows, cell by cell."""
        return [line.split("\t") for line in self.out.splitlines()]


def clean(**environment: str) -> dict[str, str]:
    """Return the environment without what changes output, and with what a test adds."""
    kept = {name: value for name, value in os.environ.items() if name not in PLAIN}
    return {**kept, "TERM": "xterm", **environment}


def prunectl(*words: str | Path, stdin: bytes | None = None, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run prunectl with its output in pipes."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=HANG_SECONDS,
        cwd=cwd,
        env=clean(**{"PYTHONPATH": str(ROOT), **environment}),
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def here(*words: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> Outcome:
    """Run prunectl inside this process, which has the frameworks at hand that another one would load again."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = {"stdin": io.BytesIO(stdin), "stdout": out, "stderr": err}
    texts = {name: io.TextIOWrapper(stream, "utf-8", write_through=True) for name, stream in streams.items()}
    with _as_in_a_process(environment), contextlib.chdir(cwd or "."), patch.multiple(sys, **texts):
        code = cli._run(list(map(str, words)))
    return Outcome(code, out.getvalue().decode(), err.getvalue().decode())


@contextlib.contextmanager
def _as_in_a_process(environment: dict[str, str]) -> Iterator[None]:
    """Put back what would end with a process: its environment, import path, random numbers, and users' modules."""
    path, modules = list(sys.path), list(sys.modules)
    numbers, legacy_numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - frameworks seed it
    with patch.dict(os.environ, environment), warnings.catch_warnings():
        try:
            yield
        finally:
            # Libraries that are loaded look in folders of their own again.
            sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path and entry.startswith(_INSTALLED))]
            random.setstate(numbers)
            np.random.set_state(legacy_numbers)  # noqa: NPY002 - see above
            # Most commands import nothing more, and two lists of all modules are compared in no time.
            loaded = list(sys.modules)
            for name in set(loaded).difference(modules) if loaded != modules else ():
                file = getattr(sys.modules[name], "__file__", None) or sys.prefix
                if not file.startswith(_INSTALLED) and not name.startswith("prunectl_plugin_"):
                    del sys.modules[name]


def at_terminal(*words: str | Path, columns: int = 80, **environment: str) -> Outcome:
    """Run prunectl with its output at a terminal of that width, which gets both streams."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=clean(PYTHONPATH=str(ROOT), **environment),
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side hung up
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    return Outcome(process.wait(HANG_SECONDS), seen.decode().replace("\r\n", "\n"), "")


def without_colors(text: str) -> str:
    """Return what a terminal shows, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
