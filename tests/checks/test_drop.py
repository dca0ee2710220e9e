"""`max-drop` in budgets: how much worse a model may be than another, on data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from prunectl import api
from prunectl.checks import schema
from tests.checks.checking import MODEL, RAW, gates, prunectl, put
from tests.running import FIXTURES, ROOT, clean

COUNT = 200


def accuracy_by_hand(path: Path) -> float:
    digits = np.load(FIXTURES / "digits.npz")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = digits["x"][:COUNT].transpose(0, 3, 1, 2).astype(np.float32)
    (answers,) = session.run(None, {session.get_inputs()[0].name: x})
    return float(np.mean(answers.argmax(1) == digits["y"][:COUNT]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dense model, one that was pruned too much, and data."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(FIXTURES / "digits_cnn.onnx", folder / "dense.onnx")
    api.prune(folder / "dense.onnx", folder / "small.onnx", sparsity=0.6)
    digits = np.load(FIXTURES / "digits.npz")
    np.savez(folder / "test.npz", x=digits["x"][:COUNT], y=digits["y"][:COUNT])
    return folder


@pytest.fixture
def lost(models: Path) -> float:
    """Return how many percentage points were lost."""
    found = 100 * (accuracy_by_hand(models / "dense.onnx") - accuracy_by_hand(models / "small.onnx"))
    assert found > 1
    return round(found, 6)


def judged(folder: Path, drop: str, path: str = "small.onnx", more: str = "") -> str:
    """Write a budget with a drop, and return its file."""
    put(
        folder, f"[[budget]]\npath = '{path}'\nmax-drop = {{{drop}, data = 'test.npz', against = 'dense.onnx'{more}}}\n"
    )
    return "prunectl.toml"


@pytest.mark.parametrize(
    ("levels", "verdict", "code"),
    [
        ("fail = '{over}pp'", "pass", 0),
        ("fail = '{equal}pp'", "pass", 0),
        ("fail = '{under}pp'", "FAIL", 1),
        ("warn = '{equal}pp'", "pass", 0),
        ("warn = '{under}pp'", "warn", 0),
        ("fail = '{equal}pp', warn = '{under}pp'", "warn", 0),
        ("fail = '{under}pp', warn = '0pp'", "FAIL", 1),
    ],
)
def test_a_drop_is_held_against_its_limits(levels: str, verdict: str, code: int, models: Path, lost: float) -> None:
    judged(models, levels.format(over=lost + 0.0001, equal=lost, under=lost - 0.0001))
    found = prunectl(models, "check", "--json")
    (gate,) = gates(found)
    assert found.code == code
    assert gate["ok"] is (verdict == "pass")
    assert (gate["id"], gate["metric"], gate["unit"], gate["line"]) == ("max-drop", "accuracy", "points", 3)
    assert gate["actual"] == pytest.approx(lost / 100)
    assert "for dense.onnx" in gate["note"]
    assert prunectl(models, "check").rows[0][0] == verdict


def test_a_model_that_is_no_worse_passes_without_any_drop(models: Path) -> None:
    judged(models, "fail = '0pp'", path="dense.onnx")
    assert prunectl(models, "check").code == 0


def test_every_report_tells_it(models: Path, lost: float, tmp_path: Path) -> None:
    judged(models, f"fail = '{lost - 0.5}pp'")
    formats = ["human", "plain", "json", "markdown", "junit", "sarif", "github", "gitlab", "openmetrics"]
    words = [word for name in formats for word in ("--report", f"{name}:{tmp_path / name}")]
    assert prunectl(models, "check", *words, "--html", tmp_path / "page.html").code == 1
    shown = f"{lost:.3g} pp"
    for name in ("human", "markdown", "junit", "sarif", "github", "gitlab"):
        text = (tmp_path / name).read_text()
        assert shown in text, name
        assert "max-drop" in text, name
    assert shown in (tmp_path / "page.html").read_text()
    assert (tmp_path / "plain").read_text().split("\t")[6] == "points"
    assert 'unit="points"' in (tmp_path / "openmetrics").read_text()
    (case,) = ET.parse(tmp_path / "junit").iter("testcase")
    assert case.find("failure") is not None
    (rule,) = json.loads((tmp_path / "sarif").read_text())["runs"][0]["tool"]["driver"]["rules"]
    assert rule["shortDescription"]["text"]


def test_a_loss_is_limited_by_a_number(models: Path) -> None:
    digits = np.load(models / "test.npz")
    session = onnxruntime.InferenceSession(str(models / "dense.onnx"), providers=["CPUExecutionProvider"])
    x = digits["x"].transpose(0, 3, 1, 2).astype(np.float32)
    (dense,) = session.run(None, {session.get_inputs()[0].name: x})
    (small,) = onnxruntime.InferenceSession(str(models / "small.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {session.get_inputs()[0].name: x}
    )
    np.savez(models / "numbers.npz", x=digits["x"], y=dense)
    error = float(np.mean(np.abs(small - dense)))
    for limit, code in ((1.001 * error, 0), (0.999 * error, 1)):
        toml = f"fail = {limit}, data = 'numbers.npz', against = 'dense.onnx', metric = 'mae'"
        put(models, f"[[budget]]\npath = 'small.onnx'\nmax-drop = {{{toml}}}\n")
        found = prunectl(models, "check", "--json")
        assert found.code == code
        assert gates(found)[0]["unit"] == "number"
        assert gates(found)[0]["actual"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    ("drop", "code", "told"),
    [
        ("fail = '1pp', data = 'none.npz', against = 'dense.onnx'", 3, "none.npz"),
        ("fail = '1pp', data = 'test.npz', against = 'none.onnx'", 3, "none.onnx"),
        ("fail = '1pp', data = 'test.npz', against = 'dense.onnx', metric = 'accurcy'", 2, "is not a known metric"),
        ("fail = 0.01, data = 'test.npz', against = 'dense.onnx'", 2, "has no unit"),
    ],
)
def test_what_cannot_be_judged_is_told_and_the_rest_is_judged(drop: str, code: int, told: str, models: Path) -> None:
    put(models, f"[[budget]]\npath = 'small.onnx'\nmax-params = 1\nmax-drop = {{{drop}}}\n")
    found = prunectl(models, "check")
    assert found.code == code
    assert [row[:2] for row in found.rows] == [["FAIL", "max-params"]]
    assert told in found.err


@pytest.mark.parametrize(
    ("drop", "code", "told"),
    [
        ("fail = '1pp', data = 'none.npz', against = 'dense.onnx'", 3, "none.npz"),
        ("fail = '1pp', data = 'test.npz', against = 'none.onnx'", 3, "none.onnx"),
        ("fail = 0.01, data = 'test.npz', against = 'dense.onnx'", 2, "has no unit"),
        ("fail = 0.01, data = 'test.npz', against = 'dense.onnx', metric = 'mse'", 2, "the metric mse does not fit"),
        ("fail = '1pp', data = 'test.npz', against = 'dense.onnx', metric = 'm.py:kappa'", 2, "is better"),
    ],
)
def test_what_stops_a_drop_is_told_with_its_line_and_other_budgets_are_judged(
    drop: str, code: int, told: str, models: Path
) -> None:
    put(
        models,
        f"[[budget]]\npath = 'small.onnx'\nmax-drop = {{{drop}}}\n\n[[budget]]\npath = 'dense.onnx'\nmax-raw = '9MB'\n",
    )
    found = prunectl(models, "check", "--trust")
    assert found.code == code
    assert [row[:2] for row in found.rows] == [["pass", "max-raw"]]
    assert "prunectl.toml:3: " in found.err
    assert told in found.err


def test_a_direction_that_is_said_turns_the_verdict(models: Path, lost: float) -> None:
    judged(models, "fail = 0.0001", more=", metric = 'accuracy:min'")
    found = prunectl(models, "check", "--json")
    (gate,) = gates(found)
    assert (gate["ok"], gate["metric"]) == (True, "accuracy")
    assert gate["actual"] == pytest.approx(-lost / 100)


def test_a_runtime_that_is_missing_is_an_extra_and_the_rest_is_judged(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(
        models,
        "[[budget]]\npath = 'small.onnx'\nmax-raw = '1MB'\n"
        "max-drop = {fail = '1pp', data = 'test.npz', against = 'dense.onnx'}\n",
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = prunectl(models, "check")
    assert found.code == 4
    assert [row[:2] for row in found.rows] == [["pass", "max-raw"]]
    assert "pip install onnxruntime" in found.err


@pytest.mark.parametrize(
    ("drop", "told"),
    [
        ("1", "must be a table"),
        ("'0.5pp'", "must be a table"),
        ("{data = 'a', against = 'b'}", "needs fail, warn or both"),
        ("{fail = '1pp', against = 'b'}", "'data' is missing"),
        ("{fail = '1pp', data = 'a'}", "'against' is missing"),
        ("{fail = '1pp', data = 'a', against = 'b', metrik = 'c'}", "unknown key 'metrik'"),
        ("{fail = '1pp', data = 1, against = 'b'}", "data must be a string"),
        ("{fail = 'much', data = 'a', against = 'b'}", "is not a drop"),
        ("{fail = '-1pp', data = 'a', against = 'b'}", "must be 0 or more"),
        ("{fail = true, data = 'a', against = 'b'}", "is not a drop"),
        ("{fail = '1pp', warn = 0.1, data = 'a', against = 'b'}", "different units"),
        ("{fail = '1pp', warn = '2pp', data = 'a', against = 'b'}", "stricter than the warn limit"),
        ("{fail = '1pp', data = 'a', against = 'b', batch-size = 0}", "at least 1"),
        ("{fail = '1pp', data = 'a', against = 'b', batch-size = 'x'}", "not a count"),
    ],
)
def test_a_slip_is_told_with_its_line(drop: str, told: str, tmp_path: Path) -> None:
    found = prunectl(put(tmp_path, f"[[budget]]\npath = 'a'\nmax-drop = {drop}\n"), "check", "--json")
    assert found.code == 2
    assert found.json["error"]["message"].startswith("prunectl.toml:3: ")
    assert told in found.json["error"]["message"]


def test_the_schema_knows_it() -> None:
    installed = json.loads(Path(schema.__file__).with_name(schema.FILE).read_text(encoding="utf-8"))
    found = installed["properties"]["budget"]["items"]["properties"]["max-drop"]
    assert found["required"] == ["data", "against"]
    assert found["additionalProperties"] is False


def test_paths_begin_where_the_budgets_stand(models: Path, lost: float, tmp_path: Path) -> None:
    config = models / judged(models, f"fail = '{lost}pp'", more=", batch-size = 64")
    found = prunectl(tmp_path, "check", "--config", config)
    assert (found.code, found.rows[0][0]) == (0, "pass")


def test_what_judges_is_loaded_only_for_a_drop(tmp_path: Path) -> None:
    put(tmp_path, f"[[budget]]\npath = '*.safetensors'\nmax-raw = {RAW}\n", a=MODEL)
    code = (
        "import sys; from prunectl import cli; cli._run(['check']);"
        "names = ('prunectl.checks.running', 'onnxruntime', 'torch');"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
