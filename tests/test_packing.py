"""Files written again with their container's own compression, opened by the stock loader of each format."""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.analysis.sizes import packed_bytes
from prunectl.errors import InputError
from prunectl.formats.base import Capability, ModelFile, ModelInfo
from prunectl.formats.keras.hdf5 import rebuild
from prunectl.formats.registry import FORMATS, by_name, load, open_model
from tests.contract import Array, raw, read_all
from tests.networks import keras, small_keras, tf_keras
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

PACKABLE = [
    *("digits_cnn.h5", "weights_only.h5", "wrapped_by_tfmot.h5", "chunked_and_gzipped.h5"),
    *("digits_cnn.keras", "recurrent.keras", "lambda_layer.keras", "deflated.keras"),
    *("digits_cnn.pt", "checkpoint_with_optimizer.pt", "masks_of_torch_prune.pt", "tied_and_views.pt"),
    *("whole_module.pt", "digits_cnn_torchscript.pt", "digits_cnn.pt2", "digits_cnn.onnx"),
]


def pack(path: Path, target: Path) -> Path:
    """Pack a file, and see that it counts what it reads."""
    model = open_model(path)
    counted: list[int] = []
    load(by_name(model.format).packer)(model, target, counted.append)
    assert sum(counted) > 0
    return target


def packed_hdf5(path: Path) -> Path:
    """Pack an HDF5 file that no Keras wrote, and that we would not open."""
    target = path.with_name("packed.h5")
    rebuild.pack(ModelFile(path, "keras-h5", (), ModelInfo(), (path,)), target, lambda _: None)
    return target


def packed(path: Path, folder: Path) -> Path:
    """Pack into a folder, under the same name."""
    (folder / "packed").mkdir(exist_ok=True)
    return pack(path, folder / "packed" / path.name)


def assert_same(left: dict[str, Array], right: dict[str, Array]) -> None:
    assert list(left) == list(right)
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape)
        assert raw(array) == raw(right[name])


@pytest.fixture(params=PACKABLE)
def source(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / str(request.param)


def test_every_packable_format_is_tried_here() -> None:
    tried = {open_model(FIXTURES / name).format for name in PACKABLE}
    assert tried == {row.name for row in FORMATS if row.can & Capability.PACK}


def test_we_read_the_same_tensors_and_facts_from_the_packed_file(source: Path, tmp_path: Path) -> None:
    target = packed(source, tmp_path)
    before, after = open_model(source), open_model(target)
    assert_same(read_all(source), read_all(target))
    assert after.format == before.format
    assert after.about.is_compressed or source.suffix == ".onnx"
    assert after.about.producer == before.about.producer
    assert after.about.wrappers == before.about.wrappers
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.layer, old.role, old.out_axis) == (new.name, new.layer, new.role, new.out_axis)


def test_it_is_never_bigger_by_much_and_the_size_reported_never_bigger_at_all(source: Path, tmp_path: Path) -> None:
    target = packed(source, tmp_path)
    assert target.stat().st_size <= 1.01 * source.stat().st_size
    reported = packed_bytes(open_model(source), lambda _: None)
    assert reported == min(target.stat().st_size, source.stat().st_size)


