"""Data, builders and functions as objects: the same results as by their names."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch

import prunectl
from fixtures.digits_torch import DigitsCNN
from prunectl.api import in_memory
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.training.logger import LogEntry
from tests.running import FIXTURES

MODEL, NAMED = FIXTURES / "digits_cnn.pt", f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"
with np.load(FIXTURES / "digits.npz") as file:
    X, Y = (file["x"] / 16).astype("f4")[:96], file["y"][:96].astype("i8")
BASE: dict[str, Any] = {"sparsity": "50%", "epochs": 2, "device": "cpu", "batch_size": 32, "lr": 1e-3}


class Digits(torch.utils.data.Dataset[Any]):
    """A data set with numbers."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, number: int) -> Any:
        return torch.from_numpy(X[number]), int(Y[number])


def build() -> torch.nn.Module:
    return DigitsCNN()


def batches() -> Iterator[tuple[Any, Any]]:
    for begin in range(0, len(X), 32):
        yield X[begin : begin + 32], Y[begin : begin + 32]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the command's way makes of the same examples in a file."""
    folder = tmp_path_factory.mktemp("by_name")
    np.savez(folder / "train.npz", x=X, y=Y)
    prunectl.finetune(MODEL, folder / "out.pt", data=str(folder / "train.npz"), builder=NAMED, **BASE)
    return (folder / "out.pt").read_bytes()


@pytest.mark.parametrize("model", [NAMED, DigitsCNN, DigitsCNN(), build])
def test_arrays_and_builders_train_as_by_their_names(tmp_path: Path, model: Any, expected: bytes) -> None:
    prunectl.finetune(MODEL, tmp_path / "out.pt", data=(X, Y), builder=model, **BASE)
    assert (tmp_path / "out.pt").read_bytes() == expected


def test_a_data_set_of_torch_trains_as_its_arrays(tmp_path: Path, expected: bytes) -> None:
    prunectl.finetune(MODEL, tmp_path / "out.pt", data=Digits(), builder=DigitsCNN, **BASE)
    assert (tmp_path / "out.pt").read_bytes() == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.utils.data.DataLoader(Digits(), batch_size=32),
        lambda: torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(32),
        lambda: batches,
        lambda: Path("train.npz"),
    ],
)
def test_loaders_streams_and_paths_are_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", x=X, y=Y)
    found = prunectl.finetune(MODEL, "out.pt", data=make(), val=(X, Y), builder=DigitsCNN, **BASE)
    assert found.judged_after["accuracy"] > 0.5
    assert found.kept == found.masked


def test_epochs_are_told_as_they_end(tmp_path: Path) -> None:
    told: list[LogEntry] = []
    found = prunectl.finetune(
        MODEL, tmp_path / "out.pt", data=(X, Y), val=(X, Y), builder=DigitsCNN, on_epoch=told.append, **BASE
    )
    assert told == list(found.history)
    assert [entry.epoch for entry in told] == [1, 2]
    assert "accuracy" in repr(found)
    assert len(repr(found).splitlines()) <= 10
    assert "svg" in found._repr_html_()
    with pytest.raises(TypeError, match="on_epoch must be a function, not int"):
        prunectl.finetune(MODEL, tmp_path / "b.pt", data=(X, Y), on_epoch=3)  # type: ignore[arg-type]


def test_functions_are_losses_and_metrics(tmp_path: Path) -> None:
    def right(outputs: Any, targets: Any) -> Any:
        return (outputs.argmax(-1) == targets).float().mean()

    options: Any = {**BASE, "metric": [(right, "max"), "accuracy"], "loss": torch.nn.functional.cross_entropy}
    found = prunectl.finetune(MODEL, tmp_path / "out.pt", data=(X, Y), val=(X, Y), builder=DigitsCNN, **options)
    numbers = {name.rpartition(":")[2]: value for name, value in found.judged_after.items()}
    assert numbers["right"] == pytest.approx(numbers["accuracy"])
    with pytest.raises(UsageError, match=r"does not know whether a higher .*right is better"):
        prunectl.evaluate(MODEL, (X, Y), metric=right, builder=DigitsCNN)
    with pytest.raises(TypeError, match="metric must be a string or a function or a pair or a list, not int: 3"):
        prunectl.evaluate(MODEL, (X, Y), metric=3)  # type: ignore[arg-type]
    assert prunectl.evaluate(MODEL, (X, Y), metric=(right, "max"), builder=DigitsCNN).value > 0.9


