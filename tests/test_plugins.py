"""`plugins`: every name there is, and pictures of the schedules."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from prunectl.pruning.plan import POLICIES
from prunectl.pruning.schedules import CURVES
from prunectl.pruning.strategies import STRATEGIES
from prunectl.reporting.plots import braille_plot, svg_plot
from tests.running import at_terminal, here


def test_every_name_that_a_command_takes_is_listed() -> None:
    rows = {(kind, name) for kind, name, *_ in here("plugins").rows}
    assert {("strategies", one.name) for one in STRATEGIES} <= rows
    assert {("schedules", name) for name in CURVES} <= rows
    assert {("policies", one.name) for one in POLICIES} <= rows
    assert {("strategies", "movement"), ("strategies", "magnitude-gradient"), ("formats", "onnx")} <= rows


def test_a_kind_alone_is_listed_alone() -> None:
    found = here("plugins", "schedules", "--json").json
    assert {one["kind"] for one in found["plugins"]} == {"schedules"}
    assert here("plugins", "schedules", "-q").out.split() == list(CURVES)


def test_curves_are_drawn_in_a_pipe_and_at_a_terminal() -> None:
    for shown in (here("plugins", "schedules", "--plot").out, at_terminal("plugins", "schedules", "--plot").out):
        for name in CURVES:
            assert name in shown
        assert sum("\u2800" < letter <= "\u28ff" for letter in shown) > 100


def test_curves_are_drawn_into_a_file_that_is_not_overwritten(tmp_path: Path) -> None:
    picture = tmp_path / "curves.svg"
    assert here("plugins", "schedules", "--plot", picture).code == 0
    root = ET.fromstring(picture.read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(CURVES)
    assert here("plugins", "schedules", "--plot", picture).code == 2
    assert here("plugins", "schedules", "--plot", picture, "--force").code == 0


@pytest.mark.parametrize("words", [["strategies", "--plot"], ["schedules", "x.svg"], ["schedles"]])
def test_what_makes_no_sense_is_refused(words: list[str], tmp_path: Path) -> None:
    assert here("plugins", *words, cwd=tmp_path).code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_rises_goes_from_the_lower_left_to_the_upper_right() -> None:
    lines = braille_plot([0.0, 0.5, 1.0], 10, 5)
    assert lines[-1][0] not in {"\u2800", " "}
    assert lines[0][-1] not in {"\u2800", " "}
    assert lines[0][0] == "\u2800"


def test_names_are_text_in_a_picture_whatever_is_in_them() -> None:
    root = ET.fromstring(svg_plot({"<a&b>": [0.0, 1.0]}, across="x", up="y"))
    assert any(one.text == "<a&b>" for one in root.iter("{http://www.w3.org/2000/svg}text"))
