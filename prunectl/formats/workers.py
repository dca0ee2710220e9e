"""Thread pools that stop at the first failure or Ctrl-C, and the sandbox child that a context reuses."""

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
    """The job was stopped, because another one failed or the user interrupted the run."""


class Workers:
    """A pool of threads whose jobs call `check_stopped` now and then, which ends them if the pool was stopped."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self.threads = threads
        self.failure: BaseException | None = None
        """The first exception of a job."""
        self._pool = pool
        self._stopped = threading.Event()
        # A pool that was opened in a job of another pool stops with that pool.
        self._outer = _current()

    @property
    def is_stopped(self) -> bool:
        """Whether its jobs should end."""
        return self._stopped.is_set() or (self._outer is not None and self._outer.is_stopped)

    def submit(self, work: Callable[Given, Made], /, *args: Given.args, **named: Given.kwargs) -> Future[Made]:
        """Run a job in the pool."""

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

        # The job runs in a copy of the caller's context, with its context variables, such as `kept_children`.
        return self._pool.submit(copy_context().run, job)

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Yield the result for each item, in the order of the items."""
        futures = deque(self.submit(work, item) for item in items)
        while futures:
            yield futures.popleft().result()

    def stop(self) -> None:
        """Start no further jobs, and let running ones end at their next `check_stopped`."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


_of_thread = threading.local()


def _current() -> Workers | None:
    current: Workers | None = getattr(_of_thread, "workers", None)
    return current


def check_stopped() -> None:
    """Raise StoppedError if the pool of this thread was stopped; call it for every block."""
    workers = _current()
    if workers is not None and workers.is_stopped:
        raise StoppedError


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_from_env() -> int:
    """Number of threads for computations according to OMP_NUM_THREADS; 0 if it is not set to a number."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() else 0


@contextmanager
def workers(
    threads: int, name: str = "prunectl", *, on_failure: Callable[[], None] | None = None
) -> Generator[Workers]:
    """Yield a pool of threads; after an exception, each thread only finishes its current block.

    The first exception of a thread is raised here. `on_failure` stops work without `check_stopped`, as in a process.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - small files are read without threads

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
    """An object that is closed when its context ends."""

    def close(self) -> None:
        """Release its resources."""


kept_children: ContextVar[list[Closable] | None] = ContextVar("kept_children", default=None)
"""The sandbox child that this context reuses: None if it reuses none, and an empty list until the first use."""


@contextmanager
def reuse_worker() -> Generator[None]:
    """Reuse one sandbox child for all small files of this context, because a fork takes longer than reading one.

    If a file kills the child, a new one reads the next file.
    """
    children: list[Closable] = []
    token = kept_children.set(children)
    try:
        yield
    finally:
        kept_children.reset(token)
        for child in children:
            child.close()
