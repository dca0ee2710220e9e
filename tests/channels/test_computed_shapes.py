"""Shapes that a graph works out from measured parts and numbers of channels, for one reader or for several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.prune import prune_channels
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import Shape, helper, model, numpy_helper, onnx, op, saved
from tests.channels.masked import run

BATCH = op("Shape", "x", "batch", end=1)
WAYS = {
    "joined": [BATCH, op("Concat", "batch width", "shape", axis=0)],
    "joined twice": [
        *(BATCH, op("Concat", "batch width", "inner", axis=0), op("Identity", "inner", "middle")),
        op("Concat", "middle", "shape", axis=0),
    ],
    "worked out": [BATCH, op("Mul", "half two", "width6"), op("Concat", "batch width6", "shape", axis=0)],
}


def two_layers(way: str, inputs: dict[str, Shape] | None = None) -> Any:
    """As PyTorch's exporter writes shapes: made once for all that have them."""
    nodes = [
        *(*WAYS[way], *(op("Identity", "x", f"{name}0") for name in "ab")),
        *(op("MatMul", f"{name}0 {name}", f"{name}1") for name in "ab"),
        *(op("Reshape", "a1 shape", "a2"), op("Reshape", "b1 shape", "b2")),
        *(op("MatMul", "a2 c", "a3"), op("MatMul", "b2 d", "b3"), op("Add", "a3 b3", "y")),
    ]
    weights = {"a": (5, 6), "b": (5, 6), "c": (6, 4), "d": (6, 4)}
    numbers = {"half": [3], "two": [2]} if way == "worked out" else {"width": [6]}
    return model(nodes, weights, inputs={"x": ("N", 5), **(inputs or {})}, numbers=numbers)


def cut(path: Path, layers: str = "*") -> Path:
    """A copy with half of the channels of some layers, which answers as one with zeros in their place."""
    small, zeroed = path.with_name("small.onnx"), onnx.load(path)
    found = prune_channels(path, PruneRequest(sparsity=0.5, pattern="channel", only=layers), Destination(small))
    for tensor in zeroed.graph.initializer:
        gone = [number for loss in found.pruned_groups for number in loss.dropped if loss.group.name == tensor.name]
        if gone:
            array = numpy_helper.to_array(tensor).copy()
            array[:, gone] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(zeroed, path.with_name("zeroed.onnx"))
    return small


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("layers", ["a", "b", "*"])
def test_a_shape_that_several_read_is_said_anew_for_those_whose_channels_went(
    layers: str, way: str, tmp_path: Path
) -> None:
    made = two_layers(way)
    small = cut(saved(made, tmp_path), layers)
    weights = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(small).graph.initializer}
    assert weights["a"] == (5, 6 if layers == "b" else 3)
    for size in (1, 3):
        x = np.random.default_rng(size).standard_normal((size, 5)).astype(np.float32)
        np.testing.assert_allclose(run(small, x), run(tmp_path / "zeroed.onnx", x), rtol=1e-5, atol=1e-5)
    if layers == "*":
        # Nothing stays that has no reader any more.
        assert len(onnx.load(small).graph.node) == len(made.graph.node) - (way == "worked out")
        assert weights.keys().isdisjoint({"width", "half", "two"})


def test_new_shapes_take_no_name_of_an_input_of_a_node_or_of_an_inner_graph(tmp_path: Path) -> None:
    made = two_layers("joined", {"width_1": ("N", 4)})
    made.graph.node[-1].output[0], made.graph.node[-1].name = "y0", "shape_4"
    port = helper.make_tensor_value_info("y1", onnx.TensorProto.FLOAT, None)
    inner = [op("Sum", "y0 width_1", "width_2"), op("Relu", "width_2", "y1")]
    branch = helper.make_graph(inner, "inner", [], [port])
    made.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    made.graph.node.append(op("If", "always", "y", then_branch=branch, else_branch=branch))
    small = onnx.load(cut(saved(made, tmp_path), "a"))
    assert {"width_3", "shape_5"} <= {name for node in small.graph.node for name in node.input}
