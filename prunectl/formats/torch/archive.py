"""The zip of PyTorch 1.6 and later: a pickle program, and one entry for each storage.

TorchScript files are the same with the code beside.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats import budgets, extents, zip_read
from prunectl.formats.base import Array, ModelFile, ModelInfo, Storage, Tensor
from prunectl.formats.torch import model as torch_model
from prunectl.formats.torch import script
from prunectl.formats.torch.model import PickleSource
from prunectl.formats.torch.pickle.opcodes import describe_value
from prunectl.formats.torch.pickle.vm import PickleProgram, interpret
from prunectl.formats.torch.views import StorageInfo
from prunectl.formats.zip_read import Archive, ZipEntry


def open_model(path: Path) -> ModelFile:
    """Open a zip that torch.save or torch.jit.save wrote."""
    archive = zip_read.open_archive(path)
    folder = top_folder(archive)
    code = [entry for name, entry in archive.entries.items() if name.startswith(f"{folder}code/")]
    is_script = bool(code) or f"{folder}constants.pkl" in archive.entries
    sources = [pickle_source(archive, folder, "data")]
    if f"{folder}constants.pkl" in archive.entries:
        # The code says CONSTANTS.c0 and so on; a frozen model keeps all of its weights there.
        sources.append(pickle_source(archive, folder, "constants", prefix="CONSTANTS.c"))
    about = ModelInfo(
        producer=_producer(archive, folder, "TorchScript" if is_script else "zip"),
        code=("TorchScript code",) if is_script else (),
        code_bytes=sum(entry.extent.nbytes for entry in code),
        is_compressed=any(not entry.is_stored for entry in archive.entries.values() if entry not in code),
    )
    if is_script:
        texts, is_whole = script.code(archive, folder)
        declared, uses = script.parameters(texts), script.uses(texts) if is_whole else None
        sources = [
            replace(source, program=_load_without_classes(source.program), parameters=declared, uses=uses)
            for source in sources
        ]
    return torch_model.model_from_pickle(path, "torch", sources, about, decoder(archive))


def _load_without_classes(program: PickleProgram) -> PickleProgram:
    """The program without mention of the classes that the code beside it defines."""
    foreign_calls = tuple(call for call in program.foreign_calls if not call.partition(" ")[2].startswith("__torch__."))
    return replace(program, foreign_calls=foreign_calls)


def top_folder(archive: Archive) -> str:
    """The folder that all entries lie in, with its slash; it is named after the file or `archive`."""
    pickles = [name for name in archive.entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise InputError(f"{archive.path} is damaged: it has no data.pkl")
    return min(pickles, key=lambda name: (name.count("/"), name)).removesuffix("data.pkl")


def pickle_source(archive: Archive, folder: str, part: str, prefix: str = "") -> PickleSource:
    """One pickle of the archive with the storages that belong to it."""
    entry = archive.entries[f"{folder}{part}.pkl"]
    is_big = read_marker(archive, f"{folder}byteorder") == "big"

    def find(info: StorageInfo) -> Storage:
        for name in (f"{folder}{part}/{info.key}", f"{folder}{info.key}"):
            if name in archive.entries:
                return storage_of(archive, name, info, big_endian=is_big)
        raise InputError(f"{archive.path} is damaged: it has no entry {folder}{part}/{describe_value(info.key)}")

    return PickleSource(_program(archive, entry), find, prefix=prefix, is_flat=entry.is_stored)


def storage_of(archive: Archive, name: str, info: StorageInfo, *, big_endian: bool) -> Storage:
    """The entry behind a storage, if it is as long as the pickle says."""
    entry = archive.entries[name]
    if entry.nbytes != info.nbytes:
        raise InputError(
            f"{archive.path} is damaged: its entry {name} has {entry.nbytes} bytes, its pickle says {info.nbytes}"
        )
    extent = entry.extent if entry.is_stored else None
    return Storage(name, entry.nbytes, extent, entry.extent.nbytes, big_endian)


def decoder(archive: Archive) -> Callable[[Tensor], Array]:
    """What reads a tensor out of a compressed entry."""

    def inflated(key: str) -> NDArray[np.uint8]:
        return archive.inflated(archive.entries[key])

    shared = lru_cache(maxsize=1)(inflated)

    def decode(tensor: Tensor) -> Array:
        # What several tensors see is inflated once for those that follow each other.
        is_whole = tensor.nbytes == tensor.storage.nbytes
        return extents.arrange(
            (inflated if is_whole else shared)(tensor.storage.key),
            dtype=tensor.dtype,
            shape=tensor.shape,
            start=tensor.start,
            strides=tensor.strides,
            big_endian=tensor.storage.big_endian,
        )

    return decode


def _program(archive: Archive, entry: ZipEntry) -> PickleProgram:
    what = f"its entry {entry.name}"
    if not entry.is_stored:
        return interpret(archive.read(entry.name, budgets.MAX_PICKLE_BYTES), archive.path, what)
    with archive.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = entry.extent.offset
        return interpret(data, archive.path, what, start=begin, end=begin + entry.extent.nbytes)


def read_marker(archive: Archive, name: str) -> str:
    """A small entry with one word, such as a version; empty if there is none."""
    if name not in archive.entries:
        return ""
    return describe_value(archive.read(name, budgets.MAX_VERSION_BYTES).decode("ascii", "replace").strip())


def _producer(archive: Archive, folder: str, kind: str) -> str:
    version = read_marker(archive, f"{folder}version") or read_marker(archive, f"{folder}.data/version")
    return f"pytorch ({kind} format {version})" if version else f"pytorch ({kind} format)"
