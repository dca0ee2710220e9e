"""What the sandbox lets a child do to its parent, and how long it may take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from prunectl.errors import InputError
from prunectl.formats import sandbox
from prunectl.formats.sandbox import run_sandboxed
from prunectl.formats.workers import reuse_worker
from tests.running import ROOT, clean

MEGABYTES = 200 << 20


def child(work: Callable[[], bytes], seconds: float = 5.0) -> bytes:
    return bytes(run_sandboxed(work, Path("m.h5"), seconds=seconds, extra_bytes=MEGABYTES))


def echo(answer: bytes) -> bytes:
    return answer


def spin() -> bytes:
    return b"".join(b"" for _ in count())


def wait() -> bytes:
    time.sleep(0.5)
    return b"at last"


def pause() -> bytes:
    return bytes(signal.pause() or 0)


def die() -> bytes:
    os.kill(os.getpid(), signal.SIGSEGV)
    return b""


def swallow() -> bytes:
    return bytes(MEGABYTES * 2)


def who() -> bytes:
    return b"%d" % os.getpid()


def parent() -> bytes:
    return b"%d" % os.getppid()


def where() -> bytes:
    return os.getcwdb()


def held_open() -> bytes:
    return b" ".join(sorted(name.encode() for name in os.listdir("/proc/self/fd")))


def quit_at_once() -> bytes:
    os._exit(0)


@pytest.fixture
def _afresh() -> Iterator[None]:
    sandbox._server.stop()
    yield
    sandbox._server.stop()


def test_it_answers_with_any_number_of_bytes() -> None:
    answer = bytes(range(256)) * 2000
    assert child(partial(echo, answer)) == answer
    assert child(partial(echo, b"")) == b""


def test_one_that_is_kept_busy_is_stopped() -> None:
    with pytest.raises(InputError, match="takes too long to read"):
        child(spin, 0.1)


def test_one_that_has_to_wait_for_others_is_given_time() -> None:
    assert child(wait, 0.1) == b"at last"


def test_one_that_never_does_anything_is_stopped() -> None:
    with pytest.raises(InputError, match="takes too long to read"):
        child(pause, 0.02)


@pytest.mark.parametrize("work", [die, quit_at_once])
def test_one_that_dies_is_the_fault_of_the_file(work: Callable[[], bytes]) -> None:
    with pytest.raises(InputError, match="crashes the library that reads it"):
        child(work)


def test_one_that_asks_for_too_much_memory_is_refused() -> None:
    with pytest.raises(InputError, match="more memory"):
        child(swallow)


def test_each_file_gets_a_child_of_its_own_and_all_are_forked_by_one_server() -> None:
    assert len({child(who) for _ in range(3)}) == 3
    (server,) = {child(parent) for _ in range(3)}
    assert int(server) != os.getpid()


def test_paths_begin_where_the_parent_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(who)
    monkeypatch.chdir(tmp_path)
    assert child(where) == os.fsencode(tmp_path)


@pytest.mark.usefixtures("_afresh")
def test_a_child_holds_no_file_of_its_parent_open() -> None:
    reader, writer = os.pipe()
    try:
        names = child(held_open)
        os.close(writer)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
    # Its three streams, what it answers through, and the folder that is being listed.
    assert len(names.split()) <= 5


@pytest.mark.usefixtures("_afresh")
@pytest.mark.filterwarnings("error")
def test_many_threads_are_served_at_once() -> None:
    answers = [b"%d" % number * 100_000 for number in range(40)]
    with ThreadPoolExecutor(8) as workers:
        assert list(workers.map(child, [partial(echo, answer) for answer in answers])) == answers
        assert [str(failure) for failure in workers.map(_failure, [die, swallow] * 4)] == [
            "m.h5 crashes the library that reads it: it is damaged or malicious",
            "m.h5 is truncated or damaged: it asks for more memory than a file of its size can need",
        ] * 4


def _failure(work: Callable[[], bytes]) -> InputError:
    with pytest.raises(InputError) as caught:
        child(work)
    return caught.value


@pytest.mark.usefixtures("_afresh")
def test_beside_threads_nothing_is_forked_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise AssertionError("forked beside threads")

    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        monkeypatch.setattr(os, "fork", refuse)
        assert child(partial(echo, b"well")) == b"well"
    finally:
        done.set()
        thread.join()


def test_what_one_thread_keeps_does_not_serve_the_others() -> None:
    with reuse_worker(), ThreadPoolExecutor(1) as workers:
        assert child(who) == child(who)
        assert workers.submit(child, who).result() != child(who)


def test_a_server_that_was_killed_is_started_again() -> None:
    os.kill(int(child(parent)), signal.SIGKILL)
    assert child(partial(echo, b"again")) == b"again"


def test_a_process_that_was_forked_has_a_server_of_its_own() -> None:
    ours = child(parent)
    reader, writer = os.pipe()
    forked = os.fork()
    if forked == 0:
        try:
            os.write(writer, child(parent))
            sandbox._server.stop()
        finally:
            os._exit(0)
    os.waitpid(forked, 0)
    os.close(writer)
    theirs = os.read(reader, 100)
    os.close(reader)
    assert theirs.isdigit()
    assert theirs != ours == child(parent)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_no_process_is_left_when_the_parent_ends(end: str) -> None:
    code = f"import os; from tests.formats.test_isolated import *; print(child(parent).decode(), flush=True); {end}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean(PYTHONPATH=str(ROOT)), capture_output=True, check=False
    )
    server, deadline = int(done.stdout), time.monotonic() + 20
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{server}").exists()
