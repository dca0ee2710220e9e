"""Channels that make no difference go, and the network says what it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import model, numpy_helper, onnx, op, saved
from tests.channels.masked import run

Weights = dict[str, tuple[int, ...]]


def changed(made: Any, **zeros: Any) -> Any:
    """A model with some of its numbers replaced, by index and value."""
    for tensor in made.graph.initializer:
        if tensor.name in zeros:
            array = np.array(numpy_helper.to_array(tensor))
            for index, value in zeros[tensor.name]:
                array[index] = value
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def cut_dead(made: Any, tmp_path: Path) -> tuple[ChannelPruneResult, Path]:
    path, output = saved(made, tmp_path), tmp_path / "small.onnx"
    found = prune_channels(path, PruneRequest(pattern="channel"), Destination(output), dead=True, allow_empty=True)
    images = np.random.default_rng(5).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(output, images), run(path, images), rtol=1e-5, atol=1e-5)
    return found, output


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}


def pair(**more: Any) -> Any:
    """Two convolutions with biases; the second reads no border."""
    nodes = [op("Conv", "x first bias", "a"), op("Relu", "a", "b"), op("Conv", "b last end", "y", **more)]
    return model(nodes, {"first": (4, 3, 3, 3), "bias": (4,), "last": (2, 4, 3, 3), "end": (2,)})


def test_what_nothing_reads_goes(tmp_path: Path) -> None:
    found, output = cut_dead(changed(pair(pads=[1, 1, 1, 1]), last=[((slice(None), 2), 0)]), tmp_path)
    assert found.dropped == 1
    assert shapes(output) == {"first": (3, 3, 3, 3), "bias": (3,), "last": (2, 3, 3, 3), "end": (2,)}


def test_what_is_always_the_same_becomes_a_part_of_the_next_bias(tmp_path: Path) -> None:
    found, output = cut_dead(changed(pair(), first=[((1,), 0), ((3,), 0)], bias=[(1, 0.7), (3, -2)]), tmp_path)
    assert found.dropped == 2
    last, end = (numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "made.onnx").graph.initializer[2:4])
    (folded,) = [numpy_helper.to_array(one) for one in onnx.load(output).graph.initializer if one.name == "end"]
    np.testing.assert_allclose(folded, end + np.float32(0.7) * last[:, 1].sum((1, 2)), rtol=1e-5)


def test_what_a_border_would_show_stays_and_is_said(tmp_path: Path) -> None:
    made = changed(pair(pads=[1, 1, 1, 1]), first=[((1,), 0), ((3,), 0)], bias=[(1, 0.7), (3, -2)])
    found, output = cut_dead(made, tmp_path)
    assert found.dropped == 0
    assert "no bias can absorb" in found.skips[-1].reason
    assert shapes(output)["first"] == (4, 3, 3, 3)


def test_what_is_silent_behind_a_border_goes(tmp_path: Path) -> None:
    found, _ = cut_dead(changed(pair(pads=[1, 1, 1, 1]), first=[((3,), 0)], bias=[(3, -2)]), tmp_path)
    assert found.dropped == 1


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_constant_without_a_bias_is_kept_in_what_follows(kind: str, tmp_path: Path) -> None:
    weights: Weights = {"first": (4, 3, 3, 3), "bias": (4,), "last": (2, 4, 1, 1)}
    nodes = [op("Conv", "x first bias", "a"), op("Conv", "a last", "b")]
    if kind == "mean":
        nodes.append(op("BatchNormalization", "b scale shift mean variance", "y"))
        weights |= dict.fromkeys(("scale", "shift", "mean", "variance"), (2,))
    else:
        nodes.append(op("Add", "b shift", "y"))
        weights |= {"shift": (2, 1, 1)}
    found, output = cut_dead(changed(model(nodes, weights), first=[((0,), 0)]), tmp_path)
    assert found.dropped == 1
    assert shapes(output)["last"] == (2, 3, 1, 1)


def test_a_constant_that_nothing_can_keep_stays(tmp_path: Path) -> None:
    nodes = [op("Conv", "x first bias", "a"), op("Conv", "a last", "b"), op("Relu", "b", "y")]
    made = model(nodes, {"first": (4, 3, 3, 3), "bias": (4,), "last": (2, 4, 1, 1)})
    found, _ = cut_dead(changed(made, first=[((0,), 0)]), tmp_path)
    assert found.dropped == 0


def test_a_constant_that_is_scaled_by_what_goes_in_stays(tmp_path: Path) -> None:
    nodes = [
        op("Conv", "x first bias", "a"),
        op("Conv", "x gate", "g"),
        op("Mul", "a g", "b"),
        op("GlobalAveragePool", "b", "c"),
        op("Conv", "c last end", "y"),
    ]
    weights = {"first": (4, 3, 3, 3), "bias": (4,), "gate": (1, 3, 3, 3), "last": (2, 4, 1, 1), "end": (2,)}
    found, _ = cut_dead(changed(model(nodes, weights), first=[((0,), 0)]), tmp_path)
    assert found.dropped == 0


def test_constants_are_folded_one_layer_after_the_other(tmp_path: Path) -> None:
    nodes = [op("Conv", "x first bias", "a"), op("Relu", "a", "b"), op("Conv", "b middle shift", "c")]
    nodes += [op("Relu", "c", "d"), op("Conv", "d last end", "y")]
    weights: Weights = {"first": (4, 3, 3, 3), "bias": (4,), "middle": (5, 4, 1, 1), "shift": (5,)}
    made = model(nodes, weights | {"last": (2, 5, 1, 1), "end": (2,)})
    found, output = cut_dead(changed(made, first=[((0,), 0)], middle=[((slice(3, 5),), 0)]), tmp_path)
    assert found.dropped == 3
    assert shapes(output)["last"] == (2, 3, 1, 1)


def test_a_layer_that_is_all_dead_keeps_a_channel(tmp_path: Path) -> None:
    found, output = cut_dead(changed(pair(), first=[(slice(None), 0)]), tmp_path)
    assert found.dropped == 3
    assert shapes(output)["first"] == (1, 3, 3, 3)


def test_a_network_without_dead_channels_stays_what_it_was(tmp_path: Path) -> None:
    found, output = cut_dead(pair(), tmp_path)
    assert found.dropped == 0
    assert onnx.load(output).graph == onnx.load(tmp_path / "made.onnx").graph
