"""How much exported programs calculate, against PyTorch's own counter."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunectl.errors import InputError
from prunectl.formats.base import Operation
from prunectl.formats.registry import open_model
from prunectl.formats.torch.exported import operations

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore")


class Convolutions(nn.Module):  # type: ignore[name-defined, misc]
    """Plain, strided, grouped, dilated and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding="same")
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, dilation=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.line = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.depthwise(self.grouped(self.stem(x))))
        x = self.norm(self.up(x))
        return self.head(self.line(x.flatten(2)).mean(-1))


class Products(nn.Module):  # type: ignore[name-defined, misc]
    """Products of matrices in every way that PyTorch writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))
        self.bias = nn.Parameter(torch.ones(4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        flat = torch.addmm(self.bias, x.reshape(-1, 6), self.weight)
        flat = torch.mm(flat, self.proj.weight.t())
        three = flat.view(x.shape[0], -1, 4)
        scores = torch.bmm(three, three.transpose(1, 2))
        mixed = torch.matmul(scores, three)
        return self.proj(torch.einsum("bij,bjk->bik", scores, mixed))


class Attention(nn.Module):  # type: ignore[name-defined, misc]
    """A layer of a transformer, part of it under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mixing = nn.MultiheadAttention(8, 2, batch_first=True)
        self.frozen = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        x = self.words(x)
        with torch.no_grad():
            x = self.frozen(x)
        return self.mixing(x, x, x, need_weights=False)[0]


def exported(net: Any, example: Any, path: Path, **dimensions: Any) -> Path:
    program = torch.export.export(net.eval(), (example,), **dimensions)
    torch.export.save(program, path)
    return path


def total_of_torch(net: Any, example: Any) -> int:
    """Multiply-accumulates, of which PyTorch counts each as two operations."""
    # With one kernel for all of it, the counter would not see into an attention.
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, math:
        net.eval()(example)
    return int(counter.get_total_flops()) // 2


EXAMPLES: list[tuple[Callable[[], Any], Any]] = [
    (Convolutions, torch.ones(1, 3, 17, 16)),
    (Products, torch.ones(2, 5, 6)),
    (Attention, torch.ones(1, 7, dtype=torch.int64)),
]


@pytest.mark.parametrize(("build", "example"), EXAMPLES)
def test_counts_are_those_of_pytorch(tmp_path: Path, build: Callable[[], Any], example: Any) -> None:
    net = build()
    model = open_model(exported(net, example, tmp_path / "m.pt2"))
    found = operations(model)
    assert sum(one.macs or 0 for one in found) == total_of_torch(net, example)
    assert None not in {one.macs for one in found}
    assert {one.weight for one in found if one.weight} == {one.name for one in model.tensors if one.role == "kernel"}


