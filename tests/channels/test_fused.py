"""Operators of onnxruntime that others are fused into: channels are found behind them, and through some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from prunectl.channels.prune import prune_channels
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import helper, model, numpy_helper, onnx, op, saved

WIDTH, UNITS = 8, 16


def fused(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return op(kind, inputs, outputs, domain="com.microsoft", **attributes)


ATTENTION = [
    *(fused("Attention", "x qkv qkv_bias", "a", num_heads=2), op("MatMul", "a o", "b")),
    fused("SkipLayerNormalization", "b x scale shift o_bias", "h"),
]
HEADS = [
    *(op("MatMul", f"x {name}", f"{name}0") for name in ("q", "k", "v")),
    *(fused("MultiHeadAttention", "q0 k0 v0", "a", num_heads=2), op("MatMul", "a o", "b")),
    fused("SkipSimplifiedLayerNormalization", "b x scale o_bias", "h"),
]
NIBBLES = [fused("MatMulNBits", "x packed scales", "h", K=WIDTH, N=WIDTH, bits=4, block_size=16)]
PLAIN = [op("MatMul", "h first", "u"), op("Add", "u first_bias", "u1"), fused("Gelu", "u1", "u2")]
BIASED = [fused("FusedMatMul", "h first", "u", alpha=0.5), fused("BiasGelu", "u first_bias", "u2")]
FAST = [fused("FusedMatMul", "h first_t", "u", transB=1), fused("FastGelu", "u first_bias", "u2")]


def written(nodes: list[Any], folder: Path) -> Path:
    """A model of these nodes and a layer at the end, with the weights that they name."""
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
        **dict.fromkeys(("o_bias", "scale", "shift"), (WIDTH,)),
        "qkv": (WIDTH, 3 * WIDTH),
        "qkv_bias": (3 * WIDTH,),
        "scales": (WIDTH,),
        "first": (WIDTH, UNITS),
        "first_t": (UNITS, WIDTH),
        "first_bias": (UNITS,),
        "last": (UNITS, 3),
    }
    nodes = [*nodes, op("MatMul", "u2 last", "y")]
    named = {name for node in nodes for name in node.input}
    held = {name: shape for name, shape in shapes.items() if name in named}
    made = model(nodes, held, inputs={"x": ("N", "S", WIDTH)})
    random = np.random.default_rng(1)
    for tensor in made.graph.initializer:
        array = random.standard_normal(held[tensor.name]).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    if "packed" in named:
        packed = random.integers(0, 256, (WIDTH, 1, 8)).astype(np.uint8)
        made.graph.initializer.append(numpy_helper.from_array(packed, "packed"))
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return saved(made, folder)


def answers(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("behind", [ATTENTION, HEADS, NIBBLES], ids=["attention", "heads", "nibbles"])
@pytest.mark.parametrize("units", [PLAIN, BIASED, FAST], ids=["plain", "biased", "fast"])
def test_units_behind_fused_operators_go_as_if_nothing_came_of_them(
    behind: list[Any], units: list[Any], tmp_path: Path
) -> None:
    path = written([*behind, *units], tmp_path)
    request = PruneRequest(sparsity=0.5, pattern="channel")
    found = prune_channels(path, request, Destination(tmp_path / "small.onnx"))
    (loss,) = found.pruned_groups
    assert len(loss.dropped) == UNITS // 2
    silenced = onnx.load(path)
    for tensor in silenced.graph.initializer:
        if tensor.name == "last":
            array = numpy_helper.to_array(tensor).copy()
            array[list(loss.dropped)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, "last"))
    onnx.save(silenced, tmp_path / "silenced.onnx")
    for shape in ((1, 5, WIDTH), (3, 2, WIDTH)):
        x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        expected = answers(tmp_path / "silenced.onnx", x)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(answers(tmp_path / "small.onnx", x), expected, rtol=1e-4, atol=1e-5)
