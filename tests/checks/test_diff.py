"""`prunectl diff`: what became of every tensor, beside NumPy."""

from __future__ import annotations

import shutil
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from prunectl.checks.diff import diff_models
from prunectl.formats.registry import open_model
from tests.checks.checking import gates, prunectl
from tests.running import FIXTURES, Outcome
from tests.running import prunectl as in_its_own_process

FORMATS = (".h5", ".keras", ".pt", ".onnx", ".safetensors", ".tflite", ".pt2", "_savedmodel", "_checkpoint.index")
WEIGHTS = arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan")]))


def changes(found: Outcome) -> dict[str, dict[str, Any]]:
    return {change["name"]: change for change in found.json["changes"]}


def test_two_models_are_told_apart_tensor_by_tensor(tmp_path: Path) -> None:
    old = {
        "same.weight": np.ones((2, 3), np.float32),
        "changed.weight": np.array([[1, 0, 3], [4, 5, 6]], np.float32),
        "resized.weight": np.ones((2, 3), np.float32),
        "gone.weight": np.ones((5, 7), np.float32),
    }
    new = {
        "same.weight": old["same.weight"],
        "changed.weight": np.array([[0, 7, 3], [0, 5, 6]], np.float32),
        "resized.weight": np.ones((2, 2), np.float32),
        "added.weight": np.ones((8, 9), np.float32),
    }
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    found = prunectl(tmp_path, "diff", "new.safetensors", "old.safetensors", "--json")
    said = changes(found)
    assert {name: change["kind"] for name, change in said.items()} == {
        "same.weight": "same", "changed.weight": "changed", "resized.weight": "resized",
        "gone.weight": "gone", "added.weight": "added",
    }  # fmt: skip
    changed = said["changed.weight"]
    assert (changed["changed"], changed["gained"], changed["lost"]) == (3, 2, 1)
    assert (said["resized.weight"]["changed"], said["resized.weight"]["gained"]) == (None, None)
    models = found.json["models"]
    assert found.json["growth"] == models[0]["bytes"]["compressed"] - models[1]["bytes"]["compressed"]


@given(WEIGHTS)
@settings(max_examples=20, deadline=None)
def test_a_model_does_not_differ_from_itself(weight: np.ndarray[Any, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"a.weight": weight}, f"{folder}/m.safetensors")
        model = open_model(Path(folder, "m.safetensors"))
        found = diff_models(model, model)
    assert (found.growth, [change.kind for change in found.changes]) == (0, ["same"])
    assert (found.changes[0].changed, found.changes[0].zeros_added, found.changes[0].zeros_lost) == (0, 0, 0)


@given(WEIGHTS, WEIGHTS)
@settings(max_examples=30, deadline=None)
def test_zeros_gained_and_lost_add_up(new: np.ndarray[Any, Any], old: np.ndarray[Any, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"a.weight": new}, f"{folder}/new.safetensors")
        save_file({"a.weight": old}, f"{folder}/old.safetensors")
        there, back = Path(folder, "new.safetensors"), Path(folder, "old.safetensors")
        (found,) = diff_models(open_model(there), open_model(back)).changes
        (other,) = diff_models(open_model(back), open_model(there)).changes
    assert found.zeros_added is not None
    assert found.zeros_lost is not None
    assert found.zeros_added - found.zeros_lost == np.count_nonzero(new == 0) - np.count_nonzero(old == 0)
    assert (found.zeros_added, found.zeros_lost, found.changed) == (other.zeros_lost, other.zeros_added, other.changed)
    # A NaN is that of the other file; minus zero is zero.
    assert found.changed == np.count_nonzero(~((new == old) | (np.isnan(new) & np.isnan(old))))


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_network_in_two_formats_is_the_same(suffix: str) -> None:
    found = prunectl(FIXTURES, "diff", f"digits_cnn{suffix}", "digits_cnn.pt", "--json")
    said = changes(found)
    needed = {name: change for name, change in said.items() if change["old"] is not None}
    assert len(needed) == 8
    assert {change["kind"] for change in needed.values()} == {"same"}
    kernels = [change for change in needed.values() if len(change["new"]["shape"]) > 1]
    assert all(np.prod(change["new"]["shape"]) == np.prod(change["old"]["shape"]) for change in kernels)


def test_a_square_kernel_is_transposed_as_its_axes_say(tmp_path: Path) -> None:
    keras = pytest.importorskip("h5py")
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    save_file({"fc.weight": weight}, tmp_path / "torch.safetensors")
    with keras.File(tmp_path / "keras.h5", "w") as file:
        file.attrs["layer_names"] = [b"fc"]
        group = file.create_group("fc")
        group.attrs["weight_names"] = [b"fc/kernel:0"]
        group["fc/kernel:0"] = weight.T
    found = prunectl(tmp_path, "diff", "keras.h5", "torch.safetensors", "--json")
    (change,) = found.json["changes"]
    assert (change["kind"], change["how"]) == ("same", "layer, axes reordered")


