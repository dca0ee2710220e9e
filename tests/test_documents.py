"""What the documents say is true: every command line in them runs, and every command has its section."""

from __future__ import annotations

import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from benchmarks.pictures import THEMES, calibration_tables, chart
from docs.site_hooks import lead_to_pictures
from prunectl.commands.app import COMMANDS
from prunectl.formats.registry import FORMATS
from tests.pruning.test_blocks import LLAMA, made, weights
from tests.running import FIXTURES, HANG_SECONDS, ROOT, Outcome, clean, here

pytestmark = pytest.mark.filterwarnings("ignore")  # as for a user: frameworks warn of themselves

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
README = PAGES["README.md"]
COVERAGE = PAGES["docs/coverage.md"]


def typed(text: str) -> list[str]:
    """Return the command lines in a text."""
    return [line.strip().removeprefix("$ ") for line in text.splitlines() if line.strip().startswith("$ prunectl")]


def links(page: str) -> list[tuple[str, str]]:
    """Return the files that a page links to, from the root, each with the section or an empty string."""
    found = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page])
    folder = posixpath.dirname(page)
    return [(posixpath.normpath(posixpath.join(folder, path)) if path else page, section) for path, section in found]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings in a text."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def outline(line: str) -> list[str]:
    """A command line without what may differ between two of the same: names of files, not their suffixes; numbers."""
    words = shlex.split(line)
    found = []
    for at, word in enumerate(words):
        name = re.split("[?:]", word)[0]
        is_path = Path(name).suffix or at == words.index("prunectl") + 2 or words[at - 1] == "-o"
        found.append(Path(name).suffix if is_path else word if word.startswith("--") else re.sub(r"\d+", "#", word))
    return found


def run(line: str, folder: Path) -> Outcome:
    """Run a line: here, and where something is redirected in a shell that finds our prunectl."""
    words = shlex.split(line)
    if words[1] == "bench":
        words += ["--seconds", "0.1"]
    if not {"<", ">"} & set(words):
        return here(*words[1:], cwd=folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder, env=clean(PATH=path), capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def few(folder: Path, *names: str) -> None:
    """Write a few of the digits: how long training takes is not what these tests ask.

    Five batches of 32, of which `--val-split 20%` takes one: TensorFlow would trace a batch of another size once more.
    """
    digits = np.load(FIXTURES / "digits.npz")
    for name in names:
        np.savez(folder / name, **{key: digits[key][:160] for key in digits.files})


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("page", sorted(page for page, text in PAGES.items() if typed(text) and page != "README.md"))
def test_every_command_line_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path / "fixtures", ignore=shutil.ignore_patterns("make.py", "__pycache__"))
    few(tmp_path, "fixtures/digits.npz")
    for line in typed(PAGES[page]):
        done = run(line, tmp_path)
        assert done.code == 0, (line, done.err)


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_example_in_the_help_runs(command: str, tmp_path: Path) -> None:
    for suffix in (".h5", ".pt", ".onnx", ".keras"):
        shutil.copy(FIXTURES / f"digits_cnn{suffix}", tmp_path / f"model{suffix}")
    shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / "sparse.h5")
    if command in {"size", "eval", "bench"}:
        suffix = ".onnx" if command == "bench" else ".h5"
        here("prune", tmp_path / f"model{suffix}", "-o", tmp_path / f"small{suffix}", "-s", "80%")
    shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "net.pt")
    (tmp_path / "net.py").write_text((FIXTURES / "digits_torch.py").read_text().replace("DigitsCNN", "Net"))
    few(tmp_path, "train.npz", "test.npz")
    lines = typed(here(*filter(None, [command, "--help"]), COLUMNS="200").out)
    assert lines
    run_elsewhere = [outline(line) for text in PAGES.values() for line in typed(text)]
    for line in lines:
        if outline(line) in run_elsewhere:  # and no other example needs what it writes
            continue
        done = run(line, tmp_path)
        assert done.code == 0, (line, done.err)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_section_on_one_page(command: str) -> None:
    assert [f"\n## {command}\n" in text for text in PAGES.values()].count(True) == 1


def test_the_readme_can_be_skimmed() -> None:
    assert len(README.split()) <= 1500
    assert not [line for line in README.splitlines() if len(line) > 200 and not line.startswith("|")]


