"""A recording is the graph that torch.export writes, and is given up where it might not be."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn

from prunectl.channels.torch.fx import quiet
from prunectl.channels.torch.recorder import UnrecordableError, record
from tests.channels import nets
from tests.channels.torch import nets as more
from tests.channels.torch.cutting import cut, loaded, said, saved


class Recurrent(nn.Module):
    """A factory within a layer of torch, and several values that come out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(10, 8), nn.Embedding(6, 8)
        self.inner, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.table(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.inner(x)[0][:, -1])


class Repeated(nn.Module):
    """One module in two places, work in place, and parts that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), act, nn.Conv2d(8, 8, 3, padding=1), act)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        first, _ = self.body(x).chunk(2, 1)
        return {"out": self.head(torch.cat([first, first], 1).mean((2, 3)))}


_IMAGE = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (more.Functional, (_IMAGE,)),
        (more.Shared, (_IMAGE,)),
        (more.Several, (_IMAGE, torch.zeros(2, 6))),
        (Repeated, (_IMAGE,)),
        (Recurrent, (torch.zeros(2, 6, dtype=torch.int64),)),
    ],
)
def test_a_recording_is_the_graph_that_torch_export_writes(make: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    net = nets.built(make)
    recording = record(net, inputs)
    with quiet():
        program = torch.export.export(net, inputs, strict=False)
    assert _steps(recording.module.graph) == _steps(program.module().graph)
    assert recording.out_spec == program.call_spec.out_spec


def _steps(graph: torch.fx.Graph) -> list[tuple[str, ...]]:
    """All operations with their arguments, and the layers that they are in."""
    return [
        (
            node.name,
            str(node.target),
            str(node.args),
            str(node.kwargs),
            str([path for path, _ in node.meta.get("nn_module_stack", {}).values()]),
        )
        for node in graph.nodes
        if node.op not in {"call_module", "get_attr"}
    ]


def _count_inside(x: Any) -> int:
    with torch.inference_mode():
        return len(torch.where(x.clone() > 0)[0])


def _count_packed(x: Any) -> int:
    lengths = torch.ones(2, dtype=torch.int64) * 3
    return len(nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True).data)


READS: dict[str, Callable[[Any], float]] = {
    "item": lambda x: x.sum().item(),
    "list": lambda x: sum(x[0].tolist()),
    "numpy": lambda x: float(np.asarray(x).sum()),
    "mask": lambda x: len(x[x[:, 0] > 0]),
    "where": lambda x: len(torch.where(x > 0)[0]),
    "inference": _count_inside,
    "nonzero": lambda x: len(x.nonzero(as_tuple=True)[0]),
    "split": lambda x: len(x.tensor_split(torch.zeros(2, dtype=torch.int64))[0]),
    "repeat": lambda x: len(x.repeat_interleave(torch.ones(2, dtype=torch.int64), 0)),
    "pack": _count_packed,
    "sparse": lambda x: len(x.to_sparse().values()),
}
"""Numbers that depend on those that go in."""


class Branching(nn.Module):
    """Something that a run with other numbers would do otherwise."""

    calls: torch.Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        match self.way:
            case "if":
                x = x if x.sum() > 0 else -x
            case "state":
                self.calls += 1
            case "input":
                x += 1
            case "constant":
                x = x + torch.tensor([1.0, 2.0, 3.0, 4.0])
            case "gradients":
                with torch.enable_grad():
                    x = x * 2
            case way:
                x = x * READS[way](x)
        return self.layer(x)


class Swallowing(nn.Module):
    """Goes on, whatever is raised."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        try:
            x = self.inner(x)
        except Exception:  # noqa: BLE001 - as users write it
            x = x * 2
        return x.relu()


@pytest.mark.parametrize("way", [*READS, "if", "state", "input", "constant", "gradients"])
def test_what_depends_on_numbers_is_not_recorded(way: str) -> None:
    with pytest.raises(UnrecordableError):
        record(Branching(way).eval(), (torch.ones(2, 4),))


