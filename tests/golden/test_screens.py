"""Every page of help, and screens of the commands, look as they did.

`python -m tests.golden.screens` draws them anew, and `git diff` shows what that changes.
"""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import pytest

from tests.golden.running import EXPECTED, probe
from tests.golden.screens import FOLDER, HELP, SCREENS, Screen, group_picture, help_picture, screen_picture


def check(name: str, svg: str) -> None:
    before = (FOLDER / f"{name}.svg").read_text()
    changes = "\n".join(unified_diff(before.splitlines(), svg.splitlines(), "expected", "found", lineterm="", n=0))
    assert not changes, changes


def test_every_picture_is_of_a_page_or_a_screen() -> None:
    names = ["help", *HELP, *(screen.name for screen in SCREENS)]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(path.stem for path in FOLDER.glob("*.svg"))
    assert len(SCREENS) >= 12


def test_every_page_of_help_looks_as_it_did() -> None:
    check("help", group_picture())
    for name in HELP:
        check(name, help_picture(name))


@pytest.mark.parametrize("screen", SCREENS, ids=[screen.name for screen in SCREENS])
def test_a_screen_looks_as_it_did(screen: Screen, tmp_path: Path) -> None:
    if screen.needs:
        pytest.importorskip(screen.needs)
    if f'"zlib": "{probe()}"' not in EXPECTED.read_text():
        pytest.skip("sizes are those of stock zlib, and Python has another here")
    check(screen.name, screen_picture(screen, tmp_path))