def test_the_source_is_left_as_it_was_and_a_packed_file_can_be_packed_again(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    once = packed(source, tmp_path)
    again = pack(once, once.with_name(f"again-{once.name}"))
    assert source.read_bytes() == before
    assert_same(read_all(once), read_all(again))
    assert again.stat().st_size <= 1.01 * once.stat().st_size  # Libhdf5 may leave other gaps


def test_packing_gives_the_same_bytes_a_second_later(tmp_path: Path) -> None:
    first = {name: packed(FIXTURES / name, tmp_path).read_bytes() for name in PACKABLE}
    time.sleep(1.01)  # HDF5 and zip write times in seconds, or in two of them
    for name, before in first.items():
        source = tmp_path / name
        shutil.copy(FIXTURES / name, source)
        assert packed(source, tmp_path).read_bytes() == before, name


# --- Keras ---


def halved(model: Any) -> Any:
    """Make the smaller half of each kernel zero."""
    model.set_weights([np.where(np.abs(w) < np.median(np.abs(w)), 0, w) for w in model.get_weights()])
    return model


def trained(k: Any) -> Any:
    """A model with weights, an optimizer that has state, and half of its weights zero."""
    model = k.Sequential([k.layers.Input((40,)), k.layers.Dense(60, name="first"), k.layers.Dense(9, name="second")])
    model.compile("adam", k.losses.MeanSquaredError(), metrics=["mae"], run_eagerly=True)
    model.fit(np.ones((4, 40)), np.ones((4, 9)), verbose=0)
    return halved(model)


def of_optimizer(model: Any) -> list[Array]:
    return [np.asarray(variable) for variable in model.optimizer.variables]


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("library", [keras, tf_keras])
def test_a_whole_keras_model_loads_with_its_optimizer_and_is_smaller(
    tmp_path: Path, suffix: str, library: Callable[[], Any]
) -> None:
    k = library()
    path = tmp_path / f"m{suffix}"
    model = trained(k)
    model.save(path)
    target = packed(path, tmp_path)
    assert target.stat().st_size < 0.8 * path.stat().st_size
    loaded, expected = k.models.load_model(target), k.models.load_model(path)
    assert [raw(weight) for weight in loaded.get_weights()] == [raw(weight) for weight in model.get_weights()]
    assert list(map(raw, of_optimizer(loaded))) == list(map(raw, of_optimizer(expected)))
    assert sum(tensor.role == "optimizer" for tensor in open_model(target).tensors) >= 8
    assert_same(read_all(target), read_all(path))
    assert loaded.get_config() == expected.get_config()
    x = np.linspace(0, 1, 80, dtype=np.float32).reshape(2, 40)
    assert raw(loaded.predict(x, verbose=0)) == raw(expected.predict(x, verbose=0))


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_weights_alone_load(tmp_path: Path, library: Callable[[], Any]) -> None:
    path = tmp_path / "m.weights.h5"
    model = small_keras(library(), {})
    model.save_weights(path)
    fresh = small_keras(library(), {})
    fresh.load_weights(packed(path, tmp_path))
    assert list(map(raw, fresh.get_weights())) == list(map(raw, model.get_weights()))


def test_a_model_wrapped_by_tfmot_loads_with_its_wrappers(tmp_path: Path) -> None:
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    target = packed(FIXTURES / "wrapped_by_tfmot.h5", tmp_path)
    with sparsity.prune_scope():
        loaded = tf_keras().models.load_model(target, compile=False)
        expected = tf_keras().models.load_model(FIXTURES / "wrapped_by_tfmot.h5", compile=False)
    assert list(map(raw, loaded.get_weights())) == list(map(raw, expected.get_weights()))
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in expected.layers]


def test_a_bfloat16_model_loads(tmp_path: Path) -> None:
    k = keras()
    policy = k.dtype_policies.DTypePolicy("bfloat16")
    model = halved(k.Sequential([k.Input((40,)), k.layers.Dense(50, dtype=policy, name="only")]))
    model.save(tmp_path / "m.keras")
    target = packed(tmp_path / "m.keras", tmp_path)
    loaded = k.models.load_model(target).weights
    assert [raw(np.asarray(weight)) for weight in loaded] == [raw(np.asarray(weight)) for weight in model.weights]
    model.save_weights(tmp_path / "m.weights.h5")
    assert_same(read_all(tmp_path / "m.weights.h5"), read_all(packed(tmp_path / "m.weights.h5", tmp_path)))


# --- HDF5 beyond Keras ---


def said(thing: Any) -> Iterator[tuple[str, Any, Any, bytes]]:
    """Each attribute with its exact type, its shape and its bits."""
    for key in thing.attrs:
        attribute = thing.attrs.get_id(key)
        values = np.array(thing.attrs[key]) if attribute.shape is not None else np.zeros(())
        bits = repr(values.tolist()).encode() if values.dtype.hasobject or values.dtype.kind == "U" else raw(values)
        yield key, attribute.get_type().copy(), attribute.shape, bits


def assert_same_hdf5(left: Path, right: Path) -> None:
    """Compare members in their order, links, types, fill values, attributes and numbers."""
    with h5py.File(left) as old, h5py.File(right) as new:
        waiting = [(old["/"], new["/"])]
        while waiting:
            one, other = waiting.pop()
            assert list(said(one)) == list(said(other))
            if isinstance(one, h5py.Dataset):
                assert one.id.get_type() == other.id.get_type()
                assert (one.shape, one.maxshape) == (other.shape, other.maxshape)
                assert raw(np.asarray(one.fillvalue)) == raw(np.asarray(other.fillvalue))
                if one.shape is not None:
                    assert np.array_equal(one[()], other[()]) or raw(one[()]) == raw(other[()])
                continue
            assert list(one) == list(other)
            for key in one:
                link, same = one.get(key, getlink=True), other.get(key, getlink=True)
                assert type(link) is type(same)
                if isinstance(link, h5py.HardLink):
                    waiting.append((one[key], other[key]))
                else:
                    assert link.path == same.path


