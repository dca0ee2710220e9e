"""What is found slab by slab, beside the same on the whole array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.analysis.patterns import BlockPattern, ChannelPattern, NMPattern, Pattern, structured_sparsity
from prunectl.analysis.tensor_io import iter_slabs
from tests.analysis.made import flat, in_memory, small_blocks, thinned
from tests.analysis.test_patterns import LAYOUTS, blocks_by_hand, groups_by_hand, inputs_of, shape_of
from tests.contract import Array

PATTERNS: list[Pattern | None] = [
    None,
    *(
        NMPattern(2, 4),
        NMPattern(1, 2),
        BlockPattern(1, 4),
        BlockPattern(4, 1),
        BlockPattern(3, 2),
        BlockPattern(64, 64),
        ChannelPattern(),
    ),
]


def by_hand(array: Array, layout: str, pattern: Pattern | None) -> tuple[int, float | None]:
    """Dead channels, and the share of groups that follow a pattern."""
    channels = np.moveaxis(array, LAYOUTS[layout], 0).reshape(array.shape[LAYOUTS[layout]], -1) != 0
    dead = int(np.count_nonzero(~channels.any(axis=1)))
    if isinstance(pattern, NMPattern):
        if array.shape[inputs_of(layout)] % pattern.group:
            return dead, None
        good, total = groups_by_hand(array, layout, pattern.zeros, pattern.group)
    elif isinstance(pattern, BlockPattern):
        good, total = blocks_by_hand(array, layout, pattern.rows, pattern.columns)
    elif isinstance(pattern, ChannelPattern):
        good, total = int(np.count_nonzero(channels.all(axis=1) | ~channels.any(axis=1))), len(channels)
    else:
        return dead, None
    return dead, good / total


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    pattern=st.sampled_from(PATTERNS),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    seed=st.integers(0, 999),
    block=st.sampled_from([16, 64, 256, 1 << 20]),
    is_flat=st.booleans(),
)
def test_slabs_find_what_the_whole_array_shows(
    layout: str, pattern: Pattern | None, outputs: int, inputs: int, seed: int, block: int, is_flat: bool
) -> None:
    array = thinned(shape_of(layout, outputs, inputs), seed, keep=0.8)
    axes = {"out_axis": LAYOUTS[layout], "in_axis": inputs_of(layout)}
    with flat(array, **axes) as stored, small_blocks(block):
        model, tensor = stored if is_flat else in_memory(array, **axes)
        found = structured_sparsity(model, tensor, LAYOUTS[layout], pattern)
    assert (found.dead_channels, found.conforming) == by_hand(array, layout, pattern)


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), aligned=st.integers(1, 5))
def test_slabs_cover_a_tensor_once_in_order_and_begin_where_groups_do(shape: tuple[int, ...], aligned: int) -> None:
    array = thinned(shape)
    with flat(array) as (model, tensor), small_blocks(16):
        found = [(begin, slab.copy()) for begin, slab in iter_slabs(model, tensor, aligned)]
    assert np.array_equal(np.concatenate([slab for _, slab in found]), array)
    assert all(begin % aligned == 0 for begin, _ in found)
    assert [begin for begin, _ in found] == list(np.cumsum([0, *(len(slab) for _, slab in found[:-1])]))


def test_a_transposed_view_is_seen_as_it_shows_itself() -> None:
    array = thinned((8, 12), 3)
    with flat(array, out_axis=0, in_axis=1) as (model, tensor), small_blocks(32):
        view = replace(tensor, shape=(12, 8), strides=(1, 12))
        found = structured_sparsity(model, view, 0, NMPattern(2, 4))
    assert (found.dead_channels, found.conforming) == by_hand(np.ascontiguousarray(array.T), "out-in", NMPattern(2, 4))


def test_a_tensor_without_elements_has_no_slabs() -> None:
    for shape in ((0, 4), (4, 0)):
        model, tensor = in_memory(np.zeros(shape, np.float32))
        assert list(iter_slabs(model, tensor, 1)) == []
