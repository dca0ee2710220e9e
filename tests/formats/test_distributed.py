"""Distributed checkpoints of PyTorch: the parts of all ranks become what torch's own converter gives."""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from prunectl.errors import InputError
from prunectl.formats import extents
from prunectl.formats.base import Role, Storage, Tensor
from prunectl.formats.extents import Extent
from prunectl.formats.registry import open_model
from prunectl.formats.torch import boxes as tiling
from prunectl.formats.torch.boxes import TensorChunk, is_tiled
from prunectl.formats.torch.distributed import _decode, _stream
from tests.running import here
from tests.safety.cost import assert_refused_cheaply, cost

RANKS = 3
SAVE = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
ranks, home = int(sys.argv[1]), sys.argv[2]
# Loaded once, and forked before any thread runs.
children = [os.fork() for _ in range(1)]
rank = 0 if children[0] else 1
while 0 < rank < ranks - 1:
    children.append(os.fork())
    if children[-1]:
        break
    rank += 1
dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,))
torch.manual_seed(0)
rows, columns, whole = torch.randn(100, 60), torch.randn(8, 7).bfloat16(), torch.randn(5)
def spread(tensor, place):
    return distribute_tensor(tensor, mesh, [place])
model = {
    "model.layers.0.weight": spread(rows, Shard(0)), "model.layers.1.weight": spread(columns, Shard(1)),
    "model.norm.weight": spread(whole, Replicate()), "model.steps": torch.tensor(3),
}
state = {"exp_avg": spread(rows * 2, Shard(0)), "step": torch.tensor(5.0)}
optimizer = {"state": {"model.layers.0.weight": state}, "param_groups": [{"lr": 0.1, "params": [0]}]}
dcp.save({"model": model, "optimizer": optimizer, "epoch": 7}, checkpoint_id=f"{home}/saved")
dist.destroy_process_group()
if children[-1]:
    code = os.waitpid(children[-1], 0)[1]
    os._exit(1 if code else 0)
os._exit(0)
"""
"""Each rank forks the next, and waits for it."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What several ranks saved together: sharded by rows and by columns, replicated, scalars, bfloat16."""
    home = tmp_path_factory.mktemp("dcp")
    command = [sys.executable, "-W", "ignore", "-c", SAVE, str(RANKS), str(home)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, check=False)
    assert done.returncode == 0
    return home / "saved"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """What one process saved, to be damaged."""
    torch.manual_seed(1)
    state = {"model": {"a.weight": torch.randn(4, 6), "a.bias": torch.zeros(4)}, "epoch": 1}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "own", no_dist=True)
    return tmp_path / "own"


