"""TensorFlow checkpoints, written by TensorFlow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import tensorflow as tf

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, PruningWrapper, Tensor
from prunectl.formats.patch import TensorUpdate
from prunectl.formats.registry import open_model, recognise
from prunectl.formats.tensorflow import bundle_write, leveldb
from prunectl.formats.tensorflow.bundle import read_bundle, read_index, slice_key
from prunectl.formats.tensorflow.leveldb import masked_crc, read_file, records
from prunectl.formats.tensorflow.variables import classify_variable
from tests.contract import Array, FormatContract, raw, read_all, sample
from tests.running import FIXTURES, here

pytestmark = pytest.mark.filterwarnings("ignore")
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def save(prefix: Path, arrays: dict[str, Array], slices: list[str] | None = None) -> Path:
    """Write a checkpoint with the operation that all of TensorFlow's savers end in."""
    names = list(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[name.split("@")[0] for name in names],
        shape_and_slices=slices or [""] * len(names),
        tensors=[tf.constant(array) for array in arrays.values()],
    )
    return prefix.with_name(prefix.name + ".index")


def stock(path: Path) -> dict[str, Array]:
    """Every tensor of numbers, as TensorFlow reads it, under the name that we give it."""
    reader = tf.train.load_checkpoint(str(path).removesuffix(".index"))
    kinds = reader.get_variable_to_dtype_map()
    return {
        name.removesuffix(SUFFIX): np.asarray(reader.get_tensor(name))
        for name in reader.get_variable_to_shape_map()
        if kinds[name] != tf.string
    }


def by_name(model: ModelFile) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


class TestCheckpoint(FormatContract):
    format = "tf-checkpoint"
    name = "model.ckpt.index"
    is_checksummed = True

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        renamed = {
            name.replace(".", "/").replace("weight", "kernel"): array.T if array.ndim == 2 else array
            for name, array in arrays.items()
        }
        save(path.with_suffix(""), renamed)
        # Under another name the index still has to find its data.
        shard = path.with_suffix(".data-00000-of-00001")
        shutil.copy(shard, path.with_name("stranger.dat.data-00000-of-00001"))

    def read_back(self, path: Path) -> dict[str, Array]:
        return stock(path)


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_truncated_data_shard_is_refused_in_a_sentence(tmp_path: Path, sixteenth: int) -> None:
    path = save(tmp_path / "x", sample())
    shard = tmp_path / "x.data-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * sixteenth // 16])
    with pytest.raises(InputError, match=r"x\.data-00000-of-00001 is truncated"):
        open_model(path)


def test_a_missing_data_shard_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x", sample())
    (tmp_path / "x.data-00000-of-00001").unlink()
    with pytest.raises(InputError, match=r"its data shard x\.data-00000-of-00001 is missing"):
        open_model(path)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn", "qint8"]
)
def test_every_type_of_number_is_read_as_it_is(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]], np.float32)
    if dtype == "qint8":
        tensor = tf.quantization.quantize(values, -1, 1, tf.qint8)[0]
    else:
        tensor = tf.constant(values.astype(tf.dtypes.as_dtype(dtype).as_numpy_dtype))
    tf.raw_ops.SaveV2(prefix=str(tmp_path / "x"), tensor_names=["w"], shape_and_slices=[""], tensors=[tensor])
    model = open_model(tmp_path / "x.index")
    assert model.tensors[0].shape == (2, 3)
    assert raw(model.read(model.tensors[0])) == raw(np.asarray(tensor))


def test_a_checkpoint_is_found_by_its_prefix(tmp_path: Path) -> None:
    path = save(tmp_path / "model-1000", sample())
    assert open_model(tmp_path / "model-1000").path == path


def test_several_shards_are_one_model(tmp_path: Path) -> None:
    arrays = sample()
    for part, (name, array) in enumerate(arrays.items()):
        save(tmp_path / f"part{part}", {name: array})
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(tmp_path / f"part{part}") for part in range(3)],
        destination_prefix=str(tmp_path / "whole"),
        delete_old_dirs=False,
    )
    model = open_model(tmp_path / "whole.index")
    assert len(model.files) == 4
    found = read_all(tmp_path / "whole.index")
    assert {name: raw(array) for name, array in found.items()} == {name: raw(array) for name, array in arrays.items()}


