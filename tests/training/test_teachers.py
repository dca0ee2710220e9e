"""A teacher answers for its student's batches as its own framework does for its own, whatever the two are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from prunectl.errors import UntrustedError, UsageError
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LoadOptions, ModelSignature, TensorSpec, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.distillation import Teacher, load_teacher
from prunectl.training.finetune import FinetuneResult, finetune
from prunectl.training.request import FinetuneRequest
from prunectl.training.task import FinalActivation, activation_of_values, convert_outputs
from prunectl.training.torch.model import TorchTrainable
from tests.networks import keras
from tests.running import FIXTURES

HERE = "tests.training.test_teachers"
SCRIPT_IS_OLD = pytest.mark.filterwarnings("ignore::DeprecationWarning")
pytestmark = [SCRIPT_IS_OLD, pytest.mark.filterwarnings("ignore::UserWarning")]
Array = NDArray[Any]
CLASSES, SHAPE = 4, (3, 5, 7)
RANDOM = np.random.default_rng(3)
KERNEL = RANDOM.normal(size=(CLASSES, 3, 3, 3)).astype(np.float32)
IMAGES = RANDOM.normal(size=(6, *SHAPE)).astype(np.float32)


def logits() -> Array:
    """What a convolution and a mean over all places make of the images, by PyTorch's functions alone."""
    seen = torch.nn.functional.conv2d(torch.from_numpy(IMAGES), torch.from_numpy(KERNEL))
    return seen.mean((2, 3)).numpy().astype(np.float64)


def shares(found: Array) -> Array:
    exact = np.exp(found - found.max(1, keepdims=True))
    return exact / exact.sum(1, keepdims=True)


class Convolution(torch.nn.Module):
    """Channels first, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, CLASSES, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


class Shares(Convolution):
    """The same, ending in probabilities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(super().forward(x), 1)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    module.load_state_dict({"conv.weight": torch.from_numpy(KERNEL)})
    return module


def as_state_dict(folder: Path) -> Path:
    torch.save({"conv.weight": torch.from_numpy(KERNEL)}, folder / "m.pt")
    return folder / "m.pt"


def as_script(folder: Path) -> Path:
    torch.jit.trace(filled(Convolution()), torch.from_numpy(IMAGES)).save(folder / "m.pt")
    return folder / "m.pt"


def as_script_of_shares(folder: Path) -> Path:
    torch.jit.trace(filled(Shares()), torch.from_numpy(IMAGES)).save(folder / "m.pt")
    return folder / "m.pt"


