"""ONNX models that are run, assigned to and looked at, whatever form they are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prunectl import onnx_graph as graphs
from prunectl.errors import InputError, UsageError
from prunectl.formats.registry import open_model
from tests.contract import Array
from tests.training.onnx.by_hand import meet
from tests.training.onnx.models import load, node, normal, onnx, port, proto, run, save, sights

FIXTURES = Path(__file__).parents[3] / "fixtures"
BIG = (64, 48)
"""More bytes than stay in the message."""


@pytest.fixture(autouse=True)
def _little_stays_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "INLINE_BYTES", 1 << 12)


def two_layers(dtype: Any = np.float32) -> tuple[list[Any], dict[str, Array]]:
    nodes = [
        node("Gemm", ["x", "first.weight", "first.bias"], ["h"], transB=1),
        node("Relu", ["h"], ["a"]),
        node("MatMul", ["a", "second.weight"], ["y"]),
    ]
    held = {"first.weight": normal(*BIG), "first.bias": normal(64), "second.weight": normal(64, 3)}
    return nodes, {name: array.astype(dtype) for name, array in held.items()}


def expected(held: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """What is between the layers, and what comes out."""
    held = {name: array.astype(np.float32) for name, array in held.items()}
    inner = np.maximum(x @ held["first.weight"].T + held["first.bias"], 0)
    return inner, inner @ held["second.weight"]


def check(path: Path, held: dict[str, Array], tolerance: float = 1e-4, dtype: Any = np.float32) -> None:
    model, x = load(path), normal(5, 48).astype(dtype)
    found: dict[str, Array] = {}
    model.observe(list(held), x, lambda sight: found.update({sight.name: sight.inputs}))
    inner, y = expected(held, x.astype(np.float32))
    assert set(found) == {"first.weight", "second.weight"}
    np.testing.assert_allclose(found["second.weight"], inner, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model.predict(x).astype(np.float32), y, rtol=tolerance, atol=20 * tolerance)
    for name, array in model.tensors().items():
        np.testing.assert_array_equal(array, held[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numbers_of_any_width_are_seen_as_float32(dtype: Any, tmp_path: Path) -> None:
    nodes, held = two_layers(dtype)
    path = save(tmp_path / "m.onnx", nodes, held, x=[port("x", ("n", 48), dtype)], y=[port("y", None, dtype)])
    check(path, held, 2e-2 if dtype is np.float16 else 1e-4, dtype)


def test_weights_beside_the_model_are_read_where_they_lie(tmp_path: Path) -> None:
    nodes, held = two_layers()
    path = tmp_path / "m.onnx"
    onnx.save(proto(nodes, held), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    check(path, held)


def test_weights_in_constant_nodes_are_weights(tmp_path: Path) -> None:
    nodes, held = two_layers()
    constants = [node("Constant", [], [name], value=onnx.numpy_helper.from_array(held[name])) for name in held]
    check(save(tmp_path / "m.onnx", [*constants, *nodes], {}), held)


def test_weights_without_their_zeros_are_weights(tmp_path: Path) -> None:
    nodes, held = two_layers()
    held["second.weight"] = np.where(held["second.weight"] > 1, held["second.weight"], 0)
    flat = held["second.weight"].ravel()
    at = np.flatnonzero(flat)
    message = proto(nodes, {name: array for name, array in held.items() if name != "second.weight"})
    values = onnx.numpy_helper.from_array(flat[at], "second.weight")
    indices = onnx.numpy_helper.from_array(at.astype(np.int64), "indices")
    message.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, (64, 3)))
    onnx.save(message, tmp_path / "m.onnx")
    check(tmp_path / "m.onnx", held)


def test_weights_listed_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    nodes, held = two_layers()
    ports = [port(name, array.shape) for name, array in held.items()]
    path = save(tmp_path / "m.onnx", nodes, held, x=[port("x", (None, 48)), *ports], ir=3)
    assert [given.name for given in load(path).signature.inputs] == ["x"]
    check(path, held)


def test_bfloat16_weights_behind_a_cast_are_seen(tmp_path: Path) -> None:
    weight, x = normal(*BIG).astype(ml_dtypes.bfloat16), normal(3, 48)
    message = proto([node("Cast", ["w"], ["c"], to=1), node("Gemm", ["x", "c"], ["y"], transB=1)], {})
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, BIG, weight.tobytes(), raw=True)
    message.graph.initializer.append(tensor)
    path = tmp_path / "m.onnx"
    onnx.save(message, path)
    (sight,) = sights(path, ["w"], x)
    np.testing.assert_allclose(meet(weight, sight), run(path, x)[0], rtol=1e-4, atol=1e-4)
    model = load(path)
    model.assign({"w": np.where(weight > 0, weight, 0)})
    np.testing.assert_allclose(model.predict(x), x @ np.maximum(weight.astype(np.float32), 0).T, rtol=1e-4, atol=1e-4)
    assert model.weights(["w"])["w"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("is_beside", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_assigned_is_what_a_rewritten_file_would_hold(dtype: Any, is_beside: bool, tmp_path: Path) -> None:
    nodes, held = two_layers(dtype)
    ports: dict[str, Any] = {"x": [port("x", (None, 48), dtype)], "y": [port("y", None, dtype)]}
    path, x = tmp_path / "m.onnx", normal(4, 48).astype(dtype)
    onnx.save(proto(nodes, held, **ports), path, save_as_external_data=is_beside, size_threshold=0, location="w.bin")
    changed = {**held, "first.weight": np.where(held["first.weight"] > 0, held["first.weight"], 0).astype(dtype)}
    changed["first.bias"] = held["first.bias"] * 2
    rewritten = save(tmp_path / "rewritten.onnx", nodes, changed, **ports)

    model = load(path)
    before = model.predict(x)
    model.observe(["second.weight"], x, lambda _: None)
    model.assign({name: changed[name].astype(np.float32) for name in ("first.weight", "first.bias")})
    found: list[Array] = []
    model.observe(["second.weight"], x, lambda sight: found.append(sight.inputs.copy()))

    np.testing.assert_array_equal(model.predict(x), run(rewritten, x)[0])
    assert not np.array_equal(before, model.predict(x))
    np.testing.assert_array_equal(found[0], sights(rewritten, ["second.weight"], x)[0].inputs)
    for name, array in model.tensors().items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, changed[name])
    np.testing.assert_array_equal(run(path, x)[0], before)


def test_tensors_in_the_same_bytes_change_together(tmp_path: Path) -> None:
    weight, x = normal(4, 4), normal(2, 4)
    nodes = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])]
    message = proto(nodes, {"a": weight, "b": weight})
    path = tmp_path / "m.onnx"
    onnx.save(message, path, save_as_external_data=True, size_threshold=0, location="w.bin")
    message = onnx.load(path, load_external_data=False)
    message.graph.initializer[1].external_data[1].value = message.graph.initializer[0].external_data[1].value
    path.write_bytes(message.SerializeToString())
    model = load(path)
    model.assign({"a": weight * 2})
    np.testing.assert_allclose(model.predict(x), x @ weight @ weight * 4, rtol=1e-4)


def test_a_wrong_shape_or_name_cannot_be_assigned(tmp_path: Path) -> None:
    model = load(save(tmp_path / "m.onnx", *two_layers()))
    with pytest.raises(ValueError, match="shape"):
        model.assign({"first.bias": normal(3)})
    with pytest.raises(KeyError):
        model.assign({"unknown": normal(3)})


def fixed(path: Path, size: int) -> tuple[Path, dict[str, Array]]:
    """A model whose middle joins examples and positions, for so many examples."""
    held = {"k": normal(3, 2, 3, 3), "w": normal(4, 5), "shape": np.array([size * 12, 4]), "back": np.array([size, 60])}
    nodes = [
        node("Conv", ["x", "k"], ["c"]),
        node("Reshape", ["c", "shape"], ["rows"]),
        node("MatMul", ["rows", "w"], ["m"]),
        node("Reshape", ["m", "back"], ["y"]),
    ]
    return save(path, nodes, held, x=[port("x", (size, 2, 6, 6))], y=[port("y", (size, 60))]), held


@pytest.mark.parametrize("size", [1, 2, 4, 5, 7])
def test_a_model_for_a_fixed_number_of_examples_is_run_in_pieces(size: int, tmp_path: Path) -> None:
    path, _ = fixed(tmp_path / "fixed.onnx", size)
    whole, _ = fixed(tmp_path / "whole.onnx", 5)
    model, x = load(path), normal(5, 2, 6, 6)
    np.testing.assert_allclose(model.predict(x), run(whole, x)[0], rtol=1e-4, atol=1e-4)
    assert f"accepts {size} example{'s' * (size != 1)} at a time" in model.notes[0]
    for name, expected in (("k", x), ("w", sights(whole, ["w"], x)[0].inputs)):
        found = np.concatenate([sight.inputs for sight in sights(path, [name], x)])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sequences_that_fill_up_a_batch_are_not_shown(tmp_path: Path) -> None:
    held = {"w": normal(1, 8, 3), "r": normal(1, 8, 2), "v": normal(1, 8, 3)}
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "w", "r"], ["s"], hidden_size=2),
        node("Squeeze", ["s"], ["q"]),
        node("Transpose", ["q"], ["y"], perm=[1, 0, 2]),
    ]
    path = save(tmp_path / "m.onnx", nodes, held, x=[port("x", (4, 6, 3))])
    free = save(tmp_path / "free.onnx", nodes, held, x=[port("x", (None, 6, 3))])
    x = normal(6, 6, 3)
    np.testing.assert_allclose(load(path).predict(x), run(free, x)[0], rtol=1e-5, atol=1e-6)
    for name in "wr":
        rows = [sight.inputs.reshape(-1, sight.inputs.shape[-1]) for sight in sights(path, [name], x)]
        found, (expected,) = np.concatenate(rows), sights(free, [name], x)
        everything = expected.inputs.reshape(found.shape)
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(everything, axis=0), rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    weight = normal(3, 4)
    nodes = [node("MatMul", ["b", "w"], ["y"]), node("Sub", ["y", "a"], ["z"])]
    ports = [port("a", ("n", 4)), port("b", ("n", 3))]
    path = save(tmp_path / "m.onnx", nodes, {"w": weight}, x=ports, y=[port("z", ("n", 4)), port("y")])
    model, a, b = load(path), normal(2, 4), normal(2, 3)
    z, y = model.predict((a, b))
    np.testing.assert_allclose(y, b @ weight, rtol=1e-5)
    np.testing.assert_allclose(z, y - a, rtol=1e-5)
    assert [(one.name, one.shape, one.dtype) for one in model.signature.inputs] == [
        ("a", (4,), "float32"),
        ("b", (3,), "float32"),
    ]
    assert [(one.name, one.shape) for one in model.signature.outputs] == [("z", (4,)), ("y", None)]
    assert model.signature.is_channels_first
    assert model.notes == ()
    (sight,) = sights(path, ["w"], (a, b))
    np.testing.assert_array_equal(sight.inputs, b)


@pytest.mark.parametrize("is_yes", [False, True])
def test_tensors_in_branches_are_not_shown_but_can_be_assigned(is_yes: bool) -> None:
    path = FIXTURES / "weights_in_branches.onnx"
    names = [tensor.name for tensor in open_model(path).tensors]
    x = (normal(1, 4), np.array(is_yes))
    assert not sights(path, names, x)
    model = load(path)
    model.assign({name: array * 3 for name, array in model.weights(names).items()})
    found = model.predict(x)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, run(path, x)[0] * 3, rtol=1e-5)


def test_tensors_in_functions_and_branches_are_told_apart(tmp_path: Path) -> None:
    def constant(name: str, value: float) -> Any:
        return node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.full((1, 4), value, np.float32)))

    def branch(name: str, value: float) -> Any:
        inside = [constant(f"{name}_c", value), node("Identity", [f"{name}_c"], [name])]
        return onnx.helper.make_graph(inside, name, [], [port(name)])

    opsets = [onnx.helper.make_opsetid("", 17)]
    body = [constant("c", 100.0), node("Add", ["a", "c"], ["b"])]
    function = onnx.helper.make_function("own", "Raise", ["a"], ["b"], body, opsets)
    nodes = [
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "zero"], ["is_up"]),
        node("If", ["is_up"], ["chosen"], then_branch=branch("up", 1.0), else_branch=branch("down", 2.0)),
        node("Raise", ["chosen"], ["raised"], domain="own"),
        node("Add", ["raised", "c"], ["y"]),
    ]
    message = proto(nodes, {"c": np.full((1, 4), 1000, np.float32), "zero": np.zeros((), np.float32)})
    message.functions.append(function)
    message.opset_import.append(onnx.helper.make_opsetid("own", 1))
    path = tmp_path / "m.onnx"
    onnx.save(message, path)
    x, names = np.ones((1, 4), np.float32), [found.name for found in open_model(path).tensors if found.size == 4]
    assert len(set(names)) == 4
    for name in names:
        model = load(path)
        (before,) = np.unique(model.predict(x))
        (value,) = np.unique(model.weights([name])[name])
        model.assign({name: np.zeros((1, 4), np.float32)})
        is_met = value != 2
        np.testing.assert_array_equal(model.predict(x), np.full((1, 4), before - value * is_met))


def test_the_digits_network_shows_every_kernel() -> None:
    path = FIXTURES / "digits_cnn.onnx"
    model = open_model(path)
    kernels = {tensor.name: tensor for tensor in model.tensors if tensor.is_prunable}
    x = np.load(FIXTURES / "digits.npz")["x"][:7].astype(np.float32)
    observed = load(path)
    port = observed.signature.inputs[0]
    assert port.shape is not None
    x = x.reshape(-1, *(length or 8 for length in port.shape))
    found = {sight.name: sight for sight in sights(path, list(kernels), x)}
    assert set(found) == set(kernels)
    for name, sight in found.items():
        assert sight.use.out_axis == kernels[name].out_axis
        assert len(sight.inputs) == 7
    np.testing.assert_array_equal(observed.predict(x), run(path, x)[0])


def test_what_does_not_fit_is_refused_with_both_shapes(tmp_path: Path) -> None:
    nodes, held = two_layers()
    model = load(save(tmp_path / "m.onnx", nodes, held, x=[port("x", (None, 48))]))
    with pytest.raises(UsageError, match=r"\?x48, but 5x47 is given"):
        model.predict(normal(5, 47))
    with pytest.raises(UsageError, match=r"\?x48, but 5x1x48 is given"):
        model.observe(["first.weight"], normal(5, 1, 48), lambda _: None)
    with pytest.raises(UsageError, match="has 1 input, but 2 are given"):
        model.predict((normal(5, 48), normal(5, 48)))
    with pytest.raises(UsageError, match="float32, but complex64 is given"):
        model.predict(normal(5, 48).astype(np.complex64))


def test_what_onnxruntime_does_not_load_is_refused_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Unheard", ["x", "w"], ["y"])], {"w": normal(2, 2)})
    with pytest.raises(InputError, match=r"onnxruntime cannot load .*m\.onnx: .*Unheard") as caught:
        load(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("variable", "asked", "expected"), [("3", 0, 3), ("3", 2, 2), ("many", 0, 0), ("", 0, 0)])
def test_it_calculates_on_as_many_threads_as_the_environment_says(
    variable: str, asked: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    session = graphs.OnnxSession(FIXTURES / "digits_cnn.onnx", num_threads=asked)
    assert session.runtime.get_session_options().intra_op_num_threads == expected
