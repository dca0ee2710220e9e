"""A fragment for make names every file that was read, whatever it is called."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from prunectl.commands import _depfile as depfile
from prunectl.commands._depfile import make_escaped, make_rule
from prunectl.commands.app import COMMANDS
from prunectl.errors import UsageError
from tests.checks.checking import MODEL, prunectl
from tests.fits.building import written
from tests.running import FIXTURES

ODD = "a b$c#d=e:f*g?h[i]&j'k(l)~m,n"


def made(folder: Path, *words: str | Path) -> list[str]:
    """Run a command with --depfile, and return the fragment line by line."""
    (folder / "out.d").unlink(missing_ok=True)
    found = prunectl(folder, *words, "--depfile", "out.d")
    assert found.code == 0, found.err
    return (folder / "out.d").read_text().splitlines()


def test_a_fragment_names_the_output_and_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    for words in (["prune", "-s", "0.8"], ["strip"], ["export"]):
        out = "b.npz" if words == ["export"] else "b.safetensors"
        lines = made(tmp_path, *words, "a.safetensors", "-o", out, "--force")
        # The model itself has no rule: make says so where it is missing.
        assert lines == [f"{out}: a.safetensors"]


def test_every_file_that_the_words_name_is_a_prerequisite(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "mine.py").write_text("import helper\nscore = helper.score\n")
    (tmp_path / "helper.py").write_text("import numpy as np\ndef score(weights):\n    return np.abs(weights)\n")
    words = ("prune", "a.safetensors", "-s", "0.8", "--strategy", "./mine.py:score", "--manifest", "m.json", "-o")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        first, *rules = made(tmp_path, *words, "b.safetensors")
    assert first == "b.safetensors: a.safetensors mine.py helper.py"
    assert [rule for rule in rules if rule] == ["mine.py:", "helper.py:"]
    first, *_ = made(tmp_path, "prune", "a.safetensors", "--recipe", "m.json", "--trust", "-o", "c.safetensors")
    assert first == "c.safetensors: a.safetensors m.json mine.py"


@pytest.mark.parametrize("name", ["digits_cnn_savedmodel", "two_shards/model.safetensors.index.json"])
def test_a_model_of_many_files_is_all_of_them(name: str, tmp_path: Path) -> None:
    whole = name.partition("/")[0]
    shutil.copytree(FIXTURES / whole, tmp_path / whole)
    first, *_ = made(tmp_path, "prune", name, "-s", "0.8", "-o", "out")
    assert sorted(first.removeprefix("out: ").split()) == written(tmp_path / whole, tmp_path)


def test_examples_lie_in_the_files_that_a_spec_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.npy", "y.npy", "t.npz", "t.csv", "1.tfrecord", "2.tfrecord", "f.json", "d.py"):
        (tmp_path / name).touch()
    for name in ("images/cat/1.png", "images/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    meant = {
        "x.npy,y.npy": ["x.npy", "y.npy"],
        "t.npz[a+b,c]?limit=3": ["t.npz"],
        "t.csv?target=label": ["t.csv"],
        "*.tfrecord?schema=f.json": ["1.tfrecord", "2.tfrecord", "f.json"],
        "images/?size=8x8": ["images/cat/1.png", "images/dog/2.png"],
        "./d.py:load": ["d.py"],
        "package.module:load": [],
        "random:64": [],
    }
    assert {text: list(map(str, depfile.of_spec(text))) for text in meant} == meant
    assert list(filter(depfile.is_callable_spec, meant)) == ["./d.py:load", "package.module:load"]
    # A picture that is added or gone changes its folder.
    folders = depfile.folders_of({"data": "images/", "val": "t.npz"})
    assert sorted(map(str, folders)) == ["images", "images/cat", "images/dog"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_reads_odd_names_as_they_are(tmp_path: Path) -> None:
    names = [f"main {ODD}", f"other {ODD}", ODD]
    for name in (*names, ODD + ".out"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / "out.d").write_text(make_rule(f"{ODD}.out", names, main=names[0]))
    target = make_escaped(f"{ODD}.out")
    (tmp_path / "Makefile").write_text(f"include out.d\n{target}:\n\t@echo built\n")

    def make() -> str:
        # A make around these tests would have this one tell the folders that it enters.
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True, env=own)
        assert not done.stderr
        return "built" if done.stdout == "built\n" else ""

    for changed in names:
        for name in names:
            os.utime(tmp_path / name, (1, 1))
        assert make() == ""
        os.utime(tmp_path / changed, (2000, 2000))
        assert make() == "built"
    # What is gone is no error: the run itself says what it needs.
    (tmp_path / names[1]).unlink()
    assert make() == "built"


@pytest.mark.parametrize("name", ["a;b", "a|b", "a%b", "a\\b", "a\nb", "~a", "a ", "a&"])
def test_what_make_cannot_write_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    with pytest.raises(UsageError, match="a makefile cannot contain"):
        make_escaped(name)
    if not name.startswith("~"):
        words = ("prune", "a.safetensors", "-s", "0.8", "-o", name, "--depfile", "out.d")
        assert prunectl(tmp_path, *words).code == 2
        assert written(tmp_path, tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "-"],
        ["--in-place"],
        ["-o", "b.npz", "--dry-run"],
        [],
        ["-o", "b.npz", "--depfile", "no/out.d"],
        ["-o", "b.npz", "--depfile", "a.safetensors"],
        ["-o", "b.npz", "--depfile", "other.safetensors"],
        ["-o", "b.npz", "--depfile", "b.npz"],
        ["-o", "b.npz", "--depfile", "."],
        ["-o", "b.npz", "--depfile", "-"],
        ["-o", "b.safetensors", "--depfile", "/proc/out.d"],
    ],
)
def test_what_makes_no_file_of_files_is_refused(words: list[str], tmp_path: Path) -> None:
    for name in ("a.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(MODEL)
    found = prunectl(tmp_path, "prune", "a.safetensors", "-s", "0.8", "--depfile", "out.d", *words)
    # As for every output: a folder that takes no files is no fault of the words.
    assert found.code == (5 if "/proc/out.d" in words else 2)
    assert found.err.startswith("error: ")
    assert written(tmp_path, tmp_path) == ["a.safetensors", "other.safetensors"]
    assert (tmp_path / "other.safetensors").read_bytes() == MODEL


def test_folders_of_classes_may_be_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    for name in ("elsewhere/1.png", "elsewhere/.2.png", "elsewhere/notes.txt", "elsewhere/deeper/3.png"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/gone").symlink_to(tmp_path / "nowhere")
    # As far down as pictures are looked for, which ends every loop.
    assert list(map(str, depfile.of_spec("images"))) == ["images/cat/1.png"]
    folders = depfile.folders_of({"data": "images/"})
    assert list(map(str, folders)) == ["images", "images/cat", "images/loop"]


def test_what_only_a_recipe_names_is_a_prerequisite(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    for name in ("images/cat/1.png", "images/dog/2.png", "net.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    recipe = {"request": {"data": "images/", "model": "./net.py:Net", "strategy": "fits_found:score"}}
    (tmp_path / "m.json").write_text(json.dumps(recipe))
    with contextlib.chdir(tmp_path):
        typed = {"model": "a.safetensors", "recipe": Path("m.json"), "data": "", "build": ""}
        words = typed | depfile.options_of_recipe(Path("m.json"), is_trusted=True)
        found = [*depfile.files_of(words), *depfile.folders_of(words)]
    pictures = ["images/cat/1.png", "images/dog/2.png"]
    folders = ["images", "images/cat", "images/dog"]
    assert sorted(map(str, found)) == sorted(["a.safetensors", "m.json", "net.py", *pictures, *folders])
    assert "fits_found" in depfile._packages(words)


def test_a_module_that_the_run_wrote_for_itself_is_no_prerequisite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "fits_own.py").touch()
    (tmp_path / "mine.py").write_text(
        "import pathlib, runpy, time, fits_own\n"
        "time.sleep(0.05)\n"
        "pathlib.Path('__fits_generated.py').write_text('import numpy as np')\n"
        "pathlib.Path('__fits_gone.py').touch()\n"
        "import __fits_generated, __fits_gone\n"
        "pathlib.Path('__fits_gone.py').unlink()\n"
        "score = __fits_generated.np.abs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("prune", "a.safetensors", "-s", "0.8", "--strategy", "./mine.py:score", "-o", "b.safetensors")
    # The project lies where such modules are written, and its own stay.
    assert made(tmp_path, *words)[0] == "b.safetensors: a.safetensors mine.py fits_own.py"


@pytest.mark.parametrize(
    "content",
    [
        "import torch\n",
        "all: b.safetensors\n",
        "b.safetensors: a.safetensors\n\tprunectl prune $< -o $@\n",
        "b.safetensors: a.safetensors\n\nother:\n",
    ],
)
def test_a_depfile_takes_the_place_of_nothing_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "Makefile").write_text(content)
    words = ("prune", "a.safetensors", "-s", "0.8", "-o", "b.safetensors", "--depfile", "Makefile")
    found = prunectl(tmp_path, *words)
    assert (found.code, "is not a depfile of b.safetensors" in found.err) == (2, True)
    assert (tmp_path / "Makefile").read_text() == content
    assert not (tmp_path / "b.safetensors").exists()


def test_a_fragment_and_an_empty_file_are_replaced(tmp_path: Path) -> None:
    model, out = f"a {ODD}.safetensors", f"b {ODD}.safetensors"
    (tmp_path / model).write_bytes(MODEL)
    (tmp_path / "mine=.py").write_text("import numpy as np\nscore = np.abs\n")
    (tmp_path / "out.d").touch()
    words = ("prune", model, "-s", "0.8", "-o", out, "--depfile", "out.d", "--force")
    before = ""
    for more in ((), ("--strategy", "./mine=.py:score"), ()):
        assert prunectl(tmp_path, *words, *more).code == 0
        after = (tmp_path / "out.d").read_text()
        assert after != before
        before = after


def test_a_run_that_fails_leaves_no_fragment(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    words = ("prune", "a.safetensors", "-s", "0.8", "--layers", "nothing", "-o", "b.safetensors", "--depfile", "out.d")
    assert prunectl(tmp_path, *words).code == 2
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert prunectl(tmp_path, "strip", "x.npy", "-o", "b.safetensors", "--depfile", "out.d").code == 3
    assert written(tmp_path, tmp_path) == ["a.safetensors", "x.npy"]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in {"prune", "strip", "finetune", "export"}])
def test_commands_that_make_nothing_of_a_model_do_not_know_the_options(command: str, tmp_path: Path) -> None:
    for option in (["--depfile", "out.d"], ["--if-changed"]):
        assert f"{command} has no option" in prunectl(tmp_path, command, *option).err
