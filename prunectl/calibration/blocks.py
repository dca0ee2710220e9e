"""Numerical work in fixed blocks on all processors: the same sums, and bytes, however many threads there are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from threading import Lock
from typing import TypeVar

from prunectl.formats.workers import Workers, check_stopped, threads_from_env, usable_cores, workers

Made = TypeVar("Made")

ROWS = 64
"""Of a matrix in a block. It does not follow the number of threads: the sums of a product differ with its shape."""

_pool: ContextVar[Workers | None] = ContextVar("block_threads", default=None)


@contextmanager
def block_threads(threads: int = 0) -> Generator[None]:
    """Have `map_blocks` work on so many threads while the context lasts: by OMP_NUM_THREADS, or on all processors.

    NumPy's BLAS keeps to one thread meanwhile, since it splits sums by how many it has. One that cannot be told to,
    or not for other threads than this one, gets no company: blocks are worked on one after the other.
    """
    threads = threads or threads_from_env() or usable_cores()
    with _single_threaded_blas() as is_single:
        if threads == 1 or not is_single:
            yield
            return
        with workers(threads) as pool:
            token = _pool.set(pool)
            try:
                yield
            finally:
                _pool.reset(token)


def block_thread_count() -> int:
    """How many blocks are worked on at the same time."""
    pool = _pool.get()
    return 1 if pool is None else pool.threads


def map_blocks(work: Callable[[slice], Made], count: int, size: int = ROWS) -> list[Made]:
    """What comes of each slice of so many rows, in their order."""
    slices = [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
    pool = _pool.get()
    if pool is None or len(slices) == 1:
        return [_unless_stopped(work, part) for part in slices]

    def job(part: slice) -> Made:
        # A block that has blocks works on them itself: to wait for threads that wait as well would never end.
        _pool.set(None)
        return work(part)

    return list(pool.map(job, slices))


def _unless_stopped(work: Callable[[slice], Made], part: slice) -> Made:
    check_stopped()
    return work(part)


_BLAS = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_", "scipy_openblas_get_parallel64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads", "scipy_openblas_get_parallel"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_", "openblas_get_parallel64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads", "openblas_get_parallel"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads", ""),
)
"""What tells and sets the number of threads, and tells how OpenBLAS was built, in the libraries of NumPy."""
_OPENMP = 2
"""What an OpenBLAS says that was built on OpenMP."""


_numbers_before: list[int] = []
"""How many threads the BLAS had for each context that has it on one now: the first of them goes back last."""
_numbers_lock = Lock()


@contextmanager
def _single_threaded_blas() -> Generator[bool]:
    """Have the BLAS of NumPy calculate on one thread while the context lasts; yield whether it does so everywhere."""
    try:
        # Symbols of a library are those of what it is linked to as well.
        linked = ctypes.CDLL(import_module("numpy.linalg._umath_linalg").__file__)
    except (ImportError, OSError):
        yield False
        return
    for getter, setter, parallel in _BLAS:
        if hasattr(linked, getter) and hasattr(linked, setter):
            get, put = getattr(linked, getter), getattr(linked, setter)
            # On OpenMP the number belongs to the thread that sets it, and others would have the default.
            is_openmp = hasattr(linked, parallel) and getattr(linked, parallel)() == _OPENMP
            numbers: list[int] = [] if is_openmp else _numbers_before
            with _numbers_lock:
                numbers.append(get())
                put(1)
            try:
                yield not is_openmp
            finally:
                with _numbers_lock:
                    put(numbers.pop())
            return
    yield False
