"""What helps prunectl to fit in: each example runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl import __version__
from prunectl.commands.app import COMMANDS
from prunectl.formats.registry import FORMATS
from tests.checks.checking import MODEL, RAW, baseline, put
from tests.checks.little_yaml import read
from tests.running import COMMAND, FIXTURES, ROOT, clean

BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]
"""As GitHub runs a step."""


def yaml(path: str) -> Any:
    return read((ROOT / path).read_text())


@pytest.fixture
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command in it, to be put on the path."""
    folder = tmp_path_factory.mktemp("runner") / "prunectl" / "bin"
    folder.mkdir(parents=True)
    command = folder / "prunectl"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m prunectl "$@"\n')
    command.chmod(0o755)
    return folder


def run(script: str, folder: Path, bin_folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*BASH, script], cwd=folder, env=clean(PATH=path, **environment), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("given", "code", "seen"),
    [
        ({}, 1, "::error file=prunectl.toml,line=4"),
        ({"BUDGETS": "wide one\n"}, 0, ""),
        ({"BUDGETS": "wide one\ntight\n", "REPORTS": "junit:a b.xml\nplain:p.txt\n"}, 1, "::error"),
        ({"CONFIG": "missing.toml"}, 2, ""),
        ({"BUDGETS": "$(touch owned)"}, 2, ""),
    ],
)
def test_the_action_says_what_the_check_says(
    given: dict[str, str], code: int, seen: str, tmp_path: Path, bin_folder: Path
) -> None:
    action = yaml("action.yml")
    install, check = action["runs"]["steps"]
    assert install["run"].rstrip().endswith('--no-deps --no-build-isolation "$GITHUB_ACTION_PATH"')
    assert set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", (ROOT / "action.yml").read_text())) == set(action["inputs"])
    # What somebody else typed never gets into the script itself.
    assert "${{" not in check["run"]
    budget = "[[budget]]\nname = '{}'\npath = 'a.*'\nmax-raw = {}\n"
    put(tmp_path, budget.format("tight", 1) + budget.format("wide one", RAW), a=MODEL)
    environment = {**dict.fromkeys(check["env"], ""), **given, "RUNNER_TEMP": str(bin_folder.parent.parent)}
    done = run(check["run"], tmp_path, bin_folder, GITHUB_OUTPUT=str(tmp_path / "output"), **environment)
    assert (done.returncode, (tmp_path / "output").read_text()) == (code, f"exit-code={code}\n"), done.stderr
    assert done.stdout.startswith(seen)
    assert not (tmp_path / "owned").exists()
    if "REPORTS" in given:
        assert (tmp_path / "a b.xml").exists()
        assert len((tmp_path / "p.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("trust", "is_fork", "runs"),
    [("true", "false", True), ("true", "", True), ("true", "true", False), ("false", "", False), ("", "", False)],
)
def test_the_action_trusts_no_fork(trust: str, is_fork: str, *, runs: bool, tmp_path: Path, bin_folder: Path) -> None:
    (check,) = (step for step in yaml("action.yml")["runs"]["steps"] if step["name"] == "Check")
    shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path / "a.onnx")
    (tmp_path / "data.py").write_text(
        "open('canary', 'w')\nimport numpy\ndef f(): return numpy.ones((4, 8, 8, 1)), numpy.ones(4, int)\n"
    )
    drop = "max-drop = {fail = '1pp', data = './data.py:f', against = 'a.onnx'}"
    put(tmp_path, f"[[budget]]\npath = 'a.onnx'\n{drop}\n")
    said = {**dict.fromkeys(check["env"], ""), "TRUST": trust, "IS_FORK": is_fork}
    done = run(
        check["run"],
        tmp_path,
        bin_folder,
        GITHUB_OUTPUT=str(tmp_path / "output"),
        **said,
        RUNNER_TEMP=str(bin_folder.parent.parent),
    )
    assert (tmp_path / "canary").exists() is runs
    assert done.returncode == (0 if runs else 3), done.stderr
    assert ("a fork's code is not trusted" in done.stdout) is (trust == is_fork == "true")


WEIGHTS = ("net.onnx.data", "net.onnx_data", "net/variables/variables.data-00000-of-00002")
"""Files that hold weights of a model whose own file may stay as it is."""


def test_the_hook_looks_at_every_file_that_may_change_the_verdict() -> None:
    (hook,) = yaml(".pre-commit-hooks.yaml")
    assert (hook["language"], hook["pass_filenames"]) == ("python", False)
    assert hook["entry"].split()[1] in COMMANDS
    for row in FORMATS:
        for suffix in filter(None, row.suffixes):
            name = "model.safetensors.index.json" if suffix == ".json" else f"model{suffix}"
            assert re.search(hook["files"], f"models/{name}"), name
    for name in ("prunectl.toml", "a/pyproject.toml", "a/prunectl-baseline.json", "net/saved_model.pb", *WEIGHTS):
        assert re.search(hook["files"], name), name
    assert not re.search(hook["files"], "package.json")