def test_a_partitioned_tensor_is_read_as_a_whole(tmp_path: Path) -> None:
    whole = np.arange(600 * 4, dtype=np.float32).reshape(600, 4)
    path = save(
        tmp_path / "x",
        {"table/embeddings@0": whole[:200], "table/embeddings@1": whole[200:]},
        ["600 4 0,200:-", "600 4 200,400:-"],
    )
    (tensor,) = open_model(path).tensors
    assert (tensor.name, tensor.shape, tensor.role) == ("table/embeddings", (600, 4), "embedding")
    assert tensor.storage.extent is None
    assert raw(read_all(path)["table/embeddings"]) == raw(whole)


def test_the_new_numbers_of_tensors_in_slices_are_computed_once(tmp_path: Path) -> None:
    old = np.arange(60 * 4, dtype=np.float32).reshape(60, 4)
    new = {"a": old + 1, "b": old * 2}
    slices = {
        f"{name}@{begin}": (f"60 4 {begin},6:-", old[begin : begin + 6]) for name in new for begin in range(0, 60, 6)
    }
    path = save(
        tmp_path / "x", {name: part for name, (_, part) in slices.items()}, [place for place, _ in slices.values()]
    )
    computed = []

    def update(tensor: Tensor) -> TensorUpdate:
        def blocks() -> Iterator[Array]:
            computed.append(tensor.name)
            yield from np.split(new[tensor.name], 3)

        return TensorUpdate(tensor, blocks)

    model = open_model(path)
    targets = {file: tmp_path / f"out{file.name[1:]}" for file in model.files}
    bundle_write.write(model, targets, [update(tensor) for tensor in model.tensors])
    assert {name: raw(array) for name, array in stock(tmp_path / "out.index").items()} == {
        name: raw(array) for name, array in new.items()
    }
    assert sorted(computed) == ["a", "b"]


@pytest.mark.parametrize("step", ["dw", "net/depthwise_conv2d_1"])
@pytest.mark.parametrize(("multiplier", "axes"), [(1, (2, 3)), (4, (None, None))])
def test_a_depthwise_kernel_has_an_input_axis_only_where_that_is_one_long(
    step: str, multiplier: int, axes: tuple[int | None, int | None]
) -> None:
    kinds = {"dw": "DepthwiseConv2D"}
    info = classify_variable("k", f"{step}/kernel", (3, 3, 8, multiplier), is_float=True, classes=kinds)
    assert (info.role, (info.out_axis, info.in_axis)) == ("kernel", axes)


def test_the_keys_of_slices_are_those_of_tensorflow(tmp_path: Path) -> None:
    name = "odd\x01\u00e9/w"
    path = save(tmp_path / "x", {name: np.zeros((70, 9000), np.float32)}, ["70 20000 -:64,9000"])
    keys = set(read_index(path).entries)
    assert slice_key(name.encode(), ((0, -1), (64, 9000))) in keys


def test_objects_are_named_by_what_tensorflow_called_them(tmp_path: Path) -> None:
    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(np.ones((6, 5), np.float32), name="dense/kernel")
            self.plain = tf.Variable(np.ones((2, 2), np.float32))
            self.label = tf.Variable("text")

    path = Path(tf.train.Checkpoint(net=Net()).write(str(tmp_path / "x")) + ".index")
    model = open_model(path)
    found = by_name(model)
    assert found.keys() == stock(path).keys() == {"net/w", "net/plain"}
    assert (found["net/w"].layer, found["net/w"].role, found["net/w"].out_axis) == ("dense", "kernel", 1)
    assert (found["net/plain"].layer, found["net/plain"].role) == ("net", "kernel")
    assert model.about.producer == "tensorflow 2"


def test_what_only_training_needs_is_told_from_what_the_model_needs(tmp_path: Path) -> None:
    names = {
        "dense/kernel": "kernel",
        "dense/kernel/Adam": "optimizer",
        "dense/kernel/Adam_1": "optimizer",
        "beta1_power": "optimizer",
        "save_counter": "optimizer",
        "optimizer/iter": "optimizer",
        "global_step": "state",
        "rnn/cell/recurrent_kernel": "recurrent",
        "norm/gamma": "norm",
        "norm/moving_mean": "state",
        "words/embeddings": "embedding",
        "attention/mask": "kernel",
    }
    model = open_model(save(tmp_path / "x", dict.fromkeys(names, np.ones((2, 3), np.float32))))
    assert {tensor.name: str(tensor.role) for tensor in model.tensors} == names
    assert by_name(model)["dense/kernel/Adam"].layer == "dense"
    assert model.about.optimizer == "Adam"


