"""What a command does in its modes, a function does as well: search, record, repeat, masks, groups, sensitivity."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import prunectl
from prunectl import api
from prunectl.api.results import Progress
from prunectl.errors import MissingExtraError, UsageError
from tests.running import FIXTURES
from tests.running import here as command

ONNX, TORCH, DATA = FIXTURES / "digits_cnn.onnx", FIXTURES / "digits_cnn.pt", f"{FIXTURES / 'digits.npz'}?limit=200"
NET = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"


def test_a_search_finds_what_the_command_finds(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    told: list[Progress] = []
    found = prunectl.prune(ONNX, tmp_path / "ours.onnx", max_drop="2pp", data=DATA, on_progress=told.append)
    done = command("prune", ONNX, "-o", tmp_path / "theirs.onnx", "--max-drop", "2pp", "--data", DATA)
    assert done.code == 0, done.err
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert found.search is not None
    tried = [now for now in told if ": accuracy " in now.label]
    assert len(tried) == len(found.search.tried)
    assert f"{len(tried)} sparsities tried" in repr(found)
    assert found.to_dict()["max_drop"]
    with pytest.raises(UsageError, match="sparsity and max_drop both set the sparsity"):
        prunectl.prune(ONNX, None, max_drop="2pp", data=DATA, sparsity=0.5)
    with pytest.raises(UsageError, match="max_drop needs data to measure the drop on"):
        prunectl.prune(ONNX, None, max_drop="2pp")


def test_a_search_with_training_finds_what_the_command_finds(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    epochs: list[int] = []
    tried: list[Progress] = []
    options: Any = {"data": DATA, "epochs": 1, "device": "cpu", "builder": NET, "scope": "global"}
    found = prunectl.finetune(
        TORCH,
        tmp_path / "ours.pt",
        max_drop="5pp",
        tried=tmp_path / "tries",
        on_epoch=lambda entry: epochs.append(entry.epoch),
        on_progress=tried.append,
        **options,
    )
    words = ("--data", DATA, "--epochs", "1", "--device", "cpu", "--builder", NET, "--scope", "global")
    done = command("finetune", TORCH, "-o", tmp_path / "theirs.pt", "--max-drop", "5pp", *words)
    assert done.code == 0, done.err
    assert (tmp_path / "ours.pt").read_bytes() == (tmp_path / "theirs.pt").read_bytes()
    assert epochs == [1] * len(found.search.tried)
    assert any("accuracy" in now.label for now in tried)
    assert "sparsities tried" in repr(found)
    assert found.to_dict()["max_drop"]
    with pytest.raises(UsageError, match="sparsity and max_drop both set the sparsity"):
        prunectl.finetune(TORCH, tmp_path / "b.pt", max_drop="5pp", sparsity=0.5, **options)
    with pytest.raises(UsageError, match="tried needs max_drop"):
        prunectl.finetune(TORCH, tmp_path / "b.pt", tried=tmp_path / "tries", **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "channel", "target_params": "-50%"}])
def test_a_run_is_recorded_and_repeated(tmp_path: Path, options: dict[str, Any]) -> None:
    record = tmp_path / "run.json"
    prunectl.prune(ONNX, tmp_path / "a.onnx", manifest=record, **options)
    prunectl.prune(ONNX, tmp_path / "b.onnx", recipe=record)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert command("prune", ONNX, "-o", tmp_path / "c.onnx", "--recipe", record).code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
    if "pattern" not in options:
        assert prunectl.verify(tmp_path / "b.onnx", manifest=record, against=ONNX).is_ok
    with pytest.raises(UsageError, match="scope cannot be used with a recipe"):
        prunectl.prune(ONNX, None, recipe=record, scope="global")


def test_a_record_names_no_object_in_memory(tmp_path: Path) -> None:
    x = np.zeros((4, 1, 8, 8), np.float32)
    with pytest.raises(UsageError, match="a manifest cannot name data or functions in memory"):
        prunectl.prune(ONNX, tmp_path / "a.onnx", sparsity=0.5, strategy="obs", data=x, manifest=tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


def test_masks_are_written_for_later_training(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = prunectl.prune(TORCH, tmp_path / "ours.pt", sparsity=0.5, wrap=True)
    assert command("prune", TORCH, "-o", tmp_path / "theirs.pt", "-s", "0.5", "--wrap").code == 0
    names = [tensor.name for tensor in prunectl.inspect(tmp_path / "ours.pt").layers]
    assert names == [tensor.name for tensor in prunectl.inspect(tmp_path / "theirs.pt").layers]
    assert found.wrapped is not None
    assert found.wrapped.wrapped == 4
    with pytest.raises(UsageError, match="begin needs a schedule"):
        prunectl.prune(TORCH, None, sparsity=0.5, wrap=True, begin=10)


def test_inspect_finds_groups_and_measures_sensitivity() -> None:
    pytest.importorskip("onnxruntime")
    found = prunectl.inspect(ONNX, groups=True, sensitivity=True, data=DATA, samples=32)
    said = command("inspect", ONNX, "--groups", "--sensitivity", "--data", DATA, "--samples", "32", "--json").json
    assert found.groups is not None
    assert found.sensitivity is not None
    assert found.to_dict()["groups"] == said["groups"]
    assert found.to_dict()["models"][0]["sensitivity"] == said["models"][0]["sensitivity"]
    assert prunectl.inspect(ONNX).groups is None
    with pytest.raises(UsageError, match="data needs sensitivity=True"):
        prunectl.inspect(ONNX, data=DATA)
    with pytest.raises(UsageError, match="input needs groups=True"):
        prunectl.inspect(ONNX, input="1,1,8,8")


def test_weights_of_pytorch_have_groups_with_their_network() -> None:
    pytest.importorskip("torch")
    found = prunectl.inspect(TORCH, groups=True, builder=NET, input="1,1,8,8")
    assert found.groups is not None
    assert found.groups.groups


def test_progress_is_told_as_work_is_done(tmp_path: Path) -> None:
    for function in (prunectl.inspect, prunectl.size):
        told: list[Progress] = []
        function(ONNX, on_progress=told.append)
        assert 0 < told[-1].done <= told[-1].total
        assert "digits_cnn.onnx" in told[-1].label
    told = []
    prunectl.prune({"fc.weight": np.ones((4, 4), np.float32)}, sparsity=0.5, on_progress=told.append)
    assert 0 < told[-1].done <= told[-1].total
    told = []
    prunectl.strip(ONNX, tmp_path / "stripped.onnx", on_progress=told.append)
    assert {now.label for now in told} == {"measuring digits_cnn.onnx", "measuring stripped.onnx"}
    told = []
    prunectl.evaluate(ONNX, DATA, on_progress=told.append)
    assert [(now.done, now.total) for now in told][-1] == (200, 200)
    (tmp_path / "models").mkdir()
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(ONNX, tmp_path / "models" / name)
    told = []
    prunectl.init(tmp_path / "models", on_progress=told.append)
    assert [(now.done, now.total) for now in told] == [(1, 2), (2, 2)]
    told = []
    prunectl.export(ONNX, tmp_path / "weights.npz", on_progress=told.append)
    assert [(now.label, now.done, now.total) for now in told] == [
        ("exporting digits_cnn.onnx", step, 3) for step in (1, 2, 3)
    ]
    with pytest.raises(TypeError, match="on_progress must be a function, not int"):
        prunectl.size(ONNX, on_progress=3)  # type: ignore[arg-type]


def test_every_function_that_takes_time_tells_how_far_it_is_or_why_it_does_not() -> None:
    for name in api.__all__:
        function = getattr(prunectl, name)
        assert ("on_progress" in inspect.signature(function).parameters) == (name != "doctor"), name
    assert "no ``on_progress``" in (prunectl.doctor.__doc__ or "")


def test_a_table_becomes_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = ModuleType("pandas")
    monkeypatch.setattr(
        frame, "DataFrame", lambda rows, columns: [dict(zip(columns, row, strict=True)) for row in rows], raising=False
    )
    monkeypatch.setitem(sys.modules, "pandas", frame)
    (fc1,) = [row for row in prunectl.inspect(ONNX).to_pandas() if row["tensor"] == "fc1.weight"]
    assert (fc1["params"], fc1["shape"]) == (8192, "32x256")
    assert sum(row["dropped"] for row in prunectl.prune(ONNX, None, sparsity=0.5).to_pandas()) == 4868
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="needs pandas"):
        prunectl.inspect(ONNX).to_pandas()
