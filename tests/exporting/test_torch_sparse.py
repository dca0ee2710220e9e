"""`export --sparse` of PyTorch networks: layers without zeros where they are faster, in a class of torch alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import Outcome, here

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(2048, 2048, bias=False)
        self.dense = nn.Linear(2048, 40)
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.dense(torch.relu(self.wide(x)))))
"""
SHAPE = ("--input", "x:?,2048")


def loaded(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of which one layer is wide and has 99 % zeros: no kernel takes as long for it as the dense one."""
    place = tmp_path_factory.mktemp("wide")
    (place / "net.py").write_text(NET)
    torch.manual_seed(0)
    net = loaded(place / "net.py", "Net")
    keep = torch.rand(2048, 2048) > 0.99
    torch.save({**net.state_dict(), "wide.weight": net.wide.weight * keep}, place / "net.pt")
    return place


@pytest.fixture(scope="module")
def exported(folder: Path) -> Outcome:
    """What is said when the network of the folder is exported into it, which measures each layer."""
    return export(folder, "--sparse", *SHAPE)


def export(folder: Path, *words: str) -> Outcome:
    return here("export", "net.pt", "-o", "fast.pt", "--builder", "net.py:Net", *words, cwd=folder)


def test_what_is_faster_without_zeros_is_stored_so_and_answers_alike(folder: Path, exported: Outcome) -> None:
    assert exported.code == 0, exported.err
    told = " ".join(exported.err.split())
    assert "measured as faster in batches of 32, on one thread of this processor: wide (" in told
    assert "Left dense: dense (0 % zeros)." in told
    dense, fast = loaded(folder / "net.py", "Net").eval(), loaded(folder / "fast.py", "Net").eval()
    dense.load_state_dict(torch.load(folder / "net.pt"))
    state = torch.load(folder / "fast.pt", weights_only=True)
    fast.load_state_dict(state, strict=True)
    assert fast.first.weight is fast.second.weight
    assert type(fast.wide).__name__ == "SparseLinear"
    columns, values = state["wide.columns"].long(), state["wide.values"]
    rows = torch.repeat_interleave(torch.arange(2048), state["wide.rows"].diff())
    assert torch.equal(torch.zeros(2048, 2048).index_put((rows, columns), values), dense.wide.weight)
    for rows in (1, 3, 64):
        x = torch.randn(rows, 2048)
        with torch.no_grad():
            assert torch.allclose(fast(x), dense(x), atol=1e-5)
    assert (folder / "fast.pt").stat().st_size < (folder / "net.pt").stat().st_size / 10


@pytest.mark.usefixtures("exported")
def test_gradients_reach_what_is_left(folder: Path) -> None:
    fast = loaded(folder / "fast.py", "Net")
    fast.load_state_dict(torch.load(folder / "fast.pt", weights_only=True))
    fast(torch.randn(4, 2048)).sum().backward()
    assert fast.wide.values.grad.shape == fast.wide.values.shape
    assert fast.wide.values.grad.abs().sum() > 0


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(("part", "value"), [("columns", 2048), ("columns", -1), ("rows", 10**6)])
def test_indices_that_lead_out_of_the_matrix_are_refused_by_the_class(folder: Path, part: str, value: int) -> None:
    state = torch.load(folder / "fast.pt", weights_only=True)
    state[f"wide.{part}"][5] = value
    fast = loaded(folder / "fast.py", "Net").eval()
    fast.load_state_dict(state)
    with pytest.raises(RuntimeError, match="not satisfied"), torch.no_grad():
        fast(torch.randn(2, 2048))


def test_where_no_layer_is_faster_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef Net():\n    return nn.Sequential(nn.Linear(64, 10))\n"
    )
    torch.manual_seed(0)
    weight = torch.randn(10, 64) * (torch.rand(10, 64) > 0.4)
    torch.save({"0.weight": weight, "0.bias": torch.zeros(10)}, tmp_path / "net.pt")
    done = export(tmp_path, "--sparse", "--input", "x:?,64", "--batch-size", "1")
    assert done.code == 5
    assert "no layer of net.pt is 1.2 times as fast without its zeros: 0 (" in " ".join(done.err.split())
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["net.pt", "net.py"]


def test_sixteen_bits_do_not_go_with_it(folder: Path) -> None:
    done = export(folder, "--sparse", "--half", *SHAPE)
    assert done.code == 2
    assert "--sparse cannot be used with --half for PyTorch" in " ".join(done.err.split())
