"""Every model in every format: the cut is that of NumPy, nothing else moves, and its own library still reads it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.registry import open_model
from prunectl.pruning.prune import Pruned
from tests.contract import raw
from tests.pruning import reference, stock
from tests.pruning.reference import MODELS, arrays, prune

pytestmark = pytest.mark.filterwarnings("ignore")

ZIPS = {".pt", ".pt2", ".keras"}
REBUILT = {"deflated.keras", "chunked_and_gzipped.h5"}
Halved = Callable[[str], tuple[Pruned, Path]]
every_model = pytest.mark.parametrize("name", MODELS)


def opened(name: str, written: Path) -> Path:
    """Where a pruned model is opened: shards come out in a folder of their own."""
    return written / "model.safetensors.index.json" if name == "two_shards" and written.is_dir() else written


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Halved:
    """Each model pruned to half, when it is first asked for."""
    return cache(lambda name: prune(MODELS[name], tmp_path_factory.mktemp("half") / "out", sparsity=0.5))


def kernels(model: ModelFile) -> list[Tensor]:
    return [tensor for tensor in model.tensors if tensor.is_prunable and tensor.name not in model.duplicates]


@every_model
@pytest.mark.parametrize(("scope", "sparsity"), [("layer", 0.83), ("global", 0.5)])
def test_the_zeros_are_those_of_a_stable_sort(name: str, scope: str, sparsity: float, tmp_path: Path) -> None:
    found, written = prune(MODELS[name], tmp_path / "out", sparsity=sparsity, scope=scope)
    before, after = arrays(MODELS[name]), arrays(opened(name, written))
    weights = {cut.tensor.name: before[cut.tensor.name] for cut in found.plan.cuts}
    marks = reference.layerwise(weights, sparsity) if scope == "layer" else reference.together(weights, sparsity)
    for tensor, mark in marks.items():
        np.testing.assert_array_equal(after[tensor], np.where(mark, 0, weights[tensor]))
    asked = [a.size for a in weights.values()] if scope == "layer" else [sum(a.size for a in weights.values())]
    assert found.plan.drop == sum(round(sparsity * size) for size in asked)
    zeros = {tensor: int((after[tensor] == 0).sum()) for tensor in weights}
    assert zeros == {tensor: tally.zeros for tensor, tally in found.counts.items()}


@every_model
@pytest.mark.parametrize("pattern", ["2:4", "3:5"])
def test_groups_lie_along_the_inputs_whatever_the_layout(name: str, pattern: str, tmp_path: Path) -> None:
    found, written = prune(MODELS[name], tmp_path / "out", pattern=pattern)
    before, after = arrays(MODELS[name]), arrays(opened(name, written))
    zeros, group = map(int, pattern.split(":"))
    for cut in found.plan.cuts:
        axis = cut.tensor.reduction_axis
        assert axis is not None
        old = before[cut.tensor.name]
        mark = reference.in_groups(old, axis, zeros, group)
        np.testing.assert_array_equal(after[cut.tensor.name], np.where(mark, 0, old))
        assert cut.drop == mark.sum()


@every_model
@pytest.mark.parametrize(("size", "pool"), [("2x2", "max"), ("3x4", "avg")])
def test_blocks_go_whole(name: str, size: str, pool: str, tmp_path: Path) -> None:
    found, written = prune(MODELS[name], tmp_path / "out", sparsity=0.5, pattern=f"block:{size}:{pool}")
    before, after = arrays(MODELS[name]), arrays(opened(name, written))
    rows, columns = map(int, size.split("x"))
    for cut in found.plan.cuts:
        assert cut.tensor.out_axis is not None
        old = before[cut.tensor.name]
        mark = reference.in_blocks(old, cut.tensor.out_axis, rows, columns, pool, 0.5)
        np.testing.assert_array_equal(after[cut.tensor.name], np.where(mark, 0, old))


@every_model
def test_no_other_number_changes_by_a_bit(name: str, halved: Halved) -> None:
    found, written = halved(name)
    before, after = arrays(MODELS[name]), arrays(opened(name, written))
    model = open_model(MODELS[name])
    cut = {cut.tensor.storage.key for cut in found.plan.cuts}
    assert list(before) == list(after)
    for tensor in model.tensors:
        if tensor.storage.key not in cut and model.duplicates.get(tensor.name) not in found.counts:
            assert raw(before[tensor.name]) == raw(after[tensor.name])


@pytest.mark.parametrize("name", sorted(set(MODELS) - REBUILT))
def test_no_other_byte_changes_but_checksums(name: str, halved: Halved) -> None:
    found, written = halved(name)
    model, result = open_model(MODELS[name]), open_model(opened(name, written))
    cut = {cut.tensor.name for cut in found.plan.cuts}
    cut |= {copy for copy, name_ in model.duplicates.items() if name_ in cut}
    for old, new in zip(sorted(model.files), sorted(result.files), strict=True):
        if name == "external_data" and old.suffix == ".onnx":
            # Its data is named after the output.
            assert without_locations(old) == without_locations(new)
            continue
        bytes_before, bytes_after = (np.frombuffer(file.read_bytes(), np.uint8) for file in (old, new))
        assert bytes_before.size == bytes_after.size
        differs = bytes_before != bytes_after
        for tensor in model.tensors:
            extent = tensor.storage.extent
            if tensor.name in cut and extent is not None and extent.path == old:
                begin = extent.offset + tensor.start * tensor.dtype.itemsize
                differs[begin : begin + tensor.nbytes] = False
        left = np.flatnonzero(differs)
        if old.suffix in ZIPS and zipfile.is_zipfile(old):
            assert all(is_in_a_crc(int(at), old, new) for at in left)
        elif old.suffix == ".index":
            # Each entry's checksum, and that of each block of entries.
            assert 0 < left.size <= 4 * (len(cut) + 4)
        else:
            assert not left.size


def without_locations(path: Path) -> onnx.ModelProto:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "" if entry.key == "location" else entry.value
    return proto


def is_in_a_crc(at: int, old: Path, new: Path) -> bool:
    """Whether a byte belongs to a number that was an entry's CRC-32 before, and is its CRC-32 now."""
    before, after = old.read_bytes()[at - 3 : at + 4], new.read_bytes()[at - 3 : at + 4]
    with zipfile.ZipFile(old) as one, zipfile.ZipFile(new) as other:
        return any(
            was.CRC.to_bytes(4, "little") == before[i : i + 4] and now.CRC.to_bytes(4, "little") == after[i : i + 4]
            for was, now in zip(one.infolist(), other.infolist(), strict=True)
            for i in range(4)
        )


