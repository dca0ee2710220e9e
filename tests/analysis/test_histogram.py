"""Magnitudes counted by powers of two, beside NumPy's own histogram."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.analysis.stats import Histogram, histogram
from tests.analysis.made import in_memory, small_blocks
from tests.contract import Array


def seen(array: Array) -> Histogram:
    model, tensor = in_memory(array)
    with small_blocks(64):
        return histogram(model, [tensor])


FLOATS = st.lists(st.floats(allow_subnormal=True) | st.just(0.0), max_size=40).map(np.array)


@given(FLOATS)
def test_every_number_is_in_one_place(array: Array) -> None:
    found = seen(array)
    assert found.zero == np.count_nonzero(array == 0)
    assert found.not_finite == np.count_nonzero(~np.isfinite(array))
    assert found.zero + found.below + sum(found.counts) + found.not_finite == array.size
    assert all(map(math.isfinite, found.edges))


@given(FLOATS)
def test_the_bins_are_those_that_numpy_fills(array: Array) -> None:
    found = seen(array)
    live = np.abs(array[np.isfinite(array) & (array != 0)])
    if not live.size:
        assert found.edges == found.counts == ()
        return
    assert len(found.edges) == len(found.counts) + 1 <= 17
    assert found.edges[0] > 0
    assert found.below == np.count_nonzero(live < found.edges[0])
    inside = [np.count_nonzero((live >= low) & (live < high)) for low, high in itertools.pairwise(found.edges)]
    inside[-1] += np.count_nonzero(live == sys.float_info.max) if found.edges[-1] == sys.float_info.max else 0
    assert list(found.counts) == inside
    assert found.counts[-1] > 0


def test_an_edge_is_the_first_number_of_its_bin() -> None:
    found = seen(np.array([1.0, 1.5, np.nextafter(2, 0), 2.0, -4.0]))
    assert (found.edges, found.counts) == ((1.0, 2.0, 4.0, 8.0), (3, 1, 1))


def test_the_biggest_and_the_smallest_float_have_a_bin() -> None:
    biggest = seen(np.array([sys.float_info.max, 1e308]))
    assert biggest.edges == (2.0**1023, sys.float_info.max)
    assert biggest.counts == (2,)
    assert seen(np.array([5e-324])).edges == (5e-324, 1e-323)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_small_floats_count_as_doubles_do(dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal(500).astype(dtype)
    assert seen(array) == seen(array.astype(np.float64))


def test_several_tensors_are_counted_together() -> None:
    first, second = np.array([1.0, 0, 8]), np.array([2.0, np.inf])
    model, tensor = in_memory(first)
    other, another = in_memory(second)
    arrays = {id(tensor): first, id(another): second}
    both = type(model)(model.path, "made", (tensor, another), model.about, (), lambda found: arrays[id(found)])
    assert histogram(both, both.tensors) == seen(np.concatenate([first, second]))
    assert other.format == "made"
