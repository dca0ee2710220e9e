"""Exported programs, written by torch.export.save."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prunectl.errors import InputError
from prunectl.formats.base import Role
from prunectl.formats.table import open_model
from tests.contract import Array, FormatContract, raw

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class TestExportedProgram(FormatContract):
    format = "torch-export"
    name = "model.pt2"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        net = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 6), "second": torch.nn.Linear(6, 3, bias=False)})
        net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        export(torch.nn.Sequential(*net.values()), path, names=("first", "second"))

    def read_back(self, path: Path) -> dict[str, Array]:
        return {name: tensor.detach().numpy() for name, tensor in torch.export.load(path).state_dict.items()}


class Chain(torch.nn.Module):
    """Two layers one after another, tied or not, with a buffer and a constant."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module, third: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return x if self.third is None else self.third(x)


def export(net: torch.nn.Module, path: Path, names: tuple[str, ...]) -> None:
    chain = Chain(*net.children())
    torch.export.save(torch.export.export(chain, (torch.ones(2, 5),)), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "m.pt2"
    tied = torch.nn.Linear(5, 5)
    chain = Chain(tied, torch.nn.BatchNorm1d(5), tied)
    torch.export.save(torch.export.export(chain.eval(), (torch.ones(2, 5),)), target)
    return target


def test_tied_layers_share_a_storage_and_kinds_come_from_the_graph(path: Path) -> None:
    model = open_model(path)
    expected = torch.export.load(path).state_dict
    found = {tensor.name: tensor for tensor in model.tensors}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert raw(model.read(tensor)) == raw(expected[name].detach().numpy())
    assert found["first.weight"].storage.key == found["third.weight"].storage.key
    assert "linear" in {found["first.weight"].kind, found["third.weight"].kind}
    assert found["second.running_mean"].role is Role.STATE
    assert model.about.producer == f"pytorch {torch.__version__}"


def test_a_deflated_program_is_read(path: Path) -> None:
    model = open_model(changed(path, lambda name, content: content, zipfile.ZIP_DEFLATED))
    assert model.about.is_compressed
    expected = torch.export.load(path).state_dict
    for tensor in model.tensors:
        assert raw(model.read(tensor)) == raw(expected[tensor.name].detach().numpy())


def changed(path: Path, change: Any, method: int = zipfile.ZIP_STORED) -> Path:
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return target


def with_meta(**changes: Any) -> Any:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return content
        config = json.loads(content)
        for facts in config["config"].values():
            facts["tensor_meta"].update(changes)
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            with_meta(sizes=[{"as_int": 1000}, {"as_int": 1000}], strides=[{"as_int": 1000}, {"as_int": 1}]),
            "should reach",
        ),
        (with_meta(sizes=[{"as_expr": "s0"}]), "does not say how"),
        (with_meta(sizes=[{"as_int": -1}], strides=[{"as_int": 1}]), "no shape that makes sense"),
        (with_meta(storage_offset={"as_int": 10**30}), "no shape that makes sense"),
        (with_meta(dtype=99), "does not read"),
        (with_meta(dtype=[]), "does not read"),
        (lambda name, content: None if "weights_config" in name else content, "has no entry"),
        (lambda name, content: b"[" * 100_000 if "weights_config" in name else content, "nested too deep"),
        (lambda name, content: None if "models/" in name else content, "has no model"),
    ],
)
def test_a_program_that_lies_is_refused(path: Path, change: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_model(changed(path, change))


def test_an_older_layout_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", b"")
    with pytest.raises(InputError, match=r"PyTorch 2\.7 or earlier") as caught:
        open_model(path)
    assert "save it" in caught.value.hint
