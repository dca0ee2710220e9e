"""`--max-drop`: the largest sparsity that holds a metric, found by `prune` and by `finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from prunectl import api
from prunectl.commands import app, max_drop
from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.sweeping import workers as searching
from tests.running import FIXTURES

ONNX, DIGITS = FIXTURES / "digits_cnn.onnx", FIXTURES / "digits.npz"
FEW = f"{DIGITS}?limit=200"
TORCH = ["--builder", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"]
LARGEST_FIRST = "import numpy as np\n\ndef score(weights):\n    return 1 / (1 + np.abs(weights))\n"


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """Run a command, and return its JSON."""
    assert app.run([*map(str, words), "--json", "--no-progress"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def accuracy_by_hand(path: Path) -> float:
    digits = np.load(DIGITS)
    x, y = digits["x"][:200], digits["y"][:200]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: x.transpose(0, 3, 1, 2).astype(np.float32)})
    return float(np.mean(answers.argmax(1) == y))


@pytest.mark.parametrize("strategy", ["magnitude", "activation-magnitude"])
def test_what_is_found_holds_and_a_hundredth_more_does_not(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    words = ["prune", ONNX, "-o", out, "--max-drop", "2pp", "--data", FEW, "--strategy", strategy]
    found = said(capsys, *words)["max_drop"]
    data = {"data": FEW} if strategy != "magnitude" else {}
    before = accuracy_by_hand(ONNX)
    assert found["before"] == before
    assert found["after"] == accuracy_by_hand(out) >= before - 0.02 - 1e-9
    same, next_ = tmp_path / "same.onnx", tmp_path / "next.onnx"
    api.prune(ONNX, same, sparsity=found["sparsity"], strategy=strategy, **data)
    api.prune(ONNX, next_, sparsity=round(found["sparsity"] + 0.01, 2), strategy=strategy, **data)
    assert out.read_bytes() == same.read_bytes()
    assert accuracy_by_hand(next_) < before - 0.02
    assert [one["is_held"] for one in found["tried"]] == [one["drop"] <= 0.02 for one in found["tried"]]
    assert len(found["tried"]) <= 7


def test_channels_are_cut_as_far_as_the_metric_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "thin.onnx"
    words = ["prune", ONNX, "-o", out, "--pattern", "channel", "--max-drop", "5pp", "--data", FEW]
    found = said(capsys, *words)["max_drop"]
    assert found["drop"] <= 0.05
    assert accuracy_by_hand(ONNX) - accuracy_by_hand(out) == pytest.approx(found["drop"])
    assert sum(np.prod(one.dims) for one in onnx.load(out).graph.initializer) < 9802


def answers_of(path: Path) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.load(DIGITS)["x"][:50].transpose(0, 3, 1, 2).astype(np.float32)
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return found


def test_a_loss_may_rise_by_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = answers_of(ONNX), tmp_path / "out.onnx"
    np.savez(tmp_path / "same.npz", x=np.load(DIGITS)["x"][:50], y=dense)
    limit = 0.05 * float(np.mean(dense**2))
    words = ["prune", ONNX, "-o", out, "--data", tmp_path / "same.npz", "--metric", "mse", "--max-drop", repr(limit)]
    found = said(capsys, *words)["max_drop"]
    assert (found["metric"], found["before"]) == ("mse", pytest.approx(0, abs=1e-6))
    assert found["after"] == pytest.approx(float(np.mean((answers_of(out) - dense) ** 2)), rel=1e-5)
    assert 0 < found["drop"] <= limit


def test_a_dry_run_searches_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "prune", ONNX, "--dry-run", "--max-drop", "2pp", "--data", FEW)
    assert found["max_drop"]["sparsity"] > 0
    assert not list(tmp_path.iterdir())


def test_what_nothing_holds_is_out_of_reach_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "worst.py").write_text(LARGEST_FIRST)
    out = tmp_path / "out.onnx"
    words = ["prune", ONNX, "-o", out, "--max-drop", "0pp", "--data", FEW]
    with pytest.raises(WorkError, match=r"cannot be kept: even at a sparsity of 1%, accuracy is .* worse") as failed:
        app.run([*map(str, words), "--strategy", f"{tmp_path / 'worst.py'}:score"])
    assert failed.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["worst.py"]


def test_a_search_that_was_stopped_goes_on_with_what_it_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prune", ONNX, "--max-drop", "2pp", "--data", FEW]
    whole = said(capsys, *words, "-o", tmp_path / "whole.onnx")["max_drop"]
    weighed, made = searching.evaluate, []

    def counted(path: Path, *more: Any) -> Any:
        made.append(path)
        if len(made) == 4:
            raise KeyboardInterrupt
        return weighed(path, *more)

    monkeypatch.setattr(searching, "evaluate", counted)
    memory: list[str | Path] = ["--tried", tmp_path / "tried", "-o", tmp_path / "out.onnx"]
    with pytest.raises(KeyboardInterrupt):
        app.run([*map(str, words), *map(str, memory)])
    assert not (tmp_path / "out.onnx").exists()
    assert said(capsys, *words, *memory)["max_drop"] == whole
    # The model as it is, each sparsity once, and the one that was interrupted.
    assert len(made) == 1 + len(whole["tried"]) + 1
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    with pytest.raises(UsageError, match="strategy was magnitude, not lamp"):
        app.run([*map(str, [*words, *memory]), "--strategy", "lamp", "--force"])
    # Another limit asks the same points another question.
    assert said(capsys, *words[:2], "--max-drop", "5pp", *words[4:], *memory, "--force")["max_drop"]["limit"] == 0.05


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-drop", "1pp"], "needs data"),
        (["--max-drop", "1pp", "-s", "50%"], "both set the sparsity"),
        (["--max-drop", "1pp", "--compression", "2"], "both set the sparsity"),
        (["--max-drop", "1pp", "--target-gzip", "2kB"], "both set the sparsity"),
        (["--max-drop", "1pp", "--pattern", "channel", "--target-flops", "-50%"], "both set the sparsity"),
        (["--max-drop", "1pp", "--data", FEW, "--pattern", "2:4"], "fixes the sparsity"),
        (["--max-drop", "1pp", "--data", FEW, "--pattern", "channel", *TORCH], "no longer fits its model class"),
        (["--max-drop", "1pp", "--data", FEW, "--wrap"], "wrappers prune later"),
        (["--max-drop", "1pp", "--data", FEW, "--samples", "9"], "uses no data"),
        (["--max-drop", "much", "--data", FEW], "is not a drop"),
        (["--max-drop", "1", "--data", FEW], "has no unit"),
        (["-s", "50%", "--metric", "accuracy"], "needs --max-drop"),
        (["-s", "50%", "--tried", "folder"], "needs --max-drop"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failed:
        app.run(["prune", str(ONNX), "-o", str(tmp_path / "out.onnx"), *words])
    assert told in f"{failed.value.message} {failed.value.hint}"
    assert not list(tmp_path.iterdir())


def test_training_prunes_as_far_as_it_wins_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, out = FIXTURES / "digits_cnn.pt", tmp_path / "out.pt"
    words = ["finetune", model, *TORCH, "--data", FEW, "--val", f"{DIGITS}?limit=100", "--epochs", "1"]
    words += ["--lr", "0.0001", "--max-drop", "3pp", "--tried", tmp_path / "tried"]
    told = said(capsys, *words, "-o", out)
    found = told["max_drop"]
    zeros = api.size(out).params.zero
    assert found["drop"] <= 0.03
    assert zeros / 9736 == pytest.approx(found["sparsity"], abs=0.02)
    assert told["models"][1]["params"]["zero"] == zeros
    assert out.read_bytes() == (tmp_path / f"tried/magnitude-global-{100 * found['sparsity']:g}/model.pt").read_bytes()
    assert found["after"] == pytest.approx(_torch_accuracy(out), abs=1e-6)

    def fails(*_: Any) -> None:
        raise AssertionError

    # What was tried is remembered, so that nothing is trained again.
    monkeypatch.setattr(max_drop, "finetune", fails)
    assert said(capsys, *words, "-o", tmp_path / "again.pt")["max_drop"] == found
    assert (tmp_path / "again.pt").read_bytes() == out.read_bytes()
    copy = tmp_path / "copy.pt"
    copy.write_bytes(model.read_bytes())
    words[1] = copy
    assert said(capsys, *words, "--in-place")["max_drop"] == found
    assert copy.read_bytes() == out.read_bytes()


def _torch_accuracy(path: Path) -> float:
    import torch  # noqa: PLC0415 - slow to import

    digits = np.load(DIGITS)
    net = {tensor.name: torch.tensor(open_model(path).read(tensor)) for tensor in open_model(path).tensors}
    x = torch.tensor(digits["x"][:100].transpose(0, 3, 1, 2).astype(np.float32))
    conv = torch.nn.functional.conv2d
    x = torch.relu(conv(x, net["conv1.weight"], net["conv1.bias"]))
    x = torch.relu(conv(x, net["conv2.weight"], net["conv2.bias"]))
    x = torch.relu(x.permute(0, 2, 3, 1).reshape(-1, 256) @ net["fc1.weight"].T + net["fc1.bias"])
    answers = (x @ net["fc2.weight"].T + net["fc2.bias"]).argmax(1).numpy()
    return float(np.mean(answers == digits["y"][:100]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-s", "50%"], "both set the sparsity"),
        (["--checkpoint-dir", "points"], "each trial is a separate run"),
        (["--logdir", "logs"], "each trial is a separate run"),
        (["--keep-wrappers"], "cannot be evaluated"),
        (["--pattern", "2:4"], "fixes the sparsity"),
        (["--schedule", "polynomal"], "not a known schedule"),
    ],
)
def test_training_refuses_what_does_not_go_with_it(words: list[str], told: str, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out.pt"), "--max-drop", "1pp", "--data", FEW]
    with pytest.raises(PrunectlError, match=told):
        app.run(["finetune", str(FIXTURES / "digits_cnn.pt"), *TORCH, *out, *words])
    assert not list(tmp_path.iterdir())


def test_training_in_several_processes_does_not_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = ["-o", str(tmp_path / "out.pt"), "--max-drop", "1pp", "--data", FEW]
    with pytest.raises(UsageError, match="--max-drop cannot be used with torchrun"):
        app.run(["finetune", str(FIXTURES / "digits_cnn.pt"), *TORCH, *out])
