"""The bar on work over a second."""

from __future__ import annotations

import io

import pytest

from prunectl.reporting import reporter
from prunectl.reporting.report import Settings
from prunectl.reporting.reporter import ProgressBars


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
