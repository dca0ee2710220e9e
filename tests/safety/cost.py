"""What a command costs on a stranger's file, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.running import COMMAND, ROOT, Outcome, clean

MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 2.0, 300_000_000, 300
_SHARED = 2
"""How much longer processor time is where another test shares the processor's caches and its core."""
_KILLED_AFTER = 60
"""Seconds of processor time, and of the clock ten times as many."""

_LAUNCHER = """
import json, os, resource, sys
place, seconds, *words = sys.argv[1:]
child = os.fork()
if child == 0:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execv(words[0], words)
_, status, used = os.wait4(child, 0)
with open(place, "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
"""
# A process of its own in between: what Linux tells of a child's memory begins with its parent's, which may be full of
# frameworks.


@dataclass(frozen=True)
class Cost:
    """How a command ended, and what it took."""

    outcome: Outcome
    seconds: float
    """Of processor time, of it and its children."""
    nbytes: int
    """At most, resident, in one process."""
    left: tuple[str, ...]
    """What is in its temporary folder afterwards."""


def cost(*words: str | Path, scratch: Path, stdin: bytes | None = None, **environment: str) -> Cost:
    """Run prunectl with a temporary folder of its own, made in `scratch`."""
    temporary, told = scratch / "temporary", scratch / "told.json"
    temporary.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(told), str(_KILLED_AFTER)]
    done = subprocess.run(
        [*command, *COMMAND, *map(str, words)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=10 * _KILLED_AFTER,
        env=clean(PYTHONPATH=str(ROOT), TMPDIR=str(temporary), **environment),
        check=False,
    )
    code, seconds, nbytes = json.loads(told.read_text())
    left = tuple(sorted(os.listdir(temporary)))
    return Cost(Outcome(code, done.stdout.decode(), done.stderr.decode()), seconds, nbytes, left)


def assert_refused_cheaply(found: Cost, *, code: int = 3) -> None:
    """Hold a refusal against what is promised: a sentence, at once, in little memory, and nothing left."""
    error, *_ = found.outcome.err.splitlines() or [""]
    assert found.outcome.code == code, (found.outcome.code, found.outcome.err[-2000:])
    assert "Traceback" not in found.outcome.err
    assert error.startswith("error: "), error[:1000]
    assert len(error.removeprefix("error: ")) <= MAX_CHARACTERS, error[:1000]
    assert all(len(line) <= MAX_CHARACTERS + 20 for line in found.outcome.err.splitlines())
    assert found.seconds < MAX_SECONDS * _SHARED, found.seconds
    assert found.nbytes < MAX_BYTES, found.nbytes
    assert not found.left, found.left