def test_the_weights_are_those_of_torchs_own_converter_bit_by_bit(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text("{}")
    dcp_to_torch_save(saved, tmp_path / "reference.pt")
    reference = torch.load(tmp_path / "reference.pt", weights_only=True)
    assert here("export", saved, "-o", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == reference["model"].keys()
    for name, tensor in reference["model"].items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    # The state of the optimizer is put together as well, though nothing writes it.
    opened = open_model(saved)
    moment = next(tensor for tensor in opened.tensors if tensor.name.endswith("exp_avg"))
    assert (
        opened.read(moment).tolist()
        == reference["optimizer"]["state"]["model.layers.0.weight"]["exp_avg"].numpy().tolist()
    )


def test_one_file_is_written_where_it_is_asked_for(saved: Path, tmp_path: Path) -> None:
    for name in ("out.safetensors", "out.pt"):
        assert here("export", saved, "-o", tmp_path / name).code == 0
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state.keys() == load_file(tmp_path / "out.safetensors").keys()


def test_inspect_needs_no_torch_and_tells_the_state_of_the_optimizer(saved: Path) -> None:
    code = "import sys; from prunectl.cli import _run; _run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "inspect", str(saved), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert '"format": "torch-dcp"' in done.stdout
    assert "The optimizer state takes" in done.stdout
    assert "`prunectl strip` removes it." in done.stdout
    roles = {row[1]: row[2] for row in here("inspect", saved).rows}
    assert roles["model.layers.0.weight"] == "kernel"
    assert roles["optimizer.state.model.layers.0.weight.exp_avg"] == "optimizer"


def test_what_is_only_read_says_what_to_do_first(saved: Path, tmp_path: Path) -> None:
    done = here("prune", saved, "-o", tmp_path / "out", "-s", "50%")
    assert done.code == 3
    assert f"prunectl strip {saved} -o OUT" in done.err


def test_strip_leaves_the_weights_of_torchs_own_converter_and_says_what_went(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "config.json").write_text("{}")
    (folder / "rng_state_0.pth").write_bytes(b"random")
    (folder / "meta.pt").write_bytes(b"epoch and callbacks, as Lightning keeps them")
    dcp_to_torch_save(saved, tmp_path / "reference.pt")
    reference = torch.load(tmp_path / "reference.pt", weights_only=True)["model"]
    assert here("strip", folder, "-o", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == reference.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in reference.items()
    )
    removed = {name: (part, int(nbytes)) for name, part, nbytes in here("strip", folder, "--dry-run").rows}
    assert removed["rng_state_0.pth"] == ("training", len(b"random"))
    assert removed["meta.pt"][0] == "training"
    # One moment of a matrix of 100 rows and 60 columns, and a step that takes a small archive of its own.
    assert 100 * 60 * 4 + 4 <= removed["optimizer"][1] < 100 * 60 * 4 + 2000


def test_strip_writes_one_file_or_halves_where_it_is_asked_for(saved: Path, tmp_path: Path) -> None:
    assert here("strip", saved, "-o", tmp_path / "out.safetensors").code == 0
    assert here("strip", saved / ".metadata", "-o", tmp_path / "half.safetensors", "--half").code == 0
    whole, half = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "half.safetensors")
    assert torch.equal(whole["model.layers.0.weight"].half(), half["model.layers.0.weight"])
    assert half["model.layers.1.weight"].dtype is torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors", "out.safetensors"]


def test_a_dry_run_of_strip_writes_nothing(saved: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in saved.iterdir())
    assert here("strip", saved, "--dry-run").code == 0
    assert sorted(path.name for path in saved.iterdir()) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("-o", "OUT.pt"), "prunectl export"),
        (("-o", "OUT", "--pack"), "leave out --pack"),
        (("-o", "OUT", "--only", "optimizer"), "leave out --only"),
        (("--in-place",), "write -o OUT"),
    ],
)
def test_what_strip_cannot_do_with_many_ranks_is_a_sentence(saved: Path, words: tuple[str, ...], hint: str) -> None:
    done = here("strip", saved, *words)
    assert done.code == 2
    assert hint in done.err
    assert not Path("OUT").exists()


def test_strip_replaces_nothing_unless_it_is_told_to(saved: Path, tmp_path: Path) -> None:
    assert here("strip", saved, "-o", tmp_path / "out").code == 0
    assert here("strip", saved, "-o", tmp_path / "out").code == 2
    assert here("strip", saved, "-o", tmp_path / "out", "--force").code == 0
    assert here("strip", saved, "-o", saved / "out").code == 2
    assert here("strip", saved, "-o", saved.parent).code == 2


def test_a_checkpoint_of_accelerate_with_fsdp_is_found_in_its_folder(saved: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.copytree(saved, tmp_path / f"checkpoint-100/{name}", ignore=shutil.ignore_patterns("config.json"))
    (tmp_path / "checkpoint-100/tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint-100/scheduler.pt").write_bytes(b"schedule")
    assert here("strip", tmp_path / "checkpoint-100", "-o", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "model.safetensors"}


TILED = [
    ((7, 5), [((0, 0), (3, 5)), ((3, 0), (4, 5))]),
    ((7, 5), [((0, 0), (7, 2)), ((0, 2), (7, 3))]),
    ((4, 6), [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((0, 3), (4, 3))]),
    ((5, 2, 3), [((0, 0, 0), (5, 1, 3)), ((0, 1, 0), (2, 1, 3)), ((2, 1, 0), (3, 1, 3))]),
    ((2, 4, 3), [((0, 0, 0), (2, 1, 3)), ((0, 1, 0), (2, 3, 2)), ((0, 1, 2), (1, 3, 1)), ((1, 1, 2), (1, 3, 1))]),
    ((9,), [((6,), (3,)), ((0,), (6,))]),
    ((), [((), ())]),
    ((0, 3), [((0, 0), (0, 3))]),
]
"""Shapes with boxes that tile them: by rows, by columns, by both, and unevenly."""


def boxes_of(folder: Path, whole: torch.Tensor, parts: Any) -> list[TensorChunk]:
    """Boxes of a tensor, each saved as the ranks do it."""
    boxes = []
    for number, (offsets, sizes) in enumerate(parts):
        place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        file = folder / f"{number}.distcp"
        torch.save(whole[place].clone(), file)
        boxes.append(TensorChunk(offsets, sizes, Extent(file, 0, file.stat().st_size)))
    return boxes


def tensor_like(whole: torch.Tensor) -> Tensor:
    storage = Storage("a", whole.nbytes, None, whole.nbytes)
    return Tensor("a", "", tuple(whole.shape), np.dtype(np.float32), Role.KERNEL, storage)


@pytest.mark.parametrize("slab_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize(("shape", "parts"), TILED)
def test_a_tensor_is_streamed_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], parts: Any, slab_bytes: int
) -> None:
    # Less than a row, a few rows, and the whole.
    monkeypatch.setattr(tiling, "_SLAB_BYTES", slab_bytes)
    whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    boxes, tensor = boxes_of(tmp_path, whole, parts), tensor_like(whole)
    pieces = [piece.copy().reshape(-1) for piece in _stream(tmp_path, {"a": boxes}, tensor)]
    flat = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    assert flat.tolist() == whole.reshape(-1).tolist()
    assert _decode(tmp_path, {"a": boxes}, tensor).tolist() == whole.tolist()


