"""What a command costs on a stranger's file, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from atexit import register
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.running import ROOT, Outcome, clean

MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 2.0, 300_000_000, 300
_SHARED = 2
"""How much longer processor time is where another test shares the processor's caches and its core."""
_KILLED_AFTER = 60
"""Seconds of processor time, and of the clock ten times as many."""

_SERVER = """
import gc, json, os, resource, signal, sys
import h5py
from prunectl import cli
from prunectl.commands import inspect, prune, strip

gc.freeze()  # what is collected at the end of a child would be copied first
for line in sys.stdin:
    words, environment, folder, streams, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(10 * seconds)
        for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
            os.dup2(os.open(path, flags | os.O_CREAT), number)
        sys.stdin = open(0, closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["prunectl", *words]
        sys.exit(cli.main())
    _, status, used = os.wait4(child, 0)
    told = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]
    print(json.dumps(told), flush=True)
"""
"""Forks off a process for each command, with what all commands import at hand.

What Linux tells of a child's memory begins with its parent's, which is that of no test: it may be full of frameworks.
"""


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


def cost(*words: str | Path, scratch: Path, stdin: bytes = b"", **environment: str) -> Cost:
    """Run prunectl with a temporary folder of its own, made in `scratch`."""
    temporary = scratch / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    streams = given, out, err = [scratch / f"standard-{name}" for name in ("input", "output", "error")]
    given.write_bytes(stdin)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    setting = clean(TMPDIR=str(temporary), **environment), os.getcwd()
    request = [list(map(str, words)), *setting, list(map(str, streams)), _KILLED_AFTER]
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    code, seconds, nbytes = json.loads(server.stdout.readline())
    left = tuple(sorted(os.listdir(temporary)))
    outcome = Outcome(code, out.read_bytes().decode(), err.read_bytes().decode())
    for path in streams:
        path.unlink()
    return Cost(outcome, seconds, nbytes, left)


@cache
def _server() -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean(PYTHONPATH=str(ROOT))
    )
    register(server.communicate)
    return server


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
