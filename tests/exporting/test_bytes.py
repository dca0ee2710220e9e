"""Weights alone, from every format, by bytes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from prunectl.errors import UsageError, WorkError
from prunectl.exporting import onnx_finish
from tests.exporting.exporting import export
from tests.running import FIXTURES, ROOT

STATE = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
EVERY = [
    "digits_cnn.h5",
    "digits_cnn.keras",
    "digits_cnn.onnx",
    "digits_cnn.pt",
    "digits_cnn.pt2",
    "digits_cnn_checkpoint.index",
    "digits_cnn_savedmodel",
    "digits_cnn_torchscript.pt",
]


@pytest.mark.parametrize("source", EVERY)
def test_weights_of_every_format_come_out_to_the_bit(source: str, tmp_path: Path) -> None:
    export(source, tmp_path / "w.safetensors")
    export(source, tmp_path / "w.npz")
    found = load_file(tmp_path / "w.safetensors")
    with np.load(tmp_path / "w.npz") as held:
        other = {name: held[name] for name in held.files}
    assert found.keys() == other.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, other[name], strict=True)
    expected = sorted(float(np.abs(value.numpy().astype(np.float64)).sum()) for value in STATE.values())
    sums = sorted(float(np.abs(array.astype(np.float64)).sum()) for array in found.values() if array.dtype.kind == "f")
    np.testing.assert_allclose(sums, expected, rtol=1e-9)


def test_tflite_has_the_same_weights_beside_its_constants(tmp_path: Path) -> None:
    export("digits_cnn.tflite", tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as held:
        shapes = {held[name].shape for name in held.files}
    assert {(8, 3, 3, 1), (16, 3, 3, 8), (32, 256), (10, 32)} <= shapes


def test_no_framework_is_loaded_for_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prunectl import api;"
        f"api.export('{FIXTURES}/digits_cnn.pt', Path('{tmp_path}/w.safetensors'));"
        "sys.exit(bool({'torch', 'tensorflow', 'onnx', 'keras'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_masks_are_multiplied_in_and_optimizers_left_out(tmp_path: Path) -> None:
    found = export("masks_of_torch_prune.pt", tmp_path / "w.safetensors")
    held = torch.load(FIXTURES / "masks_of_torch_prune.pt", weights_only=True)
    ours = load_file(tmp_path / "w.safetensors")
    expected = (held["conv2.weight_orig"] * held["conv2.weight_mask"]).numpy()
    np.testing.assert_array_equal(ours["conv2.weight"], expected)
    assert any("torch.nn.utils.prune" in remark for remark in found.notes)
    export("checkpoint_with_optimizer.pt", tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as archive:
        assert not [name for name in archive.files if "optim" in name]


def test_half_rounds_as_numpy_does_and_refuses_what_16_bits_do_not_hold(tmp_path: Path) -> None:
    export("digits_cnn.pt", tmp_path / "w.safetensors", half=True, metadata=["author=me"])
    found = load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(found["fc1.weight"], STATE["fc1.weight"].numpy().astype(np.float16), strict=True)
    torch.save({"big": torch.tensor([1e6, 1.0])}, tmp_path / "big.pt")
    with pytest.raises(WorkError, match="big has values beyond 65504"):
        export(tmp_path / "big.pt", tmp_path / "b.npz", half=True)
    assert not (tmp_path / "b.npz").exists()


def test_metadata_and_the_framework_stand_in_the_header(tmp_path: Path) -> None:
    export("digits_cnn.pt", tmp_path / "w.safetensors", metadata=["author=me"])
    head = (tmp_path / "w.safetensors").read_bytes()[:120]
    assert b'"__metadata__":{"author":"me","format":"pt"}' in head


def test_archives_have_no_times_and_packed_ones_are_deflated(tmp_path: Path) -> None:
    export("digits_cnn.h5", tmp_path / "a.npz")
    export("digits_cnn.h5", tmp_path / "b.npz", pack=True)
    with ZipFile(tmp_path / "a.npz") as plain, ZipFile(tmp_path / "b.npz") as packed:
        assert {info.date_time for info in plain.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert all(info.compress_type for info in packed.infolist())
    assert (tmp_path / "b.npz").stat().st_size < (tmp_path / "a.npz").stat().st_size


def test_a_type_that_numpy_has_not_is_named(tmp_path: Path) -> None:
    torch.save({"one": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "b.pt")
    with pytest.raises(UsageError, match="one has the type bfloat16, which npz does not support"):
        export(tmp_path / "b.pt", tmp_path / "b.npz")
    export(tmp_path / "b.pt", tmp_path / "b.safetensors")


def test_what_is_tied_stands_once_for_each_name_in_safetensors_and_tied_in_a_state_dict(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    torch.save({"one": shared, "two": shared}, tmp_path / "t.pt")
    found = export(tmp_path / "t.pt", tmp_path / "t.safetensors")
    assert any("1 tensor shares its bytes" in remark for remark in found.notes)
    export(tmp_path / "t.safetensors", tmp_path / "again.pt")
    both = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(both["one"], both["two"])


@pytest.mark.parametrize("source", ["digits_cnn.pt2", "digits_cnn_torchscript.pt", "digits_cnn.safetensors"])
def test_a_state_dict_is_loaded_without_trust(source: str, tmp_path: Path) -> None:
    export(source, tmp_path / "s.pt")
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


def test_a_whole_module_becomes_a_state_dict_and_its_code_never_runs(tmp_path: Path) -> None:
    export("whole_module.pt", tmp_path / "s.pt", pack=True)
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    assert set(found) == {"0.weight", "0.bias"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.npz", "w.pt"):
        export("digits_cnn_torchscript.pt", tmp_path / name)
        (tmp_path / "other").mkdir(exist_ok=True)
        export("digits_cnn_torchscript.pt", tmp_path / "other" / f"x{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / f"x{name}").read_bytes()


@pytest.mark.parametrize("level", [logging.NOTSET, logging.CRITICAL])
def test_logging_is_as_disabled_after_quantising_as_it_was_before(
    level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loaded = [], onnx.ModelProto()
    silent = cast("Any", SimpleNamespace(scratch=tmp_path))
    monkeypatch.setattr(onnx, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(logging.root.manager, "disable", level)
    found = onnx_finish._through_files(silent, onnx.ModelProto(), lambda *_: seen.append(logging.root.manager.disable))
    assert found is loaded
    assert seen == [max(level, logging.WARNING)]
    assert logging.root.manager.disable == level