@pytest.mark.parametrize("name", [name for name in PACKABLE if name.endswith(".h5")])
def test_all_members_and_attributes_of_an_hdf5_fixture_are_equal(tmp_path: Path, name: str) -> None:
    assert_same_hdf5(FIXTURES / name, packed(FIXTURES / name, tmp_path))


def sparse(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    random = np.random.default_rng(0)
    return np.where(random.random(shape) < 0.2, random.standard_normal(shape) * 50, 0).astype(dtype)


def strange(path: Path) -> Path:
    """A file with everything that a Keras file does not have but HDF5 allows."""
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights", track_order=True)
        group.attrs["text"] = "ü 中"
        group.attrs["texts"] = ["one", "", "three"]
        group.attrs.create("ascii", b"plain", dtype=h5py.string_dtype("ascii"))
        group.attrs.create("fixed", np.array([b"ab", b"c"]))
        group.attrs.create("spaces", np.bytes_("x  "), dtype=h5py.string_dtype("ascii", 5))
        group.attrs["yes"] = True
        group.attrs["yeses"] = np.array([True, False])
        group.attrs["none"] = h5py.Empty("f4")
        group.attrs["empty"] = np.zeros((0, 3), np.float32)
        group.attrs["big-endian"] = np.array([1, 2], ">i4")
        group.attrs["complex"] = 1 + 2j
        group.attrs["record"] = np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")])
        group.attrs.create("array", np.zeros((2, 3), np.int16), dtype="(3,)i2", shape=(2, 3))
        group.attrs.create("ragged", np.array([[1, 2]], "i4"), dtype="i4")
        group.attrs["long"] = np.arange(20_000)
        for key in ("zebra", "apple", "mango"):
            group.create_dataset(key, data=sparse((50, 40)))
        group["zebra"].attrs["note"] = "kept"
        group.create_dataset("big-endian", data=sparse((50, 40), ">f4"))
        group.create_dataset("ints", data=sparse((50, 40), np.int64))
        group.create_dataset("bools", data=sparse((50, 40)) > 0)
        group.create_dataset("complex", data=sparse((50, 40), np.complex64))
        group.create_dataset("halves", data=sparse((50, 40), np.float16))
        group.create_dataset("texts", data=["a", "bc"])
        group.create_dataset("scalar", data=3.5)
        group.create_dataset("none", data=h5py.Empty("f4"))
        group.create_dataset("empty", shape=(0, 4))
        group.create_dataset("growing", data=sparse((50, 40)), maxshape=(None, 40), chunks=(7, 9), fillvalue=7)
        group.create_dataset("lzf", data=sparse((50, 40)), compression="lzf")
        group.create_dataset("timed", data=sparse((5, 4)), track_times=True)
        group.create_dataset("unwritten", shape=(30, 30), dtype="f4", fillvalue=2)
        group.create_dataset("records", data=np.zeros(300, [("a", "i4"), ("b", "f8")]))
        group["same"] = group["zebra"]
        group["soft"] = h5py.SoftLink("/model_weights/apple")
        file.create_group("inner")["up"] = group
        file["inner/itself"] = file["inner"]
    return path


def test_what_only_hdf5_knows_is_carried_over(tmp_path: Path) -> None:
    path = strange(tmp_path / "m.h5")
    target = packed_hdf5(path)
    with h5py.File(path) as old, h5py.File(target) as new:
        assert list(old["model_weights"])[:3] == list(new["model_weights"])[:3] == ["zebra", "apple", "mango"]
        assert new["model_weights/zebra"] == new["model_weights/same"]
        assert new["inner/itself/itself/up"] == new["model_weights"]
        assert new["model_weights/zebra"].compression == "gzip"
        assert new["model_weights/lzf"].compression == "lzf"
        del_loops(old, new, tmp_path)
    assert_same_hdf5(tmp_path / "old.h5", tmp_path / "new.h5")


def del_loops(old: Any, new: Any, folder: Path) -> None:
    """Leave groups that hold themselves out of what is compared."""
    for name, file in (("old.h5", old), ("new.h5", new)):
        with h5py.File(folder / name, "w") as part:
            file.copy("model_weights", part)


def test_a_strange_file_gives_the_same_bytes_a_second_later(tmp_path: Path) -> None:
    path = strange(tmp_path / "m.h5")
    before = packed_hdf5(path).read_bytes()
    time.sleep(1.01)
    assert packed_hdf5(path).read_bytes() == before


def test_a_file_with_references_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", data=sparse((50, 40)))
        file.attrs["to"] = file["w"].ref
    assert packed_hdf5(path).read_bytes() == path.read_bytes()


def test_datasets_of_many_chunks_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "_CHUNK_BYTES", 500)
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        for number, shape in enumerate([(1000,), (3, 400), (400, 3), (7, 11, 13), (2, 3, 4, 50)]):
            file.create_dataset(f"w{number}", data=sparse(shape))
    target = packed_hdf5(path)
    assert_same_hdf5(path, target)
    with h5py.File(target) as file:
        assert all(np.prod(dataset.chunks) * 4 <= 500 for dataset in file.values() if dataset.chunks)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (1, 1), (7,)])