def test_two_that_could_be_meant_are_not_guessed(tmp_path: Path) -> None:
    weight = np.ones((2, 3), np.float32)
    save_file({"a.Fc.weight": weight, "a.FC.weight": weight}, tmp_path / "new.safetensors")
    save_file({"a.fc.weight": weight}, tmp_path / "old.safetensors")
    found = prunectl(tmp_path, "diff", "new.safetensors", "old.safetensors", "--json")
    assert [change["kind"] for change in found.json["changes"]] == ["added", "added", "gone"]
    assert "does not guess" in prunectl(tmp_path, "diff", "new.safetensors", "old.safetensors").err


def test_a_name_that_all_layers_share_makes_no_difference(tmp_path: Path) -> None:
    arrays = {f"{name}.weight": np.ones((2, 3), np.float32) for name in ("fc1", "fc2")}
    save_file(arrays, tmp_path / "old.safetensors")
    save_file({f"module.{name}": array for name, array in arrays.items()}, tmp_path / "new.safetensors")
    found = prunectl(tmp_path, "diff", "new.safetensors", "old.safetensors", "--json")
    assert [change["kind"] for change in found.json["changes"]] == ["same", "same"]


def test_half_of_the_digits_is_another_type_and_nothing_else(tmp_path: Path) -> None:
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    save_file({"a.weight": weight}, tmp_path / "old.safetensors")
    save_file({"a.weight": weight.astype(np.float16)}, tmp_path / "new.safetensors")
    found = prunectl(tmp_path, "diff", "new.safetensors", "old.safetensors", "--json", "--fail-on", "changed,dtype")
    (change,) = found.json["changes"]
    assert (change["kind"], change["changed"]) == ("retyped", 0)
    assert [(gate["id"], gate["ok"]) for gate in gates(found)] == [("changed", True), ("dtype", False)]
    assert found.code == 1


@pytest.mark.parametrize(
    ("fail_on", "code"),
    [
        ("growth:0%", 0), ("nonzero", 0), ("shape", 0), ("dtype", 0), ("changed", 1), ("growth:0B,changed", 1),
        ("growth", 2), ("growth:big", 2), ("nonzero:1", 2), ("shapes", 2), ("", 0),
    ],
)  # fmt: skip
def test_what_is_forbidden_of_a_pruned_model(fail_on: str, code: int, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "old.pt")
    assert prunectl(tmp_path, "prune", "old.pt", "-o", "new.pt", "-s", "0.5").code == 0
    words = ("--fail-on", fail_on) if fail_on else ()
    assert prunectl(tmp_path, "diff", "new.pt", "old.pt", *words).code == code


def test_one_of_the_two_may_come_from_standard_input() -> None:
    content = (FIXTURES / "digits_cnn.pt").read_bytes()
    found = in_its_own_process("diff", "-", FIXTURES / "digits_cnn.onnx", "--fail-on", "changed,shape", stdin=content)
    assert found.code == 0, found.err
    assert in_its_own_process("diff", "-", "-", stdin=content).code == 2


def test_the_way_back_grows_and_loses_zeros(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "old.pt")
    prunectl(tmp_path, "prune", "old.pt", "-o", "new.pt", "-s", "0.5")
    for fail_on in ("growth:2%", "nonzero"):
        found = prunectl(tmp_path, "diff", "old.pt", "new.pt", "--fail-on", fail_on, "--json")
        (gate,) = gates(found)
        assert (found.code, gate["id"], gate["ok"]) == (1, fail_on.partition(":")[0], False)


def test_what_is_forbidden_is_told_once_for_people_and_for_logs(tmp_path: Path) -> None:
    save_file({"a.weight": np.zeros((4, 4), np.float32)}, tmp_path / "old.safetensors")
    save_file({"a.weight": np.ones((4, 4), np.float32)}, tmp_path / "new.safetensors")
    words = ("diff", "new.safetensors", "old.safetensors", "--fail-on", "nonzero")
    sentence = "16 pruned weights of new.safetensors are no longer zero, the limit is 0 (nonzero)."
    assert f"FAIL: {sentence}" in prunectl(tmp_path, *words).err.splitlines()
    shown = prunectl(tmp_path, *words, "--format", "human").out
    assert "* nonzero: First: a.weight." in shown
    assert sentence not in " ".join(shown.split())


def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    weight = (np.arange(1 << 22) % 999).astype(np.float32).reshape(1024, -1)
    save_file({"a.weight": weight}, tmp_path / "old.safetensors")
    weight.flat[::1000] = -1
    save_file({"a.weight": weight}, tmp_path / "new.safetensors")
    new, old = open_model(tmp_path / "new.safetensors"), open_model(tmp_path / "old.safetensors")
    tracemalloc.start()
    found = diff_models(new, old)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [change.changed for change in found.changes] == [len(range(0, 1 << 22, 1000))]
    assert peak < new.nbytes // 2
