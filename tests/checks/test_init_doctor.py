"""`prunectl init` and `prunectl doctor`: budgets for what is there, and what works here."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.checks import suggest
from prunectl.commands import doctor
from prunectl.commands.doctor import Extra
from prunectl.formats import packages
from prunectl.formats.packages import Package
from prunectl.units import parse_size
from tests.checks.checking import GZIP, MODEL, PARAMS, RAW, baseline, prunectl
from tests.running import FIXTURES, ROOT, here


def test_budgets_are_a_little_above_and_then_hold(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    assert prunectl(tmp_path, "init").code == 0
    (budget,) = tomllib.loads((tmp_path / "prunectl.toml").read_text())["budget"]
    for key, value in (("max-raw", RAW), ("max-gzip", GZIP), ("max-params", PARAMS)):
        assert 1.1 * value <= parse_size(str(budget[key])) <= 1.12 * value + 1
    assert (budget["path"], budget["min-sparsity"]) == ("a.safetensors", "50%")
    assert prunectl(tmp_path, "check").code == 0


def test_a_first_check_after_init_passes_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    shutil.copy(FIXTURES / "digits_cnn.keras", tmp_path)
    told = prunectl(tmp_path, "init", "--format", "human").out
    assert told.startswith("Wrote prunectl.toml and prunectl-baseline.json: 2 models")
    assert "Next: prunectl check" in told
    known = json.loads((tmp_path / "prunectl-baseline.json").read_text())["models"]
    assert (known["a.safetensors"]["gzip"], known["a.safetensors"]["reason"]) == (GZIP, "first sizes")
    found = prunectl(tmp_path, "check")
    assert (found.code, found.err) == (0, "prunectl.toml: 0 failed, 0 warned, 9 passed; 2 models measured\n")
    assert {row[0] for row in found.rows} == {"pass"}


def test_init_in_another_folder_names_the_file_to_check(tmp_path: Path) -> None:
    (tmp_path / "my models").mkdir()
    (tmp_path / "my models" / "a.safetensors").write_bytes(MODEL)
    assert "Next: prunectl check --config 'my models/prunectl.toml'" in prunectl(
        tmp_path, "init", "my models", "--format", "human"
    ).out  # fmt: skip
    assert prunectl(tmp_path, "check", "--config", "my models/prunectl.toml").code == 0


def test_a_baseline_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    baseline(tmp_path, a=1)
    before = (tmp_path / "prunectl-baseline.json").read_bytes()
    told = prunectl(tmp_path, "init", "--format", "human").out
    assert told.startswith("Wrote prunectl.toml: 1 model")
    assert "prunectl-baseline.json was there before, and is unchanged." in told
    assert (tmp_path / "prunectl-baseline.json").read_bytes() == before


@given(st.integers(0, 1 << 50), st.sampled_from([0, 0.1, 0.25]))
def test_a_proposed_limit_reads_back_to_the_number_that_was_meant(value: int, margin: float) -> None:
    for limit in (value, suggest._rounded_up(value, margin)):
        assert parse_size(f"{suggest._shortened(limit)}B") == parse_size(suggest._shortened(limit)) == limit


def test_every_model_is_found_once_whatever_its_format(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path / "models")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / ".hidden")
    assert prunectl(tmp_path, "init").code == 0
    paths = [budget["path"] for budget in tomllib.loads((tmp_path / "prunectl.toml").read_text())["budget"]]
    assert len(set(paths)) == len(paths)
    for name in (
        "digits_cnn.h5",
        "digits_cnn.pt",
        "digits_cnn.onnx",
        "digits_cnn_savedmodel",
        "digits_cnn_checkpoint.index",
    ):
        assert f"models/{name}" in paths
    assert "models/two_shards/model.safetensors.index.json" in paths
    assert not any(".hidden" in path or "variables" in path or path.endswith((".npz", ".py", ".md")) for path in paths)
    assert prunectl(tmp_path, "check").code == 0


def test_names_that_mean_something_to_globs_or_toml_are_kept(tmp_path: Path) -> None:
    for name in ("a1.safetensors", "a[1].safetensors", 'b"q".safetensors', "c\\d.safetensors", "é😀.safetensors"):
        (tmp_path / name).write_bytes(MODEL)
    assert prunectl(tmp_path, "init").code == 0
    found = prunectl(tmp_path, "check")
    assert (found.code, len({row[2] for row in found.rows})) == (0, 5)


def test_a_name_that_is_no_text_is_told_and_the_others_are_written(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b\udcff.safetensors", "c\n.safetensors"):
        (tmp_path / name).write_bytes(MODEL)
    found = prunectl(tmp_path, "init")
    assert found.code == 3
    assert len(tomllib.loads((tmp_path / "prunectl.toml").read_text())["budget"]) == 1


def test_the_margin_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    assert prunectl(tmp_path, "init", "--margin", "0%").code == 0
    (budget,) = tomllib.loads((tmp_path / "prunectl.toml").read_text())["budget"]
    assert (budget["max-raw"], budget["max-params"]) == (f"{RAW}B", PARAMS)


@pytest.mark.parametrize("there", ["prunectl.toml", "pyproject.toml"])
def test_budgets_that_are_there_are_left_alone(there: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    text = "[tool.prunectl]\non-missing = 'warn'\n"
    (tmp_path / there).write_text(text)
    assert prunectl(tmp_path, "init").code == 2
    assert (tmp_path / there).read_text() == text
    assert not (tmp_path / "prunectl.toml").exists() or there == "prunectl.toml"


def test_no_model_or_no_folder_is_a_slip(tmp_path: Path) -> None:
    assert prunectl(tmp_path, "init").code == 2
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    assert prunectl(tmp_path, "init", "a.safetensors").code == 2
    assert not (tmp_path / "prunectl.toml").exists()


def test_the_doctor_knows_every_extra_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) - {""} == set(project["optional-dependencies"]) - {"all"}


def test_the_doctor_tells_the_versions_that_are_installed(tmp_path: Path) -> None:
    said = {extra["name"]: extra for extra in prunectl(tmp_path, "doctor", "--json").json["extras"]}
    versions = {package["name"]: package["version"] for package in said[None]["packages"]}
    assert versions["numpy"] == metadata.version("numpy")
    assert said[None]["is_ready"]


def test_what_is_missing_or_too_old_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1.26", "onnx>=99; extra == 'onnx'", "nonesuch>=1; extra == 'zstd'", "onnx>=99; extra == 'all'"]
    monkeypatch.setattr("prunectl.formats.packages.metadata.requires", lambda _: lines)
    found = {extra.name: extra for extra in doctor.extras()}
    assert [found[name].is_ready for name in ("", "onnx", "zstd")] == [True, False, False]
    assert found["zstd"].install_command.endswith("pip install nonesuch")
    assert found["onnx"].install_command.endswith("pip install 'onnx>=99'")


@pytest.mark.parametrize(
    ("prefix", "has_pip", "on_path", "command"),
    [
        ("/a/.venv", True, "/a/.venv/bin/pip", "pip install torch"),
        ("/a/.venv", True, "/usr/bin/pip", "/a/.venv/bin/python -m pip install torch"),
        ("/a/my env", True, None, "'/a/my env/bin/python' -m pip install torch"),
        ("/a/.venv", False, "/usr/bin/pip", "uv pip install --python /a/.venv/bin/python torch"),
        ("/home/a/.local/share/uv/tools/prunectl", False, None,
         "uv pip install --python /home/a/.local/share/uv/tools/prunectl/bin/python torch"),
        ("/home/a/.local/share/pipx/venvs/prunectl", False, None, "pipx inject prunectl torch"),
    ],
)  # fmt: skip
def test_the_command_installs_where_prunectl_runs(
    prefix: str, has_pip: bool, on_path: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "executable", f"{prefix}/bin/python")
    monkeypatch.setattr("prunectl.formats.packages.shutil.which", lambda _: on_path)
    monkeypatch.setattr("prunectl.formats.packages._version", lambda _: "1" if has_pip else "")
    assert packages.install_command([packages.Package("torch", "torch", ">=2.4", "")]) == command


def test_a_python_below_the_folder_is_named_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr("prunectl.formats.packages.shutil.which", lambda _: None)
    assert packages.command_for("torch", "torch") == ".venv/bin/python -m pip install torch"


def test_sources_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("prunectl.formats.packages.metadata.requires", unknown)
    found = prunectl(tmp_path, "doctor")
    assert (found.code, "pip install -e ." in found.err) == (3, True)


@pytest.mark.parametrize(("system", "is_weaker"), [("Linux", False), ("Darwin", True)])
def test_the_doctor_names_what_protects_less_off_linux(
    system: str, is_weaker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunectl.commands.doctor.platform.system", lambda: system)
    done = here("doctor", "--format", "human")
    assert done.code == 0, done.err
    assert (
        f"On {system} the process that reads HDF5 is limited in time, but not in memory" in " ".join(done.out.split())
    ) is (is_weaker)


@pytest.mark.parametrize(
    ("requirement", "version", "is_ready"),
    [
        (">=1.26", "1.26.0", True), (">=1.26", "1.9.9", False), (">=2", "2.13.0+cpu", True),
        ("<0.29,>=0.26", "0.28.1", True),
        ("<0.29,>=0.26", "0.29", False), (">=1", "", False), ("", "1", True), (">=0.26", "0.26", True),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(requirement: str, version: str, is_ready: bool) -> None:
    package = Package("p", "", requirement, version)
    assert package.is_ready is is_ready
    assert Extra("x", "y", (package,)).is_ready is is_ready
