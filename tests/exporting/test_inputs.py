"""What --input says, and what cannot be said."""

from __future__ import annotations

import pytest

from prunectl.channels.lengths import InputOption, parse_input
from prunectl.errors import UsageError
from prunectl.exporting.job import InputSpec, apply_input_options


def parse(text: str) -> InputOption:
    return parse_input(text, "1,3,8,8")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("x:1,3,8,8:f32", InputOption("x", (1, 3, 8, 8), "float32")),
        ("?,3", InputOption("", (None, 3), "")),
        ("x:-1,3", InputOption("x", (None, 3), "")),
        ("2,3:i64", InputOption("", (2, 3), "int64")),
        ("ids:?,?:int32", InputOption("ids", (None, None), "int32")),
        ("serving_default_x:0:1x3x8", InputOption("serving_default_x:0", (1, 3, 8), "")),
        ("1, 128:bf16", InputOption("", (1, 128), "bfloat16")),
    ],
)
def test_a_name_and_a_type_may_be_left_out(word: str, said: InputOption) -> None:
    assert parse(word) == said


@pytest.mark.parametrize("word", ["x", "x:0,3", "x:1,3:q8", "a:b:f32", "x:1,,2", ""])
def test_nonsense_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="--input"):
        parse(word)


def test_inputs_are_told_by_name_or_else_by_order() -> None:
    flows = (InputSpec("a", (None, 2), "float32"), InputSpec("b", (None, 3), "float32"))
    by_name = apply_input_options(flows, [parse("b:1,3"), parse("a:1,2")])
    assert [(flow.name, flow.shape) for flow in by_name] == [("a", (1, 2)), ("b", (1, 3))]
    by_order = apply_input_options(flows, [parse("left:?,2"), parse("4,3")])
    assert [(flow.name, flow.shape) for flow in by_order] == [("left", (None, 2)), ("b", (4, 3))]


def test_what_the_model_says_stays() -> None:
    flows = (InputSpec("a", (None, 2), "float32"),)
    for word, said in (
        ("a:1,3", r"has the shape \?,2, but --input gives 1,3"),
        ("a:1,?", r"has the shape \?,2, but --input gives 1,\?"),
        ("a:2", r"has the shape \?,2, but --input gives 2"),
        ("a:1,2:f16", "is float32, but --input gives float16"),
    ):
        with pytest.raises(UsageError, match=f"the input a of the model {said}"):
            apply_input_options(flows, [parse(word)])
    with pytest.raises(UsageError, match=r"has 1 input \(a\), but --input gives 2"):
        apply_input_options(flows, [parse("a:1,2"), parse("b:1,2")])
