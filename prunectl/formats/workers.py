"""Threads that give up after the first failure or Ctrl-C, and the child process that reads for all of them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Given = ParamSpec("Given")
Item = TypeVar("Item")
Made = TypeVar("Made")


class StoppedError(Exception):
    """Other work failed, or the user gave up: so does this."""


class Workers:
    """A pool of threads whose jobs ask now and then, by `check_stopped`, whether they are still wanted."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self.threads = threads
        self.failure: BaseException | None = None
        """What went wrong first."""
        self._pool = pool
        self._stopped = threading.Event()
        # A pool that a job of another pool has opened stops with it.
        self._outer = _current()

    @property
    def is_stopped(self) -> bool:
        """Whether its jobs should end."""
        return self._stopped.is_set() or (self._outer is not None and self._outer.is_stopped)

    def submit(self, work: Callable[Given, Made], /, *args: Given.args, **named: Given.kwargs) -> Future[Made]:
        """Have a job done."""

        def job() -> Made:
            _of_thread.workers = self
            try:
                check_stopped()
                return work(*args, **named)
            except StoppedError:
                raise
            except BaseException as error:
                self.failure = self.failure or error
                self._stopped.set()
                raise

        # What holds in the context of who asks, such as the child that is kept for its reading, holds for the job.
        return self._pool.submit(copy_context().run, job)

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Yield what comes of each item, in their order."""
        waiting = deque(self.submit(work, item) for item in items)
        while waiting:
            yield waiting.popleft().result()

    def stop(self) -> None:
        """Begin nothing more, and tell what runs to end."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


_of_thread = threading.local()


def _current() -> Workers | None:
    current: Workers | None = getattr(_of_thread, "workers", None)
    return current


def check_stopped() -> None:
    """End the job that this thread does, if nobody wants its result any more: to be called for every block."""
    workers = _current()
    if workers is not None and workers.is_stopped:
        raise StoppedError


def usable_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_from_env() -> int:
    """How many threads a process may calculate on by OMP_NUM_THREADS; 0 if that does not say."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() else 0


@contextmanager
def workers(
    threads: int, name: str = "prunectl", *, on_failure: Callable[[], None] | None = None
) -> Generator[Workers]:
    """Yield a pool of threads; leaving it by an exception waits for no more than the block that each is busy with.

    What fails in a thread fails here. `on_failure` ends work that asks nobody, such as that of another process.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - what reads a small file needs no threads

    with ThreadPoolExecutor(threads, name) as pool:
        current = Workers(pool, threads)
        try:
            yield current
        except BaseException as error:
            current.stop()
            if on_failure is not None:
                on_failure()
            if isinstance(error, StoppedError) and current.failure is not None:
                raise current.failure from None
            raise


class Closable(Protocol):
    """What is closed when its context ends."""

    def close(self) -> None:
        """Let it go."""


kept_children: ContextVar[list[Closable] | None] = ContextVar("kept_children", default=None)
"""The child process that this context keeps, if it keeps any; empty until a file is read in a child."""


@contextmanager
def reuse_worker() -> Generator[None]:
    """Keep one child for the many small files of this context: to fork takes longer than to read one of them.

    After a file that kills it, a new one goes on with the next.
    """
    children: list[Closable] = []
    token = kept_children.set(children)
    try:
        yield
    finally:
        kept_children.reset(token)
        for child in children:
            child.close()
