"""Sweeps of real files: the points are what the commands make, and a sweep that was killed goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from prunectl import api
from prunectl.commands import app
from prunectl.errors import InputError, UsageError
from prunectl.sweeping.sweep import Swept, sweep
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial
from tests.running import COMMAND, FIXTURES, ROOT, clean

pytestmark = pytest.mark.filterwarnings("ignore")

ONNX, DIGITS = FIXTURES / "digits_cnn.onnx", FIXTURES / "digits.npz"
FEW = f"{DIGITS}?limit=100"
TORCH = ["--builder", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"]


def table(found: Swept) -> dict[str, tuple[float, int, float]]:
    return {point.name: (one.value, one.gzip, one.sparsity) for point, one in found.outcomes.items()}


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """Run the command, and return its JSON."""
    assert app.run(["sweep", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def killed_after(lines: int, *words: str | Path, **environment: str) -> None:
    """Run a sweep in a process of its own, and kill it with no chance to tidy up."""
    folder = Path(words[words.index("-o") + 1])
    process = subprocess.Popen(
        [*COMMAND, "sweep", *map(str, words)],
        env=clean(PYTHONPATH=str(ROOT), **environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    notes, until = folder / "sweep.jsonl", time.monotonic() + 120
    try:
        while not notes.exists() or notes.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def noted(folder: Path) -> int:
    return (folder / "sweep.jsonl").read_bytes().count(b"\n")


def accuracy_by_hand(path: Path) -> float:
    digits = np.load(DIGITS)
    x, y = digits["x"][:100], digits["y"][:100]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: x.transpose(0, 3, 1, 2).astype(np.float32)})
    return float(np.mean(answers.argmax(1) == y))


@pytest.mark.usefixtures("trials_here")
def test_points_are_what_prune_writes_and_onnxruntime_answers(tmp_path: Path) -> None:
    choices = SweepConfig(data=FEW, strategies=("magnitude", "lamp"), scopes=("global",), sparsities=(0.5, 0.9))
    found = sweep(ONNX, choices, tmp_path / "points")
    assert [point.name for point in found.outcomes] == [
        *("base", "magnitude-global-50", "magnitude-global-90", "lamp-global-50", "lamp-global-90")
    ]
    for point, outcome in found.outcomes.items():
        path = tmp_path / "points" / outcome.path if point != BASELINE else ONNX
        assert outcome.value == accuracy_by_hand(path)
        assert outcome.gzip == api.size(path).bytes.compressed
        if point != BASELINE:
            own = tmp_path / f"{point.name}.onnx"
            api.prune(ONNX, own, sparsity=point.sparsity, strategy=point.strategy, scope=point.scope)
            assert path.read_bytes() == own.read_bytes()


@pytest.mark.usefixtures("trials_here")
def test_strategies_that_look_at_data_look_at_it(tmp_path: Path) -> None:
    choices = SweepConfig(data=FEW, strategies=("activation-magnitude",), sparsities=(0.8,), samples=64)
    found = sweep(ONNX, choices, tmp_path / "points")
    own = tmp_path / "own.onnx"
    api.prune(ONNX, own, sparsity=0.8, strategy="activation-magnitude", data=FEW, samples=64)
    (point,) = found.outcomes.keys() - {BASELINE}
    assert (tmp_path / "points" / found.outcomes[point].path).read_bytes() == own.read_bytes()


@pytest.mark.usefixtures("trials_here")
def test_it_is_judged_by_a_share_of_the_data_or_by_other_data(tmp_path: Path) -> None:
    whole = sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.8,)), tmp_path / "whole")
    other = sweep(ONNX, SweepConfig(data=f"{DIGITS}?limit=3", val=FEW, sparsities=(0.8,)), tmp_path / "other")
    share = sweep(ONNX, SweepConfig(data=FEW, val_split=0.07, sparsities=(0.8,)), tmp_path / "share")
    assert table(other) == table(whole)
    value = next(one.value for point, one in share.outcomes.items() if point != BASELINE)
    assert (value * 7).is_integer() or value * 7 == pytest.approx(round(value * 7))


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize(("strategy", "is_told"), [("magnitude", False), ("activation-magnitude", True)])
def test_data_that_pruning_saw_as_well_is_told(
    strategy: str, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-o", str(tmp_path / "points"), "--data", FEW, "--strategies", strategy, "--sparsities", "50%"]
    assert app.run(["sweep", str(ONNX), *words]) == 0
    assert ("which pruning also used: add --val or --val-split" in capsys.readouterr().err) is is_told


@pytest.mark.usefixtures("trials_here")
def test_the_report_marks_the_front_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [ONNX, "-o", tmp_path / "points", "--data", FEW, "--scopes", "layer,global", "--sparsities", "50%,90%"]
    found = said(capsys, *words)
    points = [model["point"] for model in found["models"]]
    assert [point["strategy"] for point in points] == [None, *["magnitude"] * 4]
    assert any(point["is_front"] for point in points)
    assert app.run(["sweep", *map(str, words), "--format", "human"]) == 0
    drawn = capsys.readouterr().out
    assert "accuracy against gzip size" in drawn
    assert "a magnitude layer" in drawn
    assert app.run(["sweep", *map(str, words), "--quiet"]) == 0
    best = [model["path"] for model in found["models"] if model["point"]["is_front"] and model["point"]["strategy"]]
    assert sorted(capsys.readouterr().out.split()) == sorted(best)
    assert app.run(["sweep", *map(str, words)]) == 0
    assert [len(line.split("\t")) for line in capsys.readouterr().out.splitlines()] == [10] * 5
    assert app.run(["sweep", *map(str, words), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    # The unpruned model is a diamond, and the legend has circles without a title.
    assert page.count("</title></circle>") == len(points) - 1
    assert page.count("</title></path>") == 1
    assert 'class="step"' in page
    assert "capitals" not in page


@pytest.mark.usefixtures("trials_here")
def test_the_largest_sparsity_within_a_drop_is_found_and_the_next_is_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [ONNX, "-o", tmp_path / "points", "--data", FEW, "--scopes", "global", "--max-drop", "2pp"]
    found = said(capsys, *words)
    (held,) = found["max_drop"]
    points = {model["point"]["sparsity"]: model["point"]["drop"] for model in found["models"]}
    assert points[held["sparsity"]] <= 0.02 == held["limit"]
    assert points[round(held["sparsity"] + 0.01, 2)] > 0.02
    assert accuracy_by_hand(ONNX) - accuracy_by_hand(Path(held["path"])) <= 0.02 + 1e-9
    before = noted(tmp_path / "points")
    assert said(capsys, *words) == found
    assert noted(tmp_path / "points") == before


@pytest.mark.usefixtures("trials_here")
def test_two_processes_that_are_killed_leave_what_the_next_run_goes_on_with(tmp_path: Path) -> None:
    sparsities = tuple(round(0.08 * at, 2) for at in range(1, 11))
    words = ["--data", FEW, "--scopes", "layer,global", "--sparsities", ",".join(map(str, sparsities))]
    choices = SweepConfig(data=FEW, scopes=("layer", "global"), sparsities=sparsities)
    unbroken = table(sweep(ONNX, choices, tmp_path / "unbroken"))
    killed_after(5, ONNX, "-o", tmp_path / "broken", "-j", "2", *words)
    with (tmp_path / "broken/sweep.jsonl").open("ab") as file:
        file.write(b'{"point": {"strategy": "magni')
    assert noted(tmp_path / "broken") < len(unbroken)
    assert table(sweep(ONNX, choices, tmp_path / "broken")) == unbroken
    assert noted(tmp_path / "broken") == 1 + len(unbroken)


SLOW = f"""
import os, pathlib, time
import numpy as np

