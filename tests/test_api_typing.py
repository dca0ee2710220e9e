"""A user's script passes the strictest type check, and the notebook runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT

SCRIPT = """
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import prunectl

x, y = np.zeros((4, 8), np.float32), np.zeros(4, np.int64)
print(prunectl.inspect("m.pt", layers="conv*").prunable_sparsity, prunectl.size(Path("m.pt"), codec="xz").bytes.packed)
pruned = prunectl.prune("m.pt", "out.pt", sparsity="80%", layer={"fc*": 0.9}, exclude="fc2", target_gzip=None)
print(pruned.output, pruned.before.path, pruned.to_dict()["ok"])
net: torch.nn.Linear = prunectl.prune(torch.nn.Linear(8, 4), sparsity=0.5)
arrays: dict[str, npt.NDArray[np.float32]] = prunectl.prune({"w": x}, sparsity=0.5, in_place=True)
state = prunectl.prune(OrderedDict(net.state_dict()), pattern="2:4")
print(prunectl.strip("m.pt", None, only=["optimizer"]).removed)
trained = prunectl.finetune(
    "m.pt", "out.pt", data=(x, y), builder=torch.nn.Bilinear, metric=[(max, "max")], on_epoch=lambda one: print(one.val)
)
print(trained.judged_after["accuracy"])
print(prunectl.finetune("m.pt", "out.pt", data=x, max_drop="1pp", tried=Path("tries")).search.best.sparsity)
print(prunectl.export("m.pt", "m.onnx", input=["x:?,8"], half=True).comparison)
print(prunectl.diff("a.pt", "b.pt", fail_on="shape").is_ok, prunectl.verify("a.pt", against="b.pt").is_ok)
print(prunectl.check("a*", config="prunectl.toml").failed, prunectl.init(".", margin=0.2).path)
print(prunectl.doctor().extras)
print(prunectl.sweep("m.onnx", "trials", data="d.npz", sparsities=["50%", 0.9], jobs=2).best)
print(prunectl.prune("llama", "small", part="1/2", sparsity="50%").missing)
print(prunectl.prune("llama", "small", join=True))
searched = prunectl.prune("m.pt", "out.pt", max_drop="1pp", data=x, metric="accuracy", manifest=Path("run.json"))
print(searched.search.best.sparsity if searched.search else None, prunectl.prune("m.pt", None, recipe="run.json"))
print(prunectl.prune("m.h5", "w.h5", sparsity=0.8, wrap=True, schedule="polynomial", begin=0, end="2000"))
looked = prunectl.inspect("m.pt", groups=True, sensitivity=True, data=(x, y), builder=torch.nn.Bilinear)
print(looked.groups, looked.sensitivity, looked.to_pandas())
print(prunectl.bench("a.onnx", "b.onnx", batch_size=[1, 8], on_progress=print).latencies)
print(prunectl.size("m.pt", on_progress=lambda now: print(now.done, now.total, now.label)))
print(prunectl.strip("m.pt", None, on_progress=print), prunectl.init("models", on_progress=print).proposals)
print(prunectl.export("m.pt", "m.npz", on_progress=lambda now: now.done).output, prunectl.doctor().to_dict())
print(prunectl.eval("m.onnx", "d.npz", metric=["accuracy"], on_progress=print).logs["accuracy"])
print(prunectl.bench("m.onnx", Path("n.onnx"), batch_size=[1, 16]).latencies[1][0].median.middle)
print(prunectl.evaluate("m.pt", torch.utils.data.TensorDataset(torch.zeros(1)), metric="accuracy").value)
"""
MISTAKES = """import prunectl
prunectl.prune("m.pt", "out.pt", sparcity=0.5)
prunectl.prune("m.pt", "out.pt", sparsity=[0.5])
prunectl.prune("m.pt", sparsity=0.5)
prunectl.inspect(3)
"""


def test_a_script_with_every_function_passes_strict_mypy_and_one_with_mistakes_does_not(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "script.py", "mistakes.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    places = {tuple(line.split(":")[:2]) for line in done.stdout.splitlines() if ": error:" in line}
    assert places == {("mistakes.py", str(number)) for number in range(2, 6)}, done.stdout


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