def test_prune_looks_at_arrays_as_at_their_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=X, y=Y)
    options: Any = {"sparsity": "80%", "strategy": "activation-magnitude", "samples": 64}
    model = FIXTURES / "digits_cnn.onnx"
    prunectl.prune(model, tmp_path / "a.onnx", data=tmp_path / "train.npz", **options)
    prunectl.prune(model, tmp_path / "b.onnx", data=X, **options)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_objects_are_let_go_of_when_the_call_is_over(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"^mine raised RuntimeError: no disk"):
        prunectl.prune(FIXTURES / "digits_cnn.onnx", None, sparsity=0.5, repair=True, data=mine)
    with pytest.raises(UsageError, match="has no option dta"):
        prunectl.finetune(MODEL, tmp_path / "out.pt", dta=(X, Y))  # type: ignore[call-arg]
    gc.collect()
    assert not in_memory._named
    with pytest.raises(AttributeError, match="no object is called data now"):
        in_memory.data  # noqa: B018 - asking for it is the test


def mine() -> Any:
    raise RuntimeError("no disk")


def test_an_error_calls_objects_by_the_name_of_their_keyword() -> None:
    with pytest.raises(InputError, match=r"^data: the arrays of a batch have different numbers"):
        prunectl.evaluate(FIXTURES / "digits_cnn.onnx", (np.zeros((4, 8, 8, 1), np.float32), np.zeros(3, np.int64)))


def test_the_direction_of_a_metric_is_asked_for_as_it_is_given() -> None:
    x, y = np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int64)
    metric = lambda predicted, targets: 1.0  # noqa: E731 - it has no name of its own
    with pytest.raises(UsageError) as caught:
        prunectl.prune(FIXTURES / "digits_cnn.onnx", None, max_drop="0.1", data=(x, y), metric=metric)
    assert caught.value.hint == 'write metric=(metric, "max") or metric=(metric, "min")'


@pytest.mark.parametrize("once", [(batch for batch in [(X, Y)]), zip([X], [Y], strict=True), iter([(X, Y)])])
def test_data_that_can_be_read_only_once_is_refused_by_its_keyword(once: Any) -> None:
    with pytest.raises(TypeError, match=r"data must not be an iterator, .*: write a function that returns one"):
        prunectl.evaluate(FIXTURES / "digits_cnn.onnx", once)


class Loader:
    """A loader as that of DALI, which is its own iterator and begins anew whenever it is asked for one."""

    def __init__(self) -> None:
        self.left = [(X, Y)]

    def reset(self) -> None:
        self.left = [(X, Y)]

    def __iter__(self) -> Iterator[Any]:
        self.reset()
        return self

    def __next__(self) -> Any:
        if not self.left:
            raise StopIteration
        return self.left.pop()


def test_a_loader_that_is_its_own_iterator_is_data() -> None:
    loader = Loader()
    by_arrays = prunectl.evaluate(MODEL, (X, Y), builder=DigitsCNN).value
    assert [prunectl.evaluate(MODEL, loader, builder=DigitsCNN).value for _ in range(2)] == [by_arrays] * 2


def test_an_output_that_is_named_is_to_come_after_the_model() -> None:
    options: Any = {"output": "small.onnx", "sparsity": 0.5}
    with pytest.raises(UsageError, match="it comes after the model"):
        prunectl.prune(FIXTURES / "digits_cnn.onnx", **options)


def test_a_hint_about_a_model_in_memory_names_no_file() -> None:
    with pytest.raises(UsageError) as caught:
        prunectl.prune({"a": np.zeros((4, 4), np.float32)}, sparsity=0.5)
    assert caught.value.hint == "select tensors with layers or policy='all'"


def test_a_metric_of_ones_own_goes_by_its_own_name(tmp_path: Path) -> None:
    def right(out: Any, y: Any) -> float:
        return float((out.argmax(1) == y).float().mean())

    options: Any = {"builder": DigitsCNN, "metric": (right, "max")}
    judged = prunectl.evaluate(MODEL, (X, Y), **options)
    assert judged.metric == "right"
    assert judged.logs["right"] == judged.value
    epochs: list[Any] = []
    run = {**options, "data": (X, Y), "val": (X, Y), "epochs": 1, "device": "cpu", "on_epoch": epochs.append}
    trained = prunectl.finetune(MODEL, tmp_path / "out.pt", **run)
    assert trained.history[-1].val["right"] == trained.judged_after["right"] == epochs[-1].val["right"]
    searched = prunectl.prune(MODEL, None, max_drop="5pp", data=(X, Y), **options)
    assert searched.search.base.metric == "right"
    for result in (judged, trained, searched):
        assert "in_memory" not in f"{result} {result.to_dict()}"
