"""Numbers and names as people read and write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl import units as words
from prunectl.errors import UsageError
from prunectl.units import Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5242880", 5242880),
        ("400KB", 400_000),
        ("400kb", 400_000),
        ("400k", 400_000),
        ("5MiB", 5 << 20),
        ("1.5 MB", 1_500_000),
        ("1.13MB", 1_130_000),
        ("2GB", 2_000_000_000),
        ("0", 0),
        ("7 B", 7),
    ],
)
def test_a_size_is_understood(text: str, expected: int) -> None:
    assert words.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "big", "-5", "5XB", "5 M B", "1e6", "MB", "5.MB", "½MB"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        words.parse_size(text)
    assert "400KB" in caught.value.hint


@given(st.integers(0, 1 << 60))
def test_bytes_come_back_as_they_were_written(value: int) -> None:
    assert words.parse_size(words.nbytes(value, Units.BYTES)) == value


@given(st.integers(1, 1 << 59), st.sampled_from([Units.SI, Units.IEC]))
def test_a_size_is_written_in_at_most_four_digits_and_hardly_off(value: int, units: Units) -> None:
    text = words.nbytes(value, units)
    if text.split()[1] in {"PB", "PiB"}:
        return
    assert abs(words.parse_size(text) - value) <= value * 0.0051 + 1
    assert sum(letter.isdigit() for letter in text.split()[0]) <= 4


@given(st.floats(0, 1))
def test_a_ratio_comes_back_as_it_was_written(value: float) -> None:
    assert words.parse_ratio(f"{value:.12f}") == pytest.approx(value, abs=1e-12)
    assert words.parse_ratio(f"{value * 100:.12f}%") == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("text", "hint"), [("80", "write 80% or 0.8"), ("1.5", "write 1.5% or 0.015"), ("180", "80%")])
def test_a_ratio_out_of_range_is_answered_with_what_was_meant(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        words.parse_ratio(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["", "half", "-0.5", "80 percent", "0,8", "nan", "inf"])
def test_what_is_no_ratio_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        words.parse_ratio(text)


@given(st.floats(0, 1))
def test_a_percentage_never_rounds_to_all_or_nothing(value: float) -> None:
    shown = words.percent(value)
    assert (shown == "0.0 %") == (value == 0)
    assert (shown == "100.0 %") == (value == 1)


@given(st.text())
def test_what_is_shown_has_nothing_that_moves_a_cursor(text: str) -> None:
    shown = words.printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
