"""How much of a network calibration runs: passes end at the last layer that is looked at, and serve many layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from prunectl.calibration import passes, session
from prunectl.calibration.prune import prune
from prunectl.calibration.sensitivity import sensitivity
from prunectl.errors import WorkError
from prunectl.formats.registry import open_model
from prunectl.onnx_graph import stands_outside
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import InspectableModel, LayerInput, LoadOptions, PassEnd
from prunectl.training.runtimes import load_onnx_model, load_trainable
from tests.calibration import nets
from tests.calibration.runs import NETS, data, examples, numbers, saved
from tests.networks import keras
from tests.training.keras.nets import saved as saved_keras

DEPTH, BATCHES, EXAMPLES = nets.Chain.DEPTH, 4, 40
ALL = DEPTH * BATCHES
"""Layers that one pass through all of the network calls."""
HALF = (DEPTH + 1) * DEPTH // 2
"""Layers that passes to the first, the second … layer call for one batch."""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(nets.Chain(), tmp_path / "chain.pt")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that is called."""
    found: list[int] = []
    forward = torch.nn.Linear.forward

    def counted(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found.append(len(x))
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return found


def wish(folder: Path, **more: Any) -> PruneRequest:
    source = data(folder / "x.npz", x=examples(EXAMPLES, 12))
    said = {"sparsity": 0.5, "data": source, "model": f"{NETS}:Chain", "batch_size": EXAMPLES // BATCHES, **more}
    return PruneRequest(**said)


@pytest.mark.parametrize(
    ("more", "most", "before"),
    [
        ({"strategy": "obs"}, 2 * ALL + HALF * BATCHES, (1 + 2 * DEPTH) * ALL),
        # Whether a bias still sees the same inputs, the first batch tells.
        ({"is_repaired": True}, 2 * ALL + HALF * (BATCHES + 1), (1 + 3 * DEPTH) * ALL),
        ({"strategy": "obs", "scope": "global"}, 3 * ALL + DEPTH + HALF * BATCHES, (1 + 3 * DEPTH) * ALL),
    ],
    ids=["obs", "repair", "obs, global"],
)
def test_passes_end_at_the_layer_they_are_for_and_the_dense_model_runs_once(
    more: dict[str, Any], most: int, before: int, chain: Path, calls: list[int]
) -> None:
    prune(chain, wish(chain.parent, **more), Destination(chain.parent / "out.pt"))
    assert ALL < len(calls) <= most
    assert 2 * len(calls) < before, "where each layer has a whole pass of each model"


def test_without_memory_for_several_layers_the_bytes_are_the_same(
    chain: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for nbytes in (session.AHEAD_BYTES, 2 * EXAMPLES * 12 * 4, 0):
        for module in (session, passes):
            monkeypatch.setattr(module, "AHEAD_BYTES", nbytes)
        calls.clear()
        out = chain.parent / f"{nbytes}.pt"
        prune(chain, wish(chain.parent, strategy="obs", is_repaired=True), Destination(out))
        found.append((len(calls), numbers(out)))
    assert found[0][0] < found[1][0] < found[2][0]
    for _, state in found[1:]:
        assert all(state[name].tobytes() == array.tobytes() for name, array in found[0][1].items())


def test_sensitivity_looks_at_all_layers_in_one_pass(chain: Path, calls: list[int]) -> None:
    report = sensitivity(open_model(chain), wish(chain.parent))
    assert len(calls) == ALL
    assert all(point.output_error is not None for layer in report.layers for point in layer.points)


def _enough(_sight: LayerInput) -> None:
    raise PassEnd


def observe(network: Any, name: str, x: np.ndarray[Any, Any]) -> None:
    assert isinstance(network, InspectableModel)
    with pytest.raises(PassEnd):
        network.observe([name], x, _enough)


def test_a_pass_of_torch_ends_where_enough_was_seen(chain: Path, calls: list[int]) -> None:
    network = load_trainable(open_model(chain), LoadOptions(model=f"{NETS}:Chain"))
    observe(network, "layers.1.weight", examples(8, 12))
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_makes_no_other_error_of_it(chain: Path) -> None:
    path = chain.parent / "script.pt"
    torch.jit.trace(nets.Chain(), torch.zeros(2, 12)).save(str(path))
    observe(load_trainable(open_model(path), LoadOptions()), "layers.1.weight", examples(8, 12))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_pass_of_keras_ends_where_enough_was_seen(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    k = keras()
    net = k.Sequential([k.layers.Input((12,)), *(k.layers.Dense(12) for _ in range(4))])
    path = saved_keras(net, tmp_path / f"m{suffix}")
    model = open_model(path)
    network = load_trainable(model, LoadOptions())
    names = [tensor.name for tensor in model.tensors if "kernel" in tensor.name]
    called: list[int] = []
    call = k.layers.Dense.call

    def counted(layer: Any, *words: Any, **more: Any) -> Any:
        called.append(1)
        return call(layer, *words, **more)

    monkeypatch.setattr(k.layers.Dense, "call", counted)
    observe(network, names[1], examples(8, 12))
    assert len(called) == 2


def test_onnxruntime_runs_nothing_that_comes_after_what_is_looked_at(tmp_path: Path) -> None:
    numbers_of = {"first": np.eye(12, dtype="f4"), "wrong": np.array([5, 5])}
    nodes = [
        helper.make_node("Relu", ["a"], ["x"]),
        helper.make_node("MatMul", ["x", "first"], ["inner"]),
        # It fails as soon as it is run.
        helper.make_node("Reshape", ["inner", "wrong"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [None, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(array, name) for name, array in numbers_of.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    network, seen = load_onnx_model(open_model(path)), list[LayerInput]()
    network.observe(["first"], examples(8, 12), seen.append)
    assert [sight.name for sight in seen] == ["first"]


def test_a_pass_that_fails_before_the_layer_still_says_why(chain: Path) -> None:
    def broken(_sight: LayerInput) -> None:
        raise WorkError("not this")

    network = load_trainable(open_model(chain), LoadOptions(model=f"{NETS}:Chain"))
    assert isinstance(network, InspectableModel)
    with pytest.raises(WorkError, match="not this"):
        network.observe(["layers.0.weight"], examples(8, 12), broken)


def test_a_pass_that_ends_early_asks_for_no_large_weight_after_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"first": (8, 16), "second": (16, 1024), "third": (1024, 16)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert sum(stands_outside(shape, TensorProto.FLOAT) for shape in shapes.values()) == 2
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"]),
            helper.make_node("MatMul", ["a", "second"], ["b"]),
            helper.make_node("MatMul", ["b", "third"], ["y"]),
        ],
        "three",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    source = data(tmp_path / "x.npz", x=rng.normal(size=(EXAMPLES, 8)).astype(np.float32))
    said = PruneRequest(sparsity=0.5, data=source, strategy="obs")
    prune(tmp_path / "m.onnx", said, Destination(tmp_path / "out.onnx"))
    left = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert {name: np.count_nonzero(array) * 2 for name, array in left.items()} == {
        name: array.size for name, array in weights.items()
    }
