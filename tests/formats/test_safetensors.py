"""Safetensors files, written by the safetensors library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prunectl
from prunectl.errors import InputError
from prunectl.formats import safetensors, state_dict
from prunectl.formats.registry import open_model
from prunectl.formats.workers import Workers
from tests.contract import Array, FormatContract, raw
from tests.running import here


class TestSafetensors(FormatContract):
    format = "safetensors"
    name = "model.safetensors"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        save_file(arrays, path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return load_file(path)


def craft(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.int8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_every_type_of_number_is_read_as_it_is(tmp_path: Path, dtype: type) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    save_file({"w": values}, tmp_path / "m.safetensors")
    model = open_model(tmp_path / "m.safetensors")
    assert model.tensors[0].dtype == dtype
    assert raw(model.read(model.tensors[0])) == raw(values)


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    save_file({"one": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32)}, tmp_path / "m.safetensors")
    model = open_model(tmp_path / "m.safetensors")
    arrays = {tensor.name: model.read(tensor) for tensor in model.tensors}
    assert arrays["one"] == 3
    assert arrays["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), "overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "gap"),
        ({"a": entry(0, 4, [1] * 100)}, bytes(4), "claims the shape"),
        ({"a": entry(0, 400, [100])}, bytes(12), "truncated"),
        ({"a": entry(0, 4, [1])}, bytes(400), "but the file ends at"),
        ({"a": entry(0, 8, [3])}, bytes(8), "does not match"),
        ({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "does not read"),
        ({"a": {"dtype": "F32"}}, b"", "does not give the offsets of a"),
        ({"a": entry(0, -4, [-1])}, b"", "does not give the offsets of a"),
        (b'{"a": ' * 100_000, b"", "nested too deep"),
        (b"{not json}", b"", "not JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes, complaint: str) -> None:
    path = craft(tmp_path / "m.safetensors", header, data)
    with pytest.raises(InputError, match=complaint):
        open_model(path)


def test_a_header_of_two_to_the_sixty_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="claims a header of 1152921504606846976 bytes"):
        open_model(path)


def test_many_shards_are_read_once_for_each_opening_and_written_by_one_job_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [f"model-{number:05}-of-00040.safetensors" for number in range(40)]
    weight_map = {f"{number}.{i}.weight": shards[number] for number in range(40) for i in range(6)}
    for number, shard in enumerate(shards):
        rows = np.random.default_rng(number).standard_normal((6, 4, 8)).astype(np.float32)
        save_file({f"{number}.{i}.weight": row for i, row in enumerate(rows)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **named: calls.update([name]) or function(*args, **named)

    monkeypatch.setattr(safetensors, "parse_object", counted("headers", safetensors.parse_object))
    monkeypatch.setattr(state_dict, "_describe", counted("tensors", state_dict._describe))
    monkeypatch.setattr(Workers, "submit", counted("jobs", Workers.submit))
    model = open_model(tmp_path)
    assert calls == {"headers": 40, "tensors": 240}
    output = tmp_path / "pruned" / "model.safetensors.index.json"
    output.parent.mkdir()
    assert here("prune", tmp_path, "-o", output, "-s", "50%").code == 0
    assert (calls["headers"], calls["tensors"]) == (3 * 40, 3 * 240), "the input once more, and the output"
    assert calls["jobs"] < 60, "as many as shards, and a few for all"
    assert [(tensor.name, tensor.out_axis) for tensor in model.tensors] == [(name, 0) for name in weight_map]


CONV1D = {
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_attn.bias": (24,),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.c_proj.bias": (8,),
    "h.0.mlp.c_proj.weight": (32, 8),
    "h.0.mlp.c_proj.bias": (8,),
}


@pytest.mark.parametrize(
    ("shapes", "in_axes"),
    [
        (CONV1D, {name: 0 for name in CONV1D if name.endswith("weight")}),
        # The same names with linear layers, as in GPT-BigCode.
        (
            {name: shape[::-1] for name, shape in CONV1D.items()},
            {name: 1 for name in CONV1D if name.endswith("weight")},
        ),
        (
            {
                "up.weight": (8, 12, 2, 2),
                "up.bias": (12,),
                "grouped.weight": (8, 6, 3),
                "grouped.bias": (12,),
                "plain.weight": (12, 8, 2, 2),
                "plain.bias": (12,),
            },
            {"up.weight": 0, "grouped.weight": 0, "plain.weight": 1},
        ),
        ({"x.kernel": (8, 12), "x.bias": (12,), "y.kernel": (3, 3, 8, 4)}, {"x.kernel": 0, "y.kernel": 2}),
        (
            {"m.experts.gate_up_proj": (2, 8, 24), "m.experts.down_proj": (2, 12, 8)},
            {"m.experts.gate_up_proj": 1, "m.experts.down_proj": 1},
        ),
        (
            {"m.experts.gate_up_proj": (2, 24, 8), "m.experts.down_proj": (2, 8, 12)},
            {"m.experts.gate_up_proj": 2, "m.experts.down_proj": 2},
        ),
        (
            {"moe.input_linear.weight": (2, 24, 8), "moe.output_linear.weight": (2, 8, 12)},
            {"moe.input_linear.weight": 2, "moe.output_linear.weight": 2},
        ),
        (
            {"a.experts.input_linear.weight": (4, 16, 32), "a.experts.output_linear.weight": (4, 32, 16)},
            {"a.experts.input_linear.weight": 2, "a.experts.output_linear.weight": 2},
        ),
        ({"conv.weight": (4, 16, 32), "conv.bias": (32,)}, {"conv.weight": 1}),
        ({"a.query.kernel": (16, 4, 8), "a.query.bias": (4, 8)}, {"a.query.kernel": 0}),
        ({**CONV1D, "q_attn.weight": (8, 8), "q_attn.bias": (8,)}, {"q_attn.weight": 0}),
        (
            {
                "old.weight_v": (8, 12, 4),
                "old.weight_g": (8, 1, 1),
                "old.bias": (12,),
                "new.parametrizations.weight.original1": (8, 12, 4),
                "new.bias": (12,),
                "new.parametrizations.weight.original0": (8, 1, 1),
            },
            {"old.weight_v": 0, "new.parametrizations.weight.original1": 0},
        ),
    ],
    ids=[
        *("Conv1D", "Linear", "ConvTranspose", "Flax", "Llama 4", "Mixtral", "GraniteMoe", "JetMoe", "RGCNConv"),
        *("Flax attention", "square Conv1D", "ConvTranspose with weight_norm"),
    ],
)
def test_two_of_four_zeros_lie_along_the_inputs(
    shapes: dict[str, tuple[int, ...]], in_axes: dict[str, int], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "m.safetensors")
    prunectl.prune(tmp_path / "m.safetensors", tmp_path / "out.safetensors", pattern="2:4")
    pruned = load_file(tmp_path / "out.safetensors")
    for name, axis in in_axes.items():
        groups = np.moveaxis(weights[name], axis, -1).reshape(-1, 4)
        rank = np.argsort(np.argsort(np.abs(groups), axis=1), axis=1)
        expected = np.where(rank < 2, np.float32(0), groups)
        np.testing.assert_array_equal(np.moveaxis(pruned[name], axis, -1).reshape(-1, 4), expected)