def test_wrappers_of_pruning_are_told_by_their_variables(tmp_path: Path) -> None:
    names = [f"prune_low_magnitude_fc/{leaf}" for leaf in ("mask", "threshold", "pruning_step")]
    model = open_model(save(tmp_path / "x", dict.fromkeys(names, np.ones((2, 3), np.float32))))
    assert {tensor.role: tensor.layer for tensor in model.tensors} == {"mask": "fc", "schedule": "fc"}
    assert model.about.wrappers == (PruningWrapper("tfmot", "fc"),)


def test_the_checksum_of_a_tensor_stands_where_the_entry_says(tmp_path: Path) -> None:
    path = save(tmp_path / "x", sample())
    index, bundle = path.read_bytes(), read_bundle(path)
    for entry in bundle.numbers():
        extent = bundle.extent(entry)
        data = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        assert int.from_bytes(index[entry.crc_at : entry.crc_at + 4], "little") == entry.crc == masked_crc(data)
        block = entry.block
        stored = index[block.crc_at : block.crc_at + 4]
        assert int.from_bytes(stored, "little") == masked_crc(index[block.begin : block.crc_at])


def seal(index: bytearray, path: Path) -> None:
    """Mend the checksums of the blocks, so that only the lie inside is found."""
    for block in {entry.block for entry in read_bundle(path).entries.values()}:
        index[block.crc_at : block.crc_at + 4] = masked_crc(bytes(index[block.begin : block.crc_at])).to_bytes(
            4, "little"
        )
    path.write_bytes(index)


def test_a_flipped_bit_in_the_index_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "x", sample())
    index = bytearray(path.read_bytes())
    index[read_bundle(path).numbers()[0].crc_at] ^= 1
    path.write_bytes(index)
    with pytest.raises(InputError, match="does not match its checksum"):
        open_model(path)


def test_a_tensor_beyond_the_end_of_its_shard_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"a": np.zeros(20, np.float32), "b": np.zeros(5, np.float32)})
    index = bytearray(path.read_bytes())
    entry = read_bundle(path).entries[b"b"]
    at = index.index(b"\x20\x50\x28\x14", entry.block.begin)  # field 4: offset 80, field 5: 20 bytes
    index[at + 1] = 0x7F
    seal(index, path)
    with pytest.raises(InputError, match=r"is truncated or damaged: b should be at bytes 127\.\.147"):
        open_model(path)
    index[at + 1] = 0x08
    path.write_bytes(path.read_bytes())
    index[entry.block.crc_at : entry.block.crc_at + 4] = masked_crc(
        bytes(index[entry.block.begin : entry.block.crc_at])
    ).to_bytes(4, "little")
    path.write_bytes(index)
    with pytest.raises(InputError, match="overlaps another tensor"):
        open_model(path)


def test_an_index_that_is_compressed_with_snappy_is_read(tmp_path: Path) -> None:
    # As the builds inside of Google write it: b"a" with its header, then a copy that runs into what it writes.
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(range(12)))
    block = entry_record(b"", b"\x08\x01") + entry_record(b"aaaaaaaaaa", b"\x08\x04\x28\x01") + bytes(4)
    at = block.index(b"aa") + 1
    packed = (
        number(len(block)) + bytes([(at - 1) << 2]) + block[:at] + b"\x15\x01" + bytes([(len(block) - at - 10) << 2])
    )
    path = table(tmp_path / "x.index", packed + block[at + 9 :], kind=1)
    (tensor,) = open_model(path).tensors
    assert (tensor.name, tensor.shape, tensor.dtype) == ("aaaaaaaaaa", (), np.uint8)
    assert {entry.crc_at for entry in read_bundle(path).numbers()} == {-1}


def snappy(data: bytes) -> bytes:
    """Return some bytes as snappy packs what has no repetitions: literals, with their lengths."""
    pieces = [data[at : at + 65_536] for at in range(0, len(data), 65_536)]
    return number(len(data)) + b"".join(b"\xf4" + (len(one) - 1).to_bytes(2, "little") + one for one in pieces)


