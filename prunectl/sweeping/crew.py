"""Processes that make points side by side, each with its share of the processors."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, MissingExtraError, PrunectlError, UntrustedError, UsageError, WorkError
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import Outcome, Point

_KINDS = {one.kind: one for one in (UsageError, InputError, UntrustedError, MissingExtraError, WorkError)}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


class Crew:
    """So many processes, each started when it is first needed; safe to use from as many threads."""

    def __init__(self, path: Path, choices: Choices, folder: Path, *, jobs: int, threads: int, lock: int) -> None:
        job = json.dumps({"model": str(path), "folder": str(folder), "choices": choices.as_json})
        self._workers = [_Worker(job, number, threads, lock) for number in range(jobs)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def attempt(self, point: Point) -> Outcome | PrunectlError:
        """Have a point made by whoever is free."""
        worker = self._free.get()
        try:
            return worker.attempt(point)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End all of them, whatever they do."""
        for worker in self._workers:
            worker.close()


class _Worker:
    def __init__(self, job: str, number: int, threads: int, lock: int) -> None:
        self._job, self._number, self._threads, self._lock = job, number, threads, lock
        self._process: subprocess.Popen[str] | None = None
        self._is_over = False

    def attempt(self, point: Point) -> Outcome | PrunectlError:
        job = f"{self._job}\n" if self._process is None else ""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{job}{json.dumps(asdict(point))}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._ended(process)
            return WorkError(
                f"{point.name}: its process ended with {_told(code)}",
                hint="is there memory enough? fewer --jobs need less",
            )
        answer: dict[str, Any] = json.loads(line)
        if "outcome" in answer:
            return Outcome.of_json(answer["outcome"])
        if "bug" in answer:
            return WorkError(f"{point.name}: {answer['bug']}", hint="please report it, with the traceback above")
        said = answer["error"]
        kind = _KINDS.get(said["kind"], WorkError)
        return kind(said["message"], hint=said["hint"], did_you_mean=tuple(said["did_you_mean"]))

    def close(self) -> None:
        self._is_over = True
        # Taken once: a thread that waits for it may let go of it meanwhile.
        if (process := self._process) is not None:
            process.kill()
            self._ended(process)

    def _ended(self, process: subprocess.Popen[str]) -> int:
        """Wait for a process, close what led to it, and return its exit code."""
        code = process.wait()
        self._process = None
        for pipe in (process.stdin, process.stdout):
            # What was not sent any more has nobody to read it.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return code

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            if self._is_over:
                raise KeyboardInterrupt
            environment = {
                **os.environ,
                **dict.fromkeys(_THREADS, str(self._threads)),
                "TF_NUM_INTEROP_THREADS": "1",
                # What can be imported here can be imported there.
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prunectl.sweeping.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                # Held until the last process is gone, so that no other run makes points meanwhile.
                pass_fds=(self._lock,),
                # Ctrl-C is for us, who end them.
                start_new_session=True,
            )
            if hasattr(os, "sched_setaffinity"):
                # Also for runtimes that ask nobody how many threads to start.
                os.sched_setaffinity(self._process.pid, self._processors())
        return self._process

    def _processors(self) -> set[int]:
        """Return as many processors as there are threads, beside those of the others."""
        known = sorted(os.sched_getaffinity(0))
        first = self._number * self._threads
        return {known[at % len(known)] for at in range(first, first + self._threads)}


def share(jobs: int) -> int:
    """Return how many threads each process may have, if nobody says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(said) if said.isdecimal() and int(said) else max(known // jobs, 1)


def _told(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
