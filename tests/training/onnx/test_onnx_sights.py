"""Convolutions and products of ONNX models, seen as they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract import Array
from tests.training.onnx.by_hand import meet
from tests.training.onnx.models import node, normal, run, save, sights


def close(found: Array, expected: Array, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 6, 5), (4, 3, 3, 2), {}),
    "padded": ((2, 3, 6, 5), (4, 3, 3, 3), {"pads": [1, 0, 2, 1]}),
    "strided": ((1, 2, 7, 8), (3, 2, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "dilated": ((1, 2, 9, 8), (3, 2, 3, 2), {"dilations": [2, 3]}),
    "same upper": ((1, 2, 7, 6), (3, 2, 2, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "same lower": ((1, 2, 7, 6), (3, 2, 2, 4), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "valid": ((1, 2, 7, 6), (3, 2, 2, 4), {"auto_pad": "VALID"}),
    "grouped": ((2, 4, 5, 5), (6, 2, 3, 3), {"group": 2}),
    "depthwise": ((2, 4, 5, 5), (8, 1, 3, 3), {"group": 4}),
    "of one axis": ((2, 3, 9), (4, 3, 3), {"pads": [2, 1], "strides": [2]}),
    "of three axes": ((1, 2, 4, 4, 3), (2, 2, 2, 3, 2), {"pads": [0, 1, 1, 0, 1, 0]}),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_its_kernel_and_its_inputs(kind: str, tmp_path: Path) -> None:
    shape, kernel, settings = CONVOLUTIONS[kind]
    weights = {"w": normal(*kernel), "b": normal(kernel[0])}
    path = save(
        tmp_path / "m.onnx", [node("Relu", ["x"], ["h"]), node("Conv", ["h", "w", "b"], ["y"], **settings)], weights
    )
    x = normal(*shape)
    (sight,) = sights(path, ["w"], x)
    assert (sight.name, sight.use.out_axis, sight.use.in_axis) == ("w", 0, 1)
    np.testing.assert_array_equal(sight.inputs, np.maximum(x, 0))
    bias = weights["b"].reshape(-1, *[1] * (len(shape) - 2))
    close(meet(weights["w"], sight) + bias, run(path, x)[0])


TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 4, 3), (3, 4, 3, 2), {}),
    "strided": ((1, 3, 4, 3), (3, 2, 3, 2), {"strides": [2, 3]}),
    "cut": ((1, 3, 4, 3), (3, 2, 3, 4), {"strides": [2, 2], "pads": [1, 0, 0, 2]}),
    "added to": ((1, 3, 4, 3), (3, 2, 3, 2), {"strides": [3, 2], "pads": [1, 0, 0, 0], "output_padding": [2, 1]}),
    "dilated": ((1, 3, 4, 3), (3, 2, 3, 2), {"dilations": [2, 3], "strides": [2, 1]}),
    "grouped": ((2, 4, 3, 3), (4, 3, 2, 2), {"group": 2, "strides": [2, 2]}),
    "same upper": ((1, 2, 4, 3), (2, 2, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [1, 2]}),
    "same lower": ((1, 2, 4, 3), (2, 2, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    "same and wide": ((1, 2, 4, 3), (2, 2, 1, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "asked shape": ((1, 2, 4, 3), (2, 2, 4, 3), {"output_shape": [8, 6], "strides": [2, 2]}),
    "asked shape upper": (
        (1, 2, 4, 3),
        (2, 2, 4, 4),
        {"output_shape": [7, 5], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "asked shape and added to": (
        (1, 2, 4, 3),
        (2, 2, 4, 3),
        {"output_shape": [9, 6], "strides": [2, 2], "output_padding": [1, 1]},
    ),
    "of one axis": ((2, 3, 5), (3, 4, 3), {"strides": [2], "pads": [1, 1], "output_padding": [1]}),
}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_a_transposed_convolution_is_its_kernel_spread_by_its_inputs(kind: str, tmp_path: Path) -> None:
    shape, kernel, settings = TRANSPOSED[kind]
    weights = {"w": normal(*kernel)}
    path = save(tmp_path / "m.onnx", [node("ConvTranspose", ["x", "w"], ["y"], **settings)], weights)
    x = normal(*shape)
    (sight,) = sights(path, ["w"], x)
    assert sight.use.window is not None
    assert sight.use.window.is_transposed
    close(meet(weights["w"], sight), run(path, x)[0])


@pytest.mark.parametrize("turned", [(a, b) for a in (0, 1) for b in (0, 1)])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_gemm_multiplies_from_either_side(turned: tuple[int, int], place: int, alpha: float, tmp_path: Path) -> None:
    left, right = (normal(3, 4), normal(4, 5, seed=1))
    sides = [side.T.copy() if turn else side for side, turn in zip((left, right), turned, strict=True)]
    inputs = ["x", "w"] if place else ["w", "x"]
    settings = {"transA": turned[0], "transB": turned[1], "alpha": alpha}
    path = save(tmp_path / "m.onnx", [node("Gemm", inputs, ["y"], **settings)], {"w": sides[place]})
    x = sides[1 - place]
    (sight,) = sights(path, ["w"], x)
    expected = run(path, x)[0]
    close(meet(sides[place], sight), expected if place else expected.T)


PRODUCTS = {
    "rows": ((2, 4), (4, 3), 1),
    "rows of rows": ((2, 5, 3, 4), (4, 3), 1),
    "a vector": ((4,), (4, 3), 1),
    "columns": ((2, 4, 5), (3, 4), 0),
    "a column": ((4,), (3, 4), 0),
    "a stack": ((2, 3, 5, 4), (3, 4, 6), 1),
    "a stack that shares its inputs": ((5, 4), (3, 4, 6), 1),
    "a stack beside one matrix": ((2, 1, 5, 4), (3, 4, 6), 1),
    "a stack of one": ((2, 3, 5, 4), (1, 4, 6), 1),
    "a stack on the left": ((2, 3, 4, 5), (3, 6, 4), 0),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_product_is_its_matrix_and_its_inputs(kind: str, tmp_path: Path) -> None:
    shape, matrix, place = PRODUCTS[kind]
    weight, x = normal(*matrix), normal(*shape)
    inputs = ["x", "w"] if place else ["w", "x"]
    path = save(tmp_path / "m.onnx", [node("MatMul", inputs, ["y"])], {"w": weight})
    (sight,) = sights(path, ["w"], x)
    expected = run(path, x)[0]
    if not place and len(shape) > 1:
        expected = expected.swapaxes(-1, -2)
    if sight.use.groups > 1:
        expected = np.moveaxis(expected, -3, -2)
        expected = expected.reshape(*expected.shape[:-2], -1)
    close(meet(weight, sight), expected)


def test_a_fused_product_is_seen_with_its_scale(tmp_path: Path) -> None:
    settings = {"transA": 1, "transB": 1, "alpha": 0.25, "domain": "com.microsoft"}
    weight, x = normal(3, 4), normal(2, 4, 5)
    path = save(tmp_path / "m.onnx", [node("FusedMatMul", ["x", "w"], ["y"], **settings)], {"w": weight})
    (sight,) = sights(path, ["w"], x)
    close(meet(weight, sight), run(path, x)[0])


def test_a_shared_weight_is_seen_at_each_use_in_the_order_of_the_graph(tmp_path: Path) -> None:
    weight, x = normal(4, 4), normal(2, 4)
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Tanh", ["h"], ["t"]), node("Gemm", ["t", "w"], ["y"], transB=1)]
    path = save(tmp_path / "m.onnx", nodes, {"w": weight})
    first, second = sights(path, ["w"], x)
    assert (first.use.out_axis, second.use.out_axis) == (1, 0)
    np.testing.assert_array_equal(first.inputs, x)
    close(second.inputs, np.tanh(x @ weight))
    close(meet(weight, second), run(path, x)[0])


def test_a_weight_is_followed_through_what_hands_it_on(tmp_path: Path) -> None:
    weight, x = normal(3, 4), normal(2, 4)
    nodes = [
        node("Identity", ["w"], ["i"]),
        node("Transpose", ["i"], ["t"]),
        node("Cast", ["t"], ["c"], to=1),
        node("MatMul", ["x", "c"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"w": weight})
    (sight,) = sights(path, ["w"], x)
    assert (sight.use.out_axis, sight.use.in_axis) == (0, 1)
    close(meet(weight, sight), run(path, x)[0])


def test_a_kernel_of_another_layout_keeps_the_order_of_its_window(tmp_path: Path) -> None:
    kernel, x = normal(3, 2, 4, 5), normal(2, 4, 6, 6)  # height, width, in, out
    turned = [node("Transpose", ["w"], ["t"], perm=[3, 2, 0, 1]), node("Conv", ["x", "t"], ["y"])]
    path = save(tmp_path / "turned.onnx", turned, {"w": kernel})
    (sight,) = sights(path, ["w"], x)
    close(meet(kernel, sight), run(path, x)[0])
    mirrored = [node("Transpose", ["w"], ["t"], perm=[3, 2, 1, 0]), node("Conv", ["x", "t"], ["y"])]
    assert not sights(save(tmp_path / "mirrored.onnx", mirrored, {"w": kernel}), ["w"], x)


UNTOLD = {
    "reshaped": [node("Reshape", ["w", "shape"], ["r"]), node("MatMul", ["x", "r"], ["y"])],
    "added": [node("Add", ["x", "w"], ["y"])],
    "scaled": [node("Mul", ["w", "w"], ["r"]), node("MatMul", ["x", "r"], ["y"])],
    "a constant with a constant": [node("MatMul", ["w", "w"], ["r"]), node("Add", ["x", "r"], ["y"])],
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_what_cannot_be_told_is_not_shown(kind: str, tmp_path: Path) -> None:
    weights = {"w": normal(4, 4), "shape": np.array([4, 4])}
    path = save(tmp_path / "m.onnx", UNTOLD[kind], weights)
    assert not sights(path, ["w", "shape", "unknown"], normal(4, 4))
