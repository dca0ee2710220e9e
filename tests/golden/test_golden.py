"""What scripts and files depend on stays as it is: reports, outputs to the byte, records, exit codes.

`python -m tests.golden` writes what is expected anew, and `git diff` shows what that changes.
"""

from __future__ import annotations

import hashlib
import json
from difflib import unified_diff
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import prunectl
from tests.golden.cases import CASES, Case
from tests.golden.running import EXPECTED, as_text, probe, result
from tests.running import FIXTURES


@cache
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXPECTED.read_text())
    return found


def test_every_case_is_expected_and_no_other() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(names) == expected()["cases"].keys()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_comes_of_it_is_what_it_was(case: Case, tmp_path: Path) -> None:
    for module in case.needs:
        pytest.importorskip(module)
    if expected()["zlib"] != probe():
        pytest.skip("sizes are those of stock zlib, and Python has another here")
    before = as_text(expected()["cases"][case.name]).splitlines()
    after = as_text(result(case, tmp_path)).splitlines()
    changes = "\n".join(unified_diff(before, after, "expected", "found", lineterm="", n=2))
    assert not changes, "\n".join((*case.lines, changes))


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("prune/digits_cnn.pt", "out.pt", {"sparsity": 0.8}),
        ("prune/global", "out.pt", {"sparsity": 0.9, "scope": "global"}),
        ("prune/lamp-global", "out.onnx", {"sparsity": 0.9, "strategy": "lamp", "scope": "global"}),
        ("prune/two-of-four", "out.onnx", {"pattern": "2:4", "exclude": ["fc2"]}),
        ("prune/block", "out.h5", {"sparsity": 0.7, "pattern": "block:1x4"}),
        ("prune/pack/digits_cnn.keras", "out.keras", {"sparsity": 0.8, "pack": True}),
    ],
)
def test_functions_write_what_the_command_writes(case: str, name: str, words: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / name
    prunectl.prune(FIXTURES / f"digits_cnn{output.suffix}", output, **words)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == expected()["cases"][case]["files"][name]


def test_stripping_and_exporting_as_functions_write_what_the_commands_write(tmp_path: Path) -> None:
    prunectl.strip(FIXTURES / "checkpoint_with_optimizer.pt", tmp_path / "out.pt")
    prunectl.export(FIXTURES / "two_of_four_zero.safetensors", tmp_path / "out.npz")
    cases = expected()["cases"]
    for name, case in (("out.pt", "strip/checkpoint_with_optimizer.pt"), ("out.npz", "export/npz")):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == cases[case]["files"][name]
