"""`prunectl inspect`, beside what the frameworks and NumPy say of the same files."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from prunectl.formats.registry import open_model
from tests.contract import read_all
from tests.running import FIXTURES, at_terminal, here, without_colors

DIGITS = sorted(
    path for path in FIXTURES.glob("digits_cnn*") if path.suffix not in {".py", ".tflite"} and ".data-" not in path.name
)
ALL = [
    path
    for path in sorted(FIXTURES.iterdir())
    if path.suffix in {".h5", ".keras", ".pt", ".pt2", ".onnx", ".safetensors", ".tflite", ".index"}
]
PARAMETERS = 80 + 1168 + 8224 + 330


def inspected(path: Path, *words: str) -> dict[str, Any]:
    """Return what the JSON says of one model."""
    found = here("inspect", path, "--json", *words)
    assert found.code == 0, found.out
    model: dict[str, Any] = found.json["models"][0]
    return model


@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.name)
def test_one_network_has_the_same_parameters_in_every_format(path: Path) -> None:
    found = inspected(path)
    assert found["params"]["total"] in {PARAMETERS, PARAMETERS + 1}  # some count the optimizer's learning rate
    assert found["params"]["prunable"] == PARAMETERS - (8 + 16 + 32 + 10)
    assert {row["layer"] for row in found["layers"] if row["role"] == "kernel"} == {"conv1", "conv2", "fc1", "fc2"}


def test_the_totals_equal_those_of_the_framework() -> None:
    state = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
    found = inspected(FIXTURES / "digits_cnn.pt")
    assert found["params"]["total"] == sum(tensor.numel() for tensor in state.values())
    assert {row["name"]: tuple(row["shape"]) for row in found["layers"]} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_zeros_equal_numpy_on_every_fixture(path: Path) -> None:
    model = open_model(path)
    arrays = {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors}
    for row in inspected(path)["layers"]:
        array = arrays[row["name"]]
        assert row["zeros"] == array.size - np.count_nonzero(array)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_the_parts_add_up_to_the_file(path: Path) -> None:
    found = inspected(path)
    assert sum(part["bytes"] for part in found["parts"]) == found["bytes"]["raw"]


def test_without_zeros_no_weight_is_counted_and_nothing_is_hashed() -> None:
    found = inspected(FIXTURES / "digits_cnn.pt", "--no-zeros")
    assert found["params"]["zero"] is None
    assert found["sparsity"] is None
    assert found["sha256"] is None
    assert all(row["zeros"] is None for row in found["layers"])


def test_of_what_a_disk_reads_in_minutes_zeros_are_counted_when_asked_for(tmp_path: Path) -> None:
    """Full of holes, so that it takes no room."""
    path, nbytes = tmp_path / "big.safetensors", 65 << 30
    tensors = {
        "a.weight": {"dtype": "I8", "shape": [nbytes >> 20, 1 << 20], "data_offsets": [0, nbytes]},
        "b.weight": {"dtype": "I8", "shape": [4, 4], "data_offsets": [nbytes, nbytes + 16]},
    }
    header = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes + 16)
    done = here("inspect", path)
    assert done.code == 0, done.err
    said = "Zeros were not counted"
    assert f"{said}, as that would read 69.8 GB: add --zeros to count them." in done.err
    (model,) = here("inspect", path, "--json").json["models"]
    assert model["advice"] == [f"{said}, as that would read 69.8 GB: add --zeros to count them."]
    assert said not in here("inspect", path, "--no-zeros").err
    assert said not in here("inspect", path, "--layers", "b").err
    assert said not in here("inspect", FIXTURES / "digits_cnn.safetensors").err


def test_a_model_wrapped_by_tfmot_has_the_sparsity_of_its_kernels(tmp_path: Path) -> None:
    found = inspected(FIXTURES / "wrapped_by_tfmot.h5")
    with h5py.File(FIXTURES / "wrapped_by_tfmot.h5") as file:
        kernels = [file[f"model_weights/prune_low_magnitude_{name}/{name}/kernel:0"][()] for name in ("conv1", "fc1")]
    assert found["params"]["prunable"] == PARAMETERS - 66
    rows = {row["layer"]: row for row in found["layers"] if row["role"] == "kernel"}
    assert [rows["conv1"]["zeros"], rows["fc1"]["zeros"]] == [int((kernel == 0).sum()) for kernel in kernels]


def test_masks_and_optimizers_are_dead_weight() -> None:
    dead = {part["name"] for part in inspected(FIXTURES / "masks_of_torch_prune.pt")["parts"] if part["is_dead"]}
    assert dead == {"masks"}
    dead = {part["name"] for part in inspected(FIXTURES / "checkpoint_with_optimizer.pt")["parts"] if part["is_dead"]}
    assert dead == {"optimizer"}


def test_tied_tensors_count_once() -> None:
    found = inspected(FIXTURES / "tied_and_views.pt")
    assert found["params"]["total"] == 24
    assert [row["tied_to"] for row in found["layers"]] == [None, *["encoder.weight"] * 3]


def test_a_pattern_is_measured_along_the_inputs() -> None:
    path = FIXTURES / "two_of_four_zero.safetensors"
    (row,) = inspected(path, "--pattern", "2:4")["layers"]
    assert row["conforming"] == 1
    (row,) = inspected(path, "--pattern", "3:4")["layers"]
    weights = load_file(path)["fc.weight"]
    assert row["conforming"] == np.mean((weights.reshape(-1, 4) == 0).sum(axis=1) >= 3)


def test_layers_can_be_chosen_by_glob_and_by_expression() -> None:
    for selector in ("conv*", "re:^conv[12]", "re:conv"):
        chosen = inspected(FIXTURES / "digits_cnn.onnx", "--layers", selector)
        assert {row["layer"] for row in chosen["layers"]} == {"conv1", "conv2"}


@pytest.mark.parametrize(
    ("order", "key"),
    [
        ("size", lambda row: -row["bytes"]),
        ("params", lambda row: -row["params"]),
        ("sparsity", lambda row: -row["sparsity"]),
        ("name", lambda row: row["name"]),
    ],
)
def test_tensors_can_be_sorted(order: str, key: Any) -> None:
    rows = inspected(FIXTURES / "masks_of_torch_prune.pt", "--sort", order)["layers"]
    assert [key(row) for row in rows] == sorted(key(row) for row in rows)


def test_the_histogram_counts_every_prunable_weight() -> None:
    found = inspected(FIXTURES / "masks_of_torch_prune.pt", "--hist")
    bars = found["histogram"]
    assert bars["zero"] + bars["below"] + sum(bars["counts"]) + bars["not_finite"] == found["params"]["prunable"]
    assert bars["zero"] == found["params"]["prunable_zero"]


def test_flops_are_twice_the_multiply_accumulates() -> None:
    found = inspected(FIXTURES / "digits_cnn.onnx", "--flops")
    assert found["macs"] == 36 * 8 * 9 + 16 * 16 * 8 * 9 + 256 * 32 + 32 * 10
    rows = here("inspect", FIXTURES / "digits_cnn.onnx", "--flops").rows
    assert sum(int(row[-1]) for row in rows if row[-1] != "-") == 2 * found["macs"]


def test_flops_of_a_file_without_a_graph_are_refused() -> None:
    found = here("inspect", FIXTURES / "digits_cnn.safetensors", "--flops")
    assert found.code == 3
    assert "no graph to count operations in" in found.err


def test_why_the_file_is_not_smaller_is_said_unasked() -> None:
    for name, sentence in (
        ("two_of_four_zero.safetensors", "in this format a zero takes as many bytes"),
        ("masks_of_torch_prune.pt", "still holds pruning wrappers"),
        ("every_variable_twice", "twice"),
    ):
        assert sentence in here("inspect", FIXTURES / name).err


def test_the_next_step_from_masks_around_layers_that_no_file_describes_works(tmp_path: Path) -> None:
    path, ones, folder = tmp_path / "m.weights.h5", np.ones((8, 8), np.float32), "layers/prune_low_magnitude"
    with h5py.File(path, "w") as file:
        for number, array in enumerate((ones, ones, np.float32(0.5), np.int64(3))):
            file[f"{folder}/vars/{number}"] = array
        file[f"{folder}/layer/vars/0"] = file["optimizer/vars/1"] = ones
        file["optimizer/vars/0"] = np.int64(3)
    said = here("inspect", path)
    assert "They cannot be removed" in said.err
    assert "`prunectl strip --only optimizer,training` removes it" in said.err
    last = here("inspect", path, "--format", "human").out.splitlines()[-1]
    assert here(*shlex.split(last.removeprefix("Next: prunectl "))).code == 0


def test_quiet_says_no_notes() -> None:
    loud, quiet = (here("inspect", FIXTURES / "masks_of_torch_prune.pt", *words) for words in ((), ("-q",)))
    assert quiet.out == loud.out
    assert (quiet.err, quiet.code) == ("", 0)
    assert loud.err
    assert "* " not in here("inspect", FIXTURES / "masks_of_torch_prune.pt", "-q", "--format", "human").out


def test_code_that_a_framework_would_run_is_named_and_not_run() -> None:
    assert inspected(FIXTURES / "whole_module.pt")["about"]["code"]
    assert inspected(FIXTURES / "lambda_layer.keras")["about"]["code"] == ["Lambda layer double"]


def test_csv_and_markdown_hold_the_same_rows() -> None:
    plain = here("inspect", FIXTURES / "digits_cnn.pt").rows
    commas = here("inspect", FIXTURES / "digits_cnn.pt", "--format", "csv").out.splitlines()
    bars = here("inspect", FIXTURES / "digits_cnn.pt", "--format", "markdown").out.splitlines()
    assert [[cell or "-" for cell in line.split(",")] for line in commas[1:]] == plain
    assert len(bars) == len(plain) + 2
    assert all(line.startswith("| ") for line in bars)


def test_no_text_in_csv_is_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+a", "-a+1", "@SUM(A1)", "\t=1", "\r=1", "-1.5", "+2e3", "-", "a=1", "=a,b"]
    save_file({name: np.ones(3, np.float32) for name in names}, tmp_path / "m.safetensors")
    commas = here("inspect", tmp_path / "m.safetensors", "--format", "csv").out
    shown = {row["tensor"] for row in csv.DictReader(io.StringIO(commas))}
    assert shown == {
        "'=cmd|' /C calc'!A0", "'+a", "'-a+1", "'@SUM(A1)", "\\t=1", "\\r=1", "-1.5", "+2e3", "-", "a=1", "'=a,b"
    }  # fmt: skip
    plain = {row[1] for row in here("inspect", tmp_path / "m.safetensors", "--format", "plain").rows}
    assert plain == {cell.removeprefix("'") for cell in shown}


def test_rows_limits_a_table_on_a_terminal_and_says_so() -> None:
    shown = without_colors(at_terminal("inspect", FIXTURES / "digits_cnn.pt", "--tensors", "-n", "3").out)
    assert "5 more rows: -n 0 shows all" in shown
    assert "more rows" not in at_terminal("inspect", FIXTURES / "digits_cnn.pt", "-n", "0").out


def test_rows_limits_the_list_of_tensors_and_no_part_or_histogram() -> None:
    shown, cut = (
        here("inspect", FIXTURES / "digits_cnn.pt", "--tensors", "--hist", "-n", rows, "--format", "human").out
        for rows in "01"
    )
    pairs = list(zip(shown.split("\n\n"), cut.split("\n\n"), strict=True))
    assert [before == after for before, after in pairs] == [True, True, False, True]
    assert "|weight|" in pairs[3][0]
    assert pairs[2][1].endswith("7 more rows: -n 0 shows all")


def test_bytes_are_written_in_the_units_asked_for() -> None:
    raw = (FIXTURES / "digits_cnn.pt").stat().st_size
    assert f"{raw / 1024:.1f} KiB" in at_terminal("inspect", FIXTURES / "digits_cnn.pt", "--units", "iec").out
    assert f" {raw} " in at_terminal("inspect", FIXTURES / "digits_cnn.pt", "--units", "bytes", "--color", "never").out


def test_an_onnx_model_has_the_initializers_that_onnx_reads() -> None:
    graph = onnx.load(FIXTURES / "digits_cnn.onnx").graph
    assert {row["name"] for row in inspected(FIXTURES / "digits_cnn.onnx")["layers"]} == {
        tensor.name for tensor in graph.initializer
    }


def test_a_part_of_a_saved_model_is_told_from_a_model() -> None:
    folder = FIXTURES / "digits_cnn_savedmodel"
    for part, sentence in {
        "saved_model.pb": f"is the graph of a SavedModel: name its folder, {folder}",
        "keras_metadata.pb": "is a part of a TensorFlow model",
        "variables/variables.data-00000-of-00001": "is a part of a TensorFlow model",
    }.items():
        ran = here("inspect", folder / part)
        assert (ran.code, ran.out) == (3, "")
        assert sentence in ran.err


def test_the_index_of_shards_of_keras_sends_to_the_shards(tmp_path: Path) -> None:
    (tmp_path / "model.weights.json").write_text('{"weight_map": {"/layers/dense/vars": ["model_00000.weights.h5"]}}')
    ran = here("inspect", tmp_path / "model.weights.json")
    assert (ran.code, "shards that Keras wrote" in ran.err) == (3, True)


def test_what_is_wrong_with_standard_input_is_told_of_it() -> None:
    ran = here("inspect", "-", stdin=b"text\n")
    assert (ran.code, ran.err.splitlines()[0]) == (3, "error: standard input is text, not a model")
    ran = here("inspect", "-", "--layers", "nothing", stdin=(FIXTURES / "digits_cnn.pt").read_bytes())
    assert ran.code == 2
    assert "error: no layer of standard input matches 'nothing'\n" in ran.err


def test_what_is_not_all_zero_is_never_called_a_hundred_percent(tmp_path: Path) -> None:
    weights = np.zeros((40, 25), np.float32)
    for one, share in ((1, "99%"), (0, "100%")):
        weights[0, 0] = one
        save_file({"a.weight": weights}, tmp_path / "m.safetensors")
        assert f"{share} of the prunable weights are zero" in here("inspect", tmp_path / "m.safetensors").err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("https://example.org/a/model.h5", "curl -LO https://example.org/a/model.h5"),
        ("hf://org/name", "hf download org/name"),
        ("s3://bucket/model.pt", "aws s3 cp s3://bucket/model.pt ."),
    ],
)
@pytest.mark.parametrize(
    "command",
    [("export", "-o", "out.npz"), ("eval", "--data", "a.npz"), ("verify", "--against", "b.pt"), ("bench",)],
    ids=lambda words: words[0],
)
def test_a_url_is_told_from_a_file_that_is_not_there(
    command: tuple[str, ...], word: str, hint: str, tmp_path: Path
) -> None:
    done = here(command[0], word, *command[1:], cwd=tmp_path)
    assert done.code == 2
    assert f"{word} is a URL, and {command[0]} reads only files: download it first" in done.err
    assert hint in done.err


WEIGHTS = {"a.weight": torch.ones(8, 4), "a.bias": torch.ones(8), "b.weight": torch.ones(2, 8)}
TWICE: dict[str, tuple[Any, str, str]] = {
    "F5-TTS": (
        {
            "model_state_dict": WEIGHTS,
            "ema_model_state_dict": {f"ema_model.{name}": one * 2 for name, one in WEIGHTS.items()},
            "optimizer_state_dict": {"state": {}, "param_groups": []},
        },
        "model_state_dict",
        "ema_model_state_dict",
    ),
    "timm": ({"state_dict": WEIGHTS, "state_dict_ema": WEIGHTS}, "state_dict", "state_dict_ema"),
    "Stable Diffusion": (
        {
            "state_dict": {
                **{f"model.{name}": one for name, one in WEIGHTS.items()},
                **{f"model_ema.{name.replace('.', '')}": one * 2 for name, one in WEIGHTS.items()},
            }
        },
        "state_dict.model",
        "state_dict.model_ema",
    ),
}


@pytest.mark.parametrize("layout", TWICE)
def test_weights_that_are_in_a_file_twice_are_named_with_both_places(layout: str, tmp_path: Path) -> None:
    root, trained, average = TWICE[layout]
    torch.save({name: _copied(one) for name, one in root.items()}, tmp_path / "m.pt")
    found = here("inspect", tmp_path / "m.pt", "--format", "human")
    pruned = here(
        "prune", tmp_path / "m.pt", "-s", "50%", "--scope", "layer", "-o", tmp_path / "out.pt", "--format", "human"
    )
    for done in (found, pruned):
        assert done.code == 0, done.err
        text = " ".join(f"{done.out} {done.err}".split())
        assert f"The file holds the weights twice: {trained} and {average}, their average (3 tensors)" in text
    kernels = [t for t in read_all(tmp_path / "out.pt").items() if t[0].endswith(("a.weight", "aweight"))]
    assert [int((array == 0).sum()) for _, array in kernels] == [16, 16]


def _copied(held: Any) -> Any:
    return {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in held.items()}


def test_one_copy_of_the_weights_is_not_called_two(tmp_path: Path) -> None:
    torch.save({"state_dict": {"ema.weight": torch.ones(3, 4), **WEIGHTS}}, tmp_path / "m.pt")
    assert "twice" not in here("inspect", tmp_path / "m.pt", "--format", "human").out


def overview(path: Path, *words: str) -> list[str]:
    """Return the lines that a terminal shows of the layers and of what is summed up."""
    shown = here("inspect", path, "--format", "human", *words).out
    return shown[shown.index("\ntensor") + 1 :].partition("\nNext: ")[0].splitlines()


def test_a_terminal_gets_a_row_for_each_kernel_and_a_line_for_the_rest(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Embedding(5, 6))
    optimizer = torch.optim.Adam(net.parameters())
    net[1](net[0](torch.ones(2, 3, 8, 8))).sum().backward()
    optimizer.step()
    torch.save({"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    lines = [line.split("  ")[0] for line in overview(tmp_path / "m.pt")]
    assert lines[1:4] == ["state_dict.0.weight", "state_dict.2.weight", "all"]
    assert {"1 bias", "2 norm parameters", "3 batch-norm statistics", "12 optimizer slots"} <= set(lines)
    assert "--tensors lists each of them." in " ".join(overview(tmp_path / "m.pt"))
    assert len(here("inspect", tmp_path / "m.pt").rows) == len(inspected(tmp_path / "m.pt")["layers"]) == 20


def test_what_is_summed_up_has_its_bytes_and_share_of_the_file() -> None:
    path = FIXTURES / "digits_cnn.safetensors"
    (line,) = [line for line in overview(path) if line.startswith("4 biases")]
    size = sum(row["bytes"] for row in inspected(path)["layers"] if row["role"] == "bias")
    assert line.split()[2:] == [str(size), "B", f"{100 * size / path.stat().st_size:.1f}", "%"]


def test_every_tensor_is_listed_for_who_asks_or_names_some() -> None:
    names = {row["name"] for row in inspected(FIXTURES / "digits_cnn.pt")["layers"]}
    assert {line.split()[0] for line in overview(FIXTURES / "digits_cnn.pt", "--tensors")} == {"tensor", *names, "all"}
    chosen = overview(FIXTURES / "digits_cnn.pt", "--layers", "*.bias")
    assert {line.split()[0] for line in chosen[1:-1]} == {name for name in names if name.endswith("bias")}


def test_two_comes_before_ten_where_a_file_has_the_order_of_the_alphabet(tmp_path: Path) -> None:
    names = [f"block{at}.weight" for at in range(12)]
    save_file({name: np.ones((4, 4), np.float32) for name in names}, tmp_path / "m.safetensors")
    assert [line.split()[0] for line in overview(tmp_path / "m.safetensors")[1:-1]] == names
    rows = here("inspect", tmp_path / "m.safetensors").rows
    assert [row[1] for row in rows] == [row["name"] for row in inspected(tmp_path / "m.safetensors")["layers"]]
    net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("stem10", "stem2", "head", "body")})
    torch.save(net.state_dict(), tmp_path / "m.pt")
    assert [line.split()[0] for line in overview(tmp_path / "m.pt")[1:-1]] == list(net.state_dict())


def test_rows_that_are_sorted_stay_sorted() -> None:
    path = FIXTURES / "digits_cnn.pt"
    kernels = [row["name"] for row in inspected(path, "--sort", "size")["layers"] if row["role"] == "kernel"]
    assert [line.split()[0] for line in overview(path, "--sort", "size")[1:5]] == kernels
