from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prunectl.formats.registry import open_model
from tests.running import FIXTURES, here

H5, PT = FIXTURES / "digits_cnn.h5", FIXTURES / "digits_cnn.pt"


def refused(*words: str | Path) -> str:
    done = here("prune", *words)
    assert done.code == 2, done.err
    assert done.out == ""
    return done.err


def test_masks_are_written_and_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = here("prune", PT, "-o", tmp_path / "w.pt", "-s", "80%", "--wrap", "--exclude", "conv1*", "--format", "human")
    assert done.code == 0, done.err
    assert "Added pruning wrappers to 3 tensors: their masks keep pruned weights at zero." in done.out
    assert f"Next: prunectl finetune {tmp_path / 'w.pt'}" in done.out
    assert {wrapper.layer for wrapper in open_model(tmp_path / "w.pt").about.wrappers} == {"conv2", "fc1", "fc2"}


def test_a_schedule_is_written_and_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_model_optimization")
    words = ("--schedule", "polynomial", "--initial-sparsity", "10%", "--begin", "100", "--end", "400", "--power", "2")
    done = here("prune", H5, "-o", tmp_path / "w.h5", "-s", "0.8", *words, "--format", "human")
    assert done.code == 0, done.err
    # Wherever the line is broken.
    text = " ".join(done.out.split())
    assert "no weight is pruned yet; in training, polynomial 10.0 % to 80.0 %, from step 100 to step 400." in text
    assert "to prune  7,790 of 9,736 weights" in done.out
    assert "likely to fall" not in done.out
    assert "not measured" not in done.out
    assert "The optimizer's state was not kept" not in done.out
    wrappers = open_model(tmp_path / "w.h5").about.wrappers
    assert {wrapper.schedule for wrapper in wrappers} == {"PolynomialDecay(0.1 -> 0.8, steps 100-400)"}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = here("prune", PT, "-s", "80%", "--wrap", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "dry run" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--end", "100"), "--end needs a schedule"),
        (("--wrap", "--power", "2"), "--power needs a schedule"),
        (("--custom-objects", "m:O"), "--custom-objects has no effect here"),
        (("--trust",), "--trust has no effect here"),
        (("--schedule", "polynomial"), "needs --end, a number of steps"),
        (("--schedule", "polynomial", "--end", "75%"), "depends on the length of the training"),
        (("--schedule", "linear", "--begin", "1ep", "--end", "9"), "depends on the length of the training"),
        (("--schedule", "polynomial", "--end", "100", "--frequency", "30"), "not 100"),
        (("--schedule", "polynominal", "--end", "100"), "did you mean"),
        (("--wrap", "--manifest", "m.json"), "manifest"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_makes_no_sense_is_refused_before_a_file_is_opened(words: tuple[str, ...], said: str) -> None:
    assert said in refused("no-such-file.h5", "-o", "out.h5", "-s", "0.8", *words)


def test_a_schedule_of_ours_may_end_between_turns(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_model_optimization")
    words = ("--schedule", "cosine", "--end", "100", "--frequency", "30")
    done = here("prune", H5, "-o", tmp_path / "w.h5", "-s", "0.8", *words)
    assert done.code == 0, done.err


def test_turns_come_often_enough_on_a_short_way_and_reach_its_end(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_model_optimization")
    kept = pytest.importorskip("prunectl.training.wrap").read_saved_pruning
    done = here("prune", H5, "-o", tmp_path / "w.h5", "-s", "0.8", "--schedule", "polynomial", "--end", "210")
    assert done.code == 0, done.err
    schedule = kept(open_model(tmp_path / "w.h5")).schedules["fc1"]
    assert schedule.frequency == 10
    assert schedule.prunes_at(210)


@pytest.mark.parametrize("module", ["commands.prune", "training.tfmot.wrappers"])
def test_neither_help_nor_the_refusal_of_a_file_loads_a_framework(module: str) -> None:
    code = (
        f"import sys, prunectl.{module};"
        "sys.exit(bool({'torch', 'tensorflow', 'tf_keras', 'keras', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