def load():
    notes = pathlib.Path(os.environ.get("STUCK_IN", "nowhere"), "sweep.jsonl")
    if notes.exists() and notes.read_bytes().count(b"\\n") == 4:
        time.sleep(60)  # in the middle of a point
    digits = np.load({str(DIGITS)!r})
    return digits["x"][:100], digits["y"][:100]
"""


@pytest.mark.usefixtures("trials_here")
def test_training_that_is_killed_comes_to_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "slow.py").write_text(SLOW)
    model, broken = FIXTURES / "digits_cnn.pt", tmp_path / "broken"
    data = f"{tmp_path / 'slow.py'}:load"
    words: list[str | Path] = [*TORCH, "--data", data, "--val-split", "30%", "--epochs", "1", "--sparsities", "60%,80%"]
    words += ["--schedules", "constant,polynomial"]
    whole = said(capsys, model, "-o", tmp_path / "unbroken", *words)
    killed_after(4, model, "-o", broken, *words, STUCK_IN=str(broken))
    assert noted(broken) == 4
    resumed = said(capsys, model, "-o", broken, *words)
    assert [one["point"] for one in resumed["models"]] == [one["point"] for one in whole["models"]]
    assert [one["bytes"] for one in resumed["models"]] == [one["bytes"] for one in whole["models"]]
    own, name = tmp_path / "own.pt", "magnitude-global-polynomial-80/model.pt"
    found = api.finetune(
        model, own, data=data, val_split=0.3, epochs=1, sparsity=0.8, schedule="polynomial", model=TORCH[1]
    )
    assert api.size(broken / name).params.zero == api.size(own).params.zero
    (point,) = [one["point"] for one in whole["models"] if one["path"].endswith(name)]
    assert point["value"] == pytest.approx(found.judged_after["accuracy"], abs=0.034)
    app.run(["sweep", str(model), "-o", str(broken), *map(str, words), "--format", "human"])
    assert "constant or polynomial: " in capsys.readouterr().out


@pytest.mark.usefixtures("trials_here")
def test_other_choices_than_those_noted_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.5,)), folder)
    with pytest.raises(UsageError, match=r"sparsities was 0\.5, not 0\.5, 0\.8"):
        sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.5, 0.8)), folder)
    with pytest.raises(UsageError, match="a sweep of another model"):
        sweep(FIXTURES / "float_data.onnx", SweepConfig(data=FEW, sparsities=(0.5,)), folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no sweep"):
        sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.5,)), other)


@pytest.mark.usefixtures("trials_here")
def test_a_sweep_that_made_nothing_yet_may_be_said_anew(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a known metric"):
        sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.5,), metric="accurcy"), tmp_path / "points")
    assert len(sweep(ONNX, SweepConfig(data=FEW, sparsities=(0.5,)), tmp_path / "points").outcomes) == 2


def test_what_cannot_be_trained_or_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be trained"):
        sweep(ONNX, SweepConfig(data=FEW, epochs=1, sparsities=(0.5,)), tmp_path / "onnx")
    with pytest.raises(InputError, match="cannot be trained"):
        sweep(FIXTURES / "digits_cnn.tflite", SweepConfig(data=FEW, epochs=1, sparsities=(0.5,)), tmp_path / "tflite")
    with pytest.raises(UsageError, match="has pruning wrappers"):
        sweep(FIXTURES / "wrapped_by_tfmot.h5", SweepConfig(data=FEW, sparsities=(0.5,)), tmp_path / "wrapped")


def test_a_point_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    choices = SweepConfig(data=FEW, strategies=("gradient", "magnitude"), sparsities=(0.5,))
    for jobs in (1, 2):
        found = sweep(ONNX, choices, tmp_path / f"points{jobs}", jobs=jobs)
        assert list(found.outcomes) == [BASELINE, Trial("magnitude", "global", "", 0.5)]
        ((point, error),) = found.failed.items()
        assert point.strategy == "gradient"
        assert "onnxruntime cannot compute" in error.message
        assert isinstance(error, UsageError)


DEADLY = f"""
import os, pathlib
import numpy as np

def load():
    here = pathlib.Path(__file__).parent
    if (here / "points/magnitude-global-50/model.onnx").exists() and not (here / "died").exists():
        (here / "died").touch()
        os.kill(os.getpid(), 9)
    digits = np.load({str(DIGITS)!r})
    return digits["x"][:50], digits["y"][:50]
"""


def test_a_process_that_dies_costs_its_point_alone(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    choices = SweepConfig(data=f"{tmp_path / 'deadly.py'}:load", sparsities=(0.5, 0.8))
    found = sweep(ONNX, choices, tmp_path / "points")
    assert [point.name for point in found.outcomes] == ["base", "magnitude-global-80"]
    assert "ended with signal 9" in found.failed[Trial("magnitude", "global", "", 0.5)].message
    again = sweep(ONNX, choices, tmp_path / "points")
    assert [point.name for point in again.outcomes] == ["base", "magnitude-global-50", "magnitude-global-80"]
    assert not again.failed