RECIPES = [
    re.findall(r"`(prunectl [^`]+)`", line)
    for line in README.partition("\n## I have")[2].partition("\n## ")[0].splitlines()
]


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize(
    "lines", [lines for lines in RECIPES if lines], ids=lambda lines: " ".join(lines[0].split()[:2])
)
def test_every_recipe_of_the_readme_runs(lines: list[str], tmp_path: Path) -> None:
    run_elsewhere = [outline(line) for line in typed(PAGES["docs/recipes.md"])]
    if all(outline(line) in run_elsewhere for line in lines):
        return
    for suffix in (".h5", ".keras", ".onnx"):
        shutil.copy(FIXTURES / f"digits_cnn{suffix}", tmp_path / f"model{suffix}")
    shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "resnet.pt")
    shutil.copy(FIXTURES / "checkpoint_with_optimizer.pt", tmp_path / "checkpoint.pt")
    (tmp_path / "net.py").write_text((FIXTURES / "digits_torch.py").read_text().replace("DigitsCNN", "Net"))
    made(tmp_path / "llama", LLAMA, weights({"model.layers": 6}), shards=2)
    if any("checkpoint-1000" in line for line in lines):
        dcp.save(
            {"model": torch.nn.Linear(8, 4).state_dict()}, checkpoint_id=tmp_path / "checkpoint-1000", no_dist=True
        )
    (tmp_path / "models").mkdir()
    shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / "models")
    few(tmp_path, "train.npz", "test.npz")
    if "sparse.onnx model.onnx" in lines[0]:
        here("prune", "model.onnx", "-o", "sparse.onnx", "-s", "50%", cwd=tmp_path)
    for line in lines:
        if "--on ray" in line:  # tests/sweeping/test_on_ray.py runs it, where Ray is
            continue
        done = run(line.replace("3,224,224", "1,8,8"), tmp_path)
        assert done.code == 0, (line, done.err)


def told(text: str) -> set[str]:
    """Return the lines of an output, without what depends on data and processor: numbers, and stars of the best."""
    bare = (re.sub(r"[\d.,]+", "#", line).replace("*", "") for line in text.splitlines())
    return {" ".join(line.split()) for line in bare}


@pytest.mark.usefixtures("trials_here")
def test_what_the_readme_shows_is_what_is_printed(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path)
    few(tmp_path, "digits.npz")
    (tour,) = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    for block in tour.split("$ ")[1:]:
        line, _, shown = block.partition("\n")
        words = [*shlex.split(line)[1:], "--format", "human"]
        done = here(*words, cwd=tmp_path, COLUMNS="94")
        assert done.code == 0, (line, done.err)
        assert told(shown) - {"…", ""} <= told(done.out)


def test_the_tour_of_the_readme_is_the_demo() -> None:
    demo = (ROOT / "examples/demo.sh").read_text().replace('"$data"', "'digits.npz?norm=/16'")
    for line in typed(README):
        assert f"show {line.removeprefix('prunectl ')}\n" in demo


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_has_the_numbers_of_its_tables(theme: str) -> None:
    assert (ROOT / f"docs/pictures/accuracy-{theme}.svg").read_text() == chart(THEMES[theme])
    assert {name: len(table) for name, table in calibration_tables().items()} == {
        "Small transformer, words of Python source": 12,
        "CNN, Fashion-MNIST": 12,
        "Multilayer perceptron, Fashion-MNIST": 12,
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_shows_the_tour_and_fetches_nothing(theme: str) -> None:
    picture = (ROOT / f"docs/pictures/terminal-{theme}.svg").read_text()
    svg = ET.fromstring(picture)
    shown = "".join(svg.itertext()).replace("\xa0", " ")
    for words in (
        "sweep digits_cnn.onnx -o trials",
        "prune digits_cnn.onnx -o small.onnx",
        "0.9814",
        "37.0 kB",
        "9.79 kB",
    ):
        assert words in shown
        assert words in README
    assert not re.search(r"url\(\W*http|<image|<script|@font-face", picture)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_of_a_page_leads_to_what_is_there(page: str) -> None:
    for target, section in links(page):
        assert (ROOT / target).exists(), target
        if section:
            assert section in anchors(PAGES[target]), (target, section)


def test_a_page_of_the_site_finds_its_pictures_from_its_own_folder() -> None:
    picture = '<img src="pictures/accuracy-light.svg">'
    assert lead_to_pictures(picture, "figures/") == picture.replace("pictures/", "../pictures/")
    assert lead_to_pictures(picture, "") == picture
    with pytest.raises(FileNotFoundError, match=r"docs/pictures/gone\.svg"):
        lead_to_pictures('<img src="pictures/gone.svg">', "")


def test_every_guide_and_every_command_is_in_the_navigation_of_the_site() -> None:
    navigation = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    guides = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert guides | {f"commands/{command}.md" for command in COMMANDS} <= navigation


def test_every_suffix_that_is_recognised_is_in_the_readme() -> None:
    for row in FORMATS:
        for suffix in row.suffixes:
            assert suffix in README


def test_every_test_that_the_coverage_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", COVERAGE)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), (file, test)


def test_every_fixture_is_described() -> None:
    described = (FIXTURES / "README.md").read_text()
    for path in FIXTURES.iterdir():
        if not path.name.startswith(("digits_cnn", "__")) and path.suffix not in {".py", ".md"}:
            assert path.name in described


def test_every_key_of_an_export_and_of_an_inspection_is_in_the_page_on_json(tmp_path: Path) -> None:
    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    runs = (
        ("export", FIXTURES / "digits_cnn.onnx", "-o", "half.onnx", "--half"),
        ("export", FIXTURES / "digits_cnn.safetensors", "-o", "weights.npz"),
        ("inspect", FIXTURES / "two_of_four_zero.safetensors", "--pattern", "2:4"),
    )
    told = set(re.findall(r"\w+", PAGES["docs/json.md"]))
    for words in runs:
        done = here(*words, "--json", cwd=tmp_path)
        assert keys(done.json) <= told
