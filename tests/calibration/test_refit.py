"""Fitting what stays, held against least squares by NumPy on the examples themselves."""

from __future__ import annotations

import numpy as np
import pytest

from prunectl.calibration.least_squares import least_squares_refit
from prunectl.calibration.reconstruct import center
from prunectl.calibration.statistics import CrossStatistics
from prunectl.training.backend import WeightUse
from tests.calibration.by_hand import normal, shown
from tests.contract import Array

OUTPUTS, FEATURES, EXAMPLES = 5, 8, 60


def layer(seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Rows, what is kept of them, and inputs now and before."""
    before = normal(EXAMPLES, FEATURES, seed=seed) @ normal(FEATURES, FEATURES, seed=seed + 1) + 1.0
    now = before + 0.3 * normal(EXAMPLES, FEATURES, seed=seed + 2)
    kept = normal(OUTPUTS, FEATURES, seed=seed + 3) > 0
    kept[3], kept[4] = False, True
    return normal(OUTPUTS, FEATURES, seed=seed + 4), kept, now, before


def refitted(rows: Array, kept: Array, now: Array, before: Array, damp: float) -> Array:
    return least_squares_refit(rows, now.T @ now, now.T @ before, kept, damp)


def pulled(row: Array, at: Array, now: Array, before: Array, pull: Array) -> Array:
    """Least squares with a ridge towards the old numbers: as many examples more, one for each feature."""
    ridge = np.sqrt(pull[at])
    inputs = np.concatenate([now[:, at], np.diag(ridge)])
    wanted = np.concatenate([before @ row, ridge * row[at]])
    return np.asarray(np.linalg.lstsq(inputs, wanted, rcond=None)[0])


@pytest.mark.parametrize("damp", [1e-3, 0.01, 1.0, 100.0])
def test_it_is_least_squares_with_a_ridge_towards_the_old_weights(damp: float) -> None:
    rows, kept, now, before = layer()
    found = refitted(rows, kept, now, before, damp)
    pull = np.full(FEATURES, damp * np.square(now).sum(axis=0).mean())
    for number, keep in enumerate(kept):
        at = np.flatnonzero(keep)
        np.testing.assert_allclose(found[number, at], pulled(rows[number], at, now, before, pull), rtol=1e-6, atol=1e-8)
    assert not found[~kept].any()


@pytest.mark.parametrize("seed", range(3))
def test_where_it_starts_does_not_matter(seed: int) -> None:
    rows, kept, now, before = layer(seed)
    among, across = now.T @ now, now.T @ before
    found = least_squares_refit(rows, among, across, kept, 0.01, initial=100 * normal(*rows.shape, seed=seed + 9))
    np.testing.assert_allclose(found, least_squares_refit(rows, among, across, kept, 0.01), rtol=1e-7, atol=1e-9)


def test_many_features_that_depend_on_each_other_are_fitted_as_few() -> None:
    now = normal(900, 20) @ normal(20, 300, seed=1) + 0.01 * normal(900, 300, seed=2)
    rows, kept = normal(4, 300, seed=3), normal(4, 300, seed=4) > 0
    found = refitted(rows, kept, now, now, 0.01)
    ridge = np.sqrt(0.01 * np.square(now).sum(axis=0).mean())
    for row, keep, ours in zip(rows, kept, found, strict=True):
        best = pulled(row, np.flatnonzero(keep), now, now, np.full(300, ridge**2))
        # As near to the dense outputs and to the old weights as can be, but for a hundredth.
        error, least = (
            np.hypot(np.linalg.norm(now[:, keep] @ weights - now @ row), ridge * np.linalg.norm(weights - row[keep]))
            for weights in (ours[keep], best)
        )
        assert error <= 1.01 * least


def test_without_damping_it_is_least_squares_on_what_is_kept() -> None:
    rows, kept, now, before = layer()
    found = refitted(rows, kept, now, before, 1e-14)
    for number, keep in enumerate(kept):
        expected = np.linalg.lstsq(now[:, keep], before @ rows[number], rcond=None)[0]
        np.testing.assert_allclose(found[number, keep], expected, rtol=1e-6, atol=1e-8)


def test_with_all_damping_in_the_world_it_is_what_it_was() -> None:
    rows, kept, now, before = layer()
    np.testing.assert_allclose(refitted(rows, kept, now, before, 1e12), np.where(kept, rows, 0.0), atol=1e-8)


def test_a_row_of_which_all_stays_stays_if_its_inputs_did() -> None:
    rows, _, _, before = layer()
    everything = np.ones(rows.shape, bool)
    np.testing.assert_allclose(refitted(rows, everything, before, before, 0.01), rows, rtol=1e-8, atol=1e-8)


def test_a_weight_without_any_input_stays_as_it_was() -> None:
    rows, _, now, before = layer()
    now[:, 2] = before[:, 2] = 0.0
    found = refitted(rows, np.ones(rows.shape, bool), now, before, 0.01)
    np.testing.assert_allclose(found[:, 2], rows[:, 2])


def test_centred_products_are_those_of_a_regression_with_an_intercept() -> None:
    rows, kept, now, before = layer()
    use = WeightUse(0, 1)
    pairs = CrossStatistics(use)
    pairs.add(shown(now, use), shown(before, use), rows.shape)
    among = center(pairs.gram, pairs.sum_pruned, pairs.sum_pruned, pairs.count)[0]
    across = center(pairs.cross_gram, pairs.sum_pruned, pairs.sum_dense, pairs.count)[0]
    np.testing.assert_allclose(among, np.cov(now.T, ddof=0) * EXAMPLES, rtol=1e-3, atol=1e-3)
    found = least_squares_refit(rows, among, across, kept, 1e-12)
    for number, keep in enumerate(kept):
        inputs = np.concatenate([now[:, keep], np.ones((EXAMPLES, 1))], axis=1)
        expected = np.linalg.lstsq(inputs, before @ rows[number], rcond=None)[0][:-1]
        np.testing.assert_allclose(found[number, keep], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("damp", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_never_farther_off_than_before(seed: int, damp: float) -> None:
    rows, kept, now, before = layer(seed)
    zeroed, found = np.where(kept, rows, 0.0), refitted(rows, kept, now, before, damp)
    after = np.square(now @ found.T - before @ rows.T).sum(axis=0)
    assert (after <= np.square(now @ zeroed.T - before @ rows.T).sum(axis=0) * (1 + 1e-9)).all()


def test_rows_without_a_single_solution_keep_to_their_weights_among_others_that_have_one() -> None:
    gram = np.diag(np.arange(1.0, 41.0))
    # Two features that are one: of both together only the sum is known.
    gram[:2, :2] = 1.0
    rows, kept = normal(70, 40), np.random.default_rng(1).random((70, 40)) < 0.5
    assert {tuple(pair) for pair in kept[:, :2].tolist()} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    found = least_squares_refit(rows, gram, gram, kept, 0.0)
    expected = np.where(kept, rows, 0.0)
    alone = kept[:, :2].sum(axis=1) == 1
    expected[alone, :2] = np.where(kept[alone, :2], rows[alone, :2].sum(axis=1, keepdims=True), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
