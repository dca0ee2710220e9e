"""One answer for every framework to what targets are: labels, a share of each class, yes or no, or measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.adapt import check_batches, infer_tasks
from prunectl.training.data.readers import from_arrays
from prunectl.training.data.source import Batch
from prunectl.training.evaluate import evaluate_predictions
from prunectl.training.keras.backend import load_keras2, load_keras3
from prunectl.training.keras.compile import optimizer_by_name
from prunectl.training.keras.losses import default_loss
from prunectl.training.keras.outputs import ModelOutput
from prunectl.training.request import OptimizerSpec, parse_optimizer
from prunectl.training.task import DistilledOutput, FinalActivation, TaskKind, distillation_loss, infer_task
from prunectl.training.torch.losses import LOSSES, METRICS, TorchLoss, compared_by_loss, distilled, resolve_loss
from prunectl.training.torch.optimizers import make_optimizer
from tests.contract import Array

RANDOM = np.random.default_rng(0)
LABELS = np.arange(24) % 4
HOT = np.eye(4)[LABELS]
RAW, SOFTMAX, SIGMOID = FinalActivation.RAW, FinalActivation.SOFTMAX, FinalActivation.SIGMOID


@pytest.mark.parametrize(
    ("shape", "activation", "targets", "kind"),
    [
        ((4,), RAW, LABELS, "labels"),
        ((4,), RAW, LABELS[:, None], "labels"),
        ((4,), SOFTMAX, LABELS.astype(float), "labels"),
        ((4,), RAW, LABELS.astype(float), ""),
        ((None,), RAW, LABELS, "labels"),
        ((5, 6, 4), RAW, np.ones((24, 5, 6), int), "labels"),
        ((None, None, 4), RAW, np.ones((24, 5, 6, 1), int), "labels"),
        ((4,), RAW, HOT, "shares"),
        ((4,), RAW, HOT.astype(int), "shares"),
        ((4,), SOFTMAX, RANDOM.dirichlet(np.ones(4), 24), "shares"),
        ((4,), RAW, RANDOM.dirichlet(np.ones(4), 24), "numbers"),
        ((4,), SIGMOID, HOT, "binary"),
        ((4,), RAW, RANDOM.integers(2, size=(24, 4)), "binary"),
        ((1,), RAW, LABELS % 2, "binary"),
        ((1,), SIGMOID, LABELS[:, None] / 4, "binary"),
        ((1,), RAW, LABELS, "numbers"),
        ((1,), RAW, np.zeros(24), "numbers"),
        ((), RAW, LABELS / 4, "numbers"),
        ((4,), RAW, RANDOM.integers(9, size=(24, 4)), "numbers"),
        ((4,), RAW, RANDOM.random((24, 3)), ""),
        ((4,), RAW, RANDOM.integers(4, size=(24, 3)), ""),
    ],
)
def test_targets_tell_the_task(shape: Any, activation: FinalActivation, targets: Array, kind: str) -> None:
    assert infer_task(shape, activation, targets).kind == kind


@pytest.mark.parametrize("shape", [(4, 5, 6), (5, 4)])
def test_classes_are_the_first_axis_where_channels_are_or_the_last_of_a_row_of_words(shape: tuple[int, ...]) -> None:
    places = (5, 6) if len(shape) == 3 else (5,)
    task = infer_task(shape, RAW, np.ones((24, *places), int), is_channels_first=True)
    assert (task.kind, task.classes) == (TaskKind.LABELS, 4)


@pytest.mark.parametrize(("activation", "targets"), [(RAW, LABELS), (RAW, HOT), (SOFTMAX, HOT), (RAW, LABELS % 2)])
def test_frameworks_take_the_same_loss(activation: FinalActivation, targets: Array) -> None:
    width = 1 if targets.max() < 2 and targets.ndim == 1 else 4
    out = RANDOM.normal(size=(24, width)).astype(np.float32)
    if activation is SOFTMAX:
        out = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    chosen = resolve_loss("", torch.from_numpy(out), torch.from_numpy(targets), activation)
    by_torch = float(chosen.loss(torch.from_numpy(out), torch.from_numpy(targets)))
    by_keras = default_loss(load_keras3(), ModelOutput("y", activation, (None, width)), targets)
    assert by_keras is not None
    y = targets.reshape(-1, 1) if width == 1 else targets
    assert by_torch == pytest.approx(float(by_keras.loss(y.astype(np.float32), out)), rel=1e-5)


@pytest.mark.parametrize("name", ["cross-entropy", "bce"])
def test_a_loss_of_classes_takes_what_the_model_ends_in(name: str) -> None:
    is_binary = name == "bce"
    logits = torch.from_numpy(RANDOM.normal(size=(24, 1 if is_binary else 4)))
    targets = torch.from_numpy(LABELS % 2 if is_binary else LABELS)
    shares, activation = (torch.sigmoid(logits), SIGMOID) if is_binary else (torch.softmax(logits, 1), SOFTMAX)
    expected = LOSSES[name](logits, targets)
    assert torch.allclose(resolve_loss(name, shares, targets, activation).loss(shares, targets), expected)
    assert torch.allclose(resolve_loss(name, logits, targets, RAW).loss(logits, targets), expected)
    one = resolve_loss("cross-entropy", logits[:, :1], targets % 2, RAW)
    assert torch.allclose(one.loss(logits[:, :1], targets % 2), LOSSES["bce"](logits[:, :1], targets % 2))


def test_labels_of_pixels_and_words_are_compared_alike_with_their_classes_first_or_last() -> None:
    out, y = RANDOM.normal(size=(3, 4, 5, 6)), RANDOM.integers(4, size=(3, 5, 6))
    expected = float(np.mean(out.argmax(1) == y))
    assert evaluate_predictions(lambda x: x, [Batch(out, y)], "", "d") == ("accuracy", pytest.approx(expected))
    last = np.moveaxis(out, 1, -1)
    assert evaluate_predictions(lambda x: x, [Batch(last, y)], "", "d") == ("accuracy", pytest.approx(expected))
    for outputs in (out, last):
        assert float(METRICS["accuracy"](torch.from_numpy(outputs.copy()), torch.from_numpy(y))) == pytest.approx(
            expected
        )


def test_several_answers_of_yes_or_no_are_judged_one_by_one() -> None:
    out, y = RANDOM.normal(size=(30, 4)), RANDOM.integers(2, size=(30, 4))
    expected = np.mean((out > 0) == y)
    assert evaluate_predictions(lambda x: x, [Batch(out, y)], "", "d") == ("accuracy", pytest.approx(expected))


def test_labels_of_pixels_are_checked_where_channels_come_first() -> None:
    signature = ModelSignature((TensorSpec("x", (3, 5, 6), "float32"),), (TensorSpec("y", (4, 5, 6), "float32"),), True)
    x, y = np.zeros((7, 3, 5, 6), np.float32), np.full((7, 5, 6), 3)
    tasks = infer_tasks(signature, Batch(x, y))
    check_batches(from_arrays("d", {"x": x}, {"y": y}), signature, needs_targets=True, tasks=tasks)
    with pytest.raises(UsageError, match=r"the label 4 .* the model has 4 classes"):
        check_batches(from_arrays("d", {"x": x}, {"y": y + 1}), signature, needs_targets=True, tasks=tasks)


def test_an_optimizer_is_typed_alike_for_every_framework() -> None:
    spec = parse_optimizer("Adam-W: lr=0.1, betas=(0.9,0.99),amsgrad=true,foreach=none,mode=[1,2],word=x")
    assert spec.settings == {
        "lr": 0.1, "betas": (0.9, 0.99), "amsgrad": True, "foreach": None, "mode": [1, 2], "word": "x",
    }  # fmt: skip
    for rate in ("lr", "learning_rate"):
        weight = torch.nn.Parameter(torch.zeros(2))
        by_torch = make_optimizer(f"adam_w:{rate}=0.5,weight_decay=0.25", [weight], None).param_groups[0]
        by_keras = optimizer_by_name(load_keras3(), f"adam_w:{rate}=0.5,weight_decay=0.25", lr=None, clip=None)
        settings = by_keras.optimizer.get_config()
        assert (by_torch["lr"], by_torch["weight_decay"]) == (settings["learning_rate"], settings["weight_decay"])
    assert parse_optimizer("") == OptimizerSpec("adam", {})


def softmax(logits: Array) -> Array:
    return np.asarray(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits)))


@pytest.mark.parametrize(
    ("loss", "activation"),
    [("cross-entropy", RAW), ("probabilities", SOFTMAX), ("bce", RAW), ("bce-probabilities", SIGMOID), ("mse", RAW)],
)
def test_a_teacher_is_followed_alike_in_every_framework(loss: str, activation: FinalActivation) -> None:
    teacher, student = RANDOM.normal(size=(2, 24, 3))
    temperature = 3.0
    if loss == "mse":
        expected = np.mean((teacher - student) ** 2)
    elif loss.startswith("bce"):
        p, q = sigmoid(teacher / temperature), sigmoid(student / temperature)
        expected = temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    else:
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        expected = temperature**2 * np.mean((p * np.log(p / q)).sum(1))
    form = {SOFTMAX: softmax, SIGMOID: sigmoid}.get(activation, np.asarray)
    theirs, ours = (torch.from_numpy(form(logits).astype(np.float32)) for logits in (teacher, student))
    compared = compared_by_loss([TorchLoss(loss, LOSSES[loss])], [ours])
    assert float(distilled(compared, [ours], [theirs], temperature)) == pytest.approx(expected, rel=1e-4)
    output = DistilledOutput(loss != "mse", loss.startswith("bce"), activation)
    for library in (load_keras2(), load_keras3()):
        found = distillation_loss(library.ops, output, theirs.numpy(), ours.numpy(), temperature)
        assert float(found) == pytest.approx(expected, rel=1e-4)
