"""A process on this machine that makes points, with its share of the processors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from prunectl.errors import PrunectlError, WorkError
from prunectl.sweeping.answer import understood
from prunectl.sweeping.point import Outcome, Point
from prunectl.sweeping.threads import surroundings


class Process:
    """Makes points one after the other, in a process that is started when it is first needed."""

    def __init__(self, job: dict[str, Any], number: int, threads: int, lock: int) -> None:
        self._job, self._number, self._threads, self._lock = json.dumps(job), number, threads, lock
        self._process: subprocess.Popen[str] | None = None
        self._is_over = False

    def attempt(self, point: Point) -> Outcome | PrunectlError:
        """Have a point made."""
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
        return understood(point, json.loads(line))

    def close(self) -> None:
        """End the process, whatever it does."""
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
                **surroundings(self._threads),
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


def _told(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
