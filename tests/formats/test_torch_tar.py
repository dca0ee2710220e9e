"""The tar of the earliest PyTorch, put together from tarfile, pickle and struct as its writer did."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Reference:
    """Stands in the pickle for the tensor of that key."""

    def __init__(self, key: int) -> None:
        self.key = key


class Pickler(pickle.Pickler):
    """Leaves tensors to the container."""

    def persistent_id(self, obj: object) -> str | None:
        return str(obj.key) if isinstance(obj, Reference) else None


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write(path: Path, arrays: dict[str, Array], views: list[tuple[int, int, int, int]] | None = None) -> None:
    storages, tensors, main = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(arrays), storages, 2)
    pickle.dump(len(arrays), tensors, 2)
    for key, array in enumerate(arrays.values(), 100):
        pickle.dump((key, "cpu", torch.FloatStorage), storages, 2)
        storages.write(struct.pack("<q", array.size) + array.tobytes())
        pickle.dump((key + 1000, key, torch.FloatTensor), tensors, 2)
        strides = [step // 4 for step in array.strides]
        tensors.write(struct.pack("<ii", array.ndim, 0) + struct.pack(f"<{array.ndim}q", *array.shape))
        tensors.write(struct.pack(f"<{array.ndim}q", *strides) + struct.pack("<q", 0))
    pickle.dump(views or [], storages, 2)
    pairs = [(name, Reference(1000 + key)) for key, name in enumerate(arrays, 100)]
    Pickler(main, 2).dump(collections.OrderedDict(pairs))
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "sys_info", pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2))
        add(tar, "pickle", main.getvalue())
        add(tar, "tensors", tensors.getvalue())
        add(tar, "storages", storages.getvalue())


class TestTorchTar(FormatContract):
    format = "torch-tar"
    name = "model.pt"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        write(path, arrays)

    def read_back(self, path: Path) -> dict[str, Array]:
        # Written by this very test: PyTorch has no safe way to load a tar.
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=False).items()}


def test_an_entry_that_reaches_past_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    write(path, {"w": np.ones(2, np.float32)})
    content = bytearray(path.read_bytes())
    content[124:136] = b"%011o\0" % (1 << 30)
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(InputError, match="reaches past the end"):
        open_model(path)


def test_a_shared_storage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.pt", {"w": np.ones(2, np.float32)}, [(7, 8, 0, 1)])
    with pytest.raises(InputError, match="shares a storage that it does not hold"):
        open_model(tmp_path / "m.pt")


def test_a_broken_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    write(path, {"w": np.ones(2, np.float32)})
    content = bytearray(path.read_bytes())
    content[130] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="a header in the tar is broken"):
        open_model(path)
