"""`prunectl bench`: each model in its runtime, limits that are judged by intervals, and what a difference means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from prunectl.analysis.timing import Interval, Latency
from prunectl.exporting.bench import BenchedModel, Benchmark
from prunectl.formats.tflite.schema import LiteGraph, LiteOperator
from prunectl.reporting.bench import bench_report
from prunectl.reporting.report import Report, report_json
from tests.running import FIXTURES, Outcome, here

ONNX = FIXTURES / "digits_cnn.onnx"
QUICK = ("--seconds", "0.1")
DENSE = BenchedModel("dense.onnx", "onnxruntime", 1000, 0.0, 10_000)
SPARSE = replace(DENSE, path="sparse.onnx", sparsity=0.8)


def bench(*words: str | Path) -> Outcome:
    return here("bench", *words, *QUICK)


def test_each_file_runs_in_the_runtime_that_opens_it() -> None:
    runtimes = {
        "digits_cnn.onnx": "onnxruntime",
        "digits_cnn.tflite": "TensorFlow Lite",
        "digits_cnn.keras": "TensorFlow",
        "digits_cnn.h5": "TensorFlow",
        "digits_cnn_savedmodel": "TensorFlow",
        "digits_cnn.pt2": "PyTorch",
        "digits_cnn_torchscript.pt": "TorchScript",
    }
    done = bench(*(FIXTURES / name for name in runtimes), "--input", "x:1,1,8,8", "--json")
    assert done.code == 0, done.err
    rows = done.json["latencies"]
    assert {Path(row["path"]).name: row["runtime"] for row in rows} == runtimes
    for row in rows:
        median = row["median"]
        assert 0 < row["minimum"] <= median["low"] <= median["value"] <= median["high"]
        assert row["samples"] >= 6
        assert row["throughput"] == pytest.approx(1 / median["value"])
        assert row["threads"] == row["batch_size"] == 1
        assert row["memory"] is None or row["memory"] >= 0
    assert [row["speedup"] is None for row in rows] == [True, *[False] * 6]


def test_a_network_that_is_built_by_the_user_runs_too(tmp_path: Path) -> None:
    code = "import torch\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(6, 3))\n"
    (tmp_path / "net.py").write_text(code)
    torch.save({"0.weight": torch.ones(3, 6), "0.bias": torch.ones(3)}, tmp_path / "m.pt")
    done = bench(tmp_path / "m.pt", "--builder", f"{tmp_path / 'net.py'}:net", "--input", "x:1,6", "--json")
    assert done.code == 0, done.err
    assert done.json["latencies"][0]["runtime"] == "PyTorch"


def test_every_batch_size_is_measured() -> None:
    done = bench(ONNX, ONNX, "--batch-size", "1,16", "--json")
    assert [(row["batch_size"], row["speedup"] is None) for row in done.json["latencies"]] == [
        (1, True),
        (1, False),
        (16, True),
        (16, False),
    ]


def test_inputs_can_be_the_users_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((4, 8, 8, 1), np.float32))
    assert bench(ONNX, "--data", tmp_path / "x.npz", "--batch-size", "4").code == 0
    done = bench(ONNX, "--data", tmp_path / "x.npz", "--batch-size", "5")
    assert done.code == 2
    assert "has 4 examples, fewer than a batch of 5" in done.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((FIXTURES / "digits_cnn.safetensors",), 2, "holds only weights, not the network that uses them"),
        ((FIXTURES / "digits_cnn_checkpoint.index",), 3, "holds weights alone, which no runtime here can run"),
        ((FIXTURES / "lambda_layer.keras",), 3, "Lambda layer double"),
        ((FIXTURES / "digits_cnn_torchscript.pt",), 2, "whose open axes need a length"),
        ((ONNX, "--batch-size", "0"), 2, "is not a list of numbers above 0"),
        ((ONNX, "--max-latency", "5"), 2, "'5' is not a time"),
        ((ONNX, "--min-speedup", "1.2"), 2, "--min-speedup needs a second model"),
        ((ONNX, "--seed", "-1"), 2, "-1 is not in the range x>=0"),
        ((ONNX, "--input", "x:1,1,8,8"), 2, "--input has no use"),
        (("no.onnx",), 3, "no.onnx does not exist"),
    ],
)
def test_what_cannot_be_measured_is_told(words: tuple[str | Path, ...], code: int, message: str) -> None:
    done = bench(*words)
    assert (done.code, done.out) == (code, ""), done.err
    assert message in " ".join(done.err.split())


def test_a_model_of_a_fixed_batch_is_measured_with_it(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    assert bench(tmp_path / "m.onnx", "--json").json["latencies"][0]["batch_size"] == 2
    done = bench(tmp_path / "m.onnx", "--batch-size", "3")
    assert done.code == 2
    assert "cannot run batches of 3: it was saved for 2" in " ".join(done.err.split())


def test_a_model_without_inputs_is_refused(tmp_path: Path) -> None:
    port = helper.make_tensor_value_info("y", TensorProto.FLOAT, (3,))
    node = helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0, 3.0])
    graph = helper.make_graph([node], "g", [], [port])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    done = bench(tmp_path / "m.onnx")
    assert done.code == 3
    assert "takes no inputs" in done.err


def test_operators_of_tensorflow_that_may_write_files_need_trust(tmp_path: Path) -> None:
    graphs = (LiteGraph((), (LiteOperator("FlexWriteFile", (), (), None),)),)
    with patch("prunectl.training.lite.read_lite", return_value=SimpleNamespace(graphs=graphs)):
        done = bench(FIXTURES / "digits_cnn.tflite")
        assert done.code == 3
        assert "uses operators of TensorFlow, some of which read and write files: FlexWriteFile" in done.err
        assert bench(FIXTURES / "digits_cnn.tflite", "--trust").code == 0


def test_limits_decide_the_exit_code() -> None:
    assert bench(ONNX, "--max-latency", "100s").code == 0
    done = bench(ONNX, "--max-latency", "0.001us")
    assert done.code == 1
    assert "over the limit of 0.00 µs (max-latency)" in done.err
    assert bench(ONNX, ONNX, "--min-speedup", "0.001").code == 0
    assert bench(ONNX, ONNX, "--min-speedup", "1000").code == 1


def latency(seconds: float, *, speedup: tuple[float, float, float] = (1, 1, 1), spread: float = 0.01) -> Latency:
    median = Interval(seconds, seconds * (1 - spread), seconds * (1 + spread))
    return Latency(median, seconds * 0.9, 100, Interval(*speedup))


def report(other: BenchedModel, measured: Latency, **limits: float) -> Report:
    return bench_report(Benchmark((DENSE, other), {1: (latency(5e-3), measured)}, 1), **limits)


def test_a_limit_within_the_interval_is_not_judged() -> None:
    near = report(SPARSE, latency(5e-3, speedup=(1.2, 1.1, 1.3)), max_latency=5.02e-3, min_speedup=1.25)
    assert near.exit_code == 5
    assert [str(failure.error) for failure in near.failures] == [
        "dense.onnx cannot be judged: a run takes 4.95 ms to 5.05 ms, too near --max-latency 5.02 ms",
        "sparse.onnx cannot be judged: a run takes 4.95 ms to 5.05 ms, too near --max-latency 5.02 ms",
        "sparse.onnx cannot be judged: it is 1.10 to 1.30 times as fast, too near --min-speedup 1.25",
    ]
    clear = report(SPARSE, latency(5e-3, speedup=(1.2, 1.1, 1.3)), max_latency=5.1e-3, min_speedup=1.1)
    assert (clear.exit_code, clear.failures) == (0, ())
    assert report(SPARSE, latency(5e-3), max_latency=4.9e-3).exit_code == 1


@pytest.mark.parametrize(
    ("speedup", "sentence"),
    [
        (
            (1.0, 0.99, 1.01),
            "as fast as dense.onnx: the difference is within noise (0.99 to 1.01). onnxruntime ignores zeros.",
        ),
        ((1.9, 1.8, 2.0), "1.90 times as fast as dense.onnx (1.80 to 2.00)."),
        (
            (0.5, 0.4, 0.625),
            "slower than dense.onnx: a run takes 2.00 times as long (1.60 to 2.50).",
        ),
        ((1.0, 0.8, 1.2), "cannot be told apart from dense.onnx: the speed-up lies between 0.80 and 1.20. Measure"),
    ],
)
def test_a_verdict_is_a_sentence(speedup: tuple[float, float, float], sentence: str) -> None:
    (note,) = report(SPARSE, latency(5e-3, speedup=speedup)).notes
    assert note.removeprefix("sparse.onnx ").removeprefix("is ").startswith(sentence)


def test_only_what_differs_by_zeros_is_told_that_they_are_ignored() -> None:
    same = latency(5e-3, speedup=(1.0, 0.99, 1.01))
    for other in (DENSE, replace(SPARSE, params=500), replace(SPARSE, runtime="PyTorch")):
        told = report(replace(other, path="other.onnx"), same)
        assert "zeros" not in told.notes[0]
        assert not told.next_step
    assert report(SPARSE, same).next_step == (
        "prunectl prune dense.onnx -o dense-channels.onnx --pattern channel -s 50%"
    )


def test_scripts_read_the_verdict() -> None:
    (_, row) = json.loads(report_json(report(SPARSE, latency(2e-3, speedup=(2.5, 2.4, 2.6))), "bench"))["latencies"]
    assert row["speedup"] == {"value": 2.5, "low": 2.4, "high": 2.6, "verdict": "faster"}
    assert row["sparsity"] == 0.8
