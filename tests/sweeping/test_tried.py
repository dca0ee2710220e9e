"""What was tried is trusted as long as its files are what they were; what came to no number does not hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from prunectl.commands import app
from prunectl.errors import UsageError, WorkError
from prunectl.sweeping.journal import digests
from prunectl.sweeping.sweep import pareto_front
from prunectl.sweeping.trial import BASELINE, Trial, TrialResult
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")

ONNX, DIGITS = FIXTURES / "digits_cnn.onnx", FIXTURES / "digits.npz"
TORCH = ["--builder", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"]


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """Run a command, and return its JSON."""
    assert app.run([*map(str, words), "--json", "--no-progress"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def ran(*words: str | Path) -> int:
    return app.run([*map(str, words), "--no-progress"])


def put_data(path: Path, begin: int) -> None:
    """Write sixty digits."""
    with np.load(DIGITS) as digits:
        np.savez(path, x=digits["x"][begin : begin + 60], y=digits["y"][begin : begin + 60])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with data, where we are."""
    put_data(tmp_path / "d.npz", 0)
    (tmp_path / "s.py").write_text("import numpy as np\ndef score(weights):\n    return np.abs(weights)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRUNE = ["prune", ONNX, "-o", "out.onnx", "--force", "--max-drop", "5pp", "--data", "d.npz?limit=50", "--tried", "t"]
SWEEP = ["sweep", ONNX, "-o", "t", "--data", "d.npz?limit=50", "--sparsities", "50%,80%"]


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("words", [PRUNE, SWEEP])
@pytest.mark.parametrize("file", ["d.npz", "s.py"])
def test_a_file_that_changed_is_named_and_nothing_goes_on(words: list[str], file: str, folder: Path) -> None:
    option = "--strategies" if words is SWEEP else "--strategy"
    words = [*words, option, "s.py:score"]
    assert ran(*words) == 0
    if file == "d.npz":
        put_data(folder / "d.npz", 60)
    else:
        (folder / file).write_text("def score(weights):\n    return -weights\n")
    with pytest.raises(UsageError, match=f"{file} has changed since the sweep in t began") as refused:
        ran(*words)
    assert "another folder" in refused.value.hint


def test_a_model_that_was_exchanged_or_removed_is_made_again_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = said(capsys, *PRUNE)
    made = sorted((folder / "t").glob("*/model.onnx"))
    before = [path.read_bytes() for path in made]
    shutil.copyfile(ONNX, made[0])
    shutil.rmtree(made[1].parent)
    assert said(capsys, *PRUNE)["max_drop"] == first["max_drop"]
    assert [path.read_bytes() for path in made] == before
    shutil.copyfile(ONNX, made[0])
    made[1].unlink()
    capsys.readouterr()
    assert app.run([*map(str, PRUNE), "--format", "human", "--no-progress"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{made[0].relative_to(folder)} had changed since its trial: the trial ran again." in told
    assert f"{made[1].relative_to(folder)} was missing: the trial ran again." in told


@pytest.mark.usefixtures("trials_here")
def test_a_sweep_makes_a_point_again_whose_file_was_exchanged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = said(capsys, *SWEEP)
    path = folder / "t/magnitude-global-80/model.onnx"
    before = path.read_bytes()
    path.write_bytes(b"no model")
    assert said(capsys, *SWEEP)["models"] == first["models"]
    assert path.read_bytes() == before


def dividing(path: Path) -> None:
    """Write a model that divides by a column of its weights: without any of them it answers with NaN."""
    weights = np.ones((8, 4), np.float32)
    weights[:, 0] = np.linspace(0.001, 0.008, 8)
    make = onnx.helper
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["product"]),
        make.make_node("ReduceSum", ["w", "axes"], ["sums"], keepdims=0),
        make.make_node("Div", ["product", "sums"], ["y"]),
    ]
    ports = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name, size in (("x", 8), ("y", 4))
    ]
    constants = [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.array([0]), "axes")]
    graph = make.make_graph(nodes, "divided", ports[:1], ports[1:], constants)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


@pytest.mark.usefixtures("trials_here")
def test_a_sparsity_that_answers_with_no_number_does_not_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dividing(folder / "div.onnx")
    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    np.savez("xy.npz", x=x, y=np.zeros((20, 4), np.float32))
    words = ["prune", "div.onnx", "-o", "thin.onnx", "--data", "xy.npz", "--max-drop", "100", "--policy", "all"]
    found = said(capsys, *words)["max_drop"]
    nothing = [one for one in found["tried"] if one["value"] is None]
    # The first column is gone at a quarter; the others at more.
    assert 0.2 < found["sparsity"] < 0.25
    assert nothing
    assert not any(one["is_held"] or one["drop"] for one in nothing)
    assert app.run([*words, "--force", "--format", "human", "--no-progress"]) == 0
    assert "NaN" in capsys.readouterr().out
    points = said(
        capsys, "sweep", "div.onnx", "-o", "points", "--data", "xy.npz", "--policy", "all", "--html", "p.html"
    )
    assert [one["point"]["value"] is None for one in points["models"]] == [False, True, True, True]
    assert not any(one["point"]["is_front"] for one in points["models"][1:])


