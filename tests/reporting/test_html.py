"""The page for a browser: one file, whole, with nothing in it that came from outside but text."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl import __version__
from prunectl.analysis.sizes import LimitCheck
from prunectl.api import inspect
from prunectl.commands import app
from prunectl.reporting.html import page
from prunectl.reporting.html.charts import Box, Scale, pareto, squarify
from prunectl.reporting.inspect import inspect_report
from prunectl.reporting.report import Column, Report, Section, Table, Unit
from prunectl.units import Units
from tests.running import FIXTURES, here

HOSTILE = "</title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x\u202egnp.exe\x1b[2J"

VOID = {"meta", "input", "link", "br", "img"}


@dataclass
class Element:
    """A tag with its attributes, and the text in it."""

    name: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements of a page, in the order in which they begin."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    @classmethod
    def of(cls, text: str) -> Self:
        page = cls()
        page.feed(text)
        page.close()
        assert not page.open, "every element is closed"
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, name: str) -> list[Element]:
        return [element for element in self.elements if element.name == name]


def written(*words: str | Path) -> tuple[int, str]:
    """Run a command that writes a page, and return its exit code and the page."""
    *_, place = words
    code = app.run([str(word) for word in words])
    return code, Path(place).read_text(encoding="utf-8")


def rules(found: Page) -> dict[str, str]:
    (meta,) = [one for one in found.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy"]
    content = meta.attributes["content"]
    assert content is not None
    return dict(rule.strip().split(" ", 1) for rule in content.split(";"))


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def of_names(tmp_path: Path, *names: str) -> Report:
    path = tmp_path / "names.safetensors"
    save_file({name: np.eye(8, dtype=np.float32) for name in names}, path)
    return inspect_report([inspect(path)], [], has_flops=False)


def test_a_model_is_shown_with_its_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = written("inspect", FIXTURES / "digits_cnn.h5", "--html", tmp_path / "page.html")
    found = Page.of(text)
    assert code == 0
    assert "fc1/kernel:0" in capsys.readouterr().out
    assert text.startswith("<!doctype html>")
    assert found.all("h2")[0].text.endswith("digits_cnn.h5")
    assert {"parts", "tensors", "size by tensor", "sparsity by tensor"} <= {one.text for one in found.all("h3")}
    labels = [one.attributes["aria-label"] for one in found.all("svg")]
    assert labels[:2] == ["size of 9 tensors, 39.2 kB in total", "conv1/kernel:0: 0.0 % of 72 weights are zero"]
    assert "sparsity of 4 prunable tensors" in {one.attributes.get("aria-label") for one in found.all("div")}


def test_nothing_is_fetched_and_only_its_own_style_and_script_are_allowed(tmp_path: Path) -> None:
    text = page(of_names(tmp_path, "a", "b"), "inspect", Units.SI)
    found = Page.of(text)
    assert "://" not in text.replace("http-equiv", "")
    assert not {"href", "src", "action", "style", "srcset"} & {key for one in found.elements for key in one.attributes}
    assert not [key for one in found.elements for key in one.attributes if key.startswith("on")]
    (style,), (script,) = found.all("style"), found.all("script")
    assert rules(found) == {
        "default-src": "'none'",
        "style-src": sha256(style.text),
        "script-src": sha256(script.text),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "prefers-color-scheme: dark" in style.text
    assert not re.search(r"@import|url\(", style.text)


def test_hostile_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    plain, hostile = of_names(tmp_path, "a"), of_names(tmp_path, HOSTILE)
    spoiled = replace(
        hostile,
        notes=(HOSTILE,),
        gates=(LimitCheck("max-raw", "raw", 1, 2, ok=False, model=HOSTILE),),
        sections=(
            *hostile.sections,
            Section(HOSTILE, ((HOSTILE, HOSTILE),), (Table(HOSTILE, (Column(HOSTILE),), ((HOSTILE,),)),), (HOSTILE,)),
            Section(HOSTILE, drawing=(HOSTILE,)),
        ),
    )
    for report in (hostile, spoiled):
        text = page(report, "inspect", Units.SI)
        found = Page.of(text)
        assert {one.name for one in found.elements} <= {
            one.name for one in Page.of(page(plain, "", Units.SI)).elements
        } | {*("p", "ul", "li", "pre", "dl", "dt", "dd")}
        assert len(found.all("script")) == 1
        assert not [key for one in found.elements for key in one.attributes if key.startswith("on")]
        assert "\x1b" not in text
        assert "\u202e" not in text
    cells = [one.text for one in found.all("td")]
    assert any(cell.startswith("</title></svg><script>alert(1)") for cell in cells)


def test_every_column_is_sorted_by_a_button_and_by_plain_numbers() -> None:
    table = Table(
        "sizes",
        (Column("model"), Column("size", Unit.BYTES), Column("zero", Unit.RATIO), Column("")),
        (("a", 2_000_000, 0.25, ""), ("b", 999, None, "x")),
        total=("all", 2_000_999, None, ""),
    )
    found = Page.of(page(Report(models=(), table=table), "size", Units.SI))
    heads = found.all("th")
    assert [head.attributes["aria-sort"] for head in heads] == ["none"] * 3
    assert [head.attributes["scope"] for head in heads] == ["col"] * 3
    assert [button.text for button in found.all("button")] == ["model", "size", "zero"]
    numbers = [one.attributes["data-v"] for one in found.all("td") if "data-v" in one.attributes]
    assert numbers == ["2000000", "0.25", "999", "", "2000999", ""]


def test_a_column_that_may_go_and_tells_nothing_is_not_on_the_page() -> None:
    columns = (Column("model"), Column("was", is_optional=True), Column("note", is_optional=True), Column("left"))
    table = Table("t", columns, (("a", "", "", ""), ("b", None, "x", "")))
    found = Page.of(page(Report(models=(), table=table), "diff", Units.SI))
    assert [button.text for button in found.all("button")] == ["model", "note", "left"]


def test_a_gate_that_says_no_is_on_the_page_too(tmp_path: Path) -> None:
    model = FIXTURES / "digits_cnn.h5"
    code, text = written("size", model, "--max-raw", "5kB", "--html", tmp_path / "page.html")
    assert code == 1
    assert "A limit is exceeded (exit code 1)" in text
    assert "over the limit of 5.00 kB (max-raw)" in text


def test_check_and_diff_have_a_page(tmp_path: Path) -> None:
    config = tmp_path / "prunectl.toml"
    (tmp_path / "m.h5").write_bytes((FIXTURES / "digits_cnn.h5").read_bytes())
    config.write_text('[[budget]]\npath = "m.h5"\nmax-raw = "5kB"\n')
    place = tmp_path / "page.html"
    code, text = written("check", "--config", config, "--json", "--html", place)
    assert code == 1
    assert [one.attributes["class"] for one in Page.of(text).all("td") if one.text == "FAIL"] == ["bad"]
    code, text = written("diff", FIXTURES / "digits_cnn.onnx", FIXTURES / "digits_cnn.pt", "--html", place)
    assert code == 0
    assert any("digits_cnn.pt -> " in one.text for one in Page.of(text).all("h2"))


def test_a_page_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path: Path) -> None:
    model, place = FIXTURES / "two_of_four_zero.safetensors", tmp_path / "page.html"
    assert written("size", model, "--html", place) == written("size", model, "--html", place)
    precious = tmp_path / "notes.html"
    precious.write_text("<p>mine")
    for path, said in (
        (precious, "is not a prunectl report"),
        (tmp_path, "is a folder"),
        (tmp_path / "a/b", "not a folder"),
    ):
        with pytest.raises(Exception, match=said):
            app.run(["size", str(model), "--html", str(path)])
    assert precious.read_text() == "<p>mine"


def test_a_page_is_refused_where_there_is_no_report(tmp_path: Path) -> None:
    for words in (["prune", "m.h5", "-s", "50%", "-o", "-"], ["check", "--report", "junit:-"]):
        with pytest.raises(Exception, match="standard output carries other data"):
            app.run([*words, "--html", str(tmp_path / "page.html")])


def test_five_hundred_layers_stay_under_a_megabyte(tmp_path: Path) -> None:
    names = [f"model.encoder.layers.{at}.self_attention.projection.weight" for at in range(500)]
    text = page(of_names(tmp_path, *names), "inspect", Units.SI)
    assert len(text.encode()) < 1_000_000
    assert len([one for one in Page.of(text).all("rect") if one.attributes["class"] == "bar"]) == 500


def test_a_treemap_fills_its_box_in_proportion_and_overlaps_nowhere() -> None:
    sizes = [500.0, 200.0, 100.0, 100.0, 50.0, 25.0, 20.0, 5.0]
    boxes = squarify(sizes, Box(0, 0, 80, 40))
    areas = [box.width * box.height for box in boxes]
    assert areas == pytest.approx([size / sum(sizes) * 3200 for size in sizes])
    held = np.zeros((400, 800), int)
    for box in boxes:
        left, right, top, bottom = (round(10 * at) for at in (box.x, box.x + box.width, box.y, box.y + box.height))
        held[top:bottom, left:right] += 1
    assert np.all(held == 1)


def trial(strategy: str, sparsity: float, value: float, size: int, *, is_front: bool = False) -> dict[str, Any]:
    """A model of a sweep, as reports have it."""
    point = {"strategy": strategy, "scope": "global" if strategy else "", "schedule": "", "pattern": "", "params": ""}
    point |= {"sparsity": sparsity, "metric": "accuracy", "value": value, "is_front": is_front}
    return {"point": point, "bytes": {"compressed": size}}


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([0.0, 1.0], [0, 0.5, 1]),
        ([0.8734, 0.9271], [0.88, 0.9, 0.92]),
        ([5_690, 37_041], [10_000, 20_000, 30_000]),
        ([0.5], [0.48, 0.49, 0.5, 0.51, 0.52]),
        ([-3.0, 12.0], [0, 5, 10]),
    ],
)
def test_the_marks_of_an_axis_are_round_and_within_it(values: list[float], marks: list[float]) -> None:
    scale = Scale.of(values, 0, 100)
    assert scale.marks == marks
    assert all(0 <= scale.position(mark) <= 100 for mark in scale.marks)


def test_the_points_of_a_sweep_are_coloured_by_strategy_and_the_front_is_labelled() -> None:
    models = [
        trial("", 0.0, 0.97, 37_000, is_front=True),
        trial("magnitude", 0.5, 0.95, 22_000),
        trial("lamp", 0.5, 0.96, 21_000, is_front=True),
        trial("magnitude", 0.9, 0.61, 5_700, is_front=True),
        trial("lamp", 0.9, 0.611, 5_701, is_front=True),
    ]
    picture = Page.of(pareto(models, Units.SI))
    texts = [element.text for element in picture.elements if element.name == "text"]
    assert {"unpruned", "magnitude global", "lamp global", "10.0 kB", "50.0 %"} <= set(texts)
    # Of two that lie on one another, one has a label.
    assert texts.count("90.0 %") == 1
    circles = [element.attributes["class"] for element in picture.elements if element.name == "circle"]
    assert circles.count("dot f0") == 1
    assert {"best f0", "best f1", "f0", "f1"} <= set(circles)
    assert [element.attributes["class"] for element in picture.elements if element.name == "path"].count("dense") == 1


def test_the_picture_is_first_and_the_end_tells_what_the_page_was_made_by(tmp_path: Path) -> None:
    words = ("prune", FIXTURES / "digits_cnn.onnx", "--dry-run", "-s", "50%", "--exclude", "fc 2*", "--html", "p.html")
    assert here(*words, cwd=tmp_path, SOURCE_DATE_EPOCH="86400").code == 2
    words = (*words[:5], "--exclude", "fc2*", "--html", "p.html")
    assert here(*words, cwd=tmp_path, SOURCE_DATE_EPOCH="86400").code == 0
    text = (tmp_path / "p.html").read_text()
    assert text.index("<svg") < text.index("<table")
    footer = text[text.index("<footer>") : text.index("</footer>")]
    assert "--dry-run -s 50% --exclude &#x27;fc2*&#x27; --html p.html</code>" in footer
    assert f"prunectl {__version__}, 1970-01-02" in footer