@pytest.mark.parametrize(
    "inner",
    [
        Branching("if"),
        # Raised in a module that is never left.
        nn.Linear(5, 4),
        nn.Sequential(nn.Linear(5, 4)),
    ],
)
def test_nothing_is_recorded_where_a_module_swallows_what_is_raised(inner: nn.Module) -> None:
    with pytest.raises(UnrecordableError):
        record(Swallowing(inner).eval(), (torch.ones(2, 4),))


def test_what_is_not_recorded_is_exported(tmp_path: Path) -> None:
    net = nets.built(Constant)
    output = tmp_path / "small.pt"
    cut(saved(net, tmp_path / "net.pt"), output, model=f"{__name__}:Constant")
    assert said(loaded(output, "Constant"), torch.randn(2, 3, 16, 16))[0].shape == (2, 5)


class Constant(nn.Module):
    """A constant that is made in passing, which only torch.export keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.body(x)).mean((2, 3))) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def test_a_cut_imports_no_compiler(tmp_path: Path) -> None:
    saved(nets.built(more.Functional), tmp_path / "net.pt")
    lines = (
        "import sys",
        "from pathlib import Path",
        "from tests.channels.torch.cutting import cut",
        f"folder = Path({str(tmp_path)!r})",
        f"cut(folder / 'net.pt', folder / 'small.pt', model='{more.__name__}:Functional')",
        "print(*sys.modules)",
    )
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    modules = set(ran.stdout.split())
    assert "prunectl.channels.torch.recorder" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy"}


def test_where_pytorch_lacks_what_recording_needs_modules_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("torch.export._trace")  # which has it already
    monkeypatch.delattr("torch._export.utils._compiling_state_context")
    monkeypatch.delitem(sys.modules, "prunectl.channels.torch.recorder")
    cut(
        saved(nets.built(more.Functional), tmp_path / "net.pt"),
        tmp_path / "small.pt",
        model=f"{more.__name__}:Functional",
    )
    assert "prunectl.channels.torch.recorder" not in sys.modules
    assert said(loaded(tmp_path / "small.pt", "Functional"), torch.randn(2, 3, 16, 16))[0].shape == (2, 5)


class Beside(nn.Module):
    """Has another thread run a network, which is in the middle of it at each operation here."""

    def __init__(self, other: Staying) -> None:
        super().__init__()
        self.layer, self.others = nn.Linear(4, 4), [other]

    def forward(self, x: Any) -> Any:
        thread = threading.Thread(target=self.others[0], args=(x,))
        thread.start()
        assert self.others[0].is_inside.wait(60)
        x = self.layer(x)
        self.others[0].may_leave.set()
        thread.join()
        return self.layer(x)


class Staying(nn.Module):
    """Stays in its forward until it may leave."""

    def __init__(self) -> None:
        super().__init__()
        self.is_inside, self.may_leave = threading.Event(), threading.Event()

    def forward(self, x: Any) -> Any:
        self.is_inside.set()
        assert self.may_leave.wait(60)
        return x


def test_what_other_threads_run_is_no_part_of_a_recording() -> None:
    graph = record(Beside(Staying()).eval(), (torch.ones(2, 4),)).module.graph
    stacks = [[*node.meta["nn_module_stack"]] for node in graph.nodes if node.op == "call_function"]
    assert stacks == [["", "layer"]] * 2


def test_the_module_that_is_recorded_is_left_as_it_is() -> None:
    net = nets.built(more.Functional)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = len(nn.modules.module._global_forward_hooks)
    record(net, (_IMAGE,))
    for name, value in net.state_dict().items():
        assert_array_equal(value.numpy(), before[name].numpy())
    assert len(nn.modules.module._global_forward_hooks) == hooks
    assert not torch.compiler.is_exporting()
