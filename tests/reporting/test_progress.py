"""The bar on work over a second."""

from __future__ import annotations

import gc
import importlib.util
import io
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from prunectl.commands._frameworks import framework_imports
from prunectl.reporting import reporter
from prunectl.reporting.finetune import TrainingProgress
from prunectl.reporting.report import Settings
from prunectl.reporting.reporter import ProgressBars
from prunectl.training.logger import LogEntry, ProgressEvent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stderr; not in a fixture, after which pytest puts its own there."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    return shown


def work(settings: Settings) -> None:
    with ProgressBars("reading big.pt", 1000, settings) as bar:
        bar.advance(400)
        bar.advance(600)


def test_a_bar_appears_once_the_work_has_taken_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", -1.0)
    work(Settings())
    assert "reading big.pt" in terminal.getvalue()


def test_quick_work_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    work(Settings())
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("settings", [Settings(has_progress=False), Settings(is_quiet=True)])
def test_nor_does_work_that_was_asked_to_be_quiet(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", -1.0)
    work(settings)
    assert terminal.getvalue() == ""


def test_nor_does_work_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", -1.0)
    monkeypatch.setenv("CI", "true")
    work(Settings())
    assert terminal.getvalue() == ""


def test_nor_does_work_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(reporter, "PATIENCE_SECONDS", -1.0)
    work(Settings())
    assert shown.getvalue() == ""


def moment(step: int, *, epoch: int, last: LogEntry | None) -> ProgressEvent:
    return ProgressEvent(step, 420, epoch, 3, 0.8, last)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_training_keeps_its_bar_count_and_time_and_the_metric_that_decides(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = {"loss": 0.49712, "top_5_accuracy": 0.91, "accuracy": 0.8156}
    with TrainingProgress(Settings(), None, "accuracy") as progress:
        progress.watch(moment(210, epoch=2, last=LogEntry(1, 140, 0.8, metrics, metrics)))
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", terminal.getvalue())]
    shown = next(line for line in lines if "epoch 2/3" in line)
    assert len(shown.rstrip()) <= columns
    parts = shown.split()
    assert parts[:2] == ["epoch", "2/3"]
    assert parts[3:5] == ["210/420", "-:--:--"]
    assert set(parts[2]) <= set("━╸╺")
    if columns == 60:
        assert shown.rstrip().endswith("…")
    else:
        assert parts[5:8] == ["val", "accuracy", "0.8156"]


def forget(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have modules imported anew, and what is imported for them forgotten when the test is over."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]


def test_a_framework_that_is_imported_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    (tmp_path / "tf_keras.py").write_text("import sys\nseen = sys.stderr.getvalue()\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch, "tf_keras")
    before = list(sys.meta_path)
    with framework_imports(Settings()):
        assert importlib.util.find_spec("tf_keras") is not None
        assert terminal.getvalue() == ""
        assert importlib.import_module("tf_keras").seen == "loading Keras …"
    assert terminal.getvalue().endswith("\r")
    assert sys.meta_path == before


@pytest.mark.parametrize("settings", [Settings(has_progress=False), Settings(is_quiet=True)])
def test_nobody_is_told_of_imports_who_asked_for_quiet(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = at_terminal(monkeypatch)
    (tmp_path / "tf_keras.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch, "tf_keras")
    with framework_imports(settings):
        importlib.import_module("tf_keras")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("ending", ["", "raise ImportError"])
def test_garbage_is_collected_again_after_a_framework_was_imported(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("import gc, keras\nassert not gc.isenabled()\n" + ending)
    (tmp_path / "keras.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch, "torch", "keras")
    thresholds: list[int] = []
    monkeypatch.setattr(gc, "set_threshold", thresholds.append)
    with framework_imports(Settings()), pytest.raises(ImportError) if ending else nullcontext():
        importlib.import_module("torch")
    assert set(thresholds) == {700}
    assert gc.isenabled()


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_that_is_stopped_is_resumed_from_a_checkpoint_alone(
    has_checkpoint: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if has_checkpoint:
        (tmp_path / "last").mkdir()
        (tmp_path / "last" / "run.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), TrainingProgress(Settings(), tmp_path):
        raise KeyboardInterrupt
    assert ("--resume" in capsys.readouterr().err) is has_checkpoint
