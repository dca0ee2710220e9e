"""What is released: the same bytes at every build, what they hold, and the versions that were tried with them."""

from __future__ import annotations

import email
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, files_by_suffix

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = PROJECT["project"]["dependencies"]
SOURCES = ["pyproject.toml", ".gitignore", *PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]


def name_of(requirement: str) -> str:
    """Return the name in a requirement, as registries spell it."""
    return re.split(r"[\[=<>; ]", requirement)[0].lower().replace("_", "-")


def copied(to: Path) -> Path:
    """Copy what is under version control, with other times and permissions than it has here."""
    for source in sorted(set(SOURCES)):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            to.mkdir(exist_ok=True)
            shutil.copy(ROOT / source, to / source)
    for path in to.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (1, 1))
    return to


WORKFLOWS = [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / "examples/github-workflow.yml"]


def built(root: Path, to: Path, **environment: str) -> dict[str, bytes]:
    """Build both archives, and return them by their names."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(to)],
        cwd=root, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **environment}, check=True, capture_output=True,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in to.iterdir()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(archives: dict[str, bytes]) -> zipfile.ZipFile:
    (name,) = (name for name in archives if name.endswith(".whl"))
    return zipfile.ZipFile(io.BytesIO(archives[name]))


@pytest.fixture(scope="module")
def bill(wheel: zipfile.ZipFile) -> dict[str, Any]:
    (name,) = (name for name in wheel.namelist() if "/sboms/" in name)
    return dict(json.loads(wheel.read(name)))


def test_two_builds_have_the_same_bytes(archives: dict[str, bytes], tmp_path: Path) -> None:
    again = built(copied(tmp_path / "copy"), tmp_path / "dist", PYTHONHASHSEED="7")
    digests = [{name: hashlib.sha256(held).hexdigest() for name, held in both.items()} for both in (archives, again)]
    assert digests[0] == digests[1]


def test_the_source_archive_builds_the_same_wheel(archives: dict[str, bytes], tmp_path: Path) -> None:
    (name,) = (name for name in archives if name.endswith(".tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(archives[name])) as archive:
        archive.extractall(tmp_path, filter="data")
    again = built(tmp_path / name.removesuffix(".tar.gz"), tmp_path / "dist")
    assert again == archives


def test_the_archives_are_dated_as_asked(wheel: zipfile.ZipFile) -> None:
    assert {held.date_time[:3] for held in wheel.infolist()} == {(2023, 11, 14)}


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "prunectl").rglob("*.py")}
    data = {
        *("py.typed", "checks/budgets.schema.json", "reporting/html/page.css", "reporting/html/page.js"),
        *("formats/pure_keras.toml", "formats/pure_tensorflow.toml"),
    }
    assert held == modules | {f"prunectl/{name}" for name in data}


def test_beside_its_modules_the_wheel_holds_only_what_tells_of_it(wheel: zipfile.ZipFile) -> None:
    told = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
    standard = {"METADATA", "WHEEL", "RECORD", "entry_points.txt"}
    assert told == standard | {"licenses/LICENSE", "sboms/prunectl.cdx.json"}


def test_the_wheel_asks_for_what_the_project_asks_for(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    told = email.message_from_bytes(wheel.read(name))
    asked = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(map(name_of, asked)) == sorted(map(name_of, CORE))
    assert told["Requires-Python"] == PROJECT["project"]["requires-python"]


def test_the_bill_of_materials_lists_every_dependency_at_run_time(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    listed = {part["name"]: part for part in bill["components"]}
    assert sorted(map(name_of, listed)) == sorted(map(name_of, CORE))
    assert len(listed) == 6
    for part in listed.values():
        assert part["purl"] == f"pkg:pypi/{name_of(part['name'])}"
        assert {(line["name"], name_of(line["value"])) for line in part["properties"]} == {
            ("prunectl:requirement", name_of(part["name"]))
        }


def test_the_bill_of_materials_says_what_needs_what(bill: dict[str, Any]) -> None:
    this, *others = bill["dependencies"]
    assert this["ref"] == bill["metadata"]["component"]["bom-ref"]
    assert this["dependsOn"] == [part["bom-ref"] for part in bill["components"]] == [part["ref"] for part in others]


def test_the_dependencies_are_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*CORE, *(line for extra in extras.values() for line in extra), *PROJECT["dependency-groups"]["dev"]]
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert set(map(name_of, asked)) - {"prunectl"} <= set(map(name_of, pinned))


@pytest.mark.parametrize(
    ("file", "asked"),
    [
        ("core", CORE),
        ("build", PROJECT["build-system"]["requires"]),
        ("docs", [*CORE, *PROJECT["dependency-groups"]["docs"]]),
    ],
)
def test_what_a_release_and_the_site_are_made_with_is_pinned_by_hash(file: str, asked: list[str]) -> None:
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").split()
    entries = re.split(r"\n(?=\S)", (ROOT / f"requirements/{file}.txt").read_text().strip())
    elsewhere = {"colorama"}  # for Windows alone
    versions = {entry.split()[0].lower() for entry in entries}
    assert all("--hash=sha256:" in entry for entry in entries)
    assert {line for line in versions if name_of(line) not in elsewhere} <= set(pinned)
    assert set(map(name_of, asked)) <= set(map(name_of, versions))


def test_the_oldest_versions_that_are_tried_are_those_that_the_project_allows() -> None:
    tried = [line for line in (ROOT / "requirements/lowest.txt").read_text().splitlines() if not line.startswith("#")]
    versions = {name_of(line): tuple(map(int, line.partition("==")[2].split("."))) for line in tried}
    for line in CORE:
        bound = re.search(r">=([\d.]+)", line)
        assert bound
        lowest = tuple(map(int, bound[1].split(".")))
        assert versions[name_of(line)] == (*lowest, *(0,) * (3 - len(lowest)))


def test_only_one_page_has_placeholders_for_where_the_project_is_published() -> None:
    named = {
        path.relative_to(ROOT).as_posix()
        for path in files_by_suffix(".md", ".yml", ".yaml", ".toml")
        if re.search(r"\bOWNER/|\bclone URL\b|\badd URL\b|repo: URL", path.read_text())
    }
    assert named == {"docs/ci.md"}
    assert "`OWNER` in `docs/ci.md`, which alone names it" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)


def test_before_a_commit_the_same_is_checked_as_in_ci() -> None:
    makefile = (ROOT / "Makefile").read_text()
    linted = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert linted
    checked = {line.removeprefix("\t$(BIN)/") for line in linted[1].splitlines() if line.startswith("\t$(BIN)/")}
    hooks = re.findall(r"entry: \.venv/bin/([^,\n]*)", (ROOT / ".pre-commit-config.yaml").read_text())
    # What a hook mends and is given file by file is looked for everywhere in CI.
    said = {"ruff check --fix": "ruff check .", "ruff format": "ruff format --check ."}
    assert {said.get(hook, hook) for hook in hooks} == checked


def test_ci_runs_every_python_that_the_project_names() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    (matrix,) = re.findall(r"python: \[(.*)\]\n    env", (ROOT / ".github/workflows/ci.yml").read_text())
    assert matrix.replace('"', "").split(", ") == named
