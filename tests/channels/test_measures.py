"""What channels are ranked by, from the words to those that go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.errors import PrunectlError, UsageError
from prunectl.plugins import attribute
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import model, numpy_helper, onnx, op, saved
from tests.running import FIXTURES, here

NET, DIGITS = FIXTURES / "digits_cnn.onnx", FIXTURES / "digits.npz"


def cut(path: Path, output: Path | None, **asked: Any) -> ChannelPruneResult:
    return prune_channels(
        path, PruneRequest(**{"pattern": "channel", **asked}), Destination(output) if output else None
    )


def dropped(found: ChannelPruneResult, name: str) -> list[int]:
    (loss,) = [loss for loss in found.pruned_groups if loss.group.name == name]
    return [loss.group.channel(number)[0][0] for number in loss.dropped]


@pytest.mark.parametrize("norm", ["1", "2"])
def test_the_channels_go_whose_outputs_are_smallest_on_the_data(norm: str) -> None:
    found = cut(NET, None, sparsity=0.5, strategy="channel-activation", params=(f"norm={norm}",), data=str(DIGITS))
    net = onnx.load(NET)
    for node in net.graph.node:
        if node.op_type == "Conv":
            net.graph.output.add().name = node.output[0]
    session = onnxruntime.InferenceSession(net.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.load(DIGITS)["x"].astype(np.float32)
    # Of the examples, the first in the order that the seed decides.
    images = images[np.random.default_rng((0, 0)).permutation(len(images))[:128]]
    (port,) = session.get_inputs()
    shown = session.run(None, {port.name: images.reshape(-1, *port.shape[1:])})[1]
    sizes = (np.abs(shown) if norm == "1" else np.square(shown)).mean((0, 2, 3))
    (first,) = [node for node in net.graph.node if node.op_type == "Conv"][:1]
    assert dropped(found, first.input[1]) == sorted(np.argsort(sizes)[: len(sizes) // 2].tolist())


def twins(tmp_path: Path) -> Path:
    """A convolution whose channels 1 and 4 are nearly what 0 and 3 are."""
    nodes = [op("Conv", "x first", "a"), op("Relu", "a", "b"), op("Conv", "b last", "y")]
    made = model(nodes, {"first": (6, 3, 3, 3), "last": (2, 6, 1, 1)})
    tensor = made.graph.initializer[0]
    array = np.random.default_rng(1).standard_normal((6, 3, 3, 3)).astype(np.float32)
    array[1], array[4] = array[0] * 2, array[3] + 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, "first"))
    return saved(made, tmp_path)


def test_of_channels_that_are_alike_the_later_goes(tmp_path: Path) -> None:
    found = cut(twins(tmp_path), tmp_path / "small.onnx", strategy="similarity", params=("threshold=0.95",))
    assert dropped(found, "first") == [1, 4]
    found = cut(twins(tmp_path), None, strategy="similarity", sparsity=0.2)
    assert dropped(found, "first") == [1]


def test_another_metric_sees_another_likeness(tmp_path: Path) -> None:
    asked = ("metric=iou", "threshold=0.9")
    assert dropped(cut(twins(tmp_path), None, strategy="similarity", params=asked), "first") == [4]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"strategy": "channel-activation", "sparsity": 0.5}, "needs data"),
        (
            {"strategy": "similarity", "sparsity": 0.5, "params": ("metric=taste",)},
            "the strategy similarity has no --param",
        ),
        ({"strategy": "similarity", "params": ("threshold=2",)}, "is not a number from 0 to 1"),
        ({"strategy": "similarity", "params": ("threshold=0.9",), "sparsity": 0.5}, "only one of --sparsity"),
        (
            {"strategy": "similarity", "params": ("threshold=0.9",), "scope": "global"},
            "applied to each layer separately",
        ),
        (
            {"strategy": "bn-scale", "params": ("threshold=0.9",), "sparsity": 0.5},
            "the strategy bn-scale has no --param",
        ),
        ({"strategy": "taylor", "sparsity": 0.5, "data": str(DIGITS)}, "needs gradients"),
    ],
)
def test_words_that_make_no_sense_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cut(NET, None, **asked)


def test_the_channels_go_that_the_loss_would_miss_least(tmp_path: Path) -> None:
    path, net = FIXTURES / "digits_cnn.pt", attribute(str(FIXTURES / "digits_torch.py"), "DigitsCNN")
    words = {"strategy": "taylor", "data": f"{DIGITS}?norm=/16", "model": f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"}
    found = cut(path, None, sparsity=0.5, inputs=("1,1,8,8",), **words)
    module = net().eval()
    module.load_state_dict(torch.load(path, weights_only=True))
    held = np.load(DIGITS)
    rows = np.random.default_rng((0, 0)).permutation(len(held["x"]))[:128]
    images = torch.from_numpy(held["x"][rows].reshape(-1, 1, 8, 8).astype("f4") / 16)
    torch.nn.functional.cross_entropy(module(images), torch.from_numpy(held["y"][rows].astype("i8"))).backward()
    for name in ("conv1", "conv2", "fc1"):
        weight = getattr(module, name).weight
        scores = (weight * weight.grad).reshape(len(weight), -1).sum(1).abs().detach().numpy()
        assert dropped(found, f"{name}.weight") == sorted(np.argsort(scores)[: len(weight) // 2].tolist())


OWN = """
import numpy as np

def last(rows, most: int = 2):
    "The last ones go first."
    return -np.arange(len(rows)) % (len(rows) * most)

def largest(rows):
    return -np.abs(rows).max(axis=1)

def short(rows):
    return rows[:1, 0]

def broken(rows):
    return rows / "x"
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


def test_a_function_of_ones_own_ranks_channels_by_their_rows(own: str, tmp_path: Path) -> None:
    found = cut(NET, tmp_path / "small.onnx", sparsity=0.25, strategy=f"{own}largest")
    (weights,) = [numpy_helper.to_array(one) for one in onnx.load(NET).graph.initializer if one.name == "conv1.weight"]
    sizes = np.abs(weights.reshape(8, -1)).max(axis=1)
    assert dropped(found, "conv1.weight") == sorted(np.argsort(-sizes)[:2].tolist())
    assert found.cutting.importance is not None
    assert cut(NET, None, sparsity=0.5, strategy=f"{own}last", params=("most=3",)).dropped == 28


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("short", (), "a finite number for each of 8 channels"),
        ("broken", (), "broken raised TypeError: "),
        ("missing", (), "has no missing"),
        ("last", ("least=1",), "has no parameter least"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(own: str, name: str, params: tuple[str, ...], said: str) -> None:
    with pytest.raises(PrunectlError, match=said):
        cut(NET, None, sparsity=0.5, strategy=f"{own}{name}", params=params)


def test_measures_are_listed_with_the_other_plugins() -> None:
    rows = {name for kind, name, *_ in here("plugins", "channels").rows}
    assert {"channel-norm", "similarity", "taylor", "random"} <= rows
