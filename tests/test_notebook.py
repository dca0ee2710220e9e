"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads(Path("tour.ipynb").read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        assert not cell["outputs"], "outputs are not kept"
        shown.append(run("".join(cell["source"]), names))
    pages = [value for value in shown if hasattr(value, "_repr_html_")]
    assert len(pages) == 4
    assert all("srcdoc" in value._repr_html_() for value in pages)
    assert shown[-1]["zeros_kept"] == shown[-1]["zeros"]
    assert "80% of the first layer's weights are zero" in capsys.readouterr().out


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell, and return the value of an expression at its end, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
