"""Which channels go together, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prunectl.channels.groups import ChannelGroups
from tests.channels.made import helper, locks, model, op, places, seen

Weights = dict[str, tuple[int, ...]]
Numbers = dict[str, Sequence[int]]
LAST = op("Conv", "last_in last", "y")
"""A convolution at the end, whose outputs are those of the network."""


def between(
    nodes: list[Any],
    tmp_path: Path,
    weights: Weights | None = None,
    numbers: Numbers | None = None,
    channels: int = 4,
    width: int | None = None,
) -> ChannelGroups:
    """What is seen of a convolution `first`, some nodes from `a` to `last_in`, and a convolution `last`."""
    own = {"first": (channels, 3, 3, 3), "last": (2, width or channels, 1, 1)} | (weights or {})
    first = op("Conv", "x first", "a", pads=[1, 1, 1, 1])
    return seen(model([first, *nodes, LAST], own, numbers=numbers), tmp_path)


def test_a_convolution_gives_new_channels_and_reads_those_of_its_input(tmp_path: Path) -> None:
    found = between([op("Relu", "a", "last_in")], tmp_path)
    assert places(found, "first") == {"first[0]", "last[1]"}
    assert [len(family) for family in found.groups] == [4, 2]
    assert locks(found) == {"last": "y is an output of the network"}


def test_a_bias_goes_with_its_filters(tmp_path: Path) -> None:
    found = between([op("Conv", "a middle bias", "last_in")], tmp_path, {"middle": (5, 4, 1, 1), "bias": (5,)}, width=5)
    assert places(found, "middle") == {"middle[0]", "bias[0]", "last[1]"}


@pytest.mark.parametrize("kind", ["Add", "Mul", "Max", "Sub", "Div"])
def test_what_is_joined_element_by_element_goes_together(kind: str, tmp_path: Path) -> None:
    found = between([op("Conv", "a second", "b"), op(kind, "a b", "last_in")], tmp_path, {"second": (4, 4, 1, 1)})
    assert places(found, "first") == {"first[0]", "second[0]", "second[1]", "last[1]"}


def test_a_number_for_each_channel_goes_with_it_whichever_way_it_is_broadcast(tmp_path: Path) -> None:
    nodes = [
        op("Mul", "a scale", "b"),
        op("Add", "shift b", "c"),
        op("PRelu", "c slope", "d"),
        op("Add", "d one", "last_in"),
    ]
    weights = {"scale": (4, 1, 1), "shift": (1, 4, 1, 1), "slope": (4, 1, 1), "one": (1,)}
    assert places(between(nodes, tmp_path, weights), "first") == {
        "first[0]",
        "scale[0]",
        "shift[1]",
        "slope[0]",
        "last[1]",
    }


def test_weights_are_followed_through_what_hands_them_on(tmp_path: Path) -> None:
    nodes = [
        op("Transpose", "turned", "straight", perm=[1, 0, 2, 3]),
        op("Conv", "a straight", "b"),
        op("Unsqueeze", "flat axes", "tall"),
        op("Mul", "b tall", "last_in"),
    ]
    found = between(nodes, tmp_path, {"turned": (4, 5, 1, 1), "flat": (5,)}, {"axes": [1, 2]}, width=5)
    assert places(found, "turned") == {"turned[1]", "flat[0]", "last[1]"}
    assert places(found, "first") == {"first[0]", "turned[0]"}


def test_batch_normalisation_has_four_numbers_for_each_channel(tmp_path: Path) -> None:
    weights = dict.fromkeys(("scale", "shift", "mean", "var"), (4,))
    found = between([op("BatchNormalization", "a scale shift mean var", "last_in")], tmp_path, weights)
    assert places(found, "first") == {"first[0]", "scale[0]", "shift[0]", "mean[0]", "var[0]", "last[1]"}


@pytest.mark.parametrize(("outputs", "per_channel"), [(4, 1), (8, 2)])
def test_a_convolution_by_channel_makes_no_channels_of_its_own(outputs: int, per_channel: int, tmp_path: Path) -> None:
    found = between(
        [op("Conv", "a middle", "last_in", group=4)], tmp_path, {"middle": (outputs, 1, 3, 3)}, width=outputs
    )
    assert places(found, "first") == {"first[0]", "middle[0]", "last[1]"}
    assert [len(indices) for indices in found.groups[0].channel(0)] == [1, per_channel, per_channel]


def test_channels_of_groups_go_one_from_each_group(tmp_path: Path) -> None:
    found = between([op("Conv", "a middle", "last_in", group=2)], tmp_path, {"middle": (6, 2, 1, 1)}, width=6)
    assert places(found, "first") == {"first[0]", "middle[1]"}
    assert [found.groups[0].channel(number) for number in range(len(found.groups[0]))] == [
        [(0, 2), (0,)],
        [(1, 3), (1,)],
    ]
    assert [found.groups[1].channel(number) for number in range(len(found.groups[1]))] == [
        [(at, at + 3), (at, at + 3)] for at in range(3)
    ]


def test_a_transposed_convolution_has_its_inputs_first(tmp_path: Path) -> None:
    nodes = [op("ConvTranspose", "a middle bias", "last_in", strides=[2, 2])]
    found = between(nodes, tmp_path, {"middle": (4, 5, 2, 2), "bias": (5,)}, width=5)
    assert places(found, "first") == {"first[0]", "middle[0]"}
    assert places(found, "middle") == {"middle[1]", "bias[0]", "last[1]"}


def test_a_concatenation_puts_channels_beside_each_other(tmp_path: Path) -> None:
    nodes = [op("Conv", "a second", "b"), op("Concat", "a b a", "last_in", axis=1)]
    found = between(nodes, tmp_path, {"second": (3, 4, 1, 1)}, width=11)
    assert found.groups[0].channel(1) == [(1,), (1,), (1, 8)]
    assert found.groups[1].channel(1) == [(1,), (5,)]


def test_a_concatenation_of_positions_makes_channels_one(tmp_path: Path) -> None:
    nodes = [op("Conv", "a second", "b"), op("Concat", "a b", "last_in", axis=2)]
    assert "second[0]" in places(between(nodes, tmp_path, {"second": (4, 4, 1, 1)}), "first")


def test_a_concatenation_with_the_input_leaves_the_input_alone(tmp_path: Path) -> None:
    found = between([op("Concat", "x a", "last_in", axis=1)], tmp_path, width=7)
    assert found.groups[0].channel(0) == [(0,), (3,)]


@pytest.mark.parametrize("sizes", [None, [1, 3]])
def test_parts_of_a_split_are_families_of_their_own(sizes: list[int] | None, tmp_path: Path) -> None:
    left, right = sizes or [2, 2]
    nodes = [
        op("Split", "a sizes" if sizes else "a", "b c", axis=1),
        op("Conv", "b one", "d"),
        op("Conv", "c two", "e"),
        op("Add", "d e", "last_in"),
    ]
    weights = {"one": (4, left, 1, 1), "two": (4, right, 1, 1)}
    found = between(nodes, tmp_path, weights, {"sizes": sizes} if sizes else None)
    assert [{place.tensor for place in family.axes} for family in found.groups[:2]] == [
        {"first", "one"},
        {"first", "two"},
    ]
    assert [len(family) for family in found.groups[:2]] == [left, right]


def test_a_slice_of_channels_is_followed(tmp_path: Path) -> None:
    nodes = [op("Slice", "a from to at", "last_in")]
    found = between(nodes, tmp_path, numbers={"from": [1], "to": [99], "at": [1]}, width=3)
    assert [[place.tensor for place in family.axes] for family in found.groups] == [
        ["first"],
        ["first", "last"],
        ["last"],
    ]


@pytest.mark.parametrize(
    "node",
    [
        op("MaxPool", "a", "last_in", kernel_shape=[2, 2]),
        op("GlobalAveragePool", "a", "last_in"),
        op("Pad", "a pads", "last_in", mode="reflect"),
        op("Resize", "a - scales", "last_in"),
        op("Resize", "a - - sizes", "last_in"),
        op("ReduceMean", "a", "last_in", axes=[2, -1]),
        op("Slice", "a from to at", "last_in"),
        op("Slice", "a to from at back", "last_in"),
        op("Clip", "a", "last_in"),
        op("Transpose", "a", "last_in", perm=[0, 1, 3, 2]),
        op("InstanceNormalization", "a scale shift", "last_in"),
    ],
    ids=lambda node: node.op_type,
)
def test_what_happens_in_space_keeps_channels(node: Any, tmp_path: Path) -> None:
    weights = {"scales": (4,), "scale": (4,), "shift": (4,)}
    numbers = {
        "pads": [0, 0, 1, 1, 0, 0, 2, 1],
        "sizes": [1, 4, 9, 9],
        "from": [1],
        "to": [-2],
        "at": [2],
        "back": [-1],
    }
    used = {name: value for name, value in weights.items() if name in node.input}
    made = between_model(node, used, {name: value for name, value in numbers.items() if name in node.input})
    found = seen(made, tmp_path)
    assert {"first[0]", "last[1]"} <= places(found, "first")
    assert "first" not in locks(found)


def between_model(node: Any, weights: Weights, numbers: Numbers) -> Any:
    """A model whose list of scales, if it has one, says twice the size."""
    own = {"first": (4, 3, 3, 3), "last": (2, 4, 1, 1)} | weights
    made = model([op("Conv", "x first", "a", pads=[1, 1, 1, 1]), node, LAST], own, numbers=numbers)
    for tensor in made.graph.initializer:
        if tensor.name == "scales":
            tensor.CopyFrom(helper.make_tensor("scales", 1, [4], [1.0, 1.0, 2.0, 2.0]))
    return made


def test_each_position_of_a_flattened_channel_is_that_channel(tmp_path: Path) -> None:
    nodes = [op("Conv", "x first", "a"), op("Flatten", "a", "b"), op("Gemm", "b dense bias", "y", transB=1)]
    found = seen(model(nodes, {"first": (2, 3, 7, 7), "dense": (5, 8), "bias": (5,)}), tmp_path)
    assert found.groups[0].channel(1) == [(1,), (4, 5, 6, 7)]
    channels_last = [nodes[0], op("Transpose", "a", "t", perm=[0, 2, 3, 1]), op("Flatten", "t", "b"), nodes[2]]
    found = seen(model(channels_last, {"first": (2, 3, 7, 7), "dense": (5, 8), "bias": (5,)}), tmp_path)
    assert found.groups[0].channel(1) == [(1,), (1, 3, 5, 7)]


def test_matrices_are_read_along_the_last_axis(tmp_path: Path) -> None:
    nodes = [op("MatMul", "x one", "a"), op("Add", "shift a", "b"), op("Gelu", "b", "c"), op("MatMul", "c two", "y")]
    made = model(nodes, {"one": (6, 8), "shift": (8,), "two": (8, 6)}, inputs={"x": ("N", "T", 6)}, opset=20)
    assert places(seen(made, tmp_path), "one") == {"one[1]", "shift[0]", "two[0]"}


def test_an_embedding_makes_channels_but_keeps_its_words(tmp_path: Path) -> None:
    nodes = [op("Cast", "x", "i", to=7), op("Gather", "words i", "a"), op("MatMul", "a two", "y")]
    made = model(nodes, {"words": (50, 8), "two": (8, 6)}, inputs={"x": ("N", "T")})
    assert places(seen(made, tmp_path), "words") == {"words[1]", "two[0]"}
    tied = [*nodes[:2], op("Transpose", "words", "back"), op("MatMul", "a back", "y")]
    found = seen(model(tied, {"words": (50, 8)}, inputs={"x": ("N", "T")}), tmp_path)
    assert [len(family) for family in found.groups if not family.locked_because] == [8]


def test_squeeze_and_excite_goes_with_what_it_scales(tmp_path: Path) -> None:
    nodes = [
        op("GlobalAveragePool", "a", "b"),
        op("Conv", "b down", "c"),
        op("Conv", "c up", "d"),
        op("Sigmoid", "d", "e"),
        op("Mul", "a e", "last_in"),
    ]
    found = between(nodes, tmp_path, {"down": (2, 4, 1, 1), "up": (4, 2, 1, 1)})
    assert places(found, "first") == {"first[0]", "down[1]", "up[0]", "last[1]"}
    assert places(found, "down") == {"down[0]", "up[1]"}
