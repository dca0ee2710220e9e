"""`prunectl eval`: the metric of each file, beside a dense one, within limits."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.contract import Array
from tests.running import FIXTURES, here

DATA = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=400")
ONNX, PRUNED = FIXTURES / "digits_cnn.onnx", ("prune", FIXTURES / "digits_cnn.onnx", "-s", "95%")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ONNX, tmp_path / "dense.onnx")
    assert here(*PRUNED, "-o", tmp_path / "small.onnx").code == 0
    return tmp_path


def accuracy(path: Path) -> float:
    """As onnxruntime and NumPy have it."""
    with np.load(FIXTURES / "digits.npz") as arrays:
        x, y = (arrays[name][:400] for name in ("x", "y"))
    session = onnxruntime.InferenceSession(path)
    (port,) = session.get_inputs()
    out = session.run(None, {port.name: (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)})[0]
    return float((out.argmax(axis=1) == y).mean())


def test_each_file_is_measured_and_nothing_is_written(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    done = here("eval", "dense.onnx", "small.onnx", *DATA, "--json", cwd=folder)
    assert done.code == 0, done.err
    found = {row["path"]: row["value"] for row in done.json["evaluations"]}
    assert found == pytest.approx({name: accuracy(folder / name) for name in ("dense.onnx", "small.onnx")}, abs=1e-6)
    assert found["small.onnx"] < found["dense.onnx"]
    assert sorted(os.listdir(folder)) == before


def test_frameworks_agree_on_one_network() -> None:
    names = [FIXTURES / f"digits_cnn.{suffix}" for suffix in ("h5", "onnx", "pt2", "tflite")]
    done = here("eval", *names, *DATA, "--metric", "accuracy", "--against", ONNX, "--max-drop", "0pp")
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines() if "\taccuracy\t" in line]
    assert [row[3] for row in rows] == ["-", "0", "0", "0", "0"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (("--min", "99%"), "below the limit of 99.0 % (min-metric)"),
        (("--against", "dense.onnx", "--max-drop", "1pp"), "over the limit of 1 pp (max-drop)"),
        (("--metric", "mse", "--max", "0.001"), "over the limit of 0.001 (max-metric)"),
    ],
)
def test_a_model_beyond_a_limit_is_exit_code_1(limit: tuple[str, ...], message: str, folder: Path) -> None:
    data = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=400&onehot=10") if "mse" in limit else DATA
    done = here("eval", "small.onnx", *data, *limit, cwd=folder)
    assert done.code == 1
    assert "FAIL" in done.err
    assert message in done.err


def test_a_model_within_its_limits_passes(folder: Path) -> None:
    words = ("--min", "0.9", "--against", "dense.onnx", "--max-drop", "1pp")
    assert here("eval", "dense.onnx", *DATA, *words, cwd=folder).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-drop", "1pp"), "--max-drop needs a model to compare with"),
        (("--max", "3"), "--max does not go with accuracy, which is better when it is higher"),
        (("--metric", "mae", "--min", "3"), "--min does not go with mae, which is better when it is lower"),
        (("--min", "much"), "--min 'much' is not a number"),
        (("--against", "dense.onnx", "--max-drop", "1%"), "--max-drop '1%' is not a drop"),
        (("--metric", "beauty"), "beauty is not a known metric"),
    ],
)
def test_a_slip_is_exit_code_2(words: tuple[str, ...], message: str, folder: Path) -> None:
    data = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=40&onehot=10") if "mae" in words else DATA
    done = here("eval", "small.onnx", *data, *words, cwd=folder)
    assert done.code == 2
    assert message in done.err


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_measured(folder: Path) -> None:
    (folder / "broken.onnx").write_bytes(b"no model")
    done = here("eval", "broken.onnx", "dense.onnx", *DATA, cwd=folder)
    assert done.code == 3
    assert "broken.onnx" in done.err
    assert done.out.startswith("dense.onnx\taccuracy\t")


def test_an_answer_that_is_no_number_is_within_no_limit(folder: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.onnx", folder / "nan.onnx")
    raw = (folder / "nan.onnx").read_bytes()
    bias = np.float32(np.nan).tobytes() * 10
    from prunectl.formats.registry import open_model  # noqa: PLC0415 - where the bias of the last layer lies

    tensor = next(tensor for tensor in open_model(folder / "nan.onnx").tensors if tensor.name == "fc2.bias")
    assert tensor.storage.extent is not None
    at = tensor.storage.extent.offset + tensor.start
    (folder / "nan.onnx").write_bytes(raw[:at] + bias + raw[at + len(bias) :])
    data = ("--data", f"{FIXTURES / 'digits.npz'}?norm=/16&limit=40&onehot=10", "--metric", "mse")
    done = here("eval", "nan.onnx", *data, "--max", "1", cwd=folder)
    assert done.code == 5
    assert "mse is nan for nan.onnx" in done.err
    assert here("eval", "nan.onnx", *data, "--json", cwd=folder).json["evaluations"][0]["value"] is None


def small_network() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("file", ["m.pt", "ema.pt", "raw.pt", "my model.pt"])
@pytest.mark.parametrize("first", ["state_dict", "ema_state_dict"])
def test_it_says_which_of_two_copies_is_measured_and_how_to_have_the_other(
    first: str, file: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    copies = {"state_dict": small_network(), "ema_state_dict": small_network()}
    other = next(name for name in copies if name != first)
    torch.save({name: copies[name].state_dict() for name in (first, other)}, tmp_path / file)
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    words = ("--builder", f"{__name__}:small_network", "--data", "d.npz", "--metric", "loss", "--json")

    def loss(name: str) -> float:
        return torch.nn.functional.cross_entropy(copies[name](x), y).item()

    done = here("eval", file, *words, cwd=tmp_path)
    assert done.json["evaluations"][0]["value"] == pytest.approx(loss(first), rel=1e-5)
    (note,) = (warning for warning in done.json["warnings"] if "twice" in warning)
    assert f"those in {first} are used, not those in {other}" in note
    command = shlex.split(note.rpartition("prunectl ")[2])
    assert here(*command, cwd=tmp_path).code == 0
    stripped = here("eval", command[-1], *words, cwd=tmp_path)
    assert stripped.json["evaluations"][0]["value"] == pytest.approx(loss(other), rel=1e-5)
    assert not any("twice" in warning for warning in stripped.json["warnings"])


def label_network(path: Path, classes: list[int] | list[str], *, has_map: bool = False) -> Path:
    """A classifier as scikit-learn's are written: labels first, then scores, or a dictionary of them (ZipMap)."""
    helper, kind = onnx.helper, onnx.TensorProto
    weights = np.random.default_rng(0).standard_normal((len(classes), 3)).reshape(-1).tolist()
    key, map_key = ("ints", "int64s") if isinstance(classes[0], int) else ("strings", "strings")
    label = kind.INT64 if isinstance(classes[0], int) else kind.STRING
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", coefficients=weights,
            intercepts=[0.0] * len(classes), post_transform="SOFTMAX", **{f"classlabels_{key}": classes},
        )
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info("label", label, ["n"])]
    if has_map:
        nodes.append(
            helper.make_node("ZipMap", ["scores"], ["map"], domain="ai.onnx.ml", **{f"classlabels_{map_key}": classes})
        )
        entry = helper.make_map_type_proto(kind.INT64, helper.make_tensor_type_proto(kind.FLOAT, None))
        outputs.append(helper.make_value_info("map", helper.make_sequence_type_proto(entry)))
    else:
        outputs.append(helper.make_tensor_value_info("scores", kind.FLOAT, ["n", len(classes)]))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind.FLOAT, ["n", 3])], outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("kind", [np.int64, np.float32])