def test_a_model_that_answers_with_no_number_as_it_is_is_an_error(folder: Path) -> None:
    dividing(folder / "div.onnx")
    model = onnx.load(folder / "div.onnx")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((8, 4), np.float32), "w"))
    onnx.save(model, folder / "div.onnx")
    np.savez("xy.npz", x=np.ones((4, 8), np.float32), y=np.zeros((4, 4), np.float32))
    with pytest.raises(WorkError, match=r"mae is nan for div\.onnx") as failed:
        ran("prune", "div.onnx", "-o", "thin.onnx", "--data", "xy.npz", "--max-drop", "100", "--policy", "all")
    assert "scaled" in failed.value.hint


def test_training_that_goes_astray_is_a_try_that_does_not_hold(folder: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.pt", "m.pt")
    words = ["finetune", "m.pt", *TORCH, "-o", "out.pt", "--data", "d.npz", "--epochs", "1", "--lr", "1e30"]
    with pytest.raises(WorkError, match="even at a sparsity of 1%, accuracy is NaN") as failed:
        ran(*words, "--max-drop", "5pp", "--tried", "t")
    assert "a lower --lr" in failed.value.hint
    assert len((folder / "t/sweep.jsonl").read_text().splitlines()) > 2


def test_what_came_to_no_number_is_never_in_front() -> None:
    outcomes = {BASELINE: TrialResult("mae", 1.0, {}, 0.0, 9, 9, "")}
    for at in range(1, 8):
        value = float("nan") if at % 2 else 1.0 - at / 10
        outcomes[Trial("magnitude", "layer", "", at / 10)] = TrialResult("mae", value, {}, 0.0, 9 - at, 9 - at, "p")
    assert all(outcomes[point].is_number for point in pareto_front(outcomes))
    nothing = outcomes[Trial("magnitude", "layer", "", 0.1)]
    again = TrialResult.from_json(json.loads(json.dumps(nothing.as_json, allow_nan=False)))
    assert not again.is_number


def test_the_sparsity_told_is_that_of_the_file_where_layers_have_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(*PRUNE, "--layer", "*=10%", "--format", "human") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ", so no more can be pruned" in told
    assert "The sparsity of all parameters is 9.9 %." in told
    assert "largest sparsity within the limit is 99" not in told


def test_channels_that_cannot_go_are_told_where_limits_hold_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*PRUNE[:5], "--max-drop", "100pp", "--data", "d.npz", "--pattern", "channel", "--max-ratio", "20%"]
    assert ran(*words, "--format", "human") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "to 99.0 %, so no more can be pruned" in told
    assert "The sparsity of all parameters" not in told


def test_a_loss_is_what_may_rise_where_the_framework_has_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", FIXTURES / "digits_cnn.pt", *TORCH, "-o", "out.pt", "--data", "d.npz", "--max-drop", "0.05"]
    found = said(capsys, *words, "--metric", "loss")["max_drop"]
    assert found["metric"] == "loss"
    assert found["after"] - found["before"] == pytest.approx(found["drop"])
    assert found["drop"] <= 0.05


def test_a_function_decides_in_the_direction_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "laptop.py").write_text("def err(out, y):\n    return (out.argmax(1) != y.reshape(-1)).float().mean()\n")
    words = ["prune", FIXTURES / "digits_cnn.pt", *TORCH, "-o", "out.pt", "--data", "d.npz", "--max-drop", "0.05"]
    with pytest.raises(UsageError, match=r"whether a higher laptop\.py:err is better"):
        ran(*words, "--metric", "laptop.py:err")
    found = said(capsys, *words, "--metric", "laptop.py:err:min")["max_drop"]
    right = said(capsys, *words[:-1], "5pp", "--force")["max_drop"]
    assert found["metric"] == "laptop.py:err"
    assert found["sparsity"] == right["sparsity"]
    assert found["after"] == pytest.approx(1 - right["after"])


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("metric", ["mse", "mae"])
@pytest.mark.parametrize("command", ["prune", "finetune", "sweep", "onnx"])
def test_a_metric_that_does_not_fit_the_targets_is_a_sentence(command: str, metric: str, folder: Path) -> None:
    torch = [FIXTURES / "digits_cnn.pt", *TORCH]
    more = {
        "prune": ["prune", *torch, "-o", "out.pt", "--max-drop", "5"],
        "finetune": ["finetune", *torch, "-o", "out.pt", "--epochs", "1"],
        "sweep": ["sweep", ONNX, "-o", "t"],
        "onnx": ["prune", ONNX, "-o", "out.onnx", "--max-drop", "5"],
    }[command]
    with pytest.raises(UsageError, match=f"the metric {metric} does not fit outputs of 10 and targets of one number"):
        ran(*more, "--data", "d.npz", "--metric", metric)


def test_every_file_that_words_name_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pack").mkdir()
    for name in ("pack/__init__.py", "pack/net.py", "net.py"):
        (folder / name).write_text("")
    monkeypatch.syspath_prepend(folder)
    words = ("net.py:Net", "pack.net:Net", "pack:Net", "sgd:momentum=0.9", "none.py:Net", "accuracy", "")
    found = digests(specs=("d.npz[x,y]?limit=5", "pack.net:data"), functions=words, models=(str(ONNX),))
    own = {folder / "pack/net.py", folder / "pack/__init__.py", folder / "net.py", folder / "d.npz", ONNX}
    assert {Path(name).resolve() for name in found} == {path.resolve() for path in own}
    assert found["net.py"] == hashlib.sha256(b"").hexdigest()
