"""How alike channels are, held against SciPy and against loops by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.spatial.distance import cdist

from prunectl.channels import importance as module
from prunectl.channels.importance import METRICS, cosine, dissimilarity, euclidean, iou, redundancy
from tests.contract import Array


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def by_loops(rows: Array, of: Callable[[Array, Array], float]) -> Array:
    return np.array([[of(one, other) for other in rows] for one in rows])


ROWS = np.concatenate([normal(7, 18), normal(2, 18, seed=1) * 5, normal(7, 18)[2:4] + 0.01])
SMALL = npst.arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 4)), elements=st.integers(-3, 3))


def test_the_cosine_is_scipys() -> None:
    np.testing.assert_allclose(cosine(ROWS), 1 - cdist(ROWS, ROWS, "cosine"), atol=1e-12)


def test_the_distance_is_counted_against_the_product_of_the_norms() -> None:
    norms = np.linalg.norm(ROWS, axis=1)
    expected = np.maximum(1 - cdist(ROWS, ROWS) / np.outer(norms, norms), 0)
    np.testing.assert_allclose(euclidean(ROWS), expected, atol=1e-12)


def test_what_is_shared_is_the_sum_of_minima_over_the_sum_of_maxima() -> None:
    rows = np.abs(ROWS)
    expected = by_loops(rows, lambda one, other: np.minimum(one, other).sum() / np.maximum(one, other).sum())
    np.testing.assert_allclose(iou(rows), expected, atol=1e-12)


def test_weights_of_opposite_signs_share_nothing() -> None:
    def shared(one: Array, other: Array) -> float:
        same = one * other > 0
        sizes = np.abs(one), np.abs(other)
        return float(np.minimum(*sizes)[same].sum() / (np.maximum(*sizes)[same].sum() + np.add(*sizes)[~same].sum()))

    np.testing.assert_allclose(iou(ROWS), by_loops(ROWS, shared), atol=1e-12)
    np.testing.assert_array_equal(iou(np.array([[1.0, -2.0], [-1.0, 2.0]])), np.eye(2))


@pytest.mark.parametrize("metric", METRICS)
def test_rows_are_as_like_one_another_in_chunks(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = METRICS[metric](ROWS)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    np.testing.assert_allclose(METRICS[metric](ROWS), whole, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(rows=SMALL)
def test_likeness_is_symmetric_and_one_for_the_same(metric: str, rows: Array) -> None:
    found = METRICS[metric](rows)
    assert found.shape == (len(rows), len(rows))
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert (found <= 1).all()
    assert (found >= (-1 if metric == "cosine" else 0)).all()
    same = (rows[:, None] == rows[None]).all(axis=2)
    np.testing.assert_allclose(found[same], 1, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_zeros_are_like_each_other_alone(metric: str) -> None:
    rows = np.array([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(METRICS[metric](rows), [[1, 0, 1], [0, 1, 0], [1, 0, 1]], atol=1e-12)


def one_by_one(alike: Array) -> Array:
    """The pair that is most alike among those left, its later row gone, until one is left."""
    left, found = list(range(len(alike))), np.full(len(alike), -1.0)
    while len(left) > 1:
        pairs = [(alike[late, early], late) for late in left for early in left if early < late]
        found[max(pairs)[1]] = max(pairs)[0]
        left.remove(max(pairs)[1])
    return found


@given(
    values=npst.arrays(
        np.float64, st.tuples(st.integers(1, 8)).map(lambda one: (*one, *one)), elements=st.integers(-4, 4)
    )
)
def test_of_the_most_alike_pair_the_later_goes_again_and_again(values: Array) -> None:
    alike = (values + values.T) / 8
    np.testing.assert_array_equal(redundancy(alike), one_by_one(alike))


@pytest.mark.parametrize("metric", METRICS)
def test_of_real_rows_the_later_of_the_most_alike_goes(metric: str) -> None:
    alike = METRICS[metric](ROWS)
    np.testing.assert_array_equal(redundancy(alike), one_by_one(alike))


def test_of_many_that_are_the_same_the_first_stays() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(redundancy(cosine(rows)), [-1, 0, 1, 1, 1])


def test_a_row_goes_only_for_one_that_stays() -> None:
    # A chain: the first is like the second and the second like the third, but not the first like the third.
    alike = np.array([[1.0, 0.95, 0.2], [0.95, 1.0, 0.92], [0.2, 0.92, 1.0]])
    np.testing.assert_array_equal(redundancy(alike), [-1.0, 0.95, 0.2])


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_channels_lie_along_any_axis_of_a_kernel(axis: int) -> None:
    kernel = normal(4, 5, 3, 6).astype("f4")
    rows = np.stack([kernel.take(at, axis).reshape(-1) for at in range(kernel.shape[axis])]).astype("f8")
    expected = 1 - redundancy(1 - cdist(rows, rows, "cosine"))
    np.testing.assert_allclose(dissimilarity(kernel, axis), expected, atol=1e-12)


def test_the_copy_of_a_channel_goes_first() -> None:
    kernel = normal(3, 3, 4, 8)
    kernel[..., 5] = kernel[..., 1]
    for metric in METRICS:
        found = dissimilarity(kernel, 3, metric)
        assert int(np.argmin(found)) == 5
        assert found[5] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_channel_has_nothing_to_replace_it(metric: str) -> None:
    np.testing.assert_array_equal(dissimilarity(normal(4, 1), 1, metric), [2.0])


def test_many_channels_take_no_more_memory_than_their_pairs() -> None:
    found = dissimilarity(normal(600, 40), 0, "iou")
    assert found.shape == (600,)
    assert np.count_nonzero(found == 2.0) == 1
