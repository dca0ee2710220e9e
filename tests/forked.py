"""Processes of their own that have the frameworks at hand: forked from one that has loaded them and has no threads.

To load TensorFlow takes longer than what most tests want of such a process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch

SECONDS = 300


class Forked:
    """What `python -m MODULE ARGUMENTS` does, in a process with an environment and standard streams of its own."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdin: bytes = b"") -> None:
        self._folder = tempfile.TemporaryDirectory()
        streams = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        streams[0].write_bytes(stdin)
        self._process = _server().Process(target=_run, args=(command, dict(env), Path.cwd(), streams))
        self._process.start()

    def end(self) -> CompletedProcess[bytes]:
        """Wait for its end, and return what it has written."""
        self._process.join(SECONDS)
        self._process.kill()
        self._process.join()
        out, err = ((Path(self._folder.name) / name).read_bytes() for name in ("out", "err"))
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        self._folder.cleanup()
        return CompletedProcess([], code, out, err)


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.loaded"])
    # Its socket is to last longer than a scratch folder of what starts it first.
    with patch.dict(os.environ, TF_USE_LEGACY_KERAS="1"), patch.object(tempfile, "tempdir", None):
        forkserver.ensure_running()
    return context


def _run(command: list[str], env: dict[str, str], cwd: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams):
        stream = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - until the process ends
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    module, *arguments = command[command.index("-m") + 1 :]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(command: list[str], *, env: Mapping[str, str], input: bytes = b"", **_: Any) -> CompletedProcess[bytes]:  # noqa: A002 - as in subprocess.run
    """Do what `subprocess.run` does with `python -m`."""
    return Forked(command, env=env, stdin=input).end()


def run_two(command: list[str], *, env: Mapping[str, str]) -> list[CompletedProcess[bytes]]:
    """Run a command in two processes that know of each other by what torchrun says."""
    shared = {**env, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [one.end() for one in [Forked(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port
