from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.training.data import readers
from prunectl.training.data.readers import IterableSource, shuffle_buffer
from prunectl.training.data.source import Batch, EpochOrder, Source, train_val_split
from tests.training.data.sources import numbered, numbers, streamed

quick = settings(max_examples=60, deadline=None)
counts = st.integers(1, 60)


def sources(count: int, piece: int) -> list[Source]:
    return [numbered(count), streamed(count, piece), streamed(count, piece, known=False)]


@quick
@given(counts, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_example_comes_once_in_batches_of_one_size(count: int, piece: int, size: int, mixed: bool) -> None:
    for source in sources(count, piece):
        batches = list(source.batches(EpochOrder(size, is_shuffled=mixed)))
        lengths = [len(batch.x) for batch in batches]
        assert lengths == [size] * (count // size) + [count % size] * bool(count % size)
        assert sorted(numbers(source, EpochOrder(size, is_shuffled=mixed))) == list(range(count))


@quick
@given(counts, st.integers(1, 20), st.integers(0, 9), st.integers(0, 3))
def test_one_order_gives_the_same_batches_twice(count: int, piece: int, seed: int, epoch: int) -> None:
    order = EpochOrder(4, seed=seed, epoch=epoch, is_shuffled=True)
    for source in sources(count, piece):
        assert numbers(source, order) == numbers(source, order)


def test_another_epoch_or_seed_is_another_order() -> None:
    for source in sources(60, 9):
        found = {tuple(numbers(source, EpochOrder(4, s, e, is_shuffled=True))) for s in range(3) for e in range(3)}
        assert len(found) == 9


@quick
@given(counts, st.integers(1, 20), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.integers(1, 3))
def test_skipping_k_batches_is_dropping_them(
    count: int, piece: int, size: int, skip: int, mixed: bool, ranks: int
) -> None:
    for source in sources(count, piece):
        everything = list(source.batches(EpochOrder(size, is_shuffled=mixed, ranks=ranks)))
        rest = list(source.batches(EpochOrder(size, is_shuffled=mixed, skip=skip, ranks=ranks)))
        assert [b.x.tolist() for b in rest] == [b.x.tolist() for b in everything[skip:]]


@quick
@given(counts, st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_ranks_share_out_one_order_evenly(count: int, piece: int, size: int, ranks: int, mixed: bool) -> None:
    for source in sources(count, piece):
        alone = numbers(source, EpochOrder(size, is_shuffled=mixed))
        shares = [numbers(source, EpochOrder(size, is_shuffled=mixed, rank=rank, ranks=ranks)) for rank in range(ranks)]
        rounds = count // ranks
        assert [len(share) for share in shares] == [rounds] * ranks
        assert shares == [alone[rank : rounds * ranks : ranks] for rank in range(ranks)]


@quick
@given(st.integers(3, 80), st.integers(1, 20), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_is_a_partition_of_exact_size(count: int, piece: int, share: float, seed: int) -> None:
    size = round(share * count)
    if not 0 < size < count:
        return
    for source in (numbered(count), streamed(count, piece)):
        rest, held = train_val_split(source, share, seed)
        assert (rest.count, held.count) == (count - size, size)
        assert len(numbers(held)) == size
        assert sorted(numbers(rest) + numbers(held)) == list(range(count))


def test_a_stream_of_unknown_length_is_split_by_the_numbers_alone() -> None:
    for seed in range(4):
        rest, held = train_val_split(streamed(5000, 64, known=False), 0.2, seed)
        again = train_val_split(streamed(5000, 7, known=False), 0.2, seed)[1]
        assert numbers(held) == numbers(again)
        assert sorted(numbers(rest) + numbers(held)) == list(range(5000))
        # 1000 are expected; 5 standard deviations are 141.
        assert abs(len(numbers(held)) - 1000) < 141


def test_seeds_split_differently() -> None:
    for source in (numbered(50), streamed(50, 8), streamed(50, 8, known=False)):
        assert numbers(train_val_split(source, 0.5, 0)[1]) != numbers(train_val_split(source, 0.5, 1)[1])


def test_a_split_of_a_split_and_a_beginning_stay_within() -> None:
    for source in (numbered(50), streamed(50, 8)):
        rest, _ = train_val_split(source, 0.2, 0)
        inner, outer = train_val_split(rest, 0.25, 0)
        assert sorted(numbers(inner) + numbers(outer)) == sorted(numbers(rest))
        assert numbers(rest.first(5)) == numbers(rest)[:5]


def test_a_stream_mixes_far_and_holds_no_more_than_its_pool() -> None:
    pieces = (Batch(np.arange(begin, begin + 100)) for begin in range(0, 40_000, 100))
    found = np.concatenate([batch.x for batch in shuffle_buffer(pieces, np.random.default_rng(0))])
    assert sorted(found.tolist()) == list(range(40_000))
    assert np.abs(found - np.arange(40_000)).mean() > readers.SHUFFLED_EXAMPLES / 10


def test_an_endless_stream_is_read_only_as_far_as_its_pool() -> None:
    def forever() -> Iterator[Batch]:
        while True:
            yield Batch(np.zeros((1000, 1), np.float32))

    endless = IterableSource("endless", None, False, forever)
    batches = endless.batches(EpochOrder(32, is_shuffled=True))
    assert [len(next(batches).x) for _ in range(3)] == [32, 32, 32]


def test_skipping_far_into_arrays_touches_only_what_is_used() -> None:
    touched: list[int] = []
    source = numbered(1_000_000)
    spying = source.map_batches(lambda batch: (touched.append(len(batch.x)), batch)[1])
    next(spying.batches(EpochOrder(10, is_shuffled=True, skip=50_000)))
    assert touched == [10]
