"""TorchScript with weights of 8 bits, which PyTorch alone loads and runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunectl import api
from prunectl.errors import UsageError, WorkError
from prunectl.formats.registry import open_model
from tests.exporting import nets_torch
from tests.exporting.exporting import DIGITS, NET, export, random
from tests.exporting.test_torch import answers, saved, shapes_of, words_of
from tests.running import FIXTURES


def loaded(place: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(place))


@pytest.mark.parametrize("name", nets_torch.NETS)
def test_dense_and_recurrent_weights_are_integers_without_data(name: str, tmp_path: Path) -> None:
    place, net = saved(name, tmp_path)
    found = export(place, tmp_path / "m.torchscript", int8=True, **words_of(name))
    assert any("dense and recurrent layers are 8-bit" in remark for remark in found.notes)
    inputs = random(*((3, *shape) for shape in shapes_of(name)))
    for ours, theirs in zip(answers(loaded(tmp_path / "m.torchscript"), inputs), answers(net, inputs), strict=True):
        assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)
    assert any(tensor.dtype == np.int8 for tensor in open_model(tmp_path / "m.torchscript").tensors)


def test_with_data_convolutions_are_integers_too_and_zeros_stay_zeros(tmp_path: Path) -> None:
    api.prune(FIXTURES / "digits_cnn.pt", tmp_path / "sparse.pt", sparsity=0.6)
    found = export(tmp_path / "sparse.pt", tmp_path / "m.torchscript", int8=True, builder=NET, data=DIGITS)
    assert found.comparison is not None
    assert found.comparison.top1_agreement is not None
    assert found.comparison.top1_agreement > 0.98
    held = open_model(tmp_path / "m.torchscript")
    integers = {tensor.shape: held.read(tensor) for tensor in held.tensors if tensor.dtype == np.int8}
    state = torch.load(tmp_path / "sparse.pt", weights_only=True)
    kernels = [value.numpy() for value in state.values() if value.ndim > 1]
    assert integers.keys() == {kernel.shape for kernel in kernels}
    for kernel in kernels:
        assert (integers[kernel.shape][kernel == 0] == 0).all()
    with np.load(FIXTURES / "digits.npz") as digits:
        images = (digits["x"][:64].astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    assert answers(loaded(tmp_path / "m.torchscript"), [images])[0].shape == (64, 10)


def test_what_shows_no_layers_or_runs_by_its_numbers_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layers that PyTorch can see") as script:
        export("digits_cnn_torchscript.pt", tmp_path / "m.torchscript", int8=True, input=["?,1,8,8"])
    assert "builder='mod:fn'; or to='onnx' supports" in script.value.hint
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.one = torch.nn.Conv1d(3, 2, 1)\n\n    def forward(self, x):\n"
        "        return self.one(x) if x.sum() > 0 else self.one(-x)\n"
    )
    torch.save({"one.weight": torch.randn(2, 3, 1), "one.bias": torch.zeros(2)}, tmp_path / "n.pt")
    np.savez(tmp_path / "d.npz", x=np.ones((8, 3, 4), np.float32))
    words = {"int8": True, "builder": f"{tmp_path}/net.py:Net"}
    with pytest.raises(WorkError, match=r"cannot quantise .* to 8 bits") as failed:
        export(tmp_path / "n.pt", tmp_path / "m.torchscript", data=f"{tmp_path}/d.npz", **words)
    assert "to='onnx'" in failed.value.hint
    with pytest.raises(UsageError, match=r"has no layer whose weights PyTorch can quantise to 8 bits") as empty:
        export(tmp_path / "n.pt", tmp_path / "m.torchscript", input=["?,3,4"], **words)
    assert "data=SPEC" in empty.value.hint
    with pytest.raises(UsageError, match="int8 cannot be used with PyTorch exported program") as other:
        export("digits_cnn.pt", tmp_path / "m.pt2", int8=True)
    assert "onnx, tflite, torchscript" in other.value.hint
