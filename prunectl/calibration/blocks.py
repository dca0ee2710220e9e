"""Numerical work in blocks of fixed size on all cores: the result is bit-identical for any number of threads."""

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
"""Rows of a matrix in a block, whatever the number of threads: the rounding of a product depends on its shape."""

_pool: ContextVar[Workers | None] = ContextVar("block_threads", default=None)


@contextmanager
def block_threads(threads: int = 0) -> Generator[None]:
    """Let `map_blocks` use this many threads within the context; 0 means OMP_NUM_THREADS, or all cores.

    NumPy's BLAS is limited to one thread meanwhile, since it splits sums by its number of threads. Where it cannot be
    limited, or only for the calling thread, blocks are processed one after the other.
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
    """How many blocks are processed at the same time."""
    pool = _pool.get()
    return 1 if pool is None else pool.threads


def map_blocks(work: Callable[[slice], Made], count: int, size: int = ROWS) -> list[Made]:
    """Call `work` on slices of `size` rows, in parallel where threads were set up; the results in order."""
    slices = [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
    pool = _pool.get()
    if pool is None or len(slices) == 1:
        return [_unless_stopped(work, part) for part in slices]

    def job(part: slice) -> Made:
        # Nested calls run their blocks in this thread: to wait for other pool threads here could deadlock.
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
"""Symbols of NumPy's BLAS: get the number of threads, set it, and get how OpenBLAS was built."""
_OPENMP = 2
"""What `openblas_get_parallel` returns for an OpenBLAS that was built with OpenMP."""


_numbers_before: list[int] = []
"""BLAS thread counts to restore, one for each open context; the first, the original count, is restored last."""
_numbers_lock = Lock()


@contextmanager
def _single_threaded_blas() -> Generator[bool]:
    """Limit NumPy's BLAS to one thread within the context; yield whether the limit holds in all threads."""
    try:
        # Symbols of the libraries that this module is linked to, such as BLAS, can be looked up in it too.
        linked = ctypes.CDLL(import_module("numpy.linalg._umath_linalg").__file__)
    except (ImportError, OSError):
        yield False
        return
    for getter, setter, parallel in _BLAS:
        if hasattr(linked, getter) and hasattr(linked, setter):
            get, put = getattr(linked, getter), getattr(linked, setter)
            # With OpenMP the number is set for the calling thread only, and other threads have the default.
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
