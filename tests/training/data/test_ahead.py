"""Batches that threads make ahead come in the same order as those that nobody makes ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.training.data.readers import IndexedSource, IterableSource
from prunectl.training.data.source import Batch, EpochOrder, parallel_map, prefetch


@given(st.lists(st.integers(), max_size=40), st.integers(0, 4))
def test_order_and_number_stay_whatever_the_threads(items: list[int], threads: int) -> None:
    assert list(parallel_map(str, items, threads)) == [str(one) for one in items]
    assert list(prefetch(iter(items), threads)) == items


def test_several_batches_are_made_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def make(item: int) -> int:
        together.wait()
        return item

    assert list(parallel_map(make, range(6), 3)) == list(range(6))


def test_what_fails_in_a_thread_fails_where_the_batch_is_wanted() -> None:
    def make(item: int) -> int:
        return 1 // (3 - item)

    found = parallel_map(make, range(6), 2)
    assert list(islice(found, 3)) == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_no_thread_is_left_once_nobody_reads_on() -> None:
    endless = prefetch(iter(int, 1), 1)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]
    assert not [one for one in threading.enumerate() if one.name.startswith("prunectl-data")]


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_sources_give_the_same_with_workers(is_shuffled: bool) -> None:
    numbers = np.arange(50)

    def pieces() -> Iterator[Batch]:
        return (Batch(numbers[begin : begin + 7]) for begin in range(0, 50, 7))

    for source in (
        IndexedSource("r", 50, False, lambda at: Batch(numbers[at])),
        IterableSource("s", 50, False, pieces),
    ):
        alone, helped = (
            [
                list(np.asarray(batch.x))
                for batch in source.batches(EpochOrder(8, 3, is_shuffled=is_shuffled, skip=1, workers=workers))
            ]
            for workers in (0, 3)
        )
        assert alone == helped
        assert sum(map(len, alone)) == 42
