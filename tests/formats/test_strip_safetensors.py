"""Safetensors files without masks and training state, read back with the format's own library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import numpy as safe_numpy
from safetensors import torch as safe_torch
from torch import nn
from torch.nn.utils import prune

from prunectl.errors import InputError
from prunectl.formats.base import RemovedItem, StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.formats.safetensors import strip

EVERYTHING = StripOptions()


def stripped(
    tensors: dict[str, torch.Tensor], tmp_path: Path, wish: StripOptions = EVERYTHING
) -> tuple[dict[str, torch.Tensor], tuple[RemovedItem, ...]]:
    path, target = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    safe_torch.save_file(tensors, path, {"format": "pt"})
    removed = strip(open_model(path), wish, {path: target})
    open_model(target)
    return safe_torch.load_file(target), removed


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_pruned_weights_come_out_as_prune_remove_leaves_them(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[1], "bias", 0.5)
    found, removed = stripped(net.state_dict(), tmp_path)
    prune.remove(net[0], "weight")
    prune.remove(net[1], "bias")
    assert_same(found, net.state_dict())
    assert set(removed) == {
        RemovedItem("0.weight_mask", StripPart.MASKS, 64 * 33 * 4),
        RemovedItem("1.bias_mask", StripPart.MASKS, 8),
        RemovedItem("0.weight_orig", StripPart.WRAPPERS, 0),
        RemovedItem("1.bias_orig", StripPart.WRAPPERS, 0),
    }


def test_parametrizations_and_wrappers_of_nni_go(tmp_path: Path) -> None:
    weight, mask = torch.rand(4, 5), (torch.rand(4, 5) > 0.5)
    rows = torch.tensor([True, False, True, True])
    tensors = {
        "a.parametrizations.weight.original": weight,
        "a.parametrizations.weight.0.mask": mask,
        "b.parametrizations.weight.original": weight + 1,
        "b.parametrizations.weight.0.mask": rows,
        "c.parametrizations.weight.original0": weight + 2,
        "c.parametrizations.weight.original1": weight + 3,
        "d.module.weight": weight + 4,
        "d.module.bias": torch.rand(4),
        "d.weight_mask": mask.float(),
    }
    found, removed = stripped(tensors, tmp_path)
    kept = {name: tensors[name] for name in tensors if name.startswith("c.")}
    assert_same(
        found,
        {
            **kept,
            "a.weight": weight * mask,
            "b.weight": (weight + 1) * rows[:, None],
            "d.weight": (weight + 4) * mask,
            "d.bias": tensors["d.module.bias"],
        },
    )
    assert {row.name for row in removed if row.part is StripPart.WRAPPERS} == {
        "a.parametrizations.weight",
        "b.parametrizations.weight",
        "d.module",
    }


def test_optimizer_gradients_and_averages_go(tmp_path: Path) -> None:
    tensors = {"w": torch.rand(3), "w.grad": torch.rand(3), "optimizer.state.0": torch.rand(2), "ema.w": torch.rand(3)}
    tensors["ema.alone"] = torch.rand(1)
    found, removed = stripped(tensors, tmp_path)
    assert_same(found, {name: tensors[name] for name in ("w", "ema.alone")})
    assert {row.name: row.part for row in removed} == {
        "w.grad": StripPart.GRADIENTS,
        "optimizer.state.0": StripPart.OPTIMIZER,
        "ema.w": StripPart.TRAINING,
    }
    (tmp_path / "out.safetensors").unlink()
    found, removed = stripped(tensors, tmp_path, StripOptions(frozenset({StripPart.GRADIENTS})))
    assert [row.name for row in removed] == ["w.grad"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_is_each_float_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"odd": torch.rand(3, dtype=dtype), "counts": torch.arange(5), "brain": torch.rand(3).bfloat16()}
    tensors["wide"] = torch.rand(300, 500, dtype=dtype)
    found, removed = stripped(tensors, tmp_path, StripOptions(to_half=True))
    assert removed == ()
    # Rounded once; PyTorch takes 64-bit floats to 32 bits on the way.
    expected = {
        name: torch.from_numpy(tensor.numpy().astype(np.float16)) if tensor.dtype == dtype else tensor
        for name, tensor in tensors.items()
    }
    assert_same(found, expected)


def test_a_number_too_big_for_half_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.safetensors holds 1e\+06 in w, but the largest 16-bit float"):
        stripped({"w": torch.tensor([1.0, 1e6])}, tmp_path, StripOptions(to_half=True))


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.safetensors holds the mask w_mask, whose shape does not match"):
        stripped({"w_orig": torch.ones(4, 2), "w_mask": torch.ones(3)}, tmp_path)


def test_nothing_to_strip_is_a_plain_copy(tmp_path: Path) -> None:
    _, removed = stripped({"w": torch.ones(2)}, tmp_path)
    assert removed == ()
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_metadata_and_alignment_are_kept(tmp_path: Path) -> None:
    path, target = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    arrays = {
        "w_orig": np.ones(3, np.float32),
        "w_mask": np.ones(3, np.bool_),
        "n": np.ones(1, np.int64),
        "e": np.ones(0),
    }
    safe_numpy.save_file(arrays, path, {"format": "np", "note": "é"})
    strip(open_model(path), StripOptions(to_half=True), {path: target})
    raw = target.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "np", "note": "é"}
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    for facts in header.values():
        assert facts["data_offsets"][0] % {"F16": 2, "I64": 8}[facts["dtype"]] == 0
    assert safe_numpy.load_file(target)["w"].tolist() == [1, 1, 1]
