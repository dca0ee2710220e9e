"""`--import`: what is imported before a file is opened, and what is said where that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prunectl.commands._requests import import_first
from prunectl.errors import UsageError
from tests.running import prunectl


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own, without which Python's path and modules would remember it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})


def test_a_module_beside_the_user_is_found_by_its_name_and_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "own_net_one.py").write_text("NUMBER = 1")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own_net_two.py").write_text("import own_beside\nNUMBER = own_beside.NUMBER")
    (tmp_path / "deep" / "own_beside.py").write_text("NUMBER = 2")
    import_first(["own_net_one", "./deep/own_net_two.py"])
    assert (sys.modules["own_net_one"].NUMBER, sys.modules["own_net_two"].NUMBER) == (1, 2)


def test_nothing_in_the_current_folder_takes_the_place_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_text("raise AssertionError")
    sys.modules.pop("wave", None)
    import_first(["wave"])
    with pytest.raises(UsageError, match="another module is already called wave"):
        import_first(["./wave.py"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_missing", ": no such module is installed or in this folder"),
        ("./own_missing.py", ": the file does not exist"),
        ("own_needy", ": it imports own_missing, which cannot be found"),
        ("./own_broken.py", " raised ValueError: so it goes"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_the_reason(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own_needy.py").write_text("import own_missing")
    (tmp_path / "own_broken.py").write_text("raise ValueError('so it goes')")
    with pytest.raises(UsageError) as caught:
        import_first([name])
    assert str(caught.value) == f"--import {name}{said}"


def test_the_command_takes_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath('seen').touch()")
    words = ("-o", "out.pt", "--data", "nothing.npz", "--import", "./own.py")
    done = prunectl("finetune", "nothing.pt", *words, cwd=tmp_path)
    assert (tmp_path / "seen").exists()
    assert done.code == 3
