"""Standard output carries data only, whatever code of the user prints."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.running import COMMAND, FIXTURES, clean, here

ONNX = FIXTURES / "digits_cnn.onnx"
LOUD = """
import ctypes, os
print('imported')
def score(weights):
    print('scored')
    os.system('echo shell')
    ctypes.CDLL(None).puts(b'printed by C')
    return abs(weights)
"""
BUILDER = f"""
import sys
sys.path.insert(0, {str(FIXTURES)!r})
from digits_torch import DigitsCNN
def build():
    print('built')
    return DigitsCNN()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "net.py").write_text(BUILDER)
    return tmp_path


def test_what_a_strategy_prints_stands_beside_the_data(folder: Path) -> None:
    prune = ("prune", ONNX, "-s", "80%", "--strategy", "./loud.py:score")
    told = here(*prune, "-o", "small.onnx", "--json", cwd=folder)
    assert json.loads(told.out)["ok"]
    assert "imported\n" in told.err
    assert "scored\n" in told.err
    rows = here(*prune, "--dry-run", cwd=folder)
    assert all(len(line.split("\t")) == 6 for line in rows.out.splitlines())
    piped = subprocess.run(
        [*COMMAND, *prune, "-o", "-"], cwd=folder, env=clean(PYTHONUNBUFFERED=""), capture_output=True, check=True
    )
    assert piped.stdout == (folder / "small.onnx").read_bytes()
    assert all(line in piped.stderr.splitlines() for line in (b"scored", b"shell", b"printed by C"))


def test_what_a_builder_prints_stands_beside_the_data(folder: Path) -> None:
    data = f"{FIXTURES / 'digits.npz'}?norm=/16"
    words = ("--data", data, "--builder", "net.py:build", "--json")
    told = here("eval", FIXTURES / "digits_cnn.pt", *words, cwd=folder)
    assert json.loads(told.out)["ok"]
    assert "built\n" in told.err
    failed = here("eval", FIXTURES / "digits_cnn.pt", *words, "--metric", "nothing", cwd=folder)
    assert json.loads(failed.out)["error"]
