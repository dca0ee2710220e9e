"""What a forked child does: some work behind fences, answered in bytes."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Callable

from prunectl.errors import NO_ROOM, InputError

DONE, REFUSED, FAILED, OUT_OF_ROOM = b"D", b"R", b"F", b"N"


def hush() -> None:
    """Leave the terminal and the parent's signals to the parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def fence(seconds: float, extra_bytes: int, *, is_last: bool) -> None:
    """Take some seconds of processor time and some memory for the most, from now on; the last fence stays for good."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The second fence, which no library can take down.
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1, 1 if is_last else None)
    _limit(resource.RLIMIT_AS, _mapped_bytes() + extra_bytes, 0 if is_last else None)


def _limit(kind: int, most: int, beyond: int | None) -> None:
    """Set the soft limit, and with something beyond it the hard one as well."""
    old = resource.getrlimit(kind)[1]
    most = most if old == resource.RLIM_INFINITY else min(most, old)
    hard = old if beyond is None else most + beyond
    resource.setrlimit(kind, (most, hard if old == resource.RLIM_INFINITY else min(hard, old)))


def answer_of(work: Callable[[], bytes]) -> bytes:
    """Return what comes of some work: a letter that says how it went, then the bytes."""
    try:
        return DONE + work()
    except InputError as error:
        return REFUSED + error.message.encode("utf-8", "backslashreplace")
    except MemoryError:
        return FAILED + b"it asks for more memory than a file of its size can need"
    except Exception as error:  # noqa: BLE001 - h5py raises what it likes on a damaged file
        return _failure(error)


def send(writer: int, answer: bytes) -> None:
    """Write all of an answer."""
    view = memoryview(answer)
    while view:
        view = view[os.write(writer, view) :]


def _failure(error: Exception) -> bytes:
    # libhdf5 tells only in words that a disk is full.
    said = re.search(r"errno = (\d+)", str(error))
    if said is not None and int(said[1]) in NO_ROOM:
        return OUT_OF_ROOM + said[1].encode()
    return FAILED + (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 34
