"""`prunectl verify`: every way in which a file may not be what it is said to be is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checks.checking import gates, prunectl
from tests.running import FIXTURES

Arrays = dict[str, np.ndarray[Any, Any]]
SOURCE = FIXTURES / "digits_cnn.safetensors"


def pruned(folder: Path, *words: str) -> None:
    """Prune the digits network, and keep the record."""
    done = prunectl(folder, "prune", SOURCE, "-o", "out.safetensors", "-s", "0.8", "--manifest", "out.json", *words)
    assert done.code == 0, done.err


def rewritten(folder: Path, change: Callable[[Arrays], None]) -> None:
    arrays = load_file(folder / "out.safetensors")
    change(arrays)
    save_file(arrays, folder / "out.safetensors")


def failing(folder: Path, *words: str | Path) -> set[str]:
    found = prunectl(folder, "verify", "out.safetensors", *words, "--json")
    failed = {gate["id"] for gate in gates(found) if not gate["ok"]}
    assert found.code == bool(failed)
    return failed


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".pt", ".onnx", ".safetensors"])
def test_what_prune_wrote_holds(suffix: str, tmp_path: Path) -> None:
    source = FIXTURES / f"digits_cnn{suffix}"
    pack = [] if suffix == ".safetensors" else ["--pack"]
    words = ("prune", source, "-o", f"out{suffix}", "-s", "0.8", "--manifest", "out.json", *pack)
    assert prunectl(tmp_path, *words).code == 0
    found = prunectl(tmp_path, "verify", f"out{suffix}", "--manifest", "out.json", "--against", source)
    assert (found.code, {row[0] for row in found.rows}, len(found.rows)) == (0, {"pass"}, 8), found.out


def test_a_file_of_weights_alone_holds_without_a_graph(tmp_path: Path) -> None:
    source = FIXTURES / "weights_only.h5"
    words = ("prune", source, "-o", "out.h5", "-s", "0.8", "--policy", "all", "--manifest", "out.json")
    assert prunectl(tmp_path, *words).code == 0
    found = prunectl(tmp_path, "verify", "out.h5", "--manifest", "out.json", "--against", source)
    assert (found.code, len(found.rows)) == (0, 8), found.out


def test_a_second_pruning_holds_against_the_first(tmp_path: Path) -> None:
    pruned(tmp_path)
    again = ("prune", "out.safetensors", "-o", "more.safetensors", "-s", "0.9", "--manifest", "more.json")
    assert prunectl(tmp_path, *again).code == 0
    words = ("--manifest", "more.json", "--against", "out.safetensors")
    assert prunectl(tmp_path, "verify", "more.safetensors", *words).code == 0


def grown_back(arrays: Arrays) -> None:
    weight = arrays["fc1.weight"]
    weight.flat[np.flatnonzero(weight == 0)[0]] = 1


def nudged(arrays: Arrays) -> None:
    weight = arrays["fc1.weight"]
    place = np.flatnonzero(weight)[0]
    weight.flat[place] = np.nextafter(weight.flat[place], np.float32(9))


def zeroed(arrays: Arrays) -> None:
    weight = arrays["fc1.weight"]
    weight.flat[np.flatnonzero(weight)[0]] = 0


def bias_zeroed(arrays: Arrays) -> None:
    arrays["fc1.bias"][0] = 0


def renamed(arrays: Arrays) -> None:
    arrays["fc9.weight"] = arrays.pop("fc1.weight")


def flattened(arrays: Arrays) -> None:
    arrays["fc1.weight"] = arrays["fc1.weight"].reshape(-1)


@pytest.mark.parametrize(
    ("change", "by_manifest", "by_source"),
    [
        (grown_back, {"digest", "zeros"}, {"kept-weights"}),
        (nudged, {"digest"}, {"kept-weights"}),
        (zeroed, {"digest", "zeros"}, set()),
        (bias_zeroed, {"digest"}, set()),
        (renamed, {"digest", "zeros"}, {"architecture"}),
        (flattened, {"digest", "zeros"}, {"architecture"}),
    ],
)
def test_a_change_is_found(
    change: Callable[[Arrays], None], by_manifest: set[str], by_source: set[str], tmp_path: Path
) -> None:
    pruned(tmp_path)
    rewritten(tmp_path, change)
    assert failing(tmp_path, "--manifest", "out.json") == by_manifest
    assert failing(tmp_path, "--against", SOURCE) == by_source


def test_with_both_zeros_are_held_against_what_was_cut(tmp_path: Path) -> None:
    pruned(tmp_path)
    rewritten(tmp_path, bias_zeroed)
    assert failing(tmp_path, "--manifest", "out.json", "--against", SOURCE) == {"digest", "other-tensors"}
    pruned(tmp_path, "--force")
    rewritten(tmp_path, zeroed)
    both = failing(tmp_path, "--manifest", "out.json", "--against", SOURCE)
    assert both == {"digest", "zeros", "dropped"}


def test_another_source_is_found(tmp_path: Path) -> None:
    pruned(tmp_path)
    arrays = load_file(SOURCE)
    nudged(arrays)
    save_file(arrays, tmp_path / "other.safetensors")
    found = failing(tmp_path, "--manifest", "out.json", "--against", "other.safetensors")
    assert "source-digest" in found


def test_a_zero_of_the_source_must_stay_one(tmp_path: Path) -> None:
    pruned(tmp_path)
    arrays = load_file(tmp_path / "out.safetensors")
    zero = np.flatnonzero(arrays["fc1.weight"] == 0)[0]
    arrays["fc1.weight"].flat[zero] = 0.5
    save_file(arrays, tmp_path / "back.safetensors")
    found = prunectl(tmp_path, "verify", "back.safetensors", "--against", "out.safetensors", "--json")
    (gate,) = [gate for gate in gates(found) if not gate["ok"]]
    assert (gate["id"], gate["actual"]) == ("kept-zeros", 1)
    assert gate["note"] == "First: fc1.weight, with 1."


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    pruned(tmp_path)
    rewritten(tmp_path, nudged)
    assert "First: fc1.weight, with 1." in prunectl(tmp_path, "verify", "out.safetensors", "--against", SOURCE).out


def test_a_nan_that_became_zero_is_no_slip(tmp_path: Path) -> None:
    arrays = load_file(SOURCE)
    arrays["fc2.weight"][0] = np.nan
    save_file(arrays, tmp_path / "nan.safetensors")
    words = ("-o", "out.safetensors", "-s", "0.01", "--nan", "zero", "--manifest", "out.json")
    assert prunectl(tmp_path, "prune", "nan.safetensors", *words).code == 0
    assert failing(tmp_path, "--manifest", "out.json", "--against", "nan.safetensors") == set()


def test_nothing_to_be_held_against_is_a_slip(tmp_path: Path) -> None:
    assert prunectl(tmp_path, "verify", SOURCE).code == 2


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"schema": "prunectl.manifest/1"}', '{"schema": "prunectl.manifest/1", "cuts": 3}']
)
def test_a_manifest_that_is_none_is_unreadable_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text(text)
    found = prunectl(tmp_path, "verify", SOURCE, "--manifest", "out.json", "--json")
    assert found.code == 3
    assert json.loads(found.out)["error"]["kind"] == "input"


@pytest.mark.parametrize("words", [("--pattern", "layers", "--blocks", "1"), ("--pattern", "channel", "-s", "0.5")])
def test_a_run_that_removed_whole_parts_is_verified_by_its_digests(tmp_path: Path, words: tuple[str, ...]) -> None:
    part, source, out = "channels", FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    weights = out
    if "layers" in words:
        part, source, out = "blocks", tmp_path / "llama", tmp_path / "out"
        weights = out / "model.safetensors"
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
        save_file({f"layers.{i}.w": np.full((2, 2), i, np.float32) for i in range(2)}, source / weights.name)
    done = prunectl(tmp_path, "prune", source, "-o", out, *words, "--manifest", "m.json")
    assert done.code == 0, done.err
    found = prunectl(tmp_path, "verify", out, "--manifest", "m.json", "--against", source)
    assert (found.code, [row[:2] for row in found.rows]) == (0, [["pass", "digest"], ["pass", "source-digest"]])
    assert f"The run removed {part}: only digests are compared, not weights." in found.out
    with weights.open("ab") as file:
        file.seek(-1, 2)
        last = weights.read_bytes()[-1]
        file.truncate(weights.stat().st_size - 1)
        file.write(bytes([last ^ 1]))
    found = prunectl(tmp_path, "verify", out, "--manifest", "m.json", "--json")
    assert [gate["id"] for gate in gates(found) if not gate["ok"]] == ["digest"]
