"""A recipe, a file of budgets or a journal may be a stranger's: what it names as code is not imported unasked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.running import FIXTURES, here, prunectl
from tests.safety.cost import assert_refused_cheaply, cost

MODEL = FIXTURES / "digits_cnn.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a stranger, with a module that leaves a canary where it is imported."""
    (tmp_path / "dense.onnx").write_bytes(MODEL.read_bytes())
    digits = np.load(FIXTURES / "digits.npz")
    np.savez(tmp_path / "test.npz", x=digits["x"][:20], y=digits["y"][:20])
    (tmp_path / "evil.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).touch()\n"
        "def f(*words): return abs(words[0]) if words else (0, 0)\n"
        "D = {}\n"
    )
    # As a console script has it not, and python -m has: a module in the folder can be imported by its name.
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


CODE = ("evil.py:f", "./evil.py:f", "evil:f")


def budgets(folder: Path, **words: str) -> None:
    said = {"fail": "1pp", "data": "test.npz", "against": "dense.onnx", **words}
    drop = ", ".join(f"{name} = {json.dumps(value)}" for name, value in said.items())
    (folder / "prunectl.toml").write_text(f"[[budget]]\npath = 'dense.onnx'\nmax-drop = {{{drop}}}\n")


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", ["data", "metric", "model", "custom-objects"])
def test_budgets_that_name_code_are_refused_with_their_line(name: str, code: str, folder: Path) -> None:
    budgets(folder, **{name: code})
    done = here("check", cwd=folder)
    assert done.code == 3
    assert "prunectl.toml:3: max-drop names code that prunectl would run: " in done.err
    assert "--trust" in done.err
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("code", CODE[:2])
def test_budgets_that_are_trusted_may_name_code(code: str, folder: Path) -> None:
    budgets(folder, data=code)
    here("check", "--trust", cwd=folder)
    assert (folder / "canary").exists()


def test_a_folder_that_is_called_as_made_up_data_hides_no_code(folder: Path) -> None:
    (folder / "random:").mkdir()
    (folder / "random").mkdir()
    (folder / "random:" / "x.py").write_text((folder / "evil.py").read_text())
    for data in ("random:/x.py:f", "random:x.py:f", "random:f", "random:4:f"):
        budgets(folder, data=data)
        assert here("check", cwd=folder).code in {2, 3}
        assert not (folder / "canary").exists()


def test_pyproject_is_no_more_trusted_than_a_file_of_its_own(folder: Path) -> None:
    budgets(folder, data="evil.py:f")
    text = (folder / "prunectl.toml").read_text().replace("[[budget]]", "[[tool.prunectl.budget]]")
    (folder / "prunectl.toml").unlink()
    (folder / "pyproject.toml").write_text(text)
    assert here("check", cwd=folder).code == 3
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", ["strategy", "policy", "data", "loss", "model", "custom_objects"])
@pytest.mark.parametrize("pattern", ["", "channel"])
def test_a_recipe_that_names_code_is_refused(name: str, code: str, pattern: str, folder: Path) -> None:
    request = {"sparsity": 0.5, "pattern": pattern, name: code}
    if name in {"loss", "model", "custom_objects"}:
        request |= {"data": "test.npz", "strategy": "activation-magnitude"}
    (folder / "recipe.json").write_text(json.dumps({"schema": "prunectl.manifest/1", "request": request}))
    words = ("prune", "dense.onnx", "-o", "out.onnx", "--recipe", "recipe.json")
    for more in ((), ("--dry-run",), ("--depfile", "out.d"), ("--if-changed",)):
        done = here(*words, *more, cwd=folder)
        assert done.code == 3, done.err
        assert "recipe.json names code that prunectl would run: " in done.err
        assert not (folder / "canary").exists()
        assert not (folder / "out.onnx").exists()


def test_a_recipe_that_is_trusted_may_name_code(folder: Path) -> None:
    request = {"sparsity": 0.5, "strategy": "./evil.py:f"}
    (folder / "recipe.json").write_text(json.dumps({"request": request}))
    words = ("prune", "dense.onnx", "-o", "out.onnx", "--recipe", "recipe.json", "--trust")
    assert here(*words, cwd=folder).code == 0
    assert (folder / "canary").exists()


def test_a_recipe_with_built_in_words_needs_no_trust(folder: Path) -> None:
    request = {"sparsity": 0.5, "policy": "min-size:100", "strategy": "lamp"}
    (folder / "recipe.json").write_text(json.dumps({"request": request}))
    words = ("prune", "dense.onnx", "-o", "out.onnx", "--recipe", "recipe.json")
    assert here(*words, cwd=folder).code == 0


def test_a_refused_recipe_costs_nothing(folder: Path) -> None:
    (folder / "recipe.json").write_text(json.dumps({"request": {"sparsity": 0.5, "strategy": "x" * 10_000 + ":f"}}))
    assert_refused_cheaply(
        cost("prune", MODEL, "-o", folder / "out.onnx", "--recipe", folder / "recipe.json", scratch=folder)
    )


def test_a_journal_of_a_stranger_names_nothing_that_is_run(folder: Path) -> None:
    words = ("sweep", "dense.onnx", "-o", "points", "--data", "test.npz", "--sparsities", "50%")
    assert here(*words, "--strategies", "magnitude", cwd=folder).code == 0
    journal = folder / "points" / "sweep.jsonl"
    journal.write_text(journal.read_text().replace('"magnitude"', '"./evil.py:f"'))
    here(*words, "--strategies", "magnitude", cwd=folder)
    assert not (folder / "canary").exists()


def test_completion_imports_nothing_that_is_named(folder: Path) -> None:
    line = "prunectl prune dense.onnx --recipe recipe.json --strategy ./evil.py:f --layers "
    environment = {"_PRUNECTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "8"}
    done = prunectl(cwd=folder, **environment)
    assert done.code == 0
    assert not (folder / "canary").exists()


def test_a_manifest_that_names_code_is_verified_without_running_it(folder: Path) -> None:
    assert here("prune", "dense.onnx", "-o", "out.onnx", "-s", "50%", "--manifest", "run.json", cwd=folder).code == 0
    run = json.loads((folder / "run.json").read_text())
    run["request"]["strategy"] = "./evil.py:f"
    (folder / "run.json").write_text(json.dumps(run))
    assert here("verify", "out.onnx", "--manifest", "run.json", "--against", "dense.onnx", cwd=folder).code == 0
    assert not (folder / "canary").exists()
