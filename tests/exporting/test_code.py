"""Code beside weights of PyTorch: a class that a process takes which has nothing but torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunectl.errors import UsageError, WorkError
from tests.exporting import nets_torch
from tests.exporting.exporting import DIGITS, NET, export, random
from tests.exporting.test_torch import answers, saved, shapes_of, words_of
from tests.running import FIXTURES


def made(code: Path) -> Any:
    """Return the class in a file of Python."""
    spec = importlib.util.spec_from_file_location(code.stem, code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = [one for one in vars(module).values() if isinstance(one, type)]
    return found


@pytest.mark.parametrize("name", nets_torch.NETS)
def test_the_class_and_the_weights_alone_answer_as_the_network(name: str, tmp_path: Path) -> None:
    place, net = saved(name, tmp_path)
    found = export(place, tmp_path / "out.pt", code=True, **words_of(name))
    assert found.comparison is not None
    assert "prunectl" not in (tmp_path / "out.py").read_text().replace("written by prunectl", "")
    module = made(tmp_path / "out.py")().eval()
    module.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    for batch in (1, 5):
        inputs = random(*((batch, *shape) for shape in shapes_of(name)))
        for ours, theirs in zip(answers(module, inputs), answers(net, inputs), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("source", ["digits_cnn.pt2", "digits_cnn_torchscript.pt"])
def test_programs_and_scripts_become_code_as_well(source: str, tmp_path: Path) -> None:
    words = {} if source.endswith("2") else {"input": ["?,1,8,8"]}
    export(source, tmp_path / "out.safetensors", code=True, **words)
    module = made(tmp_path / "out.py")().eval()
    module.load_state_dict(load_file(tmp_path / "out.safetensors"))
    original: Any = torch.export.load(FIXTURES / "digits_cnn.pt2").module()
    inputs = random((1, 1, 8, 8))
    np.testing.assert_allclose(answers(module, inputs)[0], answers(original, inputs)[0], atol=1e-5)


def test_axes_that_only_data_closes_are_told(tmp_path: Path) -> None:
    found = export("digits_cnn.pt", tmp_path / "out.pt", code=True, builder=NET, data=DIGITS)
    assert "The class was verified only with inputs of x:?,1,8,8." in found.notes
    assert found.comparison is not None
    assert found.comparison.top1_agreement == 1.0


def test_what_16_bits_are_enough_for_is_held_in_them(tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
    words = {"code": True, "builder": NET, "data": DIGITS}
    export("digits_cnn.pt", tmp_path / "out.pt", bf16=True, **words)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in state.items())
    made(tmp_path / "out.py")().load_state_dict(found)
    # And a file of 16 bits stays one.
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    export(tmp_path / "half.pt", tmp_path / "again.pt", **words)
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(found[name], value.half()) for name, value in state.items())


def test_an_operation_of_somebody_else_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\n@torch.library.custom_op('somebody::twice', mutates_args=())\n"
        "def twice(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n\n"
        "@twice.register_fake\ndef _(x):\n    return torch.empty_like(x)\n\n"
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.one = torch.nn.Linear(3, 2)\n\n    def forward(self, x):\n        return twice(self.one(x))\n"
    )
    torch.save({"one.weight": torch.randn(2, 3), "one.bias": torch.zeros(2)}, tmp_path / "n.pt")
    with pytest.raises(WorkError, match=r"no code can be generated for .*somebody\.twice") as caught:
        export(tmp_path / "n.pt", tmp_path / "out.pt", code=True, builder=f"{tmp_path}/net.py:Net", input=["?,3"])
    assert caught.value.exit_code == 5
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_network_of_pytorch_gives_no_code(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is Keras HDF5"):
        export("digits_cnn.h5", tmp_path / "out.safetensors", code=True)
    with pytest.raises(UsageError, match=r"^code cannot be used with ONNX"):
        export("digits_cnn.pt", tmp_path / "out.onnx", code=True)
    with pytest.raises(UsageError, match="nothing is run without code"):
        export("digits_cnn.h5", tmp_path / "out.safetensors", data=DIGITS)


def test_the_code_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.py").write_text("mine = 1\n")
    for force in (False, True):
        with pytest.raises(UsageError, match=r"out\.py exists"):
            export("digits_cnn.pt2", tmp_path / "out.pt", code=True, force=force)
    assert [one.name for one in tmp_path.iterdir()] == ["out.py"]
    export("digits_cnn.pt2", tmp_path / "other.pt", code=True)
    with pytest.raises(UsageError, match="exists"):
        export("digits_cnn.pt2", tmp_path / "other.pt", code=True)
    found = export("digits_cnn.pt2", tmp_path / "other.pt", code=True, force=True)
    assert found.companion_files == ((str(tmp_path / "other.py"), (tmp_path / "other.py").stat().st_size),)


def test_bfloat16_rounds_as_ml_dtypes_does_and_is_refused_where_there_is_no_such_type(tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
    found = export("digits_cnn.pt", tmp_path / "w.safetensors", bf16=True)
    held = load_file(tmp_path / "w.safetensors")
    for name, value in state.items():
        assert held[name].dtype is torch.bfloat16
        expected = value.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(held[name].float().numpy(), expected)
    assert found.after.bytes.raw < 0.55 * found.before.bytes.raw
    for name in ("w.npz", "m.h5", "m.keras", "m.tflite", "m.pt2"):
        with pytest.raises(UsageError, match=r"^bf16 cannot be used with"):
            export("digits_cnn.pt", tmp_path / name, bf16=True)
