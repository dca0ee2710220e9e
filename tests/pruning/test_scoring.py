"""Strategies that see a tensor whole: the same bytes as ever, each tensor scored once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prunectl.pruning import scores
from prunectl.pruning.strategies import BlockContext, lamp, random
from tests.contract import Array
from tests.pruning import reference
from tests.pruning.reference import arrays, prune
from tests.running import FIXTURES

_TYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
_PLUG_IN = """
from pathlib import Path

import numpy as np

def coarse(w):
    with Path(__file__).with_suffix(".log").open("a") as file:
        file.write(f"{w.shape}\\n")
    return np.round(np.abs(w), 1)

def rows(w):
    return np.abs(w) / (np.abs(w).max(axis=-1, keepdims=True) + 1)

def levels(w):
    return np.floor(np.abs(w) * 3).astype(np.int8)

def whole(w):
    return np.abs(w)

def single(w):
    return np.abs(w)

single.is_elementwise = True
"""


def model(folder: Path, tensors: Mapping[str, Array]) -> Path:
    """Write a safetensors file, its tensors one after the other."""
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    path = folder / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))
    return path


def weights(*, has_doubles: bool) -> dict[str, Array]:
    """Return weights of every width, more than a block of some, in steps so coarse that many are equal."""
    shapes = {"F32": (700, 400), "F16": (150, 100), "BF16": (90, 110)} | ({"F64": (130, 120)} if has_doubles else {})
    found = {}
    for at, (kind, shape) in enumerate(shapes.items()):
        # Knuth's multiplicative hash: the same numbers with any NumPy.
        mixed = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(2_654_435_761 + 2 * at)
        steps = (mixed % np.uint64(1 << 32) >> np.uint64(16)).astype(np.int64) % 800 - 400
        found[f"{kind.lower()}.weight"] = (steps / 128).astype(_TYPES[kind]).reshape(shape)
    return found


def coarse(array: Array) -> Array:
    return np.round(np.abs(array), 1).astype(np.float64)


def rows(array: Array) -> Array:
    return (np.abs(array) / (np.abs(array).max(axis=-1, keepdims=True) + 1)).astype(np.float64)


def levels(array: Array) -> Array:
    return np.floor(np.abs(array) * 3).astype(np.float64)


def wide(function: Callable[[Array], Array]) -> Callable[[Array, str], Array]:
    """Return what scores as a plug-in does, which is given small floats as float32."""
    return lambda array, _: function(array.astype(np.float32) if array.itemsize < 4 else array)


FORMULAS: dict[str, Callable[[Array, str], Array]] = {
    "lamp": lambda array, name: lamp(array, BlockContext(name, 0, 3)),
    "random": lambda array, name: random(array, BlockContext(name, 0, 3)),
    "coarse": wide(coarse),
    "rows": wide(rows),
    "levels": wide(levels),
}

RECORDED = {
    ("lamp", "layer"): ("6f3a5c1d8f2850af", "b686f7665c98138d"),
    ("lamp", "global"): ("7723d3994afffa22", "bfa953b88a52fe22"),
    ("random", "layer"): ("a57ae664418529b1", "347158b109683dac"),
    ("random", "global"): ("fd3f48ee3c2a5c37", "eeb48813dfee9a54"),
    ("coarse", "layer"): ("f9d1c8830a8da19d", "c778bc113812f682"),
    ("coarse", "global"): ("f2adef19ea52b6da", "960849ff6e50e53e"),
    ("rows", "layer"): ("20bc7bb0a20c3868", "5107e31e81bd5747"),
    ("rows", "global"): ("5d459aa2b8b6148c", "5470a8570af95f9c"),
    ("levels", "layer"): ("7f7a558411d71905", "040d5476e49ee8cb"),
    ("levels", "global"): ("c3f2f0ac42f4623d", "0e5393d9650f4c02"),
}
"""How the hash of each output began when tensors were scored anew for every pass: without and with doubles."""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def named(folder: Path, strategy: str) -> str:
    """Return how a strategy is called on the command line; those of the plug-in are written to a file."""
    (folder / "mine.py").write_text(_PLUG_IN)
    return strategy if strategy in {"lamp", "random"} else f"{folder / 'mine.py'}:{strategy}"


def calls(folder: Path) -> list[str]:
    return (folder / "mine.log").read_text().splitlines()


@pytest.mark.parametrize("has_doubles", [False, True], ids=["singles", "doubles"])
@pytest.mark.parametrize(("strategy", "scope"), RECORDED)
def test_the_lowest_scores_go_and_the_bytes_are_what_they_ever_were(
    strategy: str, scope: str, has_doubles: bool, tmp_path: Path
) -> None:
    before, share = weights(has_doubles=has_doubles), 0.61
    words: dict[str, Any] = {"strategy": named(tmp_path, strategy), "scope": scope, "seed": 3}
    _, written = prune(model(tmp_path, before), tmp_path / "out", sparsity=share, **words)
    assert digest(written) == RECORDED[strategy, scope][has_doubles]
    scores = {name: FORMULAS[strategy](array, name).astype(np.float64) for name, array in before.items()}
    if scope == "layer":
        marks = {name: reference.lowest(found, round(share * found.size)) for name, found in scores.items()}
    else:
        every = np.concatenate([found.ravel() for found in scores.values()])
        ends = np.cumsum([found.size for found in scores.values()])[:-1]
        parts = np.split(reference.lowest(every, round(share * every.size)), ends)
        marks = {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
    for name, after in arrays(written).items():
        np.testing.assert_array_equal(after, np.where(marks[name], np.zeros_like(before[name]), before[name]))


@pytest.mark.parametrize("cluster", ["", "8"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_tensor_is_scored_once(scope: str, cluster: str, tmp_path: Path) -> None:
    before = weights(has_doubles=True)
    words = {"sparsity": 0.5, "scope": scope, "strategy": named(tmp_path, "coarse"), "cluster": cluster}
    prune(model(tmp_path, before), tmp_path / "out", **words)
    assert sorted(calls(tmp_path)) == sorted(str(array.shape) for array in before.values())


def test_a_tensor_that_the_file_holds_twice_is_scored_once(tmp_path: Path) -> None:
    words = {"sparsity": 0.5, "strategy": named(tmp_path, "coarse")}
    found, _ = prune(FIXTURES / "every_variable_twice", tmp_path / "out", **words)
    assert len(calls(tmp_path)) == len(found.plan.cuts)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_that_memory_has_no_room_for_lie_in_a_file_without_a_name(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for the scores of the second tensor, and not for those of the first.
    monkeypatch.setattr(scores, "KEPT_BYTES", 1 << 17)
    made: list[str] = []
    real = tempfile.TemporaryFile

    def unnamed(**words: Any) -> Any:
        file = real(**words)
        made.append(words["dir"])
        assert os.fstat(file.fileno()).st_nlink == 0
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", unnamed)
    words: dict[str, Any] = {"strategy": named(tmp_path, "coarse"), "scope": scope, "seed": 3}
    _, written = prune(model(tmp_path, weights(has_doubles=True)), tmp_path / "out", sparsity=0.61, **words)
    assert digest(written) == RECORDED["coarse", scope][True]
    assert len(calls(tmp_path)) == len(weights(has_doubles=True))
    # Where the output is made, which has room for a model. That the folder takes files at all is tried before.
    used = [folder for folder in map(Path, made) if folder != tmp_path / "out"]
    assert {tmp_path / "out" in folder.parents for folder in used} == {True}
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [written.name]


@pytest.mark.parametrize("nan", ["zero", "keep"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_not_finite_is_treated_alike_by_strategies_of_either_kind(scope: str, nan: str, tmp_path: Path) -> None:
    before = weights(has_doubles=False)
    before["f16.weight"][3, 4:9] = np.nan, np.inf, -np.inf, np.nan, 0
    path = model(tmp_path, before)
    results = []
    for strategy in ("whole", "single"):
        words = {"scope": scope, "nan": nan, "strategy": named(tmp_path, strategy)}
        results.append(prune(path, tmp_path / strategy, sparsity=0.5, **words)[1].read_bytes())
    assert results[0] == results[1]
