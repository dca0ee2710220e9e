"""Many small models are looked at by one child, and none of them can harm the verdict on another."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from prunectl.errors import InputError
from prunectl.formats import sandbox
from prunectl.formats.sandbox import run_sandboxed
from prunectl.formats.workers import reuse_worker
from tests.checks.checking import prunectl
from tests.running import FIXTURES

MEGABYTES = 200 << 20
BUDGET = "[[budget]]\npath = '*.h5'\nmax-gzip = '400KB'\nmin-sparsity = '0%'\nmax-params = '1M'\n"


def ask(work: Callable[[], bytes], seconds: float = 5.0) -> bytes:
    return bytes(run_sandboxed(work, Path("m.h5"), seconds=seconds, extra_bytes=MEGABYTES))


def who() -> bytes:
    return str(os.getpid()).encode()


def echo(said: bytes) -> bytes:
    return said


def die() -> bytes:
    os.kill(os.getpid(), signal.SIGSEGV)
    return b""


def spin() -> bytes:
    return b"".join(b"" for _ in count())


def wait() -> bytes:
    return bytes(signal.pause() or 0)


def swallow() -> bytes:
    return bytes(MEGABYTES * 2)


def refuse() -> bytes:
    raise InputError("m.h5 is refused")


def test_one_child_does_the_work_of_many_and_is_gone_afterwards() -> None:
    answer = bytes(range(256)) * 2000
    with reuse_worker():
        first = ask(who)
        assert ask(partial(echo, answer)) == answer
        assert ask(partial(echo, b"")) == b""
        assert ask(who) == first != who()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


@pytest.mark.parametrize(
    ("work", "seconds", "said", "is_fatal"),
    [
        (die, 5.0, "crashes the library that reads it", True),
        (spin, 0.1, "takes too long to read", True),
        (wait, 0.02, "takes too long to read", True),
        (swallow, 5.0, "more memory", False),
        (refuse, 5.0, "is refused", False),
    ],
)
def test_what_one_file_does_is_its_own_fault(
    work: Callable[[], bytes], seconds: float, said: str, is_fatal: bool
) -> None:
    with reuse_worker():
        before = ask(who)
        with pytest.raises(InputError, match=said):
            ask(work, seconds)
        assert (ask(who) != before) is is_fatal


def test_processor_time_is_counted_for_each_file_anew() -> None:
    with reuse_worker():
        for _ in range(5):
            with pytest.raises(InputError, match="is refused"):
                ask(refuse, 0.2)
        assert sum(len(ask(partial(echo, bytes(1 << 20)), 0.2)) for _ in range(20)) == 20 << 20


def test_two_hundred_models_take_one_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / f"{number}.h5")
    (tmp_path / "broken.h5").write_bytes((FIXTURES / "digits_cnn.h5").read_bytes()[:3000])
    (tmp_path / "prunectl.toml").write_text(BUDGET)
    fork, forks = sandbox._server.fork, []
    monkeypatch.setattr(sandbox._server, "fork", lambda module: forks.append(1) or fork(module))

    found = prunectl(tmp_path, "check", "--json")
    assert (found.code, len(found.json["gates"]), len(forks)) == (3, 600, 1)
    assert all(gate["ok"] for gate in found.json["gates"])
    assert "broken.h5" in found.json["error"]["message"]