@pytest.mark.parametrize("room", [1, 2, 7, 100])
def test_chunks_cover_each_element_once(shape: tuple[int, ...], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "_CHUNK_BYTES", room)
    chunk = rebuild.chunk_of(shape, 1)
    assert chunk is not None
    assert np.prod(chunk) <= room
    covered = np.zeros(shape, int)
    for begin, lengths in rebuild.boxes(shape, chunk):
        covered[tuple(slice(start, start + length) for start, length in zip(begin, lengths, strict=True))] += 1
    assert (covered == 1).all()


# --- zip ---


def test_directories_and_the_comment_of_a_zip_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    shutil.copy(FIXTURES / "digits_cnn.keras", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("assets")
        archive.comment = b"hello"
    with zipfile.ZipFile(packed(path, tmp_path)) as archive, zipfile.ZipFile(path) as old:
        assert archive.namelist() == old.namelist()
        assert archive.comment == b"hello"
        assert archive.testzip() is None


def test_an_entry_that_is_damaged_is_not_packed_as_if_it_were_sound(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    content = bytearray((FIXTURES / "digits_cnn.pt").read_bytes())
    tensor = open_model(FIXTURES / "digits_cnn.pt").tensors[4]
    assert tensor.storage.extent is not None
    content[tensor.storage.extent.offset + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not match its checksum"):
        packed(path, tmp_path)


# --- PyTorch ---


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """What a checkpoint holds, by path."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}/{part}").items()}


@pytest.mark.parametrize("name", [name for name in PACKABLE if name.endswith(".pt") and "script" not in name])
def test_a_checkpoint_loads_bit_by_bit(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    target = packed(FIXTURES / name, tmp_path)
    loaded, expected = (torch.load(path, weights_only=name != "whole_module.pt") for path in (target, FIXTURES / name))
    if name == "whole_module.pt":
        loaded, expected = loaded.state_dict(), expected.state_dict()
    found, wanted = flat(loaded), flat(expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_views_of_one_storage_still_share_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    loaded = torch.load(packed(FIXTURES / "tied_and_views.pt", tmp_path), weights_only=True)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


def test_torchscript_loads_and_gives_the_same_bits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = FIXTURES / "digits_cnn_torchscript.pt"
    loaded, expected = torch.jit.load(packed(source, tmp_path)), torch.jit.load(source)
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    assert torch.equal(loaded(x), expected(x))
    assert loaded.code == expected.code


def test_an_exported_program_loads_and_gives_the_same_bits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = FIXTURES / "digits_cnn.pt2"
    loaded, expected = torch.export.load(packed(source, tmp_path)), torch.export.load(source)
    assert loaded.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in expected.state_dict.items())
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    assert torch.equal(loaded.module()(x), expected.module()(x))


def test_half_zeros_make_a_checkpoint_smaller_than_the_dense_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weights = {f"{number}.weight": torch.from_numpy(sparse((60, 50))) for number in range(3)}
    torch.save(weights, tmp_path / "m.pt")
    assert packed(tmp_path / "m.pt", tmp_path).stat().st_size < 0.5 * (tmp_path / "m.pt").stat().st_size
