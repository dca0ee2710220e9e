"""Exported programs, written by torch.export.save."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prunectl.errors import InputError
from prunectl.formats.base import Role
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract, raw
from tests.running import here

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
            "reaches element",
        ),
        (with_meta(sizes=[{"as_expr": "s0"}]), "does not give the layout of"),
        (with_meta(sizes=[{"as_int": -1}], strides=[{"as_int": 1}]), "has an invalid shape"),
        (with_meta(storage_offset={"as_int": 10**30}), "has an invalid shape"),
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


def older(path: Path, version: str) -> dict[str, Array]:
    """Write a program as an older PyTorch did, and return its weights; today's still loads it."""
    net = Chain(torch.nn.Linear(5, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 3)).eval()
    program = torch.export.export(net, (torch.ones(2, 5),))
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        held = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    weights, constants = (saved(value) for value in (dict(program.state_dict), {}))
    examples, graph = held["data/sample_inputs/model.pt"], held["models/model.json"]
    if version == "2.8":
        kept = {name: content for name, content in held.items() if not name.startswith(("data/weights", "data/const"))}
        entries = {**kept, "data/weights/model.pt": weights, "data/constants/model.pt": constants}
        entries = {f"m/{name}": content for name, content in entries.items()}
    else:
        entries = {
            "version": b"8.8",
            "serialized_exported_program.json": graph,
            "serialized_state_dict.pt": weights,
            "serialized_constants.pt": constants,
            "serialized_example_inputs.pt": examples,
        }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return {name: tensor.detach().numpy() for name, tensor in program.state_dict.items()}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("version", ["2.7", "2.8"])
def test_the_weights_of_an_older_program_lie_in_a_zip_inside_the_zip(version: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    expected = older(path, version)
    model = open_model(path)
    assert {tensor.name: raw(model.read(tensor)) for tensor in model.tensors} == {
        name: raw(array) for name, array in expected.items()
    }
    assert [t.name for t in model.tensors if t.is_prunable] == ["first.weight", "third.weight"]
    assert {t.name: t.kind for t in model.tensors}["first.weight"] == "linear"
    assert here("size", path).code == 0
    assert here("inspect", path, "--flops", "--json").json["models"][0]["macs"] > 0


@pytest.mark.parametrize("version", ["2.7", "2.8"])
def test_an_older_program_is_pruned_and_stripped_where_it_lies(version: str, tmp_path: Path) -> None:
    path, out, bare = tmp_path / "m.pt2", tmp_path / "out.pt2", tmp_path / "bare.pt2"
    expected = older(path, version)
    done = here("prune", path, "-o", out, "-s", "80%", "--scope", "layer")
    assert done.code == 0, done.err
    assert out.stat().st_size == path.stat().st_size
    loaded = torch.export.load(out)
    for name, tensor in loaded.state_dict.items():
        array, was = tensor.detach().numpy(), expected[name]
        zeros = round(0.8 * array.size) if name in {"first.weight", "third.weight"} else int((was == 0).sum())
        assert (array == 0).sum() == zeros
        assert (array[array != 0] == was[array != 0]).all()
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        (inner,) = [name for name in archive.namelist() if "state_dict" in name or "weights" in name]
        with zipfile.ZipFile(io.BytesIO(archive.read(inner))) as weights:
            assert weights.testzip() is None
    assert here("strip", out, "-o", bare).code == 0
    given = torch.rand(2, 5)
    assert torch.equal(torch.export.load(bare).module()(given), loaded.module()(given))


def test_an_older_program_that_is_compressed_or_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    older(path, "2.7")
    with pytest.raises(InputError, match="a zip inside the zip") as caught:
        open_model(changed(path, lambda _, content: content, zipfile.ZIP_DEFLATED))
    assert "save it" in caught.value.hint
    older(path, "2.7")
    with pytest.raises(InputError, match="damaged"):
        open_model(changed(path, lambda name, content: content[:-30] if name.endswith("dict.pt") else content))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(InputError, match="it has no entry serialized_state_dict"):
        open_model(path)


def exported(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A program whose example input is bigger than its weights, and that input."""
    net, given = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU()), torch.rand(100, 5)
    torch.export.save(torch.export.export(net.eval(), (given,)), tmp_path / "m.pt2")
    return tmp_path / "m.pt2", given


def test_example_inputs_are_called_dead_weight(tmp_path: Path) -> None:
    path, given = exported(tmp_path)
    (model,) = here("inspect", path, "--json").json["models"]
    parts = {part["name"]: part for part in model["parts"]}
    assert parts["example inputs"]["is_dead"]
    assert parts["example inputs"]["bytes"] > given.numel() * 4
    assert any("prunectl strip" in word for word in model["advice"])


@pytest.mark.parametrize("words", [(), ("--only", "examples")])
def test_strip_takes_example_inputs_out_and_the_answers_are_the_same(words: tuple[str, ...], tmp_path: Path) -> None:
    path, given = exported(tmp_path)
    done = here("strip", path, "-o", tmp_path / "out.pt2", *words, "--json")
    assert done.code == 0, done.err
    out = tmp_path / "out.pt2"
    assert out.stat().st_size < path.stat().st_size - given.numel() * 4
    assert torch.equal(torch.export.load(out).module()(given), torch.export.load(path).module()(given))
    assert torch.export.load(out).example_inputs is None
    again = here("strip", out, "-o", tmp_path / "again.pt2")
    assert again.code == 0
    assert "There was nothing to strip" in again.err
    assert (tmp_path / "again.pt2").read_bytes() == out.read_bytes()


def test_a_program_has_no_half_precision_by_itself(tmp_path: Path) -> None:
    path, _ = exported(tmp_path)
    done = here("strip", path, "-o", tmp_path / "out.pt2", "--half")
    assert done.code == 3
    assert "exported program" in done.err