def test_hundreds_of_columns_are_read_once_each_and_not_in_tiny_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(1_600_000, dtype=torch.float32).reshape(8000, 200)
    boxes = boxes_of(tmp_path, whole, [((0, column), (8000, 1)) for column in range(200)])
    read: list[Extent] = []
    blocks = extents.blocks

    def counted(extent: Extent, dtype: np.dtype[Any]) -> Iterator[Any]:
        read.append(extent)
        yield from blocks(extent, dtype)

    monkeypatch.setattr(extents, "blocks", counted)
    pieces = [piece.copy().reshape(-1) for piece in _stream(tmp_path, {"a": boxes}, tensor_like(whole))]
    assert np.array_equal(np.concatenate(pieces), whole.reshape(-1).numpy())
    assert [extent.nbytes for extent in read] == [8000 * 4] * 200
    assert len({extent.path for extent in read}) == 200


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo gone",)


def rewritten(folder: Path, change: Any) -> None:
    """Let a change work on the metadata as torch itself reads it, and pickle it again."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def longer(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.a.weight"].size = torch.Size([5, 6])  # type: ignore[union-attr]


def huge(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["model.a.weight"]
    entry.size = torch.Size([1 << 40, 6])
    entry.chunks[0].sizes = torch.Size([1 << 40, 6])


def overlapping(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["model.a.weight"]
    entry.chunks[0].sizes = torch.Size([4, 7])


def beyond(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.length = 1 << 40


def outside(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../own/__0_0.distcp"


def without_places(metadata: Metadata) -> None:
    metadata.storage_data = {}


def not_a_dictionary(metadata: Metadata) -> None:
    metadata.state_dict_metadata = [1]  # type: ignore[assignment]


def evil(metadata: Metadata) -> None:
    metadata.planner_data = Evil()


class Starter:
    """What starts a process where it is called, and has a capitalised name below torch.distributed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return SubprocessHandler, ("echo", ("gone",), {}, "out", "err", 0)


def starter(metadata: Metadata) -> None:
    metadata.planner_data = Starter()


def without_a_beginning(metadata: Metadata) -> None:
    for index in metadata.storage_data:
        object.__setattr__(index, "offset", [[]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (longer, "the parts of model.a.weight do not make up its shape [5, 6]"),
        (overlapping, "the parts of model.a.weight do not make up its shape [4, 6]"),
        (huge, "would expand to"),
        (beyond, "should be at bytes 0..1099511627776"),
        (outside, "names a file outside its folder: ../own/__0_0.distcp"),
        (without_places, "does not say where a part of model.a.weight lies"),
        (not_a_dictionary, "does not list the tensors"),
        (evil, "opened by PyTorch, its pickle would use posix.system"),
        (starter, "its pickle would use torch.distributed.elastic."),
        (without_a_beginning, "does not give the position of each part of a tensor"),
    ],
)
def test_metadata_that_lies_is_refused_and_calls_nothing(own: Path, change: Any, message: str) -> None:
    rewritten(own, change)
    out = own.parent / "out"
    for words in (("inspect", own), ("export", own, "-o", out), ("strip", own, "-o", out)):
        done = here(*words)
        assert done.code == 3
        assert message in done.err
    assert [path.name for path in own.parent.iterdir()] == ["own"]


def test_a_missing_file_of_a_rank_and_a_cut_one_are_sentences(own: Path) -> None:
    part = own / "__0_0.distcp"
    whole = part.read_bytes()
    part.write_bytes(whole[:-200])
    assert "is truncated or damaged" in here("export", own, "-o", own.parent / "out").err
    part.unlink()
    assert "is incomplete: __0_0.distcp is missing" in here("inspect", own).err
    assert not (own.parent / "out").exists()


