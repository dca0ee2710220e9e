"""The same input and the same words give the same bytes, whatever the clock says."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import FIXTURES, here

MODELS = (
    "digits_cnn.h5",
    "chunked_and_gzipped.h5",
    "wrapped_by_tfmot.h5",
    "digits_cnn.keras",
    "deflated.keras",
    "digits_cnn.pt",
    "checkpoint_with_optimizer.pt",
    "masks_of_torch_prune.pt",
    "before_torch_1.6.pt",
    "digits_cnn.pt2",
    "digits_cnn_torchscript.pt",
    "digits_cnn.onnx",
    "external_data/model.onnx",
    "digits_cnn.safetensors",
    "two_shards",
    "digits_cnn_savedmodel",
    "digits_cnn_checkpoint.index",
    "digits_cnn.tflite",
)
COMMANDS = (
    ("prune", "-s", "50%", "--pack"),
    ("strip", "--pack"),
)
"""What is packed, and so written anew: what else they write, `tests/golden` holds by digests of another day."""


def made(folder: Path) -> Iterator[tuple[str, str]]:
    """Run every command on every model, and yield what each has written."""
    for model in MODELS:
        for words in COMMANDS:
            place = folder / f"{model} {' '.join(words)}".replace("/", " ")
            place.mkdir(parents=True)
            here(words[0], FIXTURES / model, "-o", place / f"out{Path(model).suffix}", *words[1:])
            for path in sorted(file for file in place.rglob("*") if file.is_file()):
                yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_runs_at_different_times_write_the_same(tmp_path: Path) -> None:
    first = dict(made(tmp_path / "first"))
    # HDF5 keeps times in whole seconds, zip in twos.
    time.sleep(2.1)
    assert dict(made(tmp_path / "second")) == first
    assert len(first) > len(MODELS)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_random_strategy_is_decided_by_its_seed_alone(seed: int, tmp_path: Path) -> None:
    words = ("prune", FIXTURES / "digits_cnn.h5", "-s", "50%", "--strategy", "random", "--seed", str(seed))
    for name in ("a.h5", "b.h5"):
        assert here(*words, "-o", tmp_path / name).code == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