def as_onnx(folder: Path) -> Path:
    """Takes two examples at a time, and ends in a softmax behind a change of shape."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Softmax", ["f"], ["s"], axis=1),
        helper.make_node("Identity", ["s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2, *SHAPE))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2, CLASSES))],
        [numpy_helper.from_array(KERNEL, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def as_keras(folder: Path) -> Path:
    """Channels last, and probabilities."""
    k = keras()
    model = k.Sequential(
        [
            k.layers.Input((5, 7, 3)),
            k.layers.Conv2D(CLASSES, 3, use_bias=False),
            k.layers.GlobalAveragePooling2D(),
            k.layers.Softmax(),
        ]
    )
    model.layers[0].set_weights([KERNEL.transpose(2, 3, 1, 0)])
    model.save(folder / "m.keras")
    return folder / "m.keras"


FIRST = ModelSignature(
    (TensorSpec("x", SHAPE, "float32"),), (TensorSpec("y", (CLASSES,), "float32", FinalActivation.RAW),), True
)
LAST = ModelSignature(
    (TensorSpec("x", (5, 7, 3), "float32"),), (TensorSpec("y", (CLASSES,), "float32", FinalActivation.SOFTMAX),), False
)


def opened(path: Path, student: ModelSignature, x: Array | None = None) -> tuple[Teacher, Array]:
    given = IMAGES if student.is_channels_first else np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1))
    given = given if x is None else x
    options = LoadOptions(f"{HERE}:Convolution")
    return load_teacher(path, options, "cpu", student, Batch(given[:4])), given


@pytest.mark.parametrize("student", [FIRST, LAST], ids=["a student of PyTorch", "a student of Keras"])
@pytest.mark.parametrize("make", [as_state_dict, as_script, as_script_of_shares, as_onnx, as_keras])
def test_teachers_of_every_framework_answer_pupils_of_every_other(
    make: Callable[[Path], Path], student: ModelSignature, tmp_path: Path
) -> None:
    teacher, x = opened(make(tmp_path), student)
    found = np.asarray(teacher(x))
    expected = shares(logits()) if student is LAST else logits()
    if student is FIRST:
        # Logits are told but for a number that all classes share.
        found, expected = found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True)
    assert np.allclose(found, expected, atol=2e-4)
    teacher.close()


def test_a_teacher_that_takes_other_images_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes 5x7x3 for each example, but the model takes 3x9x9"):
        opened(as_keras(tmp_path), FIRST, x=np.zeros((4, 3, 9, 9), np.float32))


def test_a_teacher_of_other_classes_is_refused_before_training(tmp_path: Path) -> None:
    student = ModelSignature(FIRST.inputs, (TensorSpec("y", (9,), "float32"),), True)
    with pytest.raises(UsageError, match="outputs 4 for each example, but the model outputs 9"):
        opened(as_onnx(tmp_path), student)


@pytest.mark.parametrize("theirs", [FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX, FinalActivation.RAW])
@pytest.mark.parametrize("ours", [FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX, FinalActivation.RAW])
def test_probabilities_their_logarithms_and_logits_are_one_thing(
    theirs: FinalActivation, ours: FinalActivation
) -> None:
    forms = {
        FinalActivation.RAW: logits(),
        FinalActivation.SOFTMAX: shares(logits()),
        FinalActivation.LOG_SOFTMAX: np.log(shares(logits())),
    }
    found = convert_outputs(forms[theirs], theirs, ours, 1)
    as_shares = found if ours is FinalActivation.SOFTMAX else shares(found)
    assert np.allclose(as_shares, forms[FinalActivation.SOFTMAX], atol=1e-5)


def test_the_numbers_tell_how_a_model_ends_where_nothing_else_does() -> None:
    assert activation_of_values(logits(), 1) is FinalActivation.RAW
    assert activation_of_values(shares(logits()), 1) is FinalActivation.SOFTMAX
    assert activation_of_values(np.log(shares(logits())), 1) is FinalActivation.LOG_SOFTMAX
    assert activation_of_values(RANDOM.random((8, 1)), 1) is FinalActivation.SIGMOID
    assert activation_of_values(np.array([[np.nan, 0.5]]), 1) is FinalActivation.RAW


def taught(model: str, teacher: str, target: Path, data: str = "", **words: Any) -> FinetuneResult:
    own = {"means": TrainOptions(device="cpu", teacher_share=words.pop("share", 0.5)), "epochs": 1, **words}
    spec = data or f"{FIXTURES / 'digits.npz'}?limit=64"
    return finetune(
        FIXTURES / model, FinetuneRequest(spec, distill=str(FIXTURES / teacher), **own), Destination(target)
    )


@pytest.mark.parametrize("teacher", ["digits_cnn.onnx", "digits_cnn_torchscript.pt"])
def test_a_model_of_keras_learns_images_from_a_teacher_of_another_framework(teacher: str, tmp_path: Path) -> None:
    assert taught("digits_cnn.keras", teacher, tmp_path / "out.keras").history


def test_a_model_of_pytorch_learns_images_from_one_of_keras_and_both_are_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr("prunectl.training.keras.model.KerasTrainable.close", lambda _: closed.append("teacher"))
    monkeypatch.setattr(TorchTrainable, "close", lambda _: closed.append("student"))
    origin = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN")
    assert taught("digits_cnn.pt", "digits_cnn.keras", tmp_path / "out.pt", origin=origin).history
    assert closed == ["teacher", "student"]


class Wide(torch.nn.Module):
    """Another network for the same images, whose weights no other class takes."""

    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x.flatten(1))


def test_a_teacher_that_holds_weights_alone_is_built_by_a_function_of_its_own(tmp_path: Path) -> None:
    torch.save(Wide().state_dict(), tmp_path / "wide.pt")
    origin, words = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"), {"distill_model": f"{HERE}:Wide"}
    assert taught("digits_cnn.pt", str(tmp_path / "wide.pt"), tmp_path / "out.pt", origin=origin, **words).history
    with pytest.raises(UsageError, match="--distill-builder needs a teacher"):
        finetune(FIXTURES / "digits_cnn.pt", FinetuneRequest("d.npz", **words), Destination(tmp_path / "none.pt"))


def test_a_teacher_with_code_of_its_own_is_built_by_a_function_and_its_code_is_left_alone(tmp_path: Path) -> None:
    torch.save(Wide(), tmp_path / "wide.pt")
    with pytest.raises(UntrustedError, match="holds a whole Python module"):
        taught("digits_cnn.keras", str(tmp_path / "wide.pt"), tmp_path / "out.keras")
    words = {"distill_model": f"{HERE}:Wide"}
    assert taught("digits_cnn.keras", str(tmp_path / "wide.pt"), tmp_path / "out.keras", **words).history


def test_what_builds_the_pupil_vouches_for_no_teacher_that_says_itself_what_it_is(tmp_path: Path) -> None:
    k = keras()
    layers = [k.layers.Input((8, 8, 1)), k.layers.Flatten(), k.layers.Dense(10), k.layers.Lambda(lambda x: x)]
    k.Sequential(layers).save(tmp_path / "code.keras")
    origin = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN")
    request = FinetuneRequest("no-such-data.npz", origin=origin, distill=str(tmp_path / "code.keras"))
    with pytest.raises(UntrustedError):
        finetune(FIXTURES / "digits_cnn.pt", request, Destination(tmp_path / "out.pt"))


@pytest.mark.parametrize("model", ["digits_cnn.pt", "digits_cnn.keras"])
def test_what_only_a_teacher_tells_needs_no_targets(model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.load(FIXTURES / "digits.npz")["x"][:64])
    origin = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN" if model.endswith(".pt") else "")
    words: dict[str, Any] = {"data": str(tmp_path / "x.npz"), "origin": origin}
    found = taught(model, "digits_cnn.onnx", tmp_path / f"out_{model}", share=1.0, **words)
    assert found.history[0].train["loss"] >= 0
    with pytest.raises(UsageError, match="has inputs but no targets"):
        taught(model, "digits_cnn.onnx", tmp_path / "none", **words, share=1.0, val_split=0.5)


@pytest.mark.parametrize("model", ["digits_cnn.pt", "digits_cnn.keras"])
def test_a_model_that_is_pruned_on_inputs_alone_is_its_own_teacher(model: str, tmp_path: Path) -> None:
    held = np.load(FIXTURES / "digits.npz")
    np.savez(tmp_path / "x.npz", x=held["x"][:300])
    np.savez(tmp_path / "val.npz", x=held["x"][300:500], y=held["y"][300:500])
    origin = LoadOptions(f"{FIXTURES / 'digits_torch.py'}:DigitsCNN" if model.endswith(".pt") else "")
    said = FinetuneRequest(
        f"{tmp_path / 'x.npz'}?norm=/16",
        val=f"{tmp_path / 'val.npz'}?norm=/16",
        steps=40,
        origin=origin,
        pruning=PruneRequest(sparsity=0.9, scope="global"),
        means=TrainOptions(device="cpu", lr=3e-3, optimizer="adam"),
    )
    outs = {}
    ways = (("default", ""), ("input", "input"), ("path", str(FIXTURES / model)))
    # Which of them is meant is found out before any framework is asked.
    for name, distill in ways if model.endswith(".pt") else ways[:1]:
        outs[name] = tmp_path / f"{name}{Path(model).suffix}"
        found = finetune(FIXTURES / model, replace(said, distill=distill), Destination(outs[name]))
        assert any("has no targets: all that is learned from" in note for note in found.notes)
        assert any("compared as classes" in note for note in found.notes)
        assert found.judged_after["accuracy"] > found.judged_before["accuracy"] - 0.1
    assert len({path.read_bytes() for path in outs.values()}) == 1
    with pytest.raises(UsageError, match="has inputs but no targets"):
        finetune(FIXTURES / model, replace(said, pruning=PruneRequest()), Destination(tmp_path / "none"))
