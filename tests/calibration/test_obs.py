"""SparseGPT, held against the elimination of one column after the other with whole inverses."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.calibration import sparsegpt
from prunectl.calibration.sparsegpt import ColumnBlock
from prunectl.errors import WorkError
from tests.calibration.by_hand import normal
from tests.contract import Array

DAMP = 0.01


def products_of(features: int, examples: int = 64, seed: int = 0) -> Array:
    x = normal(examples, features, seed=seed) @ normal(features, features, seed=seed + 1)
    return x.T @ x


def damped(products: Array, damp: float) -> Array:
    diagonal = np.diagonal(products)
    diagonal = np.where(diagonal > 0, diagonal, 1.0)
    found = products.copy()
    np.fill_diagonal(found, diagonal + damp * diagonal.mean())
    return found


def eliminated(rows: Array, products: Array, parts: list[ColumnBlock], damp: float = DAMP) -> tuple[Array, Array]:
    """What is left of rows if each column is settled with the inverse of what remains of the second derivative."""
    rows, gone = rows.copy(), np.zeros(rows.shape, bool)
    hessian, is_dead = damped(products, damp), np.diagonal(products) <= 0
    rests = [np.linalg.inv(hessian[at:, at:]) for at in range(len(hessian))]
    begins = {part.begin: part for part in parts}
    for at, rest in enumerate(rests):
        if at in begins:
            part = begins[at]
            costs = np.stack(
                [np.where(is_dead[j], 0.0, rows[:, j] ** 2 / rests[j][0, 0]) for j in range(at, part.end)], axis=1
            )
            if part.is_by_row:
                for row, cost in enumerate(costs):
                    gone[row, at + np.argsort(cost, kind="stable")[: part.drop]] = True
            else:
                chosen = np.argsort(costs.reshape(-1), kind="stable")[: part.drop]
                gone[chosen // costs.shape[1], at + chosen % costs.shape[1]] = True
        for row in np.flatnonzero(gone[:, at]):
            rows[row, at:] -= rows[row, at] / rest[0, 0] * rest[0]
            rows[row, at] = 0.0
    return rows, gone


@pytest.mark.parametrize("block", [1, 8, 33, 70, 128])
@pytest.mark.parametrize("drop", [0, 1, 137, 210, 419, 420])
def test_unstructured_it_is_elimination_column_by_column(drop: int, block: int) -> None:
    rows, products = normal(6, 70), products_of(70)
    parts = sparsegpt.unstructured_blocks(6, 70, drop, block)
    found, gone = sparsegpt.prune_rows(rows, products, parts, DAMP, block)
    expected, theirs = eliminated(rows, products, parts)
    np.testing.assert_array_equal(gone, theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert np.count_nonzero(gone) == drop
    assert not found[gone].any()


@pytest.mark.parametrize("order", ["C", "F"])
def test_of_weights_that_cost_the_same_the_first_go(order: Literal["C", "F"]) -> None:
    rows = np.ones((4, 6), order=order)
    _, gone = sparsegpt.prune_rows(rows, np.eye(6), sparsegpt.unstructured_blocks(4, 6, 9, 128), DAMP, 128)
    np.testing.assert_array_equal(np.flatnonzero(gone), np.arange(9))


@pytest.mark.parametrize("block", [1, 3, 5, 8, 128])
@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 7)])
@pytest.mark.parametrize("channels", [24, 12, 6, 3])
def test_in_groups_it_is_elimination_too_across_blocks_and_at_short_ends(
    channels: int, zeros: int, group: int, block: int
) -> None:
    rows, products = normal(5, 24), products_of(24)
    parts = sparsegpt.nm_blocks(24, channels, zeros, group)
    found, gone = sparsegpt.prune_rows(rows, products, parts, DAMP, block)
    expected, theirs = eliminated(rows, products, parts)
    np.testing.assert_array_equal(gone, theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@given(features=st.integers(1, 40), channels=st.integers(1, 40), group=st.integers(1, 9), data=st.data())
def test_groups_cover_all_columns_once_and_lose_what_a_filled_group_would(
    features: int, channels: int, group: int, data: st.DataObject
) -> None:
    zeros, features = data.draw(st.integers(0, group)), features * channels
    parts = sparsegpt.nm_blocks(features, channels, zeros, group)
    assert [at for part in parts for at in range(part.begin, part.end)] == list(range(features))
    for part in parts:
        assert part.begin // channels == (part.end - 1) // channels
        missing = group - (part.end - part.begin)
        assert part.drop == max(zeros - missing, 0)
        assert part.is_by_row


@given(rows=st.integers(1, 9), features=st.integers(1, 60), block=st.integers(1, 70), data=st.data())
def test_blocks_cover_all_columns_once_and_lose_as_many_as_was_said(
    rows: int, features: int, block: int, data: st.DataObject
) -> None:
    drop = data.draw(st.integers(0, rows * features))
    parts = sparsegpt.unstructured_blocks(rows, features, drop, block)
    assert [at for part in parts for at in range(part.begin, part.end)] == list(range(features))
    assert sum(part.drop for part in parts) == drop
    for part in parts:
        size = (part.end - part.begin) * rows
        assert 0 <= part.drop <= size
        assert abs(part.drop - drop * size / (rows * features)) < 1
        assert part.end - part.begin <= block


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), block=st.integers(1, 16), data=st.data())
def test_any_layer_is_pruned_as_by_elimination(seed: int, block: int, data: st.DataObject) -> None:
    features, outputs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    rows, products = normal(outputs, features, seed=seed), products_of(features, seed=seed)
    parts = sparsegpt.unstructured_blocks(outputs, features, data.draw(st.integers(0, rows.size)), block)
    found, gone = sparsegpt.prune_rows(rows, products, parts, DAMP, block)
    expected, theirs = eliminated(rows, products, parts)
    np.testing.assert_array_equal(gone, theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_features_that_never_have_an_input_go_first(is_grouped: bool) -> None:
    x = normal(50, 8)
    x[:, [2, 5]] = 0.0
    rows = normal(4, 8, seed=1)
    rows[:, [2, 5]] = 100.0
    parts = sparsegpt.nm_blocks(8, 8, 1, 4) if is_grouped else sparsegpt.unstructured_blocks(4, 8, 8, 128)
    found, gone = sparsegpt.prune_rows(rows, x.T @ x, parts, DAMP, 128)
    assert gone[:, [2, 5]].all()
    assert np.count_nonzero(gone) == 8
    kept = [0, 1, 3, 4, 6, 7]
    np.testing.assert_allclose(found[:, kept], rows[:, kept])


def test_the_rest_makes_up_for_what_goes() -> None:
    x, rows = normal(64, 3) @ normal(3, 16, seed=1) + 0.1 * normal(64, 16, seed=3), normal(8, 16, seed=2)
    found, gone = sparsegpt.prune_rows(rows, x.T @ x, sparsegpt.unstructured_blocks(8, 16, 32, 128), DAMP, 128)
    zeroed = np.where(gone, 0.0, rows)
    assert np.square(x @ (found - rows).T).sum() < 0.2 * np.square(x @ (zeroed - rows).T).sum()


def test_the_last_column_left_costs_what_it_alone_puts_out() -> None:
    products = np.array([[4.0]])
    inverse, is_dead = sparsegpt.inverse_cholesky(products, 0.5)
    np.testing.assert_allclose(sparsegpt.scores(np.array([[3.0]]), inverse, is_dead), [[9.0 * 6.0]])


def test_the_root_is_upper_and_its_square_is_the_inverse() -> None:
    products = products_of(9)
    root, is_dead = sparsegpt.inverse_cholesky(products, DAMP)
    np.testing.assert_array_equal(root, np.triu(root))
    np.testing.assert_allclose(root.T @ root @ damped(products, DAMP), np.eye(9), atol=1e-8)
    assert not is_dead.any()


def test_fewer_examples_than_features_are_damped_until_they_do() -> None:
    x = normal(3, 12)
    rows = normal(2, 12, seed=1)
    found, gone = sparsegpt.prune_rows(rows, x.T @ x, sparsegpt.unstructured_blocks(2, 12, 12, 4), 1e-30, 4)
    assert np.isfinite(found).all()
    assert np.count_nonzero(gone) == 12


def test_products_that_no_damping_helps_are_refused() -> None:
    with pytest.raises(WorkError, match="Gram matrix of a layer's inputs is singular"):
        sparsegpt.inverse_cholesky(np.array([[1.0, 1e9], [1e9, 1.0]]), DAMP)


def test_damping_leaves_what_it_is_given_alone() -> None:
    products = products_of(4)
    before = products.copy()
    np.testing.assert_allclose(sparsegpt.dampen(products, 0.3), damped(products, 0.3))
    np.testing.assert_array_equal(products, before)
