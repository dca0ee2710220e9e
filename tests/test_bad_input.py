"""Files that lie, and paths that are no files: one sentence, exit code 3, bounded memory, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from prunectl.errors import InputError
from prunectl.formats.registry import FORMATS, open_model, recognise
from tests.running import here
from tests.safety.cost import cost

SUFFIXES = sorted({suffix for row in FORMATS for suffix in row.suffixes if suffix} | {".npz", ".dat"})
MAX_MEMORY_BYTES = 300 << 20
MEGABYTE = 1 << 20
Maker = Callable[[Path], Path]


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Zips, put together by hand because zipfile does not write lies.


@dataclass(frozen=True)
class Packed:
    """An entry of a zip: what its bytes are, and what its directory claims."""

    name: str
    data: bytes = b"{}"
    inflated_bytes: int | None = None
    """None for a stored entry."""
    shares_with: int | None = None
    """The entry whose bytes it claims for itself."""


def zip_of(*entries: Packed) -> bytes:
    body, directory, offsets = b"", b"", []
    for entry in entries:
        offset = len(body) if entry.shares_with is None else offsets[entry.shares_with]
        offsets.append(offset)
        method = 0 if entry.inflated_bytes is None else 8
        size = len(entry.data) if entry.inflated_bytes is None else entry.inflated_bytes
        name = entry.name.encode()
        common = struct.pack(
            "<HHHHHLLLHH", 20, 0, method, 0, 0x21, zlib.crc32(entry.data), len(entry.data), size, len(name), 0
        )
        if entry.shares_with is None:
            body += b"PK\x03\x04" + common + name + entry.data
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + common + bytes(10) + struct.pack("<L", offset) + name
    end = struct.pack("<HHHHLLH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def zeros_deflated(megabytes: int) -> bytes:
    """Zeros as deflate has them, a megabyte at a time, so that a bomb costs nothing to make."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(bytes(MEGABYTE)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + b"\x03\x00"


def bomb(name: str, megabytes: int = 2000) -> Packed:
    return Packed(name, zeros_deflated(megabytes), megabytes * MEGABYTE)


KERAS = (Packed("config.json"), Packed("metadata.json"), Packed("model.weights.h5", b"no HDF5"))
PLAIN_PICKLE = pickle.dumps({}, protocol=2)
TORCH = (Packed("archive/data.pkl", PLAIN_PICKLE), Packed("archive/version", b"3\n"))

ZIPS: dict[str, tuple[str, tuple[Packed, ...]]] = {
    "a zip that is no model": ("notes.zip", (Packed("readme.txt", b"hello"),)),
    "a zip that is no model but is named like one": ("m.keras", (Packed("readme.txt", b"hello"),)),
    "a zip without entries": ("m.pt", ()),
    "a zip with weights that are no HDF5": ("m.keras", KERAS),
    "a zip bomb in keras": ("m.keras", (bomb("config.json"), *KERAS[1:])),
    "a zip bomb in keras weights": ("m.keras", (*KERAS[:2], bomb("model.weights.h5"))),
    "a zip bomb in torch": ("m.pt", (bomb("archive/data.pkl"), TORCH[1])),
    "a zip bomb in an exported program": ("m.pt2", (Packed("m/archive_format", b"pt2"), bomb("m/models/model.json"))),
    "a zip that claims more than deflate can do": (
        "m.pt",
        (Packed("archive/data.pkl", b"\x03\x00", 1 << 30), TORCH[1]),
    ),
    "a zip with overlapping entries": ("m.pt", (*TORCH, Packed("archive/data/0", PLAIN_PICKLE, shares_with=0))),
    "a zip with one name twice": ("m.pt", (*TORCH, Packed("archive/data/0"), Packed("archive/data/0"))),
    "a zip with the weights twice": ("m.keras", (*KERAS, KERAS[2])),
    "a zip with an absolute name": ("m.pt", (*TORCH, Packed("/archive/data/0"))),
    "a zip with a name that climbs out": ("m.pt", (*TORCH, Packed("archive/../../0"))),
    "a zip with a name that climbs out on Windows": ("m.keras", (*KERAS, Packed("..\\0"))),
    "a configuration nested too deep": ("m.keras", (Packed("config.json", b'{"a":' * 100_000), *KERAS[1:])),
    "a pickle of a billion marks": ("m.pt", (Packed("archive/data.pkl", b"\x80\x02" + b"(" * 5_000_000), TORCH[1])),
    "a pickle nested too deep": (
        "m.pt",
        (Packed("archive/data.pkl", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), TORCH[1]),
    ),
    "a pickle that stops": ("m.pt", (Packed("archive/data.pkl", b"\x80\x02}q"), TORCH[1])),
}


def zip_maker(name: str, entries: tuple[Packed, ...]) -> Maker:
    return lambda folder: written(folder / name, zip_of(*entries))


# Pickles that would leave a canary behind.


