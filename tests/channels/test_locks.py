"""Which channels stay, and why."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from prunectl.channels.onnx.shapes import infer_static
from tests.channels.made import helper, locks, model, op, places, seen
from tests.channels.test_rules import between


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (op("Softmax", "a", "last_in", axis=1), "Softmax to_last_in spans several channels"),
        (op("LRN", "a", "last_in", size=3), "LRN to_last_in"),
        (op("DepthToSpace", "a", "last_in", blocksize=2), "DepthToSpace to_last_in"),
        (op("ReduceMean", "a", "last_in", axes=[1]), "ReduceMean to_last_in spans several channels"),
        (op("Transpose", "a", "last_in", perm=[0, 2, 1, 3]), "Conv to_y mixes channels with positions"),
        (op("Pad", "a pads", "last_in"), "Pad to_last_in spans several channels"),
        (op("Slice", "a from to at step", "last_in"), "Slice to_last_in reorders channels"),
        (op("Gather", "a pick", "last_in", axis=1), "Gather to_last_in spans several channels"),
    ],
    ids=lambda case: getattr(case, "op_type", None),
)
def test_an_operation_that_mixes_channels_locks_them(node: Any, reason: str, tmp_path: Path) -> None:
    numbers = {
        "pads": [0, 1, 0, 0, 0, 1, 0, 0],
        "from": [-1],
        "to": [-99],
        "at": [1],
        "step": [-1],
        "pick": [2, 0, 1, 3],
    }
    width = {"DepthToSpace": 1, "ReduceMean": 1, "Pad": 6, "Transpose": 8}.get(node.op_type, 4)
    found = between([node], tmp_path, numbers={n: v for n, v in numbers.items() if n in node.input}, width=width)
    assert locks(found)["first"] == reason


def test_a_shape_that_takes_channels_apart_locks_them(tmp_path: Path) -> None:
    numbers = {"apart": [1, 2, 8, 12]}
    found = between([op("Reshape", "a apart", "last_in")], tmp_path, numbers=numbers, channels=3, width=2)
    assert locks(found)["first"] == "Reshape to_last_in splits channels"


def test_what_comes_from_elsewhere_locks_what_it_meets(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["a"], ["last_in"], name="odd", domain="some.where")
    graph = model([op("Conv", "x first", "a"), op("Relu", "last_in", "y")], {"first": (4, 3, 3, 3)})
    graph.graph.node.insert(1, node)
    graph.opset_import.append(helper.make_opsetid("some.where", 1))
    assert locks(seen(graph, tmp_path))["first"] == "some.where.Mystery odd"


def test_adding_the_input_locks(tmp_path: Path) -> None:
    found = between([op("Add", "a x", "last_in")], tmp_path, channels=3)
    assert locks(found)["first"] == "Add to_last_in ties these channels to others that cannot be removed"


def test_one_channel_that_scales_many_stays(tmp_path: Path) -> None:
    nodes = [op("Conv", "a gate", "g"), op("Mul", "a g", "last_in")]
    found = between(nodes, tmp_path, {"gate": (1, 4, 1, 1)})
    assert locks(found)["gate"] == "Mul to_last_in broadcasts this channel to many channels"
    assert places(found, "first") == {"first[0]", "gate[1]", "last[1]"}


def test_weights_that_are_calculated_lock_both_sides(tmp_path: Path) -> None:
    nodes = [op("Mul", "direction length", "kernel"), op("Conv", "a kernel", "last_in")]
    found = between(nodes, tmp_path, {"direction": (5, 4, 3, 3), "length": (5, 1, 1, 1)}, width=5)
    assert locks(found)["first"] == "Conv to_last_in computes its weights"
    assert [family.name for family in found.groups] == ["first", "last"]


def test_a_shared_kernel_makes_its_users_go_together(tmp_path: Path) -> None:
    nodes = [op("Conv", "a same", "b"), op("Conv", "b same", "last_in")]
    assert places(between(nodes, tmp_path, {"same": (4, 4, 1, 1)}), "first") == {
        "first[0]",
        "same[0]",
        "same[1]",
        "last[1]",
    }


def test_a_kernel_that_is_also_used_otherwise_stays(tmp_path: Path) -> None:
    nodes = [op("Conv", "a same", "b"), op("ReduceSum", "same", "s", keepdims=0), op("Mul", "b s", "last_in")]
    found = between(nodes, tmp_path, {"same": (4, 4, 1, 1)})
    assert locks(found)["same"] == "same is also used in a different way elsewhere"


def test_equal_biases_that_an_exporter_merged_tie_nothing(tmp_path: Path) -> None:
    nodes = [op("Conv", "a middle bias", "b"), op("Conv", "b more bias", "last_in")]
    found = between(nodes, tmp_path, {"middle": (4, 4, 1, 1), "more": (4, 4, 1, 1), "bias": (4,)})
    assert places(found, "middle") == {"middle[0]", "bias[0]", "more[1]"}


def test_what_a_branch_reads_from_outside_stays(tmp_path: Path) -> None:
    def branch(kind: str) -> Any:
        out = helper.make_tensor_value_info(f"{kind}_out", 1, None)
        return helper.make_graph([op(kind, "a", f"{kind}_out")], kind, [], [out])

    nodes = [
        op("Conv", "x first", "a"),
        op("Cast", "c", "choice", to=9),
        op("If", "choice", "y", then_branch=branch("Relu"), else_branch=branch("Neg")),
    ]
    assert locks(seen(model(nodes, {"first": (4, 3, 3, 3), "c": (1,)}), tmp_path))["first"] == "If to_y"


@pytest.mark.parametrize("size", [1 << 26, 1 << 42])
def test_what_a_few_numbers_ask_a_great_many_of_is_not_worked_out(size: int) -> None:
    nodes = [op("Add", "size zero", "sizes"), op("ConstantOfShape", "sizes", "many"), op("ReduceSum", "many", "s")]
    made = model([*nodes, op("Add", "x s", "y")], {}, numbers={"size": [size], "zero": [0]})
    tracemalloc.start()
    constants = infer_static(made, "made.onnx").constants
    assert tracemalloc.get_traced_memory()[1] < 4 * size
    tracemalloc.stop()
    assert constants["sizes"] == size
    assert not {"many", "s"} & constants.keys()


def test_an_operator_that_onnx_does_not_know_is_worked_out_by_nobody() -> None:
    made = model(
        [op("Nothing", "size", "n"), op("Cast", "n", "f", to=1), op("Add", "x f", "y")], {}, numbers={"size": [3]}
    )
    assert infer_static(made, "made.onnx").constants.keys() == {"size"}


@pytest.mark.parametrize("function", ["onnx.reference.ReferenceEvaluator.run", "onnx.shape_inference.infer_shapes"])
def test_what_is_no_fault_of_the_model_is_not_passed_over(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(function, exhausted)
    made = model([op("Add", "size size", "sizes"), op("Expand", "x sizes", "y")], {}, numbers={"size": [1, 3, 8, 8]})
    with pytest.raises(MemoryError):
        infer_static(made, "made.onnx")
