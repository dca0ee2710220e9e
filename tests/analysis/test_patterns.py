"""Groups that follow a pattern, beside loops that anybody can check."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.analysis.patterns import BlockPattern, ChannelPattern, NMPattern, Pattern, parse
from prunectl.errors import UsageError
from tests.analysis.made import in_memory, thinned
from tests.contract import Array

LAYOUTS = {"out-in": 0, "in-out": 1, "out-in-h-w": 0, "h-w-in-out": 3, "in-out-h-w": 1}
"""How kernels lie, and where their outputs are."""


def shape_of(layout: str, outputs: int, inputs: int, height: int = 2, width: int = 3) -> tuple[int, ...]:
    lengths = {"out": outputs, "in": inputs, "h": height, "w": width}
    return tuple(lengths[axis] for axis in layout.split("-"))


def inputs_of(layout: str) -> int:
    return layout.split("-").index("in")


def tally(array: Array, layout: str, pattern: Pattern) -> tuple[int, int] | None:
    _, tensor = in_memory(array, out_axis=LAYOUTS[layout], in_axis=inputs_of(layout))
    return pattern.count_conforming(tensor, array != 0)


def groups_by_hand(array: Array, layout: str, zeros: int, group: int) -> tuple[int, int]:
    """For each output and each place of the window, walk along the inputs."""
    axis = inputs_of(layout)
    others = [range(length) for place, length in enumerate(array.shape) if place != axis]
    good = total = 0
    for rest in itertools.product(*others):
        for begin in range(0, array.shape[axis], group):
            index = [*rest[:axis], slice(begin, begin + group), *rest[axis:]]
            good += np.count_nonzero(array[tuple(index)] == 0) >= zeros
            total += 1
    return int(good), total


def blocks_by_hand(array: Array, layout: str, rows: int, columns: int) -> tuple[int, int]:
    """Lay inputs against outputs, and look at each block, cut short at the edges."""
    outputs = array.shape[LAYOUTS[layout]]
    matrix = np.stack([array.take(channel, LAYOUTS[layout]).reshape(-1) for channel in range(outputs)], axis=1)
    good = total = 0
    for top in range(0, len(matrix), rows):
        for left in range(0, outputs, columns):
            block = matrix[top : top + rows, left : left + columns] != 0
            good += block.all() or not block.any()
            total += 1
    return int(good), total


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    seed=st.integers(0, 999), outputs=st.integers(1, 5), groups=st.integers(1, 3), zeros_of=st.sampled_from([1, 2, 3])
)
def test_zeros_of_a_group_lie_along_the_inputs(
    layout: str, seed: int, outputs: int, groups: int, zeros_of: int
) -> None:
    array = thinned(shape_of(layout, outputs, 4 * groups), seed)
    assert tally(array, layout, NMPattern(zeros_of, 4)) == groups_by_hand(array, layout, zeros_of, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    seed=st.integers(0, 999),
    outputs=st.integers(1, 7),
    inputs=st.integers(1, 7),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
)
def test_blocks_lie_on_inputs_by_outputs(
    layout: str, seed: int, outputs: int, inputs: int, rows: int, columns: int
) -> None:
    array = thinned(shape_of(layout, outputs, inputs), seed)
    assert tally(array, layout, BlockPattern(rows, columns)) == blocks_by_hand(array, layout, rows, columns)


def test_more_zeros_than_asked_for_follow_the_pattern_too() -> None:
    array = np.array([[1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]], np.float32)
    assert tally(array, "out-in", NMPattern(2, 4)) == (2, 3)


def test_inputs_that_do_not_divide_into_groups_have_no_share() -> None:
    assert tally(np.zeros((2, 6), np.float32), "out-in", NMPattern(2, 4)) is None


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), BlockPattern(2, 2)])
def test_a_tensor_that_says_no_outputs_has_no_share(pattern: Pattern) -> None:
    array = np.zeros((4, 4), np.float32)
    _, tensor = in_memory(array)
    assert pattern.count_conforming(tensor, array != 0) is None


def test_patterns_are_parsed_from_what_users_write() -> None:
    assert parse("2:4") == NMPattern(2, 4)
    assert parse("8:8") == NMPattern(8, 8)
    assert parse("block:1x16") == BlockPattern(1, 16)
    assert isinstance(parse("channel"), ChannelPattern)


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "0:4", "2:0", "-1:4", "block", "block:4", "block:0x4", "filter"])
def test_anything_else_is_no_pattern(text: str) -> None:
    with pytest.raises(UsageError, match="is not a pattern"):
        parse(text)


def test_more_zeros_than_weights_are_turned_around_in_the_hint() -> None:
    with pytest.raises(UsageError, match="needs 4 zeros in every 2 weights") as caught:
        parse("4:2")
    assert caught.value.hint == "write 2:4"