class Bird:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.folder}/canary",)


def evil_zip(folder: Path) -> Path:
    program = pickle.dumps({"w": Bird(folder)}, protocol=2)
    return written(folder / "m.pt", zip_of(Packed("archive/data.pkl", program), TORCH[1]))


def evil_legacy(folder: Path) -> Path:
    magic = 0x1950A86A20F9469CFC6C
    parts: list[Any] = [magic, 1001, {"protocol_version": 1001, "little_endian": True}, Bird(folder), []]
    return written(folder / "m.pt", b"".join(pickle.dumps(part, protocol=2) for part in parts))


def evil_pickle(folder: Path) -> Path:
    return written(folder / "m.pkl", pickle.dumps(Bird(folder), protocol=4))


def evil_bin(folder: Path) -> Path:
    return written(folder / "pytorch_model.bin", pickle.dumps(Bird(folder), protocol=0))


# Containers that point where they should not.


def keras_weights(folder: Path, put: Callable[[Any], None]) -> Path:
    path = folder / "m.weights.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file.attrs["backend"] = "tensorflow"
        group = file.create_group("dense")
        group.attrs["weight_names"] = [b"dense/kernel:0"]
        put(group.create_group("dense"))
    return path


def linked_outside(folder: Path) -> Path:
    with h5py.File(folder / "secret.h5", "w") as file:
        file["w"] = np.ones((2, 3))

    def put(group: Any) -> None:
        group["kernel:0"] = h5py.ExternalLink("secret.h5", "/w")

    return keras_weights(folder, put)


def stored_outside(folder: Path) -> Path:
    secret = written(folder / "secret.raw", bytes(24))

    def put(group: Any) -> None:
        group.create_dataset("kernel:0", (2, 3), np.float32, external=[(str(secret), 0, 24)])

    return keras_weights(folder, put)


def linked_nowhere(folder: Path) -> Path:
    def put(group: Any) -> None:
        group["kernel:0"] = h5py.SoftLink("/nowhere")

    return keras_weights(folder, put)


def linked_to_itself(folder: Path) -> Path:
    def put(group: Any) -> None:
        group["kernel:0"] = h5py.SoftLink("/dense/dense/kernel:0")

    return keras_weights(folder, put)


