"""Files that cost more than they are worth, made quickly: what a reader would make of them is huge, they are not."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.formats import protobuf
from prunectl.formats.protobuf import length_prefix, number
from prunectl.formats.tensorflow import leveldb

Maker = Callable[[Path], Path]
MEGABYTE = 1 << 20
DENSE: dict[str, Any] = {"class_name": "Dense", "config": {"name": "dense", "units": 2}}


def field(key: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    return length_prefix(key, len(content)) + content


def commas(piece: bytes, times: int) -> bytes:
    """One piece again and again, with commas between."""
    return (piece + b",") * (times - 1) + piece


def numbered(row: bytes, count: int) -> bytes:
    """Rows with commas between: thousands of the same three digits, each with a number of its own before them."""
    thousand = b",".join(row % b"?%03d" % place for place in range(1000))
    return b",".join(thousand.replace(b"?", b"%d" % place) for place in range(count // 1000))


def filled(nbytes: int, piece: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A text of about so many bytes: one piece again and again, with commas between."""
    return before + b"[" + commas(piece, nbytes // (len(piece) + 1)) + b"]" + after


def weights(path: Path) -> Path:
    """The weights of a Keras model of one layer."""
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = np.ones((2, 2), np.float32)
    return path


def keras(config: bytes, metadata: bytes = b"{}", kind: int = zipfile.ZIP_STORED) -> Maker:
    """A `.keras` archive; its texts are deflated, its weights as said."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "m.keras", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("config.json", config)
            archive.writestr("metadata.json", metadata)
            archive.write(weights(folder / "w.h5"), "model.weights.h5", kind)
        return folder / "m.keras"

    return make


def h5(text: bytes | str) -> Maker:
    """A Keras `.h5` whose configuration is a text."""

    def make(folder: Path) -> Path:
        with h5py.File(folder / "m.h5", "w") as file:
            dense = file.create_group("model_weights/dense")
            dense["kernel:0"] = np.ones((2, 2), np.float32)
            dense.attrs["weight_names"] = [b"kernel:0"]
            file["model_weights"].attrs["layer_names"] = [b"dense"]
            # As a dataset would: an attribute of more than 64 KiB lies in the heap of strings.
            file.attrs.create("model_config", text, dtype=h5py.string_dtype())
        return folder / "m.h5"

    return make


def h5_names(count: int) -> Maker:
    """A Keras `.h5` that names many layers."""

    def make(folder: Path) -> Path:
        with h5py.File(folder / "m.h5", "w", libver="latest") as file:
            file["model_weights/dense/kernel:0"] = np.ones((2, 2), np.float32)
            file["model_weights"].attrs.create("layer_names", np.zeros(count, "S1"))
        return folder / "m.h5"

    return make


def entries(count: int) -> Maker:
    """A zip whose directory names one entry many times."""

    def make(folder: Path) -> Path:
        row = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 1, 0, 0) + bytes(12) + b"a"
        size = min(count, 0xFFFF)
        end = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, size, size, count * len(row), 30, 0)
        (folder / "m.pt").write_bytes(b"PK\x03\x04" + bytes(26) + row * count + end)
        return folder / "m.pt"

    return make


def doubled(times: int, *, is_functional: bool = False) -> bytes:
    """The configuration of a model that holds the next one twice, and so on: 2^times layers."""
    inner = json.dumps(DENSE)
    for level in range(times):
        if is_functional:
            inner = (
                f'{{"class_name":"Functional","name":"m{level}","inbound_nodes":[],"config":{{"name":"m{level}",'
                f'"layers":[{inner},{inner}]}}}}'
            )
        else:
            inner = f'{{"class_name":"Sequential","config":{{"name":"m{level}","layers":[{inner},{inner}]}}}}'
    return inner.encode()


def safetensors(header: bytes, body: bytes = b"") -> Maker:
    """A safetensors file."""

    def make(folder: Path) -> Path:
        path = folder / "m.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + body)
        return path

    return make


def one_tensor(shape: bytes, nbytes: int = 0) -> Maker:
    """A safetensors file of one tensor."""
    return safetensors(b'{"w":{"dtype":"F32","shape":[' + shape + b'],"data_offsets":[0,%d]}}' % nbytes, bytes(nbytes))


def empty_tensors(count: int) -> Maker:
    """A safetensors file of many tensors without elements."""
    row = b'"t%b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return safetensors(b"{" + numbered(row, count) + b"}")


def index(text: bytes, sparse_bytes: int = 0) -> Maker:
    """The index of a sharded checkpoint, perhaps with a hole behind it."""

    def make(folder: Path) -> Path:
        path = folder / "model.safetensors.index.json"
        path.write_bytes(text)
        if sparse_bytes:
            os.truncate(path, sparse_bytes)
        return path

    return make


def saved_model(metadata: bytes, count: int = 1) -> Maker:
    """A SavedModel with descriptions of Keras objects."""

    def make(folder: Path) -> Path:
        place = folder / "saved"
        place.mkdir()
        (place / "saved_model.pb").write_bytes(field(2, field(2, field(1, field(1, b"x") + field(2, b"NoOp")))))
        node = field(1, field(4, b"_tf_keras_layer") + field(5, metadata))
        (place / "keras_metadata.pb").write_bytes(node * count)
        return place

    return make


def checkpoint(objects: bytes) -> Maker:
    """A checkpoint of TensorFlow with an object graph."""

    def make(folder: Path) -> Path:
        stored = protobuf.encode_varint(len(objects)) + bytes(4) + objects
        (folder / "m.data-00000-of-00001").write_bytes(stored)
        entry = number(1, 7) + field(2, b"") + number(5, len(stored))
        records = [(b"", number(1, 1)), (b"_CHECKPOINTABLE_OBJECT_GRAPH", entry)]
        (folder / "m.index").write_bytes(leveldb.table(records))
        return folder / "m.index"

    return make


def onnx(graph: bytes) -> Maker:
    """An ONNX model with a graph."""

    def make(folder: Path) -> Path:
        (folder / "m.onnx").write_bytes(number(1, 9) + field(7, graph) + field(8, number(2, 20)))
        return folder / "m.onnx"

    return make


def _onnx_tensor(name: str, dims: tuple[int, ...], code: int, content: bytes) -> bytes:
    return b"".join(number(1, size) for size in dims) + number(2, code) + field(8, name.encode()) + content


def onnx_sparse(count: int, elements: int) -> bytes:
    """A graph of sparse initializers of one value each."""
    places = _onnx_tensor("i", (1,), 7, field(9, bytes(8)))
    return b"".join(
        field(
            15,
            field(1, _onnx_tensor(f"w{place}", (1,), 1, field(9, b"\0\0\x80?")))
            + field(2, places)
            + number(3, elements),
        )
        for place in range(count)
    )


def onnx_shared(count: int, nbytes: int, *, is_varied: bool = False) -> Maker:
    """An ONNX model of many tensors over one file beside it, which is a hole."""
    pairs = field(13, field(1, b"location") + field(2, b"w.bin")) + field(
        13, field(1, b"length") + field(2, b"%d" % nbytes)
    )

    def make(folder: Path) -> Path:
        with (folder / "w.bin").open("wb") as file:
            file.truncate(nbytes)
        graph = []
        for place in range(count):
            width = 1 << (place % 24 if is_varied else 1)
            shape = (nbytes // 4 // width, width)
            graph.append(field(5, _onnx_tensor(f"w{place}", shape, 1, pairs + number(14, 1))))
            node = field(1, b"x") + field(1, b"w%d" % place) + field(2, b"y%d" % place) + field(4, b"MatMul")
            graph.append(field(1, node))
        return onnx(b"".join(graph))(folder)

    return make


def tflite(tensors: int, nbytes: int, *, name: bytes = b"w") -> Maker:
    """A TensorFlow Lite model of many tensors that are one table over one buffer."""

    def make(folder: Path) -> Path:
        out = bytearray(8)
        fixes: list[tuple[int, str]] = []
        places: dict[str, int] = {}

        def table(key: str, fields: dict[int, tuple[int, Any]]) -> None:
            """A vtable, then its table; a string as a value is a place to point to."""
            slots = max(fields, default=-1) + 1
            offsets, at = [0] * slots, 4
            for slot, (width, _) in sorted(fields.items(), key=lambda item: -item[1][0]):
                offsets[slot] = at
                at += width
            while (len(out) + 4 + 2 * slots) % 4:
                out.append(0)
            vtable = len(out)
            out.extend(struct.pack(f"<HH{slots}H", 4 + 2 * slots, at, *offsets))
            places[key] = len(out)
            out.extend(struct.pack("<i", len(out) - vtable) + bytes(at - 4))
            for slot, (width, value) in fields.items():
                where = places[key] + offsets[slot]
                if isinstance(value, str):
                    fixes.append((where, value))
                else:
                    out[where : where + width] = int(value).to_bytes(width, "little")

        def vector(key: str, items: list[str]) -> None:
            places[key] = len(out)
            out.extend(struct.pack("<I", len(items)) + bytes(4 * len(items)))
            fixes.extend((places[key] + 4 + 4 * at, item) for at, item in enumerate(items))

        def run(key: str, count: int, content: bytes) -> None:
            places[key] = len(out)
            out.extend(struct.pack("<I", count) + content + bytes(-len(content) % 4))

        table("model", {0: (4, 3), 1: (4, "codes"), 2: (4, "graphs"), 4: (4, "buffers")})
        vector("codes", [])
        vector("graphs", ["graph"])
        vector("buffers", ["none", "buffer"])
        table("graph", {0: (4, "tensors"), 3: (4, "operators")})
        vector("operators", [])
        vector("tensors", ["tensor"] * tensors)
        table("tensor", {0: (4, "shape"), 2: (4, 1), 3: (4, "name")})
        run("shape", 2, struct.pack("<2i", nbytes // 8, 2))
        run("name", len(name), name)
        table("none", {})
        table("buffer", {0: (4, "data")})
        run("data", nbytes, bytes(nbytes))
        for where, value in fixes:
            out[where : where + 4] = struct.pack("<I", places[value] - where)
        out[:8] = struct.pack("<I", places["model"]) + b"TFL3"
        (folder / "m.tflite").write_bytes(bytes(out))
        return folder / "m.tflite"

    return make
