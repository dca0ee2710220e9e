"""Nothing is done where the output is what the same words would make of the same files."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from prunectl import __version__
from prunectl.commands import _build as build
from prunectl.commands import _depfile as depfile
from prunectl.commands._build import check_unmodified
from prunectl.commands._requests import BuildCommand
from prunectl.commands.app import COMMANDS
from prunectl.commands.export import Export
from prunectl.commands.finetune import Finetune
from prunectl.errors import UsageError
from tests.checks.checking import MODEL, prunectl
from tests.fits.building import written
from tests.running import FIXTURES, Outcome

OUT = "b.safetensors"
WORDS = ("prune", "a.safetensors", "-o", OUT, "--if-changed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model that was pruned by half."""
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    found = prunectl(tmp_path, *WORDS, "-s", "0.5")
    assert (found.code, written(tmp_path, tmp_path)) == (0, [f".{OUT}.prunectl", "a.safetensors", OUT])
    return tmp_path


def age(path: Path) -> int:
    return path.stat().st_mtime_ns


def reason(found: Outcome) -> str:
    """Return why an output was made again, from the note that says so."""
    head = f"{OUT} is rebuilt: "
    return next((line.removeprefix(head) for line in found.err.splitlines() if line.startswith(head)), "")


def test_the_same_words_over_the_same_files_do_nothing(folder: Path) -> None:
    before = age(folder / OUT)
    found = prunectl(folder, *WORDS, "-s", "0.5", "--json")
    assert (found.code, found.json["up_to_date"], found.json["artifacts"][0]["path"]) == (0, True, OUT)
    assert prunectl(folder, *WORDS, "-s", "0.5").err == f"note: {OUT} is up to date.\n"
    assert prunectl(folder, *WORDS, "-s", "0.5", "-q", "--force") == Outcome(0, "", "")
    # Only what is in the files counts, and not how they are called from where.
    (folder / "a.safetensors").write_bytes(MODEL)
    path = folder / "a.safetensors"
    elsewhere = prunectl(folder.parent, "prune", path, "-o", folder / OUT, "--if-changed", "-s", "0.5")
    assert "is up to date" in elsewhere.err
    assert age(folder / OUT) == before


def test_what_has_changed_is_said_and_what_prunectl_wrote_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prunectl(folder, *WORDS, "-s", "0.75")
    assert (found.code, reason(found)) == (0, "--sparsity has changed")
    (folder / "a.safetensors").write_bytes((folder / OUT).read_bytes())
    found = prunectl(folder, *WORDS, "-s", "0.75")
    assert (found.code, reason(found)) == (0, "a.safetensors has changed")
    (folder / OUT).unlink()
    found = prunectl(folder, *WORDS, "-s", "0.75")
    assert (found.code, reason(found)) == (0, f"{OUT} is missing")
    assert reason(prunectl(folder, "strip", *WORDS[1:])) == "it was written by prunectl prune"
    assert prunectl(folder, "strip", *WORDS[1:]).err == f"note: {OUT} is up to date.\n"
    monkeypatch.setattr(build, "__version__", "9.9")
    assert reason(prunectl(folder, "strip", *WORDS[1:])) == f"it was written by prunectl {__version__}"


def test_what_somebody_else_wrote_is_noticed_and_stays(folder: Path) -> None:
    (folder / OUT).write_text("a thing of value")
    found = prunectl(folder, *WORDS, "-s", "0.5")
    assert (found.code, found.err.splitlines()[0]) == (2, f"error: {OUT} has changed since prunectl wrote it")
    assert (folder / OUT).read_text() == "a thing of value"
    assert prunectl(folder, *WORDS, "-s", "0.5", "--force").code == 0
    assert (folder / OUT).stat().st_size == len(MODEL)


