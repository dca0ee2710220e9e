"""What --input says, and what cannot be said."""

from __future__ import annotations

import pytest

from prunectl.errors import UsageError
from prunectl.exporting.live import Flow
from prunectl.exporting.said import Said, parse, settled


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("x:1,3,8,8:f32", Said("x", (1, 3, 8, 8), "float32")),
        ("?,3", Said("", (None, 3), "")),
        ("x:-1,3", Said("x", (None, 3), "")),
        ("2,3:i64", Said("", (2, 3), "int64")),
        ("ids:?,?:int32", Said("ids", (None, None), "int32")),
    ],
)
def test_a_name_and_a_type_may_be_left_out(word: str, said: Said) -> None:
    assert parse(word) == said


@pytest.mark.parametrize("word", ["x", "x:0,3", "x:1,3:q8", "a:b:1,2:f32", "x:1,,2", ""])
def test_nonsense_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="--input"):
        parse(word)


def test_inputs_are_told_by_name_or_else_by_order() -> None:
    flows = (Flow("a", (None, 2), "float32"), Flow("b", (None, 3), "float32"))
    by_name = settled(flows, [parse("b:1,3"), parse("a:1,2")])
    assert [(flow.name, flow.shape) for flow in by_name] == [("a", (1, 2)), ("b", (1, 3))]
    by_order = settled(flows, [parse("left:?,2"), parse("4,3")])
    assert [(flow.name, flow.shape) for flow in by_order] == [("left", (None, 2)), ("b", (4, 3))]


def test_what_the_model_says_stays() -> None:
    flows = (Flow("a", (None, 2), "float32"),)
    for word in ("a:1,3", "a:1,?", "a:1,2:f16", "a:2"):
        with pytest.raises(UsageError, match="the input a of the model is"):
            settled(flows, [parse(word)])
    with pytest.raises(UsageError, match="has 1 inputs"):
        settled(flows, [parse("a:1,2"), parse("b:1,2")])