@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("words", [(), ("--metric", "accuracy")])
def test_labels_that_a_model_answers_by_are_compared_as_such(
    words: tuple[str, ...], has_map: bool, kind: type[np.generic], tmp_path: Path
) -> None:
    label_network(tmp_path / "m.onnx", [10, 11, 12, 13], has_map=has_map)
    random = np.random.default_rng(1)
    x, y = random.standard_normal((50, 3)).astype(np.float32), random.integers(10, 14, 50)
    np.savez(tmp_path / "d.npz", x=x, y=y.astype(kind))
    found = here("eval", "m.onnx", "--data", "d.npz", *words, "--json", cwd=tmp_path).json["evaluations"][0]
    labels = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(["label"], {"x": x})[0]
    assert (found["metric"], found["value"]) == ("accuracy", pytest.approx((labels == y).mean()))


def network_of(path: Path, nodes: list[onnx.NodeProto], kind: int, **constants: Array) -> Path:
    """A network of 16 inputs that computes `a` by a kernel, and its output `y` from that by the nodes."""
    helper = onnx.helper
    constants["f"] = np.random.default_rng(0).standard_normal((16, 1)).astype(np.float32)
    ports = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])]
    outputs = [helper.make_tensor_value_info("y", kind, ["n", 1])]
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "f"], ["a"]), *nodes], "g", ports, outputs, arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def measured(path: Path, x: Array, y: Array, *words: str) -> tuple[str, float]:
    """The metric by which a model is evaluated on some targets, and its value."""
    np.savez(path.with_name("d.npz"), x=x, y=y)
    done = here("eval", path.name, "--data", "d.npz", *words, "--json", cwd=path.parent)
    return done.json["evaluations"][0]["metric"], done.json["evaluations"][0]["value"]


INPUTS = np.random.default_rng(1).standard_normal((80, 16)).astype(np.float32)