def compress(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an index again as the builds inside of Google write it: every block is compressed."""

    def append(out: bytearray, block: bytes) -> bytes:
        packed = snappy(block)
        handle = number(len(out)) + number(len(packed))
        out += packed + b"\1" + masked_crc(packed + b"\1").to_bytes(4, "little")
        return handle

    with monkeypatch.context() as patched:
        patched.setattr(leveldb, "_append", append)
        found = list(records(index, read_file(index)))
        index.write_bytes(leveldb.table((one.key, bytes(one.data[one.begin : one.end])) for one in found))


@pytest.mark.parametrize("verb", ["prune", "strip"])
def test_a_model_whose_index_is_compressed_is_written_with_one_that_is_not(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(FIXTURES / "digits_cnn_savedmodel", model)
    index = model / "variables" / "variables.index"
    before = stock(index)
    compress(index, monkeypatch)
    assert {entry.crc_at for entry in read_bundle(index).numbers()} == {-1}
    words = ("--sparsity", "0.8") if verb == "prune" else ()
    done = here(verb, model, "-o", out, *words)
    assert done.code == 0, done.err
    after = stock(out / "variables" / "variables.index")
    for name in after:
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
    sparse = {name for name, array in after.items() if name.endswith("/kernel") and (array == 0).mean() > 0.7}
    assert bool(sparse) == (verb == "prune")
    assert tf.saved_model.load(str(out)).signatures


@pytest.mark.parametrize(
    ("packed", "complaint"),
    [
        (b"\x80\x80\x80\x80\x01", "claims to unpack to"),
        (b"\x08\x00a\x15\x02", "copies from before its start"),
        (b"\x08\x00a\x15", "copies from before its start"),
        (b"\x08\x00a", "shorter than it claims"),
        (b"\x01\xf4\xff", "longer than it claims"),
    ],
)
def test_a_compressed_index_that_lies_is_refused(tmp_path: Path, packed: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_model(table(tmp_path / "x.index", packed, kind=1))


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in a way that prunectl does not read"):
        open_model(table(tmp_path / "x.index", bytes(4), kind=2))


def test_keys_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    # Each key repeats all of the one before: a megabyte of records claims terabytes of names.
    records = (
        entry_record(b"", b"\x08\x01") + b"".join(number(size) + b"\x01\x00x" for size in range(90_000)) + bytes(4)
    )
    path = table(tmp_path / "x.index", records)
    with pytest.raises(InputError, match="claims more than"):
        open_model(path)


def number(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def table(path: Path, block: bytes, kind: int = 0) -> Path:
    """Write a table of one block."""

    def closed(content: bytes, kind: int = 0) -> bytes:
        return content + bytes([kind]) + masked_crc(content + bytes([kind])).to_bytes(4, "little")

    handle = number(0) + number(len(block))
    index = b"\x00\x01" + number(len(handle)) + b"z" + handle + (0).to_bytes(4, "little")
    body = closed(block, kind)
    footer = number(0) + number(0) + number(len(body)) + number(len(index))
    path.write_bytes(body + closed(index) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))
    return path


def entry_record(name: bytes, value: bytes) -> bytes:
    return b"\x00" + number(len(name)) + number(len(value)) + name + value


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (b"\x08\x63", "as type 99"),
        (b"\x08\x01\x12\x16" + (b"\x12\x09\x08" + b"\xff" * 7 + b"\x7f") * 2, "a shape too large for any memory"),
        (b"\x08\x01\x12\x0d\x12\x0b\x08" + b"\xff" * 9 + b"\x01", "a negative size"),
        (b"\x08\x01\x12\x84\x01" + b"\x12\x02\x08\x01" * 33, "more than 32 dimensions"),
        (b"\x08\x01\x18\x07", "refers to data shard 7"),
        (b"\x08\x01\x28\x05", "does not match its 5 bytes"),
        (b"\x08\x01\x20" + b"\xff" * 9 + b"\x01", "truncated or damaged"),
        (b"\x08\x01\x12\x04\x12\x02\x08\x04\x3a\x00", "a slice of w is missing"),
        (b"\x08\x01\x3a\xac\x02" + b"\x0a\x00" * 150, "more than 32 dimensions"),
        (b"\x08", "a number without an end"),
        (b"\x0f\x07", "wire type 7"),
    ],
)
def test_an_entry_that_lies_is_refused(tmp_path: Path, value: bytes, complaint: str) -> None:
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(9))
    header = entry_record(b"", b"\x08\x01")
    path = table(tmp_path / "x.index", header + entry_record(b"w", value) + bytes(4))
    with pytest.raises(InputError, match=complaint) as caught:
        open_model(path)
    assert "x." in caught.value.message


def test_a_table_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "x.index", entry_record(b"some", b"thing") + bytes(4))
    assert recognise(path).name == "tf-checkpoint"
    with pytest.raises(InputError, match="has no header"):
        open_model(path)


def test_an_object_graph_that_is_broken_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"_CHECKPOINTABLE_OBJECT_GRAPH": np.array(b"\xff\xff\xff")})
    with pytest.raises(InputError, match="its graph of objects holds"):
        open_model(path)