@pytest.mark.parametrize("stamp", [None, "", "[]", '{"schema": "prunectl.stamp/1"}', '{"schema": "other/1"}'])
def test_without_a_stamp_nothing_is_known(stamp: str | None, folder: Path) -> None:
    place = build.stamp_path(folder / OUT)
    place.unlink()
    if stamp is not None:
        place.write_text(stamp)
    assert prunectl(folder, *WORDS, "-s", "0.5").code == 2
    before = age(folder / OUT)
    assert prunectl(folder, *WORDS, "-s", "0.5", "--force").code == 0
    assert age(folder / OUT) != before
    assert "is up to date" in prunectl(folder, *WORDS, "-s", "0.5").err


def test_a_stamp_says_readably_what_an_output_was_made_of(folder: Path) -> None:
    said = json.loads((folder / f".{OUT}.prunectl").read_text())
    assert (said["command"], said["asked"]["sparsity"], list(said["read"])) == ("prune", "0.5", ["a.safetensors"])


def test_a_run_that_fails_leaves_the_stamp_of_the_run_before(folder: Path) -> None:
    assert prunectl(folder, *WORDS, "-s", "0.5", "--layers", "nothing").code == 2
    assert "is up to date" in prunectl(folder, *WORDS, "-s", "0.5").err


def test_what_is_written_beside_counts_as_well(folder: Path) -> None:
    words = (*WORDS, "-s", "0.5", "--manifest", "m.json", "--depfile", "b.d")
    assert prunectl(folder, *words, "--html", "page.html").code == 0
    (folder / "b.d").unlink()
    page = age(folder / "page.html")
    assert "is up to date" in prunectl(folder, *words, "--html", "page.html").err
    assert (folder / "b.d").read_text() == f"{OUT}: a.safetensors\n"
    assert age(folder / "page.html") == page
    (folder / "m.json").unlink()
    assert reason(prunectl(folder, *words, "--html", "page.html")) == "m.json is missing"
    assert (folder / "m.json").exists()


def test_code_of_the_users_counts_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "fits_scores.py").write_text("import fits_helper\nscore = fits_helper.score\n")
    (folder / "fits_helper.py").write_text("import numpy as np\ndef score(weights):\n    return np.abs(weights)\n")
    words = (*WORDS, "-s", "0.5", "--strategy", "fits_scores:score")
    assert reason(prunectl(folder, *words)) == "--strategy has changed"
    assert "is up to date" in prunectl(folder, *words).err
    (folder / "fits_helper.py").write_text("import numpy as np\ndef score(weights):\n    return -np.abs(weights)\n")
    assert reason(prunectl(folder, *words)) == "fits_helper.py has changed"


def test_what_was_changed_by_hand_beside_the_output_stays(folder: Path) -> None:
    words = (*WORDS, "-s", "0.5", "--manifest", "m.json")
    assert prunectl(folder, *words).code == 0
    # Also where the output itself is gone, or could be replaced.
    for is_gone in (False, True):
        edited = (folder / "m.json").read_text().replace("}", "} ")
        (folder / "m.json").write_text(edited)
        if is_gone:
            (folder / OUT).unlink()
        found = prunectl(folder, *words)
        assert (found.code, found.err.splitlines()[0]) == (2, "error: m.json has changed since prunectl wrote it")
        assert (folder / "m.json").read_text() == edited
        assert (folder / OUT).exists() is not is_gone
        assert prunectl(folder, *words, "--force").code == 0


def test_what_somebody_put_where_a_file_will_go_stays(folder: Path) -> None:
    (folder / "m.json").write_text('{"schema": "prunectl.manifest/1"}')
    found = prunectl(folder, *WORDS, "-s", "0.75", "--manifest", "m.json")
    assert (found.code, found.err.splitlines()[0]) == (2, f"error: m.json was not written with {OUT}")
    assert (folder / "m.json").stat().st_size == 33