@every_model
def test_the_stock_loader_reads_the_same_numbers(name: str, halved: Halved) -> None:
    found, written = halved(name)
    after = arrays(opened(name, written))
    theirs = {(array.shape, raw(array)) for array in stock.load(opened(name, written))}
    if name != "whole_module.pt":
        assert {(after[cut.tensor.name].shape, raw(after[cut.tensor.name])) for cut in found.plan.cuts} <= theirs


@pytest.mark.parametrize(
    "name", [name for name, path in MODELS.items() if path.suffix in ZIPS and zipfile.is_zipfile(path)]
)
@pytest.mark.parametrize("pack", [False, True])
def test_every_crc_of_a_zip_is_right(name: str, *, pack: bool, tmp_path: Path) -> None:
    _, written = prune(MODELS[name], tmp_path / "out", sparsity=0.5, is_packed=pack)
    with zipfile.ZipFile(written) as archive, zipfile.ZipFile(MODELS[name]) as old:
        assert archive.testzip() is None
        # Packed, a file no longer keeps the promise of this entry of PyTorch: where each record lies.
        kept = [name for name in old.namelist() if not (pack and name.endswith("/.format_version"))]
        assert archive.namelist() == kept


@pytest.mark.parametrize("name", ["digits_cnn_savedmodel", "digits_cnn_checkpoint.index"])
def test_tensorflow_itself_finds_its_checksums_right_and_a_flipped_bit_wrong(name: str, tmp_path: Path) -> None:
    _, written = prune(MODELS[name], tmp_path / "out", sparsity=0.5)
    assert stock.load(written)
    data = next((written if written.is_dir() else written.parent).rglob("*.data-00000-of-00001"))
    found = open_model(written)
    extent = next(tensor for tensor in found.tensors if tensor.is_prunable).storage.extent
    assert extent is not None
    spoilt = bytearray(data.read_bytes())
    spoilt[extent.offset] ^= 1
    data.write_bytes(spoilt)
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        stock.load(written)


@pytest.mark.parametrize("name", sorted(REBUILT))
def test_what_is_compressed_stays_compressed(name: str, tmp_path: Path) -> None:
    _, written = prune(MODELS[name], tmp_path / "out", sparsity=0.8)
    old, new = open_model(MODELS[name]), open_model(written)
    assert new.about.is_compressed
    assert new.about.is_compressed == old.about.is_compressed
    assert written.stat().st_size < MODELS[name].stat().st_size


@pytest.mark.parametrize(
    "name", ["digits_cnn.pt", "digits_cnn.pt2", "digits_cnn.keras", "digits_cnn.h5", "digits_cnn.onnx"]
)
def test_a_packed_model_is_pruned_again_and_stays_packed(name: str, tmp_path: Path) -> None:
    _, packed = prune(MODELS[name], tmp_path / "packed", sparsity=0.9, is_packed=True)
    assert packed.stat().st_size < MODELS[name].stat().st_size
    _, twice = prune(packed, tmp_path / "twice", sparsity=0.95)
    _, once = prune(MODELS[name], tmp_path / "once", sparsity=0.95)
    assert open_model(twice).about.is_compressed
    expected = arrays(once)
    for tensor, array in arrays(twice).items():
        np.testing.assert_array_equal(array, expected[tensor])
    if name != "digits_cnn.onnx":  # whose sparse initializers are not among the dense ones
        assert stock.load(twice)


def test_the_input_is_only_read(tmp_path: Path) -> None:
    own = tmp_path / "in.pt"
    shutil.copy(MODELS["digits_cnn.pt"], own)
    own.chmod(0o400)
    before = own.read_bytes(), own.stat().st_mtime_ns
    prune(own, tmp_path / "out", sparsity=0.5, is_packed=True)
    assert (own.read_bytes(), own.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "words",
    [{"scope": "global", "sparsity": 0.51}, {"strategy": "random", "sparsity": 0.51}, {"pattern": "2:4"}],
    ids=["global", "random", "2:4"],
)
def test_what_a_savedmodel_holds_twice_stays_alike(words: dict[str, object], tmp_path: Path) -> None:
    path = MODELS["every_variable_twice"]
    copies = open_model(path).duplicates
    assert copies
    found, written = prune(path, tmp_path / "out", **words)
    after = arrays(written)
    assert not {cut.tensor.name for cut in found.plan.cuts} & copies.keys()
    for copy, original in copies.items():
        assert raw(after[copy]) == raw(after[original])