def test_a_part_of_another_shape_than_it_should_have_is_refused(own: Path) -> None:
    def swap(metadata: Metadata) -> None:
        first, second = (key for key in metadata.storage_data if key.offset is not None)
        places = metadata.storage_data
        places[first], places[second] = places[second], places[first]

    rewritten(own, swap)
    for command in ("export", "strip"):
        done = here(command, own, "-o", own.parent / "out")
        assert done.code == 3
        assert "is no float32 of shape" in done.err
    assert not (own.parent / "out").exists()


def deep(metadata: Metadata) -> bytes:
    del metadata
    return b"\x80\x02" + b"}" * 3_000_000 + b"."


class Repeated:
    """A dictionary that gets one entry again and again, which no dictionary of Python can hold."""

    def __init__(self, key: object, value: object) -> None:
        self.key, self.value = key, value

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, iter([(self.key, self.value)] * 500_000)


def many_places(metadata: Metadata) -> bytes:
    metadata.storage_data = Repeated(*next(iter(metadata.storage_data.items())))
    return pickle.dumps(metadata)


def many_chunks(metadata: Metadata) -> bytes:
    entry: Any = metadata.state_dict_metadata["model.a.weight"]
    entry.chunks *= 900_000
    return pickle.dumps(metadata)


def many_tensors(metadata: Metadata) -> bytes:
    entry: Any = metadata.state_dict_metadata["model.a.weight"]
    entry.chunks *= 10_000
    metadata.state_dict_metadata = {f"{number}": entry for number in range(90_000)}
    return pickle.dumps(metadata)


def long_names(metadata: Metadata) -> bytes:
    steps = tuple("n" * 60_000 for _ in range(60))
    metadata.planner_data = {f"{number}": steps for number in range(90_000)}
    return pickle.dumps(metadata)


def long_beginnings(metadata: Metadata) -> bytes:
    """One list of many numbers, as where many parts begin."""
    (_, place), beginning = next(iter(metadata.storage_data.items())), [0] * 300_000
    for number in range(1500):
        index = MetadataIndex(f"{number}")
        object.__setattr__(index, "offset", None)
        metadata.storage_data[index] = place
    for index in metadata.storage_data:
        object.__setattr__(index, "offset", beginning)
    return pickle.dumps(metadata)


def deep_file_name(metadata: Metadata) -> bytes:
    """A file name that is no text: written out, it would be longer than any memory."""
    name: list[Any] = []
    for _ in range(60):
        name = [name, name]
    for place in metadata.storage_data.values():
        place.relative_path = name
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    "make", [deep, many_places, many_chunks, many_tensors, long_names, long_beginnings, deep_file_name]
)
def test_a_metadata_that_makes_much_of_little_costs_little(own: Path, make: Any) -> None:
    metadata: Metadata = pickle.loads((own / ".metadata").read_bytes())
    (own / ".metadata").write_bytes(make(metadata))
    assert_refused_cheaply(cost("inspect", own, scratch=own.parent / "scratch"))


def with_values(folder: Path, values: list[bytes], file: str = "__0_0.distcp") -> None:
    """Let the metadata name more values beside the tensors, at the end of a file."""
    with (folder / file).open("ab") as writer:
        places = [(writer.tell(), len(value), writer.write(value)) for value in values]

    def name(metadata: Metadata) -> None:
        for number, (offset, length, _) in enumerate(places):
            key = f"value.{file}.{number}"
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file, offset, length)

    rewritten(folder, name)


def zipped(program: bytes, name: str = "archive/data.pkl") -> bytes:
    """A zip with one pickle in it, as PyTorch would look for it."""
    made = io.BytesIO()
    with ZipFile(made, "w") as archive:
        archive.writestr(name, program)
    return made.getvalue()


def code_of(folder: Path) -> list[str]:
    return list(open_model(folder).about.code)


def test_code_in_a_value_beside_the_tensors_is_shown_and_never_run(tmp_path: Path) -> None:
    state = {"model": {"a.weight": torch.randn(4, 6)}, "epoch": {"x": Evil()}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "own", no_dist=True)
    assert code_of(tmp_path / "own") == ["calls posix.system"]
    assert '"calls posix.system"' in here("inspect", tmp_path / "own", "--json").out
    assert here("export", tmp_path / "own", "-o", tmp_path / "out").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_plain_values_beside_the_tensors_are_no_code(saved: Path) -> None:
    assert code_of(saved) == []