def test_logits_that_are_quantised_are_no_labels(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("QuantizeLinear", ["a", "s", "z"], ["y"])]
    scale, zero = np.array(0.05, np.float32), np.array(0, np.int8)
    path = network_of(tmp_path / "m.onnx", nodes, onnx.TensorProto.INT8, s=scale, z=zero)
    logits = onnxruntime.InferenceSession(path).run(None, {"x": INPUTS})[0]
    y = (logits > 0).astype(np.int64)
    y[:8] = 1 - y[:8]
    assert measured(path, INPUTS, y) == ("accuracy", pytest.approx(0.9))


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_whole_numbers_that_are_measurements_are_judged_by_their_error(kind: type[np.generic], tmp_path: Path) -> None:
    helper = onnx.helper
    nodes = [helper.make_node("Round", ["a"], ["r"]), helper.make_node("Cast", ["r"], ["y"], to=onnx.TensorProto.INT64)]
    path = network_of(tmp_path / "m.onnx", nodes, onnx.TensorProto.INT64)
    numbers = onnxruntime.InferenceSession(path).run(None, {"x": INPUTS})[0]
    y = numbers[::-1].astype(kind)
    assert measured(path, INPUTS, y) == ("mae", pytest.approx(np.abs(numbers - y).mean()))
    assert measured(path, INPUTS, y, "--metric", "accuracy")[1] == pytest.approx((numbers == y).mean())


def test_a_share_among_the_targets_leaves_other_batches_counted(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Greater", ["a", "zero"], ["y"])]
    path = network_of(tmp_path / "m.onnx", nodes, onnx.TensorProto.BOOL, zero=np.array(0, np.float32))
    answers = onnxruntime.InferenceSession(path).run(None, {"x": INPUTS})[0]
    y = answers.astype(np.float32)
    y[:32] = 1 - y[:32]
    y[79] = 0.6 if answers[79] else 0.4
    assert measured(path, INPUTS, y, "--metric", "accuracy") == ("accuracy", pytest.approx(0.6))


def test_indices_by_which_labels_are_looked_up_make_labels(tmp_path: Path) -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("Concat", ["a", "x"], ["c"], axis=1),
        helper.make_node("ArgMax", ["c"], ["i"], axis=1, keepdims=1),
        helper.make_node("Gather", ["classes", "i"], ["l"]),
        helper.make_node("Cast", ["l"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    path = network_of(tmp_path / "m.onnx", nodes, onnx.TensorProto.FLOAT, classes=np.arange(17) * 3)
    labels = onnxruntime.InferenceSession(path).run(None, {"x": INPUTS})[0]
    assert measured(path, INPUTS, labels[::-1]) == ("accuracy", pytest.approx((labels == labels[::-1]).mean()))


def test_a_map_of_labels_is_compared_place_by_place(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)]
    ports = [helper.make_tensor_value_info("x", kind.FLOAT, ["n", 5, 4, 4])]
    graph = helper.make_graph(nodes, "g", ports, [helper.make_tensor_value_info("y", kind.INT64, ["n", 4, 4])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    random = np.random.default_rng(1)
    x, y = random.standard_normal((20, 5, 4, 4)).astype(np.float32), random.integers(0, 5, (20, 4, 4))
    np.savez(tmp_path / "d.npz", x=x, y=y)
    found = here("eval", "m.onnx", "--data", "d.npz", "--json", cwd=tmp_path).json["evaluations"][0]
    assert (found["metric"], found["value"]) == ("accuracy", pytest.approx((x.argmax(axis=1) == y).mean()))


def test_scores_are_compared_where_the_labels_of_a_model_are_words(tmp_path: Path) -> None:
    label_network(tmp_path / "m.onnx", list("abcd"))
    random = np.random.default_rng(1)
    x, y = random.standard_normal((50, 3)).astype(np.float32), random.integers(0, 4, 50)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    done = here("eval", "m.onnx", "--data", "d.npz", "--json", cwd=tmp_path)
    scores = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(["scores"], {"x": x})[0]
    assert done.json["evaluations"][0]["value"] == pytest.approx((scores.argmax(axis=1) == y).mean())


def test_an_output_is_chosen_by_its_name_before_the_metric(tmp_path: Path) -> None:
    label_network(tmp_path / "m.onnx", [0, 1, 2, 3])
    x, y = np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32), np.arange(50) % 2
    targets = np.eye(4, dtype=np.float32)[y]
    np.savez(tmp_path / "d.npz", x=x, y=targets)
    words = ("--metric", "scores_mse", "--json")
    found = here("eval", "m.onnx", "--data", "d.npz", *words, cwd=tmp_path).json["evaluations"][0]
    scores = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(["scores"], {"x": x})[0]
    assert found["value"] == pytest.approx(np.square(scores - targets).mean(), rel=1e-5)
