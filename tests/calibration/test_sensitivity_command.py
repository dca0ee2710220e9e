"""`inspect --sensitivity` as it is typed: layouts, exit codes, and what is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.running import FIXTURES, at_terminal, clean, here, prunectl, without_colors

DIGITS = FIXTURES / "digits_cnn.pt"
ONNX = FIXTURES / "digits_cnn.onnx"
DATA = FIXTURES / "digits.npz"
NET = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"
KERNELS = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]


def imported(*words: str | Path) -> set[str]:
    """Return all modules that are there once a command is done."""
    code = f"import sys\nsys.argv = {['prunectl', *map(str, words)]!r}\nfrom prunectl.cli import main\nmain()\n"
    code += "print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean())
    return set(done.stderr.split())


def test_rows_have_a_number_for_each_sparsity() -> None:
    found = here("inspect", DIGITS, "--sensitivity")
    assert [row[1] for row in found.rows] == KERNELS
    assert all(row[0] == str(DIGITS) and row[3] == "weight error" and len(row) == 9 for row in found.rows)
    for row in found.rows:
        errors = [float(cell) for cell in row[4:]]
        assert errors == sorted(errors)
    assert "an estimate" in found.err


def test_several_models_are_looked_at_with_data() -> None:
    found = here("inspect", ONNX, DIGITS, "--sensitivity", "--data", DATA, "--builder", NET, "--samples", "16")
    assert found.code == 0
    by_path = {path: [row[3] for row in found.rows if row[0] == str(path)] for path in (ONNX, DIGITS)}
    assert by_path[ONNX] == ["weight error", "output error"] * 4
    assert by_path[DIGITS] == ["weight error", "output error", "loss", "accuracy"] * 4


def test_json_has_it_by_layer_and_says_what_the_table_says() -> None:
    words = ("inspect", DIGITS, "--sensitivity", "--data", DATA, "--builder", NET, "--samples", "16", "--layers", "fc2")
    (model,) = here(*words, "--json").json["models"]
    layers = {layer["name"]: layer["sensitivity"] for layer in model["layers"]}
    assert layers["fc2.bias"] is None
    points = layers["fc2.weight"]
    assert [point["sparsity"] for point in points] == [0.5, 0.7, 0.8, 0.9, 0.95]
    assert model["sensitivity"]["examples"] == 16
    assert model["sensitivity"]["loss"] >= 0
    rows = {row[3]: [float(cell) for cell in row[4:]] for row in here(*words).rows}
    for measure, numbers in rows.items():
        assert [point[measure.replace(" ", "_")] for point in points] == pytest.approx(numbers, rel=1e-5)


def test_json_without_data_has_no_key_that_needs_some() -> None:
    (model,) = here("inspect", DIGITS, "--sensitivity", "--json").json["models"]
    points = [point for layer in model["layers"] for point in layer["sensitivity"] or ()]
    assert {frozenset(point) for point in points} == {frozenset({"sparsity", "weight_error"})}
    assert model["sensitivity"]["collapses"][0]["name"] == "conv2.weight"


def test_json_is_as_before_if_nobody_asks() -> None:
    (model,) = here("inspect", DIGITS, "--json").json["models"]
    assert "sensitivity" not in model
    assert not any("sensitivity" in layer for layer in model["layers"])


def test_a_terminal_gets_tables_and_few_bars_within_its_width(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    name = "encoder.layers.{}.attention.self.projection.of.values.weight"
    weights = {name.format(at): random.standard_normal((32, 32)).astype(np.float32) for at in range(12)}
    save_file(weights, tmp_path / "long.safetensors")
    shown = without_colors(at_terminal("inspect", tmp_path / "long.safetensors", "--sensitivity").out)
    tables = shown[shown.index("weight error at") :].partition("\nNext: ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    bars = [line for line in tables.splitlines() if line.rstrip().endswith("#")]
    assert len(bars) == 8
    lengths = [line.count("#") for line in bars]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 36


def test_the_order_is_that_of_the_file_or_as_sorted() -> None:
    found = here("inspect", DIGITS, "--sensitivity", "--sort", "size")
    assert [row[1] for row in found.rows] == ["fc1.weight", "conv2.weight", "fc2.weight", "conv1.weight"]


def test_a_collapse_is_told_and_only_the_worst_are_named(tmp_path: Path) -> None:
    weights = {}
    for at in range(7):
        weights[f"l{at}.weight"] = np.random.default_rng(at).uniform(1, 2, (10, 10)).astype(np.float32)
        weights[f"l{at}.weight"][at] = 0.01
    save_file(weights, tmp_path / "m.safetensors")
    found = here("inspect", tmp_path / "m.safetensors", "--sensitivity")
    (line,) = [line for line in found.err.splitlines() if "would collapse" in line]
    assert line.count("from 50 % on (an output has no weights left but zeros)") == 5
    assert "and 2 others" in line


def test_without_kernels_it_says_so() -> None:
    found = here("inspect", DIGITS, "--sensitivity", "--layers", "*.bias")
    assert (found.code, found.out) == (0, "")
    assert "none of these tensors is a kernel" in found.err


def test_a_model_from_standard_input_can_be_looked_at() -> None:
    found = prunectl("inspect", "-", "--sensitivity", stdin=DIGITS.read_bytes())
    assert [row[:2] for row in found.rows] == [["-", name] for name in KERNELS]


def test_one_of_several_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    found = here("inspect", tmp_path / "none.pt", DIGITS, "--sensitivity")
    assert found.code == 3
    assert [row[1] for row in found.rows] == KERNELS


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "train.npz"),
        ("--samples", "4"),
        ("--sensitivity", "--samples", "4"),
        ("--sensitivity", "--loss", "mse"),
        ("--sensitivity", "--builder", "mod:fn"),
        ("--sensitivity", "--trust"),
        ("--sensitivity", "--data", str(DATA)),
        ("--sensitivity", "--data", str(DATA), "--builder", NET, "--loss", "lost"),
        ("--sensitivity", "--data", "missing.npz", "--builder", NET),
        ("--sensitivity", "--data", str(DATA), "--samples", "0"),
        ("--sensitivity", "--layers", "nothing*"),
    ],
    ids=lambda words: " ".join(words).replace(str(FIXTURES), ""),
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...]) -> None:
    found = here("inspect", DIGITS, *words)
    assert (found.code, found.out) == ({"missing.npz": 3}.get(words[2] if len(words) > 2 else "", 2), "")
    assert found.err


def test_wrappers_are_refused_with_data_and_told_without(tmp_path: Path) -> None:
    copy = tmp_path / "wrapped.h5"
    shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", copy)
    assert here("inspect", copy, "--sensitivity", "--data", DATA).code == 2
    assert "masks of pruning wrappers" in here("inspect", copy, "--sensitivity").err


def test_a_look_without_it_imports_neither_a_framework_nor_what_trains() -> None:
    for words in (("inspect", DIGITS), ("inspect", DIGITS, "--json")):
        found = imported(*words)
        assert not {"torch", "tensorflow", "keras", "tf_keras", "onnx", "onnxruntime"} & found
        assert not [name for name in found if name.startswith(("prunectl.training", "prunectl.pruning."))]


def test_weights_alone_are_looked_at_without_a_framework() -> None:
    assert not {"torch", "tensorflow", "keras", "onnxruntime"} & imported("inspect", DIGITS, "--sensitivity")