@pytest.mark.parametrize("name", ["archive/data.pkl", "other/DATA.PKL", "archive/constants.pkl"])
def test_code_is_found_wherever_pytorch_would_look_for_it(own: Path, name: str) -> None:
    made = io.BytesIO(zipped(pickle.dumps(1)))
    with ZipFile(made, "a" if name != "archive/data.pkl" else "w") as archive:
        archive.writestr(name, pickle.dumps(Evil()))
    with_values(own, [made.getvalue()])
    assert "calls posix.system" in code_of(own)


def test_files_that_hold_only_values_are_part_of_the_checkpoint(own: Path) -> None:
    with_values(own, [zipped(pickle.dumps(Evil()))], "__1_0.distcp")
    assert own / "__1_0.distcp" in open_model(own).files
    assert here("export", own, "-o", own.parent / "out").code == 0
    assert [path.name for path in (own.parent / "out").iterdir()] == ["model.safetensors"]


def test_a_value_of_another_kind_than_pytorch_writes_is_refused(own: Path) -> None:
    with_values(own, [pickle.dumps(1)])
    assert "is a damaged zip" in here("inspect", own).err


def test_values_that_make_much_of_little_cost_little(own: Path) -> None:
    def overlap(metadata: Metadata) -> None:
        for number in range(10_000):
            key = f"again.{number}"
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", 0, 1500 + number % 100)

    with_values(own, [zipped(b"\x80\x02" + b"N0" * 400_000 + b"N." + bytes(number)) for number in range(6)])
    assert_refused_cheaply(cost("inspect", own, scratch=own.parent / "scratch"))
    rewritten(own, overlap)
    found = cost("inspect", own, scratch=own.parent / "scratch")
    assert_refused_cheaply(found)
    assert "two of its values overlap" in found.outcome.err


def test_so_many_values_that_no_checkpoint_has_them_cost_little(own: Path) -> None:
    with_values(own, [zipped(pickle.dumps(number)) for number in range(2600)])
    found = cost("inspect", own, scratch=own.parent / "scratch")
    assert_refused_cheaply(found)
    assert "more values beside the tensors" in found.outcome.err


def boxes(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> list[TensorChunk]:
    return [TensorChunk(offsets, sizes, None) for offsets, sizes in parts]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "parts", "fits"),
    [
        ((4, 6), [((0, 0), (4, 6))], True),
        ((4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))], True),
        ((4, 6), [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((0, 3), (4, 3))], True),
        ((4, 6), [((0, 0), (2, 6)), ((2, 0), (0, 6)), ((2, 0), (2, 6))], True),
        # As many elements, but one box lies over the other.
        ((4, 6), [((0, 0), (2, 6)), ((1, 0), (2, 6))], False),
        ((4, 4), [((0, 0), (2, 2)), ((2, 2), (2, 2)), ((0, 2), (2, 2)), ((0, 2), (2, 2))], False),
        ((4, 6), [((0, 0), (2, 6))], False),
        ((4, 6), [((0, 0), (4, 6)), ((4, 0), (4, 6))], False),
        ((4,), [((1,), (4,))], False),
        ((), [((), ())], True),
        ((0, 3), [((0, 0), (0, 3))], True),
    ],
)
def test_parts_fill_a_shape_without_gaps_and_overlaps(shape: tuple[int, ...], parts: Any, fits: bool) -> None:
    assert is_tiled(shape, boxes(*parts)) is fits


def test_an_old_checkpoint_without_a_plan_keeps_its_names(own: Path) -> None:
    def forget(metadata: Metadata) -> None:
        metadata.planner_data = None

    rewritten(own, forget)
    assert [tensor.name for tensor in open_model(own).tensors] == ["model.a.weight", "model.a.bias"]


def test_a_copy_of_the_folder_reads_the_same(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert here("diff", tmp_path / "copy", saved, "--fail-on", "nonzero").code == 0


def test_parts_that_cut_each_other_into_millions_of_pieces_are_refused(tmp_path: Path) -> None:
    count = 1001
    columns = [TensorChunk((0, at), (count, 1), Extent(tmp_path / "a", at * count, count)) for at in range(count)]
    rows = [TensorChunk((at, count), (1, 1), Extent(tmp_path / "a", count * count + at, 1)) for at in range(count)]
    assert is_tiled((count, count + 1), columns + rows)
    with pytest.raises(InputError, match="1,003,002 pieces"):
        next(tiling.merged((count, count + 1), columns + rows, np.dtype(np.uint8)))
