"""Small runs of bytes that are read together are those that each would be read as alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.errors import InputError
from prunectl.formats.extents import Extent, blocks, read_ahead

BYTES = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
_KIND = np.dtype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "a", folder / "b"]
    for path, array in zip(paths, (BYTES, BYTES[::-1]), strict=True):
        path.write_bytes(array.tobytes())
    return paths


@given(
    data=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, BYTES.size), st.integers(0, 100_000)), min_size=1, max_size=30
    ),
    is_in_order=st.booleans(),
)
def test_runs_in_any_order_and_of_any_size_are_read_as_they_are(
    files: list[Path], data: list[tuple[int, int, int]], *, is_in_order: bool
) -> None:
    with read_ahead():
        for number, offset, size in sorted(data) if is_in_order else data:
            expected = (BYTES, BYTES[::-1])[number][offset : offset + size]
            extent = Extent(files[number], offset, expected.size)
            found = [block.copy() for block in blocks(extent, _KIND)]
            np.testing.assert_array_equal(np.concatenate(found) if found else np.zeros(0, np.uint8), expected)


def test_neighbours_are_read_whole_and_writing_to_one_leaves_the_others(files: list[Path]) -> None:
    with read_ahead():
        for begin in range(0, 300_000, 1000):
            (block,) = blocks(Extent(files[0], begin, 1000), _KIND)
            np.testing.assert_array_equal(block, BYTES[begin : begin + 1000])
            block[:] = 0
        (again,) = blocks(Extent(files[0], 299_000, 1000), _KIND)
        np.testing.assert_array_equal(again, BYTES[299_000:300_000])


def test_what_was_changed_is_read_anew_outside(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for number in range(3):
        path.write_bytes(bytes([number]) * 100)
        with read_ahead():
            assert [next(blocks(Extent(path, begin, 10), _KIND))[0] for begin in (0, 10, 20)] == [number] * 3


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    with read_ahead(), pytest.raises(InputError, match="was truncated while prunectl was reading it"):
        list(blocks(Extent(path, 50, 60), _KIND))