def test_the_shard_that_was_changed_is_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "two_shards", tmp_path / "in")
    (tmp_path / "out").mkdir()
    index = "model.safetensors.index.json"
    words = ("prune", f"in/{index}", "-o", f"out/{index}", "-s", "0.5", "--if-changed")
    assert prunectl(tmp_path, *words).code == 0
    shard = max((tmp_path / "out").glob("*.safetensors"))
    shard.write_bytes(b"mine")
    for is_gone in (False, True):
        if is_gone:
            (tmp_path / "out" / index).unlink()
        found = prunectl(tmp_path, *words)
        said = f"error: out/{shard.name} has changed since prunectl wrote it"
        assert (found.code, found.err.splitlines()[0]) == (2, said)
        assert shard.read_bytes() == b"mine"


def test_an_output_folder_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "far/away/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("far/away/out")
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "fits_linked.py").write_text("import numpy as np\nscore = np.abs\n")
    words = ("prune", "a.safetensors", "-o", f"out/{OUT}", "-s", "0.5", "--strategy", "fits_linked:score")
    assert prunectl(tmp_path, *words, "--if-changed", "--depfile", "b.d").code == 0
    assert prunectl(tmp_path, *words, "--if-changed").err == f"note: out/{OUT} is up to date.\n"
    (tmp_path / "fits_linked.py").write_text("import numpy as np\nscore = np.square\n")
    found = prunectl(tmp_path, *words, "--if-changed")
    assert (found.code, "fits_linked.py has changed" in found.err) == (0, True)