def onnx_outside(folder: Path) -> Path:
    written(folder / "secret.bin", bytes(24))
    (folder / "model").mkdir()
    proto = TensorProto(name="w", dims=[2, 3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    proto.external_data.add(key="location", value="../secret.bin")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [proto])
    onnx.save(helper.make_model(graph), folder / "model" / "m.onnx")
    return folder / "model" / "m.onnx"


def index_outside(folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    return written(path, json.dumps({"weight_map": {"w": "../secret.safetensors"}}).encode())


def safetensors(header: object, data: bytes = b"") -> Maker:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda folder: written(folder / "m.safetensors", len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, length: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [length], "data_offsets": [begin, end]}


# Paths that are no files.


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.pt")
    return folder / "m.pt"


def broken_link(folder: Path) -> Path:
    (folder / "m.pt").symlink_to(folder / "gone.pt")
    return folder / "m.pt"


def circular_link(folder: Path) -> Path:
    (folder / "m.pt").symlink_to("m.pt")
    return folder / "m.pt"


def folder_with(name: str) -> Maker:
    return lambda folder: written(folder / "model" / name, b"hello").parent


def file_named(name: str, data: bytes) -> Maker:
    return lambda folder: written(folder / name, data)


def saved_model(data: bytes) -> Maker:
    return lambda folder: written(folder / "model" / "saved_model.pb", data).parent


def random_bytes(suffix: str, seed: int = 0) -> Maker:
    return lambda folder: written(folder / f"m{suffix}", np.random.default_rng(seed).bytes(5000))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DEEP = b'{"weight_map":' + b'{"a":' * 100_000

BAD: dict[str, Maker] = {
    "an empty file": file_named("m.pt", b""),
    "text": file_named("m.pt", b"hello\nworld\n"),
    "a Git LFS pointer": file_named("m.safetensors", LFS),
    "a web page": file_named("m.h5", b"<!DOCTYPE html><html>not found</html>"),
    "a folder that is no model": folder_with("readme.txt"),
    "an empty folder": lambda folder: folder,
    "a SavedModel that is text": saved_model(b"hello"),
    "a SavedModel that is empty": saved_model(b""),
    "a SavedModel of random bytes": saved_model(np.random.default_rng(0).bytes(5000)),
    **{name: zip_maker(*parts) for name, parts in ZIPS.items()},
    "a truncated zip": lambda folder: written(folder / "m.pt", zip_of(*TORCH)[:60]),
    "a zip pickle that calls": evil_zip,
    "a legacy pickle that calls": evil_legacy,
    "a bare pickle that calls": evil_pickle,
    "a pickle in text that calls": evil_bin,
    "a header past the end": safetensors({"a": entry(0, 4000, 1000)}, bytes(12)),
    "a header with overlaps": safetensors({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)),
    "a header nested too deep": safetensors(b'{"a":' * 100_000),
    "a header of two to the sixty bytes": file_named("m.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
    "a header of too many bytes": file_named("m.safetensors", (99_000_000).to_bytes(8, "little") + b"{}"),
    "an index nested too deep": file_named("m.safetensors.index.json", DEEP),
    "an index that leaves its folder": index_outside,
    "an HDF5 signature alone": file_named("m.h5", b"\x89HDF\r\n\x1a\n"),
    "an HDF5 file of random bytes": file_named("m.h5", b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(5000)),
    "an HDF5 file linked outside": linked_outside,
    "an HDF5 file stored outside": stored_outside,
    "an HDF5 file linked nowhere": linked_nowhere,
    "an HDF5 file linked to itself": linked_to_itself,
    "an ONNX model that leaves its folder": onnx_outside,
    "an ONNX model of random bytes": file_named("m.onnx", b"\x08\x08\x12" + np.random.default_rng(0).bytes(5000)),
    "a TFLite identifier alone": file_named("m.tflite", b"\x1c\0\0\0TFL3"),
    "a TFLite model of random bytes": file_named("m.tflite", b"\x1c\0\0\0TFL3" + np.random.default_rng(0).bytes(5000)),
    "a checkpoint of random bytes": file_named(
        "m.index", np.random.default_rng(0).bytes(5000) + bytes.fromhex("57fb808b247547db")
    ),
    "a pipe": fifo,
    "a device": lambda _: Path("/dev/zero"),
    "a missing file": lambda folder: folder / "gone.pt",
    "a file inside a file": lambda folder: written(folder / "m.pt", b"hello") / "inner.pt",
    "a link to nothing": broken_link,
    "a link to itself": circular_link,
    "a name too long": lambda folder: folder / ("n" * 300 + ".pt"),
    "a name that paints the terminal": file_named("m\x1b[31m\x07\n\u202e.pt", b"hello"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "folder"
    inner.mkdir()
    return inner


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_it_is_refused_in_one_sentence(folder: Path, tmp_path: Path, make: Maker) -> None:
    path = make(folder)
    found = cost("inspect", path, scratch=tmp_path)
    ran = found.outcome
    assert ran.code == 3, ran.err
    assert ran.out.strip() == ""
    first, *rest = ran.err.splitlines()
    assert first.startswith("error: ")
    name = path.name.split("\x1b")[0]
    assert name[:40] in first
    assert len(first) <= 7 + InputError.max_characters
    assert all(line.startswith(("  ", "hint: ")) for line in rest), ran.err
    assert "Traceback" not in ran.err
    assert not any(character in ran.err for character in "\x1b\x07\u202e")
    assert found.nbytes < MAX_MEMORY_BYTES
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_from_python_it_is_an_input_error_that_names_the_file(folder: Path, make: Maker) -> None:
    path = make(folder)
    with pytest.raises(InputError) as caught:
        open_model(path)
    assert path.name[:40] in caught.value.message
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes_are_no_model_whatever_their_name(folder: Path, suffix: str, seed: int) -> None:
    path = random_bytes(suffix, seed)(folder)
    with pytest.raises(InputError) as caught:
        open_model(path)
    assert path.name in caught.value.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_is_no_model_whatever_its_name(folder: Path, suffix: str) -> None:
    path = file_named(f"m{suffix}", b"It was a dark and stormy night.\n" * 200)(folder)
    with pytest.raises(InputError) as caught:
        open_model(path)
    assert path.name in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    path = written(folder / "m.pt", b"hello")
    path.chmod(0)
    ran = here("inspect", path)
    assert ran.code == 3
    assert "permission denied" in ran.err


def test_a_file_that_may_not_be_read_is_an_input_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder / "m.pt", b"hello")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="permission denied"):
        open_model(path)


OF_OTHERS = {
    "m.gguf": (b"GGUF\3\0\0\0", "is a GGUF file"),
    "m.engine": (b"ptrt\xff", "is a TensorRT engine"),
    # Its first fields could be those of ONNX.
    "m.mlmodel": (b"\x08\x07\x12\x02\xff\xff", "is a Core ML model"),
    "m.mlpackage/Manifest.json": (b"{}", "is a Core ML model"),
    "flax_model.msgpack": (b"\x82\xa6params\x81\xff", "is a file of Flax"),
    "100/_METADATA": (b"{}", "is a checkpoint of Orbax"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_model_of_another_kind_is_named_and_what_to_do(name: str, tmp_path: Path) -> None:
    data, kind = OF_OTHERS[name]
    path = written(tmp_path / name, data)
    with pytest.raises(InputError, match=f"{kind}.*: (prune|save) the "):
        recognise(path if path.parent == tmp_path else path.parent)
