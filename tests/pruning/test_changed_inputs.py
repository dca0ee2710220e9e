"""A file that somebody writes while prunectl works with it: nothing is made of a part of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl.calibration import prune as calibrated
from prunectl.channels import prune as channels
from prunectl.errors import InputError
from prunectl.formats import safetensors as shards
from prunectl.formats import zip_read
from prunectl.formats.extents import file_states, unchanged
from prunectl.formats.registry import open_model
from prunectl.formats.tensorflow import model as tensorflow
from prunectl.pruning import prune as plain
from prunectl.pruning import strip
from prunectl.training import finetune as training
from prunectl.training.wrap import prune as wrapping
from tests.formats.test_distributed import own
from tests.formats.test_zero import save as save_zero
from tests.running import FIXTURES, here

__all__ = ["own"]
DATA = ("-s", "60%", "--data", f"{FIXTURES / 'digits.npz'}?norm=/16")
WANDA = ("--strategy", "activation-magnitude")

Change = Callable[[Path], None]


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def after(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, change: Callable[[], object]) -> None:
    """Have something done each time when a function of a module is through."""
    function = getattr(module, name)

    def late(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        change()
        return result

    monkeypatch.setattr(module, name, late)


CASES: dict[str, tuple[str, ModuleType, str, tuple[str, ...]]] = {
    "plain, when it is planned": ("digits_cnn.onnx", plain.planning, "select_tensors", ("-s", "50%")),
    "by data, before it runs": ("digits_cnn.onnx", calibrated, "open_calibration", (*DATA, *WANDA)),
    "by data, once it ran": ("digits_cnn.onnx", calibrated, "with_data_scores", (*DATA, *WANDA)),
    "reconstructed": ("digits_cnn.onnx", calibrated, "open_calibration", (*DATA, "--strategy", "obs")),
    "channels, when they are traced": ("digits_cnn.onnx", channels, "propagate", ("-s", "30%", "--pattern", "channel")),
    "channels, when they are cut": ("digits_cnn.onnx", channels, "verify", ("-s", "30%", "--pattern", "channel")),
    "wrapped": ("digits_cnn.pt", wrapping, "wrap", ("-s", "50%", "--wrap")),
}


@pytest.mark.parametrize("output", [("-o", "out{}"), ("--in-place",), ("--dry-run",)])
@pytest.mark.parametrize("case", CASES)
def test_however_it_is_pruned_a_change_since_it_was_opened_is_told(
    tmp_path: Path, case: str, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture, module, name, words = CASES[case]
    path = tmp_path / fixture
    shutil.copy(FIXTURES / fixture, path)
    before = path.read_bytes()
    after(monkeypatch, module, name, lambda: touch(path))
    done = here("prune", fixture, *words, *(word.format(path.suffix) for word in output), cwd=tmp_path)
    assert done.code == 3, done.err
    assert f"{fixture} was changed while prunectl was reading it; nothing was written" in done.err
    assert os.listdir(tmp_path) == [fixture]
    assert path.read_bytes() == before


@pytest.mark.parametrize("case", CASES)
def test_in_place_nothing_but_the_output_itself_replaces_the_input(tmp_path: Path, case: str) -> None:
    fixture, _, _, words = CASES[case]
    shutil.copy(FIXTURES / fixture, tmp_path / fixture)
    before = (tmp_path / fixture).read_bytes()
    done = here("prune", fixture, *words, "--in-place", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / fixture).read_bytes() != before


@pytest.mark.parametrize("name", ["with_data_scores", "open_calibration"])
def test_a_file_that_is_emptied_before_it_is_written_anew_is_no_bug(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    shutil.copy(FIXTURES / "digits_cnn.onnx", path)
    for module, hook, words in ((calibrated, name, (*DATA, *WANDA)), (plain, "verify", ("-s", "50%"))):
        with monkeypatch.context() as changing:
            after(changing, module, hook, lambda: empty(path))
            done = here("prune", "net.onnx", "-o", "out.onnx", *words, cwd=tmp_path)
        assert done.code == 3, done.err
        assert "net.onnx was changed while prunectl was reading it; nothing was written" in done.err
        assert os.listdir(tmp_path) == ["net.onnx"]
        shutil.copy(FIXTURES / "digits_cnn.onnx", path)


@pytest.mark.parametrize("output", [("-o", "out.pt"), ("--in-place",)])
def test_of_a_file_that_is_trained_another_size_is_told_and_another_time_is_not(
    tmp_path: Path, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(FIXTURES / "digits_cnn_torchscript.pt", tmp_path / "net.pt"))
    before = path.read_bytes()
    words = ("finetune", path.name, *output, "--data", DATA[-1], "--val-split", "25%", "--epochs", "1")
    with monkeypatch.context() as changing:
        after(changing, training, "_train", lambda: path.write_bytes(before + b"0"))
        done = here(*words, cwd=tmp_path)
    assert done.code == 3, done.err
    assert f"{path.name} was changed while prunectl was reading it; nothing was written" in done.err
    assert os.listdir(tmp_path) == [path.name]
    path.write_bytes(before)
    with monkeypatch.context() as changing:
        after(changing, training, "_train", lambda: touch(path))
        done = here(*words, cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("output", [("-o", "out"), ("-o", "out.safetensors"), ("--dry-run",)])
def test_the_file_of_a_rank_that_changes_while_its_weights_are_stripped_is_told(
    own: Path, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = own.glob("*.distcp")
    with monkeypatch.context() as changing:
        after(changing, strip, "_compare", lambda: touch(part))
        done = here("strip", own, *output, cwd=own.parent)
    assert done.code == 3, done.err
    assert f"{part.name} was changed while prunectl was reading it; nothing was written" in done.err
    assert os.listdir(own.parent) == [own.name]
    assert here("strip", own, *output, cwd=own.parent).code == 0


def onnx(home: Path) -> Path:
    return Path(shutil.copy(FIXTURES / "digits_cnn.onnx", home))


def safetensors(home: Path) -> Path:
    save_file({"a.weight": np.ones((4, 4), np.float32)}, home / "net.safetensors")
    return home / "net.safetensors"


def two_shards(home: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "two_shards", home / "net"))


def saved_model(home: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "digits_cnn_savedmodel", home / "net"))


def zero(home: Path) -> Path:
    return save_zero(home, 2)


OPENED: dict[str, tuple[Callable[[Path], Path], ModuleType, str]] = {
    "a file": (safetensors, shards, "open_undescribed"),
    "shards": (two_shards, shards, "open_undescribed"),
    "a SavedModel": (saved_model, tensorflow, "read_bundle"),
    "a checkpoint of ZeRO": (zero, zip_read, "open_archive"),
}


@pytest.mark.parametrize("kind", OPENED)
def test_what_is_written_over_a_model_while_it_is_opened_is_not_taken_for_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, module, name = OPENED[kind]
    path = make(tmp_path)
    before = open_model(path).states
    assert before == file_states(open_model(path).files)
    read, changed = getattr(module, name), []

    def late(file: Path, *given: Any) -> Any:
        result = read(file, *given)
        touch(file)
        changed.append(file)
        return result

    monkeypatch.setattr(module, name, late)
    opened = open_model(path)
    assert changed
    assert opened.states == before
    for file in changed:
        assert file_states([file])[file] != before[file]
    with pytest.raises(InputError, match="was changed while prunectl was reading it"), unchanged(opened.states):
        pass


def test_what_was_put_in_place_of_an_input_is_a_new_input(tmp_path: Path) -> None:
    path = onnx(tmp_path)
    for share in ("30%", "50%", "70%"):
        assert here("prune", path, "--in-place", "-s", share).code == 0
        assert here("prune", path, "-o", tmp_path / "out.onnx", "--force", "-s", share).code == 0
