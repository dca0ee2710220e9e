from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.readers import IndexedSource, IterableSource
from prunectl.training.data.source import EpochOrder, as_tuple, peek
from tests.training.data.sources import numbers, opened

LOADERS = """
import numpy as np
X = np.arange(10)
calls = []

def arrays():
    return X, -X

def generator():
    calls.append(1)
    for begin in range(0, 10, 3):
        yield X[begin:begin + 3], -X[begin:begin + 3]

def batches():
    return [(X[:4], -X[:4]), (X[4:], -X[4:])]

class Examples:
    def __len__(self):
        return 10
    def __getitem__(self, number):
        if not 0 <= number < 10:
            raise IndexError(number)
        return X[number], -X[number]

def examples():
    return Examples()

class Keras(Examples):
    def __len__(self):
        return 5
    def __getitem__(self, number):
        return X[2 * number:2 * number + 2], -X[2 * number:2 * number + 2]
    def on_epoch_end(self):
        pass

def keras():
    return Keras()

def inputs_alone():
    return X

def by_name():
    yield {"b": X, "a": X * 2}, {"b": X, "a": X * 2}

def fails():
    yield X[:2], -X[:2]
    raise RuntimeError("the disk is on fire")

def weighted():
    yield X, -X, X

def uneven():
    yield X, -X[:3]

def ragged():
    yield np.zeros((2, 3)), X[:2]
    yield np.zeros((2, 4)), X[:2]

def nothing():
    return iter(())

def needs(path):
    return path

def number():
    return 3

def scalars():
    yield 1.0, 2.0

def loader():
    import torch
    return torch.utils.data.DataLoader(Examples(), batch_size=4)

text = "no function"
"""


@pytest.fixture
def loaders(tmp_path: Path) -> str:
    (tmp_path / "data.py").write_text(LOADERS)
    return f"{tmp_path}/data.py"


@pytest.mark.parametrize("name", ["arrays", "generator", "batches", "examples", "keras"])
def test_whatever_a_function_gives_becomes_batches_of_one_size(loaders: str, name: str) -> None:
    source = opened(f"{loaders}:{name}")
    assert isinstance(source, IndexedSource if name in {"arrays", "examples"} else IterableSource)
    for _ in range(2):
        assert [len(as_tuple(batch.x)[0]) for batch in source.batches(EpochOrder(4))] == [4, 4, 2]
        assert numbers(source) == list(range(10))
    assert sorted(numbers(source, EpochOrder(4, is_shuffled=True))) == list(range(10))


def test_a_loader_of_pytorch_is_gone_through_anew_each_time(loaders: str) -> None:
    pytest.importorskip("torch")
    source = opened(f"{loaders}:loader")
    assert numbers(source) == numbers(source) == list(range(10))


def test_inputs_alone_have_no_targets(loaders: str) -> None:
    assert not opened(f"{loaders}:inputs_alone").has_targets


def test_dictionaries_are_put_in_the_order_of_the_model(loaders: str) -> None:
    ports = TensorSpec("a", (), ""), TensorSpec("b", (), "")
    signature = ModelSignature(ports, ports, is_channels_first=False)
    batch = peek(opened(f"{loaders}:by_name", signature))
    assert batch is not None
    assert batch.y is not None
    for side in (batch.x, batch.y):
        assert [part.tolist() for part in as_tuple(side)] == [[2 * n for n in range(10)], list(range(10))]
    with pytest.raises(InputError, match="dictionary of b, a"):
        opened(f"{loaders}:by_name")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("fails", WorkError, "fails raised RuntimeError: the disk is on fire"),
        ("weighted", InputError, "batches of 3 parts"),
        ("uneven", InputError, r"have different numbers of examples: \[10, 3\]"),
        ("ragged", InputError, "have different shapes"),
        ("nothing", InputError, "returns no batches"),
        ("needs", WorkError, "missing 1 required positional argument"),
        ("number", InputError, "returns an object of type int"),
        ("scalars", InputError, "a single float"),
        ("text", UsageError, "is not a function"),
        ("arays", UsageError, "has no arays"),
    ],
)
def test_a_function_that_gives_something_else_is_told_so(
    loaders: str, name: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        list(opened(f"{loaders}:{name}").batches(EpochOrder(3)))


def test_a_file_or_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a Python file"):
        opened(f"{tmp_path}/none.py:load")
    with pytest.raises(UsageError, match="there is no module nowhere"):
        opened("nowhere.at_all:load")


def test_a_module_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loaders_for_a_test.py").write_text(LOADERS)
    monkeypatch.syspath_prepend(tmp_path)
    assert numbers(opened("loaders_for_a_test:arrays")) == list(range(10))
    assert np.array_equal(numbers(opened("loaders_for_a_test:arrays?limit=3")), [0, 1, 2])