@pytest.mark.parametrize("build", [Convolutions, Attention])
def test_an_open_batch_counts_as_one(tmp_path: Path, build: Callable[[], Any]) -> None:
    example = torch.ones(3, 3, 17, 16) if build is Convolutions else torch.ones(3, 7, dtype=torch.int64)
    net = build()
    path = exported(net, example, tmp_path / "m.pt2", dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert sum(one.macs or 0 for one in operations(open_model(path))) == total_of_torch(net, example[:1])


def test_an_open_length_leaves_the_count_open(tmp_path: Path) -> None:
    example, length = torch.ones(2, 7, 4), torch.export.Dim("length")
    path = exported(nn.Linear(4, 3), example, tmp_path / "m.pt2", dynamic_shapes=({1: length},))
    assert operations(open_model(path)) == (Operation("linear", "linear", None, "weight"),)


@pytest.mark.parametrize(("cell", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_multiplies_by_every_kernel_at_each_step(tmp_path: Path, cell: str, gates: int) -> None:
    class Recurrent(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, cell)(3, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.cell(x)[0]

    path = exported(Recurrent(), torch.ones(1, 7, 3), tmp_path / "m.pt2")
    macs = {one.weight: one.macs for one in operations(open_model(path))}
    one_way = {"weight_ih_l0": 3, "weight_hh_l0": 5, "weight_ih_l1": 10, "weight_hh_l1": 5}
    assert macs == {
        f"cell.{name}{end}": 7 * gates * 5 * width for name, width in one_way.items() for end in ("", "_reverse")
    }


def test_an_operation_without_a_weight_belongs_to_its_module(tmp_path: Path) -> None:
    path = exported(Attention(), torch.ones(1, 7, dtype=torch.int64), tmp_path / "m.pt2")
    found = {one.kind: one for one in operations(open_model(path))}["scaled_dot_product_attention"]
    assert found == Operation("mixing", "scaled_dot_product_attention", 2 * 2 * 7 * 7 * 4)


def test_what_may_run_or_not_has_no_count(tmp_path: Path) -> None:
    class Choice(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return torch.cond(x.sum() > 0, self.one, self.other, (x,))

    found = operations(open_model(exported(Choice(), torch.ones(2, 4), tmp_path / "m.pt2")))
    assert {(one.macs, one.weight) for one in found} == {(None, "one.weight"), (None, "other.weight")}


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same program with another graph."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if "/models/" in name:
                program = json.loads(content)
                change(program)
                content = json.dumps(program).encode()
            new.writestr(name, content)
    return target


def with_size(size: Any) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"] = [size, {"as_int": 3}]

    return change


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ({"as_int": 6}, 6),
        ({"as_expr": {"expr_str": "Mul(Integer(6), Symbol('s0', integer=True))"}}, 6),
        ({"as_expr": {"expr_str": "2*s0 + 4"}}, 6),
        ({"as_expr": {"expr_str": "FloorDiv(Add(Symbol('s0'), Integer(12)), Integer(2))"}}, 6),
        ({"as_expr": {"expr_str": "Symbol('s1')"}}, None),
        ({"as_expr": {"expr_str": "s0 // 0"}}, None),
        ({"as_expr": {"expr_str": "__import__('os').abort()"}}, None),
        ({"as_expr": {"expr_str": "9**9**9**9"}}, None),
        ({"as_expr": {"expr_str": "(" * 200 + "1" + ")" * 200}}, None),
        ({"as_expr": {"expr_str": "-" * 10_000 + "1"}}, None),
        ({"as_expr": {"expr_str": "Integer(-5)"}}, None),
        ({"as_int": 10**30}, None),
        ({"as_int": True}, None),
        ("6", None),
        (None, None),
    ],
    ids=str,
)
def test_sizes_may_be_expressions_and_nonsense_is_not_known(tmp_path: Path, size: Any, rows: int | None) -> None:
    path = exported(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "m.pt2")

    def change(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        values["input"]["sizes"][0] = {"as_expr": {"expr_str": "Symbol('s0', positive=True)"}}
        with_size(size)(program)

    assert [one.macs for one in operations(open_model(changed(path, change)))] == [None if rows is None else rows * 12]


@pytest.mark.parametrize(
    "change",
    [
        lambda program: program.update(graph_module=7),
        lambda program: program["graph_module"].update(graph=[]),
        lambda program: program["graph_module"]["graph"].update(nodes=[1, None, {"target": 7}, {"inputs": {}}]),
        lambda program: program["graph_module"]["graph"].update(tensor_values=[]),
        lambda program: program["graph_module"]["graph"]["nodes"][0].update(inputs=[{"name": {}, "arg": "x"}]),
        lambda program: program["graph_module"]["graph"]["nodes"][0].update(outputs=[], metadata=[]),
        lambda program: program["graph_module"].update(signature={"input_specs": [{"parameter": 1}, None]}),
    ],
)
def test_a_graph_of_nonsense_does_no_harm(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = exported(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "m.pt2")
    assert all(one.macs is None or one.macs == 24 for one in operations(open_model(changed(path, change))))


def test_a_graph_inside_itself_many_times_ends(tmp_path: Path) -> None:
    path = exported(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "m.pt2")

    def change(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        for _ in range(40):
            argument = {"name": "", "arg": {"as_graph": {"name": "g", "graph": graph}}, "kind": 1}
            graph = {"nodes": [{"target": "torch.ops.higher_order.cond", "inputs": [argument], "outputs": []}]}
        program["graph_module"]["graph"] = graph

    assert operations(open_model(changed(path, change))) == ()


def test_a_graph_too_big_to_be_read_is_refused(tmp_path: Path) -> None:
    path = exported(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "m.pt2")
    model = open_model(changed(path, lambda program: program.update(remark=" " * (12 << 20))))
    with pytest.raises(InputError, match=r"changed\.pt2 has a graph of \d+ bytes"):
        operations(model)


def test_operations_are_counted_without_reading_the_file_again(tmp_path: Path) -> None:
    path = exported(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "m.pt2")
    model = open_model(path)
    path.unlink()
    assert [operation.macs for operation in operations(model)] == [24]