def test_pictures_behind_links_count(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real/1.png").write_bytes(b"one")
    (folder / "images").mkdir()
    (folder / "images/cat").symlink_to("../real")
    options = Finetune(model=str(folder / "a.safetensors"), output=str(folder / OUT), data=f"{folder}/images/")
    before = build.BuildStep.of("finetune", options, vars(options), None).digests
    (folder / "real/1.png").write_bytes(b"two")
    assert build.BuildStep.of("finetune", options, vars(options), None).digests != before


def test_a_recipe_with_data_from_a_function_cannot_be_known(folder: Path) -> None:
    (folder / "d.py").write_text("def load():\n    return None\n")
    (folder / "m.json").write_text(json.dumps({"request": {"data": "./d.py:load"}}))
    found = prunectl(folder, *WORDS, "--recipe", "m.json", "--trust")
    assert (found.code, found.err.splitlines()[0]) == (
        2,
        "error: --if-changed cannot tell whether the data of ./d.py:load changed",
    )


def test_what_cannot_be_written_afterwards_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(depfile.atomic, "write_text", full)
    found = prunectl(folder, *WORDS, "-s", "0.75", "--depfile", "b.d", "--json")
    assert (found.code, found.json["exit_code"], found.json["error"]) == (0, 0, None)
    assert found.json["warnings"][-2:] == [
        "b.d could not be written, so make does not know the dependencies: no space left on the disk",
        (
            f".{OUT}.prunectl could not be written, so the next run needs --force to replace {OUT}: "
            "no space left on the disk"
        ),
    ]
    assert not (folder / "b.d").exists()
    monkeypatch.undo()
    assert prunectl(folder, *WORDS, "-s", "0.75").code == 2
    assert prunectl(folder, *WORDS, "-s", "0.75", "--force").code == 0


def test_a_stamp_without_a_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / f".{OUT}.prunectl").mkdir()
    found = prunectl(tmp_path, *WORDS, "-s", "0.5", "--json")
    assert (found.code, found.json["error"]["kind"]) == (2, "usage")
    assert written(tmp_path, tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("content", ["{}", '{"schema": "other"}', "[]", "all: b.h5\n"])
def test_a_manifest_takes_the_place_of_nothing_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    (tmp_path / "m.json").write_text(content)
    words = ("prune", "a.safetensors", "-s", "0.5", "--manifest", "m.json", "-o")
    found = prunectl(tmp_path, *words, OUT)
    assert (found.code, found.err.splitlines()[0]) == (2, "error: m.json exists and is not a prunectl manifest")
    assert (written(tmp_path, tmp_path), (tmp_path / "m.json").read_text()) == (["a.safetensors", "m.json"], content)
    assert prunectl(tmp_path, *words, OUT, "--dry-run").code == 0
    assert prunectl(tmp_path, *words, OUT, "--force").code == 0
    # A manifest of ours is replaced.
    assert prunectl(tmp_path, *words, "c.safetensors").code == 0


@pytest.mark.parametrize("place", ["a.safetensors", OUT, ".", "no/m.json"])
def test_a_manifest_without_a_place_is_refused_before_any_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(MODEL)
    words = ("prune", "a.safetensors", "-s", "0.5", "-o", OUT, "--force", "--manifest", place)
    assert prunectl(tmp_path, *words).code == 2
    assert (written(tmp_path, tmp_path), (tmp_path / "a.safetensors").read_bytes()) == (["a.safetensors"], MODEL)


def test_every_file_of_a_folder_counts(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "digits_cnn_savedmodel", tmp_path / "model")
    words = ("prune", "model", "-o", "out", "-s", "0.5", "--if-changed")
    assert prunectl(tmp_path, *words).code == 0
    assert prunectl(tmp_path, *words).err == "note: out is up to date.\n"
    (tmp_path / "out" / "assets").mkdir(exist_ok=True)
    (tmp_path / "out" / "assets" / "words.txt").write_text("one more")
    found = prunectl(tmp_path, *words)
    assert (found.code, found.err.splitlines()[0]) == (2, "error: out/assets/words.txt was not written with out")
    assert (tmp_path / "out" / "assets" / "words.txt").exists()


def test_every_option_that_names_a_file_is_known_to_be_read_or_written() -> None:
    written_or_kept = {"output", "html", "depfile", "manifest", "card", "checkpoint_dir", "logdir", "tried"}
    known = {*written_or_kept, *depfile.FILES, *depfile.CALLABLE_OPTIONS, *depfile.MODELS, "model"}
    for name in ("prune", "strip", "finetune", "export"):
        command = importlib.import_module(COMMANDS[name][0]).command
        assert isinstance(command, BuildCommand)
        for param in command.params:
            if "path" in str(param.type.name) or param.metavar in {"SPEC", "TEACHER", "FILE", "DIR", "MODEL"}:
                assert param.name in known, (name, param.name)


def test_the_class_that_comes_with_weights_counts_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.b.py").touch()
    (tmp_path / "a_b.py").touch()
    (tmp_path / "a-b.py").touch()
    output = tmp_path / "a-b.pt"
    assert build._generated_class(output, {"code": True}) == (tmp_path / "a_b.py",)
    assert build._generated_class(output, {"pattern": "channel"}) == (tmp_path / "a_b.py",)
    assert build._generated_class(output, {"pattern": "2:4"}) == ()


def test_a_class_that_was_changed_by_hand_stays(folder: Path) -> None:
    options = Export(model=str(folder / "a.safetensors"), output=str(folder / "w.pt"), code=True)
    run = build.BuildStep.of("export", options, vars(options), None)
    (folder / "w.pt").write_bytes(b"weights")
    (folder / "w.py").write_text("class Net: ...")
    stamp = run.stamp({})
    check_unmodified(run, stamp)
    (folder / "w.py").write_text("class Mine: ...")
    with pytest.raises(UsageError, match=r"w\.py has changed since prunectl wrote it"):
        check_unmodified(run, stamp)


def test_what_data_a_function_gives_cannot_be_known(folder: Path) -> None:
    (folder / "d.py").write_text("def load():\n    return None\n")
    words = ("finetune", "a.safetensors", "-o", OUT, "--data", "./d.py:load", "--if-changed")
    found = prunectl(folder, *words)
    assert (found.code, found.err.splitlines()[0]) == (
        2,
        "error: --if-changed cannot tell whether the data of ./d.py:load changed",
    )
