"""Protobuf's wire format, written by hand from its specification."""

from __future__ import annotations

import numpy as np
import pytest

from prunectl.formats import protobuf
from prunectl.formats.protobuf import BYTES, FIXED32, FIXED64, VARINT, Field, WireError


def fields(data: bytes) -> list[Field]:
    return list(protobuf.fields(memoryview(data)))


def test_each_type_of_field_says_its_value_and_where_its_payload_lies() -> None:
    data = b"\x08\x96\x01" + b"\x12\x02ab" + b"\x1d\x01\x00\x00\x00" + b"\x21" + (7).to_bytes(8, "little")
    assert fields(data) == [
        Field(1, VARINT, 150, 1, 3),
        Field(2, BYTES, 2, 5, 7),
        Field(3, FIXED32, 1, 8, 12),
        Field(4, FIXED64, 7, 13, 21),
    ]


def test_a_part_of_a_buffer_is_a_message_of_its_own() -> None:
    data = memoryview(b"\x12\x02\x08\x05\xff")
    (outer,) = protobuf.fields(data, 0, 4)
    assert list(protobuf.fields(data, outer.begin, outer.end)) == [Field(1, VARINT, 5, 3, 4)]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x00\x01", "field 0"),
        (b"\x0b", "wire type 3"),
        (b"\x0f", "wire type 7"),
        (b"\x12\x05ab", "past the end"),
        (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "past the end"),
        (b"\x1d\x01\x00", "past the end"),
        (b"\x08\x80", "without an end"),
        (b"\x08" + b"\xff" * 11, "without an end"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        fields(data)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (5, 5), ((1 << 64) - 1, -1), (1 << 63, -(1 << 63))])
def test_a_negative_number_is_the_upper_half_of_64_bits(value: int, expected: int) -> None:
    assert protobuf.signed(value) == expected


def test_numbers_of_more_than_64_bits_lose_those_above() -> None:
    assert fields(b"\x08" + b"\xff" * 9 + b"\x7f")[0].value == (1 << 64) - 1


def test_a_list_is_read_packed_or_not() -> None:
    data = memoryview(b"\x0a\x03\x05\xac\x02\x08\x07")
    assert [protobuf.packed(data, field) for field in protobuf.fields(data)] == [[5, 300], [7]]


def test_all_numbers_of_a_packed_field_are_read_at_once() -> None:
    raw = b"\x05\xac\x02\x00" + b"\xff" * 9 + b"\x01"
    assert protobuf.varints(raw).tolist() == [5, 300, 0, (1 << 64) - 1]
    assert protobuf.varints(b"").dtype == np.uint64
    assert protobuf.varints(b"").size == 0


@pytest.mark.parametrize("raw", [b"\x05\x80", b"\x80" * 10 + b"\x01"])
def test_a_packed_number_that_does_not_end_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError, match="without an end"):
        protobuf.varints(raw)


def test_text_that_is_not_utf8_is_shown_escaped() -> None:
    data = memoryview(b"\x0a\x02a\xff")
    assert protobuf.text(data, next(protobuf.fields(data))) == "a\\xff"
