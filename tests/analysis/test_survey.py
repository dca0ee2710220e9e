"""Totals and parts of a whole model, each stored number counted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prunectl.analysis.patterns import NMPattern
from prunectl.analysis.stats import ModelStats, find_tied_tensors, measure_stats, ratio
from prunectl.formats.base import WEIGHTS, Role
from prunectl.formats.registry import open_model
from tests.analysis.made import model_of, tensor_of, thinned
from tests.contract import Array, read_all
from tests.running import FIXTURES

MODELS = sorted(
    path
    for path in [*FIXTURES.iterdir(), FIXTURES / "external_data" / "model.onnx"]
    if path.name not in {"README.md", "digits.npz", "external_data", "__pycache__"}
    and path.suffix != ".py"
    and not path.name.endswith("-00000-of-00001")
)


def stats_for_report(path: Path) -> ModelStats:
    model = open_model(path)
    return measure_stats(model, model.tensors)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_the_parts_of_a_model_add_up_to_its_bytes(path: Path) -> None:
    found = stats_for_report(path)
    files = open_model(path).files
    assert found.bytes.raw == sum(file.stat().st_size for file in files)
    assert sum(part.bytes for part in found.parts) == found.bytes.raw
    assert all(part.bytes >= 0 for part in found.parts)
    assert next(part for part in found.parts if part.name == "weights").bytes > 0


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_every_row_has_the_zeros_that_numpy_counts(path: Path) -> None:
    arrays = read_all(path)
    found = stats_for_report(path)
    assert [row.name for row in found.layers] == list(arrays)
    for row in found.layers:
        array = arrays[row.name]
        assert row.params == array.size
        assert row.zeros == array.size - np.count_nonzero(array)
    counted = [row for row in found.layers if row.role in WEIGHTS and not row.tied_to]
    assert found.params.total == sum(row.params for row in counted)
    assert found.params.zero == sum(row.zeros or 0 for row in counted)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_dead_channels_are_those_whose_weights_are_all_zero(path: Path) -> None:
    model, arrays = open_model(path), read_all(path)
    for tensor, row in zip(model.tensors, measure_stats(model, model.tensors).layers, strict=True):
        if tensor.out_axis is not None and tensor.size:
            channels = np.moveaxis(arrays[tensor.name], tensor.out_axis, 0).reshape(row.channels or 0, -1)
            assert row.dead_channels == np.count_nonzero(~(channels != 0).any(axis=1))


def test_without_zeros_nothing_is_read_and_nothing_claimed(tmp_path: Path) -> None:
    tensor = tensor_of(tmp_path / "missing", thinned((4, 4)), out_axis=0)
    (tmp_path / "m").write_bytes(b"")
    model = replace(model_of(tmp_path / "m", tensor))
    found = measure_stats(model, model.tensors, has_zeros=False)
    assert (found.params.total, found.params.zero, found.params.prunable_zero) == (16, None, None)
    assert found.sparsity is None
    assert found.layers[0].sparsity is None


def test_tied_tensors_count_once() -> None:
    found = stats_for_report(FIXTURES / "tied_and_views.pt")
    assert found.params.total == 24
    assert {row.name: row.tied_to for row in found.layers} == {
        "encoder.weight": "",
        "decoder.weight": "encoder.weight",
        "turned.weight": "encoder.weight",
        "row.weight": "encoder.weight",
    }


def stored(path: Path, array: Array, **views: tuple[int, tuple[int, ...], tuple[int, ...] | None]) -> ModelStats:
    """Survey views of one storage: where each begins, its shape and its strides."""
    path.write_bytes(array.tobytes())
    whole = tensor_of(path, array)
    tensors = [
        replace(whole, name=name, start=start, shape=shape, strides=strides)
        for name, (start, shape, strides) in views.items()
    ]
    model = model_of(path, *tensors)
    return measure_stats(model, model.tensors)


def test_views_of_different_parts_of_one_storage_all_count(tmp_path: Path) -> None:
    array = thinned((10, 4))
    found = stored(tmp_path / "m", array, first=(0, (4, 4), None), second=(16, (4, 4), None), bias=(32, (8,), None))
    assert [row.tied_to for row in found.layers] == ["", "", ""]
    assert (found.params.total, found.params.zero) == (40, array.size - np.count_nonzero(array))


def test_a_part_that_comes_before_the_whole_is_the_one_that_is_tied(tmp_path: Path) -> None:
    array = thinned((6, 4))
    found = stored(tmp_path / "m", array, part=(8, (2, 4), None), whole=(0, (6, 4), None), turned=(0, (4, 6), (1, 4)))
    assert [row.tied_to for row in found.layers] == ["whole", "", "whole"]
    assert found.params.total == 24


def test_recurrent_weights_in_one_buffer_all_count(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.LSTM(3, 4)
    buffer = torch.cat([weight.detach().reshape(-1) for weight in net.parameters()])
    state, begin = {}, 0
    for name, weight in net.named_parameters():
        state[name] = buffer[begin : begin + weight.numel()].view(weight.shape)
        begin += weight.numel()
    torch.save(state, tmp_path / "m.pt")
    assert stats_for_report(tmp_path / "m.pt").params.total == sum(weight.numel() for weight in net.parameters())


def test_a_weight_stands_for_what_shares_its_bytes_with_the_optimizer(tmp_path: Path) -> None:
    array = thinned((4, 4))
    weight = tensor_of(tmp_path / "m", array, "w")
    state = replace(weight, name="state", role=Role.OPTIMIZER)
    assert find_tied_tensors([state, weight]) == {"state": "w"}


def test_masks_and_optimizer_are_parts_of_their_own() -> None:
    parts = {part.name: part for part in stats_for_report(FIXTURES / "checkpoint_with_optimizer.pt").parts}
    assert parts["optimizer"].bytes > parts["weights"].bytes
    assert parts["optimizer"].is_dead
    masks = {part.name: part for part in stats_for_report(FIXTURES / "masks_of_torch_prune.pt").parts}
    assert masks["masks"].is_dead
    assert not masks["weights"].is_dead


def test_a_pattern_is_looked_for_in_prunable_weights_alone() -> None:
    model = open_model(FIXTURES / "two_of_four_zero.safetensors")
    (row,) = measure_stats(model, model.tensors, pattern=NMPattern(2, 4)).layers
    assert row.conforming == 1.0
    model = open_model(FIXTURES / "digits_cnn.pt")
    rows = measure_stats(model, model.tensors, pattern=NMPattern(2, 4)).layers
    assert all(row.conforming is None for row in rows if not row.is_prunable)
    assert all(row.conforming == 0.0 for row in rows if row.name.startswith("fc") and row.is_prunable)


def test_each_stored_byte_is_counted_once_for_whoever_watches() -> None:
    model = open_model(FIXTURES / "digits_cnn.safetensors")
    counted: list[int] = []
    measure_stats(model, model.tensors, tick=counted.append)
    assert sum(counted) == sum(tensor.storage.stored_bytes for tensor in model.tensors)


def test_a_share_of_nothing_is_nothing_and_of_the_unknown_unknown() -> None:
    assert (ratio(1, 4), ratio(0, 0), ratio(None, 4)) == (0.25, 0.0, None)


@pytest.mark.parametrize(("kind", "counted"), [("int8", 6), ("uint8", 0), ("int32", 0), ("float16", 6)])
def test_zeros_of_kernels_in_signed_bytes_count_as_those_of_floats(kind: str, counted: int, tmp_path: Path) -> None:
    # Unsigned bytes have their zero elsewhere.
    array = np.array([[0, 1, 0], [0, 2, 3]], kind)
    (tmp_path / "m.bin").write_bytes(array.tobytes())
    tensor = tensor_of(tmp_path / "m.bin", array)
    found = measure_stats(model_of(tmp_path / "m.bin", tensor), (tensor,)).params
    assert (found.prunable, found.prunable_zero) == (counted, counted // 2)
