"""The proof: what it compares, on which inputs, in which precision, and what it lets pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels import verify
from prunectl.channels.adapter import PrunedShapes, open_adapter
from prunectl.channels.plan import ChannelPlan
from prunectl.channels.rules import propagate
from prunectl.errors import UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.training.backend import LoadOptions
from tests.channels.made import model, numpy_helper, onnx, op, saved
from tests.channels.test_prune import FIXTURE, cut
from tests.running import here


def test_a_cut_that_changes_the_outcome_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_ZEROED", frozenset())
    with pytest.raises(WorkError, match="differ from the original's"):
        cut(FIXTURE, tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_a_cut_that_cannot_run_is_not_written(tmp_path: Path) -> None:
    source = open_adapter(open_model(FIXTURE), LoadOptions())
    trace = propagate(source.graph)
    broken = source.with_weights({})
    broken.proto.graph.initializer[0].dims[0] -= 1
    with pytest.raises(WorkError, match="nothing was written"):
        verify.verify(source, broken, ChannelPlan((), {}, PrunedShapes(trace, ())), 0)


def test_what_a_softmax_would_hide_is_seen(tmp_path: Path) -> None:
    nodes = [op("Conv", "x first", "a"), op("GlobalMaxPool", "a", "b"), op("Flatten", "b", "c")]
    nodes += [op("Gemm", "c last", "d"), op("Softmax", "d", "y", axis=1)]
    made = model(nodes, {"first": (8, 3, 3, 3), "last": (8, 5)})
    path = saved(made, tmp_path)
    for tensor in made.graph.initializer:
        if tensor.name == "last":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-9), "last"))
    onnx.save(made, path)
    source = open_adapter(open_model(path), LoadOptions())
    trace = propagate(source.graph)
    label = int(trace.axis_records[0].labels[0])
    gone = {("first", 0): np.array([0]), ("last", 0): np.array([0])}
    wrong = {("first", 0): np.array([0]), ("last", 0): np.array([1])}
    after = PrunedShapes(trace, [label])
    assert verify.verify(source, source.prune(gone, after, {}), ChannelPlan((), gone, after), 0).error < 1e-6
    with pytest.raises(WorkError, match="differ from the original's"):
        verify.verify(source, source.prune(wrong, after, {}), ChannelPlan((), gone, after), 0)


def blind(folder: Path) -> tuple[Any, Any, ChannelPlan]:
    """A network whose channels say nothing below 99, and a cut of it that mixes two of them up."""
    nodes = [op("Conv", "x first bias", "a"), op("Relu", "a", "b"), op("Conv", "b last", "y")]
    made = model(nodes, {"first": (8, 3, 3, 3), "bias": (8,), "last": (2, 8, 1, 1)})
    for tensor in made.graph.initializer:
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, -99, np.float32), "bias"))
    source = open_adapter(open_model(saved(made, folder)), LoadOptions())
    trace = propagate(source.graph)
    right = {("first", 0): np.array([0]), ("bias", 0): np.array([0]), ("last", 1): np.array([0])}
    wrong = right | {("last", 1): np.array([1])}
    after = PrunedShapes(trace, [int(trace.axis_records[0].labels[0])])
    return source, source.prune(wrong, after, {}), ChannelPlan((), right, after)


def test_what_random_numbers_do_not_show_the_users_data_do(tmp_path: Path) -> None:
    source, smaller, plan = blind(tmp_path)
    # Only what comes out is compared: the layers within would show it at once.
    plan = replace(plan, is_lossless=True)
    assert verify.verify(source, smaller, plan, 0).error == 0
    usual = source.random_inputs(np.random.default_rng(0))
    given = {name: array * 1000 for name, array in usual.items()}
    with pytest.raises(WorkError, match="differ from the original's"):
        verify.verify(source, smaller, plan, 0, [given])


def test_data_are_taken_in_batches_as_the_network_has_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((5, 1, 8, 8), np.float32))
    found = cut(FIXTURE, tmp_path / "small.onnx", data=str(tmp_path / "x.npz"))
    size = len(
        next(iter(open_adapter(open_model(FIXTURE), LoadOptions()).random_inputs(np.random.default_rng(0)).values()))
    )
    assert found.proof.batches == -(-min(5, 4 * size) // size)
    assert found.proof.error < 1e-5


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 7), np.float32))
    with pytest.raises(UsageError, match="for each example"):
        cut(FIXTURE, tmp_path / "small.onnx", data=str(tmp_path / "x.npz"))
    assert not (tmp_path / "small.onnx").exists()


def test_the_report_says_what_was_compared(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 8, 8, 1), np.float32))
    model, output = FIXTURE.with_suffix(".keras"), tmp_path / "small.keras"
    done = here(
        "prune",
        model,
        "-o",
        output,
        "--pattern",
        "channel",
        "-s",
        "50%",
        "--data",
        tmp_path / "x.npz",
        "--format",
        "human",
    )
    assert done.code == 0, done.err
    assert "in float64, also on your data" in done.out


def test_onnxruntime_has_no_float64() -> None:
    assert cut(FIXTURE, None).proof.error_float64 is None


def test_an_original_that_fails_in_float64_is_not_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(*_: Any) -> Any:
        raise TypeError("this layer takes 32 bits alone")

    monkeypatch.setattr(verify._Pair, "in_float64", narrow)
    assert "the original cannot run in float64" in cut(FIXTURE.with_suffix(".keras"), None).notes[-1]


def test_what_float32_hides_is_seen_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FIXTURE.with_suffix(".keras")
    found = cut(path, None)
    assert found.proof.error_float64 is not None
    assert found.proof.error_float64 < 1e-12
    monkeypatch.setattr(verify, "TOLERANCE_FLOAT64", found.proof.error_float64 / 2)
    with pytest.raises(WorkError, match="in float64"):
        cut(path, tmp_path / "small.keras")
    assert not list(tmp_path.iterdir())


def test_made_up_data_are_said_to_be_made_up() -> None:
    found = cut(FIXTURE, None, data="random:8")
    assert found.proof.batches > 0
    assert any("the data is random" in note for note in found.notes)


def test_a_number_of_examples_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="and --batch-size"):
        cut(FIXTURE, tmp_path / "small.onnx", samples=3)
