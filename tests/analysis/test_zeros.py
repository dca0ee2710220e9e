"""Zeros counted block by block, beside NumPy on the whole array."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.analysis.tensor_io import count_zeros, nonzero_mask
from prunectl.errors import InputError
from tests.analysis.made import flat, in_memory, small_blocks
from tests.contract import Array

NUMPY = ["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
ML = [
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
SMALL = ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int4", "uint4", "int2", "uint2"]
BITS = {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
BLOCKS = st.sampled_from([16, 32, 64, 1 << 20])


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def from_bits(data: bytes, dtype: np.dtype[Any]) -> Array:
    """Any bits at all, with runs of zeros: NaN, infinities, denormals and minus zeros among them."""
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)


def zeros_of(array: Array) -> int:
    """Count them as Python sees them, one number at a time."""
    wide = array.astype(np.complex128) if array.dtype.kind not in "biu" else array
    return array.size - int(np.count_nonzero(wide))


BYTES = st.lists(st.one_of(st.binary(min_size=1, max_size=9), st.integers(1, 20).map(bytes)), max_size=30).map(b"".join)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", NUMPY + ML)
@settings(max_examples=30)
@given(data=BYTES, block=BLOCKS)
def test_a_flat_tensor_has_as_many_zeros_as_numpy_counts_in_wider_numbers(name: str, data: bytes, block: int) -> None:
    array = from_bits(data, dtype_of(name))
    with flat(array) as (model, tensor), small_blocks(block):
        assert count_zeros(model, tensor) == zeros_of(array)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ML + SMALL + ["f2"])
def test_every_bit_pattern_of_a_small_type_is_told_right(name: str) -> None:
    dtype = dtype_of(name)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    every = np.arange(1 << BITS.get(name, dtype.itemsize * 8)).astype(unsigned).view(dtype)
    assert np.array_equal(nonzero_mask(every), every.astype(np.float64) != 0)


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "c8", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3"])
def test_minus_zero_is_a_zero(name: str) -> None:
    model, tensor = in_memory(np.array([-0.0, 0.0, 1.0]).astype(dtype_of(name)))
    assert count_zeros(model, tensor) == 2


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "c8", *ML])
def test_nan_and_the_smallest_number_are_no_zeros(name: str) -> None:
    dtype = dtype_of(name)
    smallest = np.array([1], f"u{dtype.itemsize}").view(dtype)
    values = [smallest] if name == "float8_e3m4" else [smallest, np.array([np.nan]).astype(dtype)]
    model, tensor = in_memory(np.concatenate(values))
    assert count_zeros(model, tensor) == 0


@given(
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple), block=BLOCKS, seed=st.integers(0, 99), order=st.booleans()
)
def test_what_does_not_lie_flat_is_counted_in_any_order(
    shape: tuple[int, ...], block: int, seed: int, order: bool
) -> None:
    array = np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)
    model, tensor = in_memory(array.T if order else array)
    with small_blocks(block):
        assert count_zeros(model, tensor) == array.size - np.count_nonzero(array)


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), start=st.integers(0, 5), step=st.integers(1, 3), block=BLOCKS)
def test_a_view_counts_the_elements_that_it_shows(rows: int, columns: int, start: int, step: int, block: int) -> None:
    storage = np.random.default_rng(rows * columns).integers(0, 2, 200).astype(np.float32)
    strides = (step, rows * step + 1)
    shown = np.lib.stride_tricks.as_strided(storage[start:], (rows, columns), [4 * length for length in strides])
    with flat(storage) as (model, whole), small_blocks(block):
        view = replace(whole, shape=(rows, columns), start=start, strides=strides)
        assert count_zeros(model, view) == shown.size - np.count_nonzero(shown)
        run = replace(whole, shape=(rows, columns), start=start)
        part = storage[start : start + rows * columns]
        assert count_zeros(model, run) == part.size - np.count_nonzero(part)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), axis=st.integers(0, 1), block=BLOCKS)
def test_an_expanded_view_counts_each_element_as_often_as_it_shows_it(
    rows: int, columns: int, axis: int, block: int
) -> None:
    storage = np.random.default_rng(rows).integers(0, 2, columns).astype(np.float32)
    shape, strides = ((rows, columns), (0, 1)) if axis == 0 else ((columns, rows), (1, 0))
    with flat(storage) as (model, whole), small_blocks(block):
        view = replace(whole, shape=shape, strides=strides)
        assert count_zeros(model, view) == rows * (columns - np.count_nonzero(storage))


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "c8", "c16", "i4", "bfloat16"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_big_endian_numbers_are_counted_as_what_they_are(name: str, is_turned: bool) -> None:
    array = np.array([[0, 1, 256], [0, -0.0, 3]]).astype(dtype_of(name))
    width = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    swapped = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, width)[:, ::-1].tobytes()
    with flat(np.frombuffer(swapped, array.dtype).reshape(array.shape)) as (model, whole):
        turned = {"shape": (3, 2), "strides": (1, 3)} if is_turned else {}
        tensor = replace(whole, storage=replace(whole.storage, big_endian=True), **turned)
        assert np.array_equal(model.read(tensor), array.T if is_turned else array)
        assert count_zeros(model, tensor) == 3


def test_a_view_that_shows_its_storage_too_often_is_refused_in_a_sentence() -> None:
    with flat(np.zeros(4, np.float32)) as (model, whole):
        view = replace(whole, shape=(1000, 1000), strides=(1, 1))
        with pytest.raises(InputError, match="repeats its 4 stored elements 1000000 times"):
            count_zeros(model, view)


def test_a_tall_array_that_does_not_lie_flat_is_seen_in_pieces_of_many_rows() -> None:
    model, tensor = in_memory(np.zeros((3, 400_000), np.float32).T)
    with small_blocks(1 << 12):
        assert count_zeros(model, tensor) == 1_200_000