def test_the_workflow_compares_with_the_main_branch(tmp_path: Path, bin_folder: Path) -> None:
    (job,) = yaml("examples/github-workflow.yml")["jobs"].values()
    scripts = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    assert scripts["Install"] == "pip install --quiet ./prunectl"
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-growth = '0%'\n", a=MODEL)
    baseline(tmp_path, a=10)
    commit = "git add . && git -c user.name=a -c user.email=a@b.c commit -qm 'sizes'"
    assert run(f"git init -q -b main && {commit}", tmp_path, bin_folder).returncode == 0
    baseline(tmp_path, a=10_000)
    # What GitHub checks out is the merge of a pull request, whose first parent is the main branch.
    assert run(commit, tmp_path, bin_folder).returncode == 0
    done = run(scripts["Check"], tmp_path, bin_folder)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("::error file=prunectl.toml,line=3")
    assert {"prunectl.xml", "prunectl.md"} <= {path.name for path in tmp_path.iterdir()}


def test_the_gitlab_job_writes_the_artifacts_that_it_names(tmp_path: Path, bin_folder: Path) -> None:
    (job,) = yaml("examples/gitlab-ci.yml").values()
    install, check = job["script"]
    assert install == "pip install --quiet ./prunectl"
    put(tmp_path, "[[budget]]\npath = 'a.*'\nmax-raw = 1\n", a=MODEL)
    assert run(check, tmp_path, bin_folder).returncode == 1
    assert all((tmp_path / name).is_file() for name in job["artifacts"]["reports"].values())


@pytest.mark.parametrize("name", ["github-workflow", "gitlab-ci"])
def test_with_a_release_one_line_of_an_example_changes(name: str) -> None:
    text = (ROOT / f"examples/{name}.yml").read_text()
    (line,) = (line for line in text.splitlines() if "pip install" in line)
    assert line.endswith(f"./prunectl # with a release: prunectl=={__version__}")


def make(folder: Path, bin_folder: Path, *words: str) -> tuple[list[str], list[str]]:
    """Run make, and return the models that it was about to prune, and those of them that were up to date."""
    done = run(f"make -f {ROOT / 'examples/Makefile'} {' '.join(words)}", folder, bin_folder)
    assert done.returncode == 0, done.stderr
    tried = re.findall(r"^prunectl prune (\S+)", done.stdout, re.MULTILINE)
    return sorted(tried), sorted(re.findall(r"^note: (\S+) is up to date", done.stderr, re.MULTILINE))


def test_make_rebuilds_only_what_has_changed(tmp_path: Path, bin_folder: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / f"{name}.h5")
    assert make(tmp_path, bin_folder, "-j2") == (["a.h5", "b.h5"], [])
    assert make(tmp_path, bin_folder, "-j2") == ([], [])
    # As after a checkout: all files are new, and only one of them is another.
    pruned = {name: (tmp_path / f"{name}.p.h5").read_bytes() for name in "ab"}
    for name in ("a.p.h5", "b.p.h5"):
        os.utime(tmp_path / name, (1000, 1000))
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["model_weights/fc2/fc2/kernel:0"][0, 0] = 7
    assert make(tmp_path, bin_folder, "-j2") == (["a.h5", "b.h5"], ["a.p.h5"])
    assert [(tmp_path / f"{name}.p.h5").read_bytes() == pruned[name] for name in "ab"] == [True, False]
    assert make(tmp_path, bin_folder, "-j2") == ([], [])
    (tmp_path / "prunectl.toml").write_text("[[budget]]\npath = '*.p.h5'\nmin-sparsity = 0.8\n")
    assert make(tmp_path, bin_folder, "check") == ([], [])
    # Another sparsity is another model, though no file is newer.
    assert make(tmp_path, bin_folder, "SPARSITY=90%", "check") == (["a.h5", "b.h5"], [])
    (tmp_path / "prunectl.toml").write_text("[[budget]]\npath = '*.p.h5'\nmin-sparsity = 0.9\n")
    assert make(tmp_path, bin_folder, "SPARSITY=90%", "-j2", "check") == ([], [])
    (tmp_path / "a.p.h5").write_text("a thing of value")
    done = run(f"make -f {ROOT / 'examples/Makefile'} a.p.h5", tmp_path, bin_folder)
    assert (done.returncode, "a.p.h5 has changed since prunectl wrote it" in done.stderr) == (2, True)
    assert (tmp_path / "a.p.h5").read_text() == "a thing of value"
    assert make(tmp_path, bin_folder, "clean") == ([], [])
    assert {path.name for path in tmp_path.iterdir()} == {"a.h5", "b.h5", "prunectl.toml"}


def test_a_build_that_is_killed_leaves_no_half_file(tmp_path: Path, bin_folder: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names"] = [b"fc"]
        file.create_group("fc").attrs["weight_names"] = [b"fc/kernel:0"]
        file["fc/fc/kernel:0"] = np.random.default_rng(0).random((1024, 1024), np.float32)
    words = [
        *COMMAND,
        "prune",
        "a.h5",
        "-o",
        "a.p.h5",
        "--sparsity",
        "80%",
        "--pack",
        "--if-changed",
        "--depfile",
        "a.p.d",
    ]
    building = subprocess.Popen(words, cwd=tmp_path, env=clean(PYTHONPATH=str(ROOT)), stderr=subprocess.DEVNULL)
    while not any(tmp_path.glob(".prunectl-*/new/*")):  # it has begun to write
        assert building.poll() is None
        time.sleep(0.001)
    building.send_signal(signal.SIGKILL)
    building.wait()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.h5"]
    assert make(tmp_path, bin_folder) == (["a.h5"], [])
    assert {path.name for path in tmp_path.iterdir()} == {"a.h5", "a.p.h5", "a.p.d", ".a.p.h5.prunectl", ".sparsity"}
