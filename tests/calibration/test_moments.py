"""Sums, squares and products of what weights meet, held against NumPy over all columns at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from prunectl.calibration import statistics
from prunectl.calibration.statistics import CrossStatistics, InputStatistics
from prunectl.training.backend import WeightUse
from tests.calibration.by_hand import every_column, normal, of_outputs, shown, use_of
from tests.calibration.layers import LAYERS, made
from tests.contract import Array

MOMENTS: dict[str, tuple[Callable[..., tuple[Array, int]], Callable[[Array], Array]]] = {
    "squares": (statistics.sum_squares, lambda seen: np.square(seen).sum(axis=0)),
    "sizes": (statistics.sum_abs, lambda seen: np.abs(seen).sum(axis=0)),
    "sums": (statistics.sum_inputs, lambda seen: seen.sum(axis=0)),
    "products": (statistics.gram, lambda seen: np.einsum("pgf,pgh->gfh", seen, seen)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", MOMENTS)
def test_what_is_added_up_is_what_all_columns_add_up_to(name: str, kind: str) -> None:
    ours, theirs = MOMENTS[name]
    layer, shape = made(kind)
    x, use, kernel = normal(5, *shape).astype("f4"), use_of(layer), tuple(layer.weight.shape)
    total, count = ours(shown(x, use), kernel)
    seen = every_column(x.astype("f8"), use, kernel)
    assert total.dtype == np.float64
    assert count == len(seen)
    np.testing.assert_allclose(total, theirs(seen), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(
    parts=st.lists(
        npst.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=st.integers(-8, 8)),
        min_size=1,
        max_size=4,
    ),
    name=st.sampled_from(sorted(MOMENTS)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_sights_add_up_whatever_batches_they_come_in(parts: list[Array], name: str, groups: int) -> None:
    ours, theirs = MOMENTS[name]
    use, kernel, found = WeightUse(0, 1, groups), (groups, 4 // groups), InputStatistics()
    for part in parts:
        found.add(shown(part, use), kernel, ours)
    whole = np.concatenate(parts).reshape(-1, groups, 4 // groups).astype("f8")
    np.testing.assert_array_equal(found.totals[None], theirs(whole))
    assert found.counts == {None: len(whole)}
    assert found.uses == {None: use}


def test_parts_of_a_tensor_are_counted_apart() -> None:
    found, use = InputStatistics(), WeightUse(0, 1)
    first, second = normal(3, 4), normal(8, 4, seed=1)
    found.add(shown(first, of_outputs(use, 0, 2)), (6, 4), statistics.sum_inputs)
    found.add(shown(second, of_outputs(use, 2, 6)), (6, 4), statistics.sum_inputs)
    found.add(shown(first, of_outputs(use, 0, 2)), (6, 4), statistics.sum_inputs)
    assert found.counts == {(0, 2): 6, (2, 6): 8}
    np.testing.assert_allclose(found.totals[0, 2], 2 * first.sum(axis=0)[None])
    np.testing.assert_allclose(found.totals[2, 6], second.sum(axis=0)[None])


@pytest.mark.parametrize("kind", LAYERS)
def test_pairs_tell_how_inputs_now_go_with_inputs_before(kind: str) -> None:
    layer, shape = made(kind)
    use, kernel = use_of(layer), tuple(layer.weight.shape)
    now, before = normal(4, *shape).astype("f4"), normal(4, *shape, seed=1).astype("f4")
    found = CrossStatistics(use)
    for rows in (slice(0, 3), slice(3, 4)):
        found.add(shown(now[rows], use), shown(before[rows], use), kernel)
    mine, theirs = every_column(now.astype("f8"), use, kernel), every_column(before.astype("f8"), use, kernel)
    assert found.count == len(mine)
    np.testing.assert_allclose(found.sum_pruned, mine.sum(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.sum_dense, theirs.sum(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.gram, np.einsum("pgf,pgh->gfh", mine, mine), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.cross_gram, np.einsum("pgf,pgh->gfh", mine, theirs), rtol=1e-4, atol=1e-4)
