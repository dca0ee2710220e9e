"""Runs commands and says how long they took and how much memory they held."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
PRUNECTL = str(BIN / "prunectl")
PYTHON = sys.executable
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_ENABLE_ONEDNN_OPTS": "0"}


@dataclass(frozen=True)
class Cost:
    """Medians over the runs of one command."""

    seconds: float
    peak_bytes: int
    out: str
    processor: float
    """Seconds of processor time, which other work on the machine disturbs least."""


def cost(words: list[str], runs: int = 5) -> Cost:
    """Return what a command costs, the first run left out to warm the caches."""
    costs = [_once(words) for _ in range(runs + 1)][1:] if runs > 1 else [_once(words)]
    return Cost(
        statistics.median(found.seconds for found in costs),
        max(found.peak_bytes for found in costs),
        costs[-1].out,
        statistics.median(found.processor for found in costs),
    )


_LAUNCHER = """
import os, sys, time
began = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(child, 0)
processor = usage.ru_utime + usage.ru_stime
print(time.perf_counter() - began, usage.ru_maxrss, os.waitstatus_to_exitcode(status), processor, file=sys.stderr)
"""
"""A small process between us and the command: a child's peak counts what its parent held when it was forked."""


def _once(words: list[str]) -> Cost:
    done = subprocess.run(
        [PYTHON, "-ISc", _LAUNCHER, *words], capture_output=True, text=True, env=os.environ | QUIET, check=True
    )
    seconds, peak_kilobytes, code, processor = done.stderr.split()
    if code != "0":
        raise RuntimeError(f"{' '.join(words)} ended with {code}")
    return Cost(float(seconds), int(peak_kilobytes) * 1024, done.stdout, float(processor))


def show(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table in Markdown."""
    print(f"\n## {title}\n")
    for line in (head, tuple("---" for _ in head), *rows):
        print("| " + " | ".join(line) + " |", flush=True)


def output_of(*words: object) -> str:
    """What a command prints, which must not fail."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
