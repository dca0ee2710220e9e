"""Operators of onnxruntime that others are fused into: channels are found behind them, and through some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from prunectl.channels.prune import prune_channels
from prunectl.errors import UsageError
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import helper, model, numpy_helper, onnx, op, saved

WIDTH, UNITS, TABLE = 8, 16, 64


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
TURNED = [fused("RotaryEmbedding", "x place cosines sines", "h", num_heads=2)]
WORDS = [
    *(op("ArgMax", "x", "word", axis=-1, keepdims=0), op("Cast", "word", "ids", to=6)),
    fused("EmbedLayerNormalization", "ids - words places - scale shift", "h mask_index"),
]
NIBBLES = [fused("MatMulNBits", "x packed scales", "h", K=WIDTH, N=WIDTH, bits=4, block_size=16)]
PLAIN = [op("MatMul", "h first", "u"), op("Add", "u first_bias", "u1"), fused("Gelu", "u1", "u2")]
BIASED = [fused("FusedMatMul", "h first", "u", alpha=0.5), fused("BiasGelu", "u first_bias", "u2")]
FAST = [fused("FusedMatMul", "h first_t", "u", transB=1), fused("FastGelu", "u first_bias", "u2")]


def written(nodes: list[Any], folder: Path, x: tuple[str | int, ...] = ("N", "S", WIDTH)) -> Path:
    """A model of these nodes and a layer at the end, with the weights that they name."""
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
        **dict.fromkeys(("o_bias", "scale", "shift"), (WIDTH,)),
        "qkv": (WIDTH, 3 * WIDTH),
        "qkv_bias": (3 * WIDTH,),
        "scales": (WIDTH,),
        **dict.fromkeys(("words", "places"), (TABLE, WIDTH)),
        **dict.fromkeys(("cosines", "sines"), (TABLE, WIDTH // 4)),
        "first": (WIDTH, UNITS),
        "first_t": (UNITS, WIDTH),
        "first_bias": (UNITS,),
        "last": (UNITS, 3),
    }
    nodes = [*nodes, op("MatMul", "u2 last", "y")]
    named = {name for node in nodes for name in node.input}
    held = {name: shape for name, shape in shapes.items() if name in named}
    made = model(nodes, held, inputs={"x": x}, numbers={"place": [0]} if "place" in named else {})
    random = np.random.default_rng(1)
    for tensor in made.graph.initializer[: len(held)]:
        array = random.standard_normal(held[tensor.name]).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    if "packed" in named:
        packed = random.integers(0, 256, (WIDTH, 1, 8)).astype(np.uint8)
        made.graph.initializer.append(numpy_helper.from_array(packed, "packed"))
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return saved(made, folder)


def answers(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def cut(path: Path) -> Any:
    request = PruneRequest(sparsity=0.5, pattern="channel")
    return prune_channels(path, request, Destination(path.with_name("small.onnx")))


def assert_silent(path: Path, *shapes: tuple[int, ...]) -> None:
    """Half of the units can be cut as if nothing came of them."""
    (loss,) = cut(path).pruned_groups
    assert len(loss.dropped) == UNITS // 2
    silenced = onnx.load(path)
    for tensor in silenced.graph.initializer:
        if tensor.name == "last":
            array = numpy_helper.to_array(tensor).copy()
            array[list(loss.dropped)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, "last"))
    onnx.save(silenced, path.with_name("silenced.onnx"))
    for shape in shapes:
        x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        expected = answers(path.with_name("silenced.onnx"), x)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(answers(path.with_name("small.onnx"), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "behind",
    [ATTENTION, HEADS, NIBBLES, TURNED, WORDS],
    ids=["attention", "heads", "nibbles", "turned", "words"],
)
@pytest.mark.parametrize("units", [PLAIN, BIASED, FAST], ids=["plain", "biased", "fast"])
def test_units_behind_fused_operators_go_as_if_nothing_came_of_them(
    behind: list[Any], units: list[Any], tmp_path: Path
) -> None:
    assert_silent(written([*behind, *units], tmp_path), (1, 5, WIDTH), (3, 2, WIDTH))


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "LeakyRelu"])
def test_units_with_an_activation_in_the_same_operator_go(activation: str, tmp_path: Path) -> None:
    units = fused("FusedGemm", "x first first_bias", "u2", activation=activation, activation_alpha=0.3)
    assert_silent(written([units], tmp_path, ("N", WIDTH)), (1, WIDTH), (3, WIDTH))


def test_units_whose_activation_makes_something_of_zero_stay(tmp_path: Path) -> None:
    units = fused("FusedGemm", "x first first_bias", "u2", activation="Sigmoid")
    with pytest.raises(UsageError, match=r"FusedGemm to_u2 applies Sigmoid to its output"):
        cut(written([units], tmp_path, ("N", WIDTH)))


@pytest.mark.parametrize("setting", ["transBatchA", "transBatchB", "transA"])
def test_units_of_a_product_that_turns_its_batches_stay(setting: str, tmp_path: Path) -> None:
    units = fused("FusedMatMul", "x first", "u2", **{setting: 1})
    with pytest.raises(UsageError, match="its operations are unknown"):
        cut(written([units], tmp_path, (WIDTH, WIDTH, WIDTH)))


BROKEN = [
    fused("Attention", "x qkv qkv_bias", "h", num_heads=2, qkv_hidden_sizes=[8, 8]),
    fused("Attention", "x qkv qkv_bias", "h", num_heads=2, qkv_hidden_sizes=5),
    fused("Attention", "x qkv qkv_bias", "h", num_heads=2, qkv_hidden_sizes="8"),
    fused("MatMulNBits", "x packed scales", "h", K="abc", N=[1, 2], bits=4, block_size=16),
    fused("MatMulNBits", "x packed scales", "h", K=WIDTH, N=-5, bits=4, block_size=16),
    fused("MatMulNBits", "x packed scales", "h", K=WIDTH, N=1 << 62, bits=4, block_size=16),
    fused("Gelu", "", "h"),
    fused("MultiHeadAttention", "x x", "h", num_heads=2),
    fused("EmbedLayerNormalization", "x", "h"),
    fused("FusedMatMul", "x", "h"),
    fused("FusedConv", "x", "h"),
]


@pytest.mark.parametrize("node", BROKEN, ids=lambda node: f"{node.op_type} {len(node.attribute)}")
def test_nodes_that_lack_what_their_operator_needs_are_unknown(node: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"unknown .com.microsoft.{node.op_type}"):
        cut(written([node, *PLAIN], tmp_path))


def test_convolutions_that_onnxruntime_fuses_are_cut_like_those_that_it_was_given(tmp_path: Path) -> None:
    nodes = [
        *(op("Conv", "x a a_bias", "a1", pads=[1, 1, 1, 1]), op("Relu", "a1", "a2")),
        *(op("Conv", "a2 b b_bias", "b1", group=UNITS), op("Clip", "b1 low high", "b2")),
        *(op("Conv", "b2 c", "c1"), op("GlobalAveragePool", "c1", "y")),
    ]
    weights = {
        "a": (UNITS, 3, 3, 3),
        "a_bias": (UNITS,),
        "b": (UNITS, 1, 3, 3),
        "b_bias": (UNITS,),
        "c": (4, UNITS, 1, 1),
    }
    made = model(nodes, weights)
    for name, limit in (("low", 0), ("high", 6)):
        made.graph.initializer.append(numpy_helper.from_array(np.array(limit, np.float32), name))
    for folder in ("plain", "fused"):
        (tmp_path / folder).mkdir()
    plain, path = saved(made, tmp_path / "plain"), tmp_path / "fused" / "made.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(path).graph.node].count("FusedConv") == 2
    assert [loss.dropped for loss in cut(path).pruned_groups] == [loss.dropped for loss in cut(plain).pruned_groups]
    x = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)
    small, expected = (answers(file.with_name("small.onnx"), x) for file in (path, plain))
    np.testing.assert_allclose(small, expected, rtol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("inputs", "settings", "why"),
    [
        ("x a", {"activation": "Clip", "activation_params": [0.5, 6.0]}, "FusedConv to_y0 applies Clip"),
        ("x a", {"activation": "HardSigmoid", "activation_params": [0.2, 0.5]}, "FusedConv to_y0 applies HardSigmoid"),
        ("x a - other", {"activation": "Relu"}, "removed: y is an output"),
    ],
    ids=["from one half", "hard sigmoid", "added to"],
)
def test_convolutions_whose_channels_would_leave_something_stay(
    inputs: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    nodes = [
        fused("FusedConv", inputs, "y0", **settings),
        op("GlobalAveragePool", "y0", "y1"),
        op("Flatten", "y1", "y2"),
    ]
    weights = {"a": (4, 3, 1, 1), "other": (1, 4, 8, 8), "last": (4, 2)}
    made = model([*nodes, op("MatMul", "y2 last", "y")], weights)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(UsageError, match=why):
        cut(saved(made, tmp_path))
