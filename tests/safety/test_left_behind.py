"""What a command that fails leaves behind: nothing in the temporary folder, and no page of a report without a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from tests.running import FIXTURES, ROOT, here
from tests.safety import makers
from tests.safety.cost import assert_refused_cheaply, cost


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A `.keras` archive whose deflated weights are not HDF5."""
    path = tmp_path / "damaged.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(makers.DENSE))
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(5000))
    return path


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    """A `.keras` archive whose deflated weights cannot be inflated."""
    whole = bytearray((FIXTURES / "deflated.keras").read_bytes())
    with zipfile.ZipFile(FIXTURES / "deflated.keras") as archive:
        info = archive.getinfo("model.weights.h5")
    middle = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    whole[middle : middle + 8] = b"\xff" * 8
    (tmp_path / "flipped.keras").write_bytes(whole)
    return tmp_path / "flipped.keras"


@pytest.mark.parametrize("file", ["damaged", "flipped"])
@pytest.mark.parametrize("command", ["inspect", "strip", "prune", "size"])
def test_weights_of_a_damaged_archive_do_not_stay_in_the_temporary_folder(
    command: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = {"strip": ["-o", tmp_path / "o.keras"], "prune": ["--sparsity", "0.5", "-o", tmp_path / "o.keras"]}
    found = cost(command, request.getfixturevalue(file), *options.get(command, []), scratch=tmp_path)
    assert_refused_cheaply(found)


def test_a_sound_deflated_archive_leaves_nothing_either(tmp_path: Path) -> None:
    found = cost("inspect", FIXTURES / "deflated.keras", scratch=tmp_path)
    assert found.outcome.code == 0
    assert not found.left


def test_nothing_is_inflated_of_an_archive_whose_metadata_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, temporary = tmp_path / "damaged.keras", tmp_path / "temporary"
    with zipfile.ZipFile(FIXTURES / "deflated.keras") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = b"{" if info.filename == "metadata.json" else old.read(info)
            new.writestr(info.filename, content, zipfile.ZIP_DEFLATED)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(InputError, match=r"metadata\.json") as held:
        open_model(path)
    assert held.traceback
    assert not list(temporary.iterdir()), "while the error is held"


@pytest.mark.parametrize("command", ["inspect", "size"])
def test_a_damaged_file_alone_gets_no_page(command: str, damaged: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert here(command, damaged, "--html", page).code == 3
    assert not page.exists()


def test_a_damaged_file_leaves_the_page_of_an_earlier_run_as_it_was(damaged: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert here("inspect", FIXTURES / "digits_cnn.keras", "--html", page).code == 0
    before = page.read_bytes()
    assert here("inspect", damaged, "--html", page).code == 3
    assert page.read_bytes() == before


def test_a_damaged_file_among_others_is_named_on_their_page(damaged: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sound = shutil.copy(FIXTURES / "digits_cnn.keras", tmp_path / "sound.keras")
    assert here("inspect", sound, damaged, "--html", page).code == 3
    text = page.read_text(encoding="utf-8")
    assert "sound.keras" in text
    assert "damaged.keras" in text
    assert "truncated or damaged" in text


def test_a_runtime_that_would_report_to_its_maker_is_told_not_to(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    # Where it reports, importing it leaves the number of a session in the temporary folder.
    environment = {name: value for name, value in os.environ.items() if name not in {"ORT_DISABLE_TELEMETRY", "CI"}}
    code = "from prunectl.formats.safe_json import require; require('onnxruntime', extra='onnx')"
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert not list(tmp_path.iterdir())
