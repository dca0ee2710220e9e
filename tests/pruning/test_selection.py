"""The exact cut, beside a stable sort of all scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from prunectl.pruning.masks import (
    SAMPLE_STEP,
    Source,
    magnitude_keys,
    radix_select,
    sorted_select,
    threshold,
)


def in_blocks(scores: NDArray[np.floating], size: int) -> Source:
    def blocks() -> Iterator[NDArray[np.floating]]:
        for begin in range(0, len(scores), size):
            yield scores[begin : begin + size]

    return blocks


def dropped(tensors: list[NDArray[np.floating]], drop: int, size: int) -> list[NDArray[np.bool_]]:
    sources = [in_blocks(scores, size) for scores in tensors]
    cut = threshold(sources, drop, sum(scores.size for scores in tensors))
    masks = []
    for number, source in enumerate(sources):
        dropper = cut.masker(number)
        masks.append(np.concatenate([dropper.mask(block) for block in source()] or [np.zeros(0, bool)]))
    return masks


def by_sorting(tensors: list[NDArray[np.floating]], drop: int) -> NDArray[np.bool_]:
    scores = np.concatenate(tensors)
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(scores, kind="stable")[:drop]] = True
    return mask


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_the_cut_is_that_of_a_stable_sort_whatever_the_blocks(dtype: type, data: st.DataObject) -> None:
    elements = st.one_of(
        st.sampled_from([0.0, 0.5, 1.0, float("inf")]),
        st.floats(0, width=32, allow_nan=False, allow_subnormal=True),
    )
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    tensors = [data.draw(arrays(dtype, size, elements=elements)) for size in sizes]
    drop = data.draw(st.integers(0, sum(sizes)))
    size = data.draw(st.integers(1, 7))
    masks = dropped(tensors, drop, size)
    np.testing.assert_array_equal(np.concatenate(masks), by_sorting(tensors, drop))
    if drop:
        sources = [in_blocks(scores, size) for scores in tensors]
        assert sorted_select(sources, drop) == radix_select(sources, drop)


def test_minus_zero_is_a_zero() -> None:
    (mask,) = dropped([np.array([1, -0.0, 0.0, 2], np.float32)], 1, 4)
    assert mask.tolist() == [False, True, False, False]


def test_a_tensor_of_equal_scores_loses_its_first() -> None:
    (mask,) = dropped([np.ones(100_000, np.float32)], 29_000, 1000)
    assert mask[:29_000].all()
    assert not mask[29_000:].any()


def test_ties_go_in_the_order_of_the_tensors() -> None:
    first, second = dropped([np.ones(3, np.float32), np.ones(3, np.float32)], 4, 2)
    assert first.all()
    assert second.tolist() == [True, False, False]


def test_more_than_there_are_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match="fewer than 4"):
        dropped([np.ones(3, np.float32)], 4, 2)


@pytest.mark.parametrize("kind", ["normal", "uniform", "mostly zero", "few values", "heavy tails", "two layers"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.8, 0.99, 1.0])
def test_a_sample_leads_to_the_same_cut(kind: str, share: float) -> None:
    random = np.random.default_rng(1)
    shape = 660_000  # fewer are sorted
    scores = {
        "normal": lambda: np.abs(random.standard_normal(shape)),
        "uniform": lambda: random.random(shape),
        "mostly zero": lambda: np.where(random.random(shape) < 0.7, 0, random.random(shape)),
        "few values": lambda: random.integers(0, 5, shape) / 4,
        "heavy tails": lambda: np.abs(random.standard_cauchy(shape)) ** 3,
        "two layers": lambda: np.concatenate([random.random(shape // 2) * 1e-6, random.random(shape // 2)]),
    }[kind]().astype(np.float32)
    tensors = [scores[:300_001], scores[300_001:]]
    drop = round(share * scores.size)
    masks = dropped(tensors, drop, 100_000)
    np.testing.assert_array_equal(np.concatenate(masks), by_sorting(tensors, drop))


def test_a_wrong_guess_is_noticed() -> None:
    # Every sampled score is large, all others are small: the sample leads to the wrong place.
    scores = np.full(1_000_000, 0.5, np.float32)
    scores[::64] = 2.0
    (mask,) = dropped([scores], 100_000, 64_000)
    np.testing.assert_array_equal(mask, by_sorting([scores], 100_000))


@pytest.mark.parametrize("drop", [1, 99_999, 400_000, 899_999, 1_000_000])
def test_many_small_tensors_are_cut_as_a_few_big_ones(drop: int) -> None:
    # Multiples of a sixteenth: each score is that of many others, in many tensors.
    scores = np.random.default_rng(1).integers(0, 64, 1_000_000).astype(np.float32) / 16
    masks = dropped(np.split(scores, 1000), drop, 300)
    np.testing.assert_array_equal(np.concatenate(masks), by_sorting([scores], drop))


@pytest.mark.parametrize("lie", [0.0, 2.0])
def test_samples_that_mislead_change_nothing(lie: float) -> None:
    scores = np.random.default_rng(2).random(1_000_000).astype(np.float32)
    sample = np.full(scores.size // SAMPLE_STEP, lie, np.float32)
    cut = threshold([in_blocks(scores, 64_000)], 300_000, scores.size, [in_blocks(sample, 1000)])
    np.testing.assert_array_equal(cut.masker(0).mask(scores), by_sorting([scores], 300_000))


def test_sort_keys_stand_for_the_scores_that_they_were_made_from() -> None:
    scores = np.random.default_rng(3).random(1000).astype(np.float32)
    cut = threshold([in_blocks(magnitude_keys(-scores), 100)], 300, scores.size)
    np.testing.assert_array_equal(cut.masker(0).mask(scores), by_sorting([scores], 300))
