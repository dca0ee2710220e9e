"""The zip of PyTorch, written again around a changed program."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from prunectl.formats.base import ModelFile
from prunectl.formats.pack_zip import LEVEL
from prunectl.formats.torch.emit import emit
from prunectl.formats.torch.recipe import Bytes
from prunectl.formats.torch.record import record
from prunectl.formats.torch.storages import Container, Contents
from prunectl.formats.torch.zip_file import MAX_MARK_BYTES, MAX_PICKLE_BYTES, top_folder
from prunectl.formats.zips import Archive, written_again

ALIGNMENT = 64
MAX_ALIGNMENT = 1 << 16
_HEADER_BYTES = 30
_ZIP64_BYTES = 20
_ZIP64_ABOVE = 1 << 30
"""Above it the header has room for 64-bit lengths."""
_PADDING = b"FB"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_script(archive: Archive) -> bool:
    """Whether there is code beside the weights, which knows their types."""
    folder = top_folder(archive)
    return any(name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in archive.entries)


def open_container(model: ModelFile, archive: Archive) -> Container:
    """Return the program and the storages of a zip."""
    folder = top_folder(archive)
    entry = archive.entries[f"{folder}data.pkl"]
    if entry.is_stored:
        with model.path.open("rb") as file:
            # Stays open as long as something of the program lies in it.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = entry.extent.offset
        recipe = record(data, model.path, start=begin, end=begin + entry.extent.nbytes)
    else:
        recipe = record(archive.read(entry.name, MAX_PICKLE_BYTES), model.path)

    def name_of(key: str) -> str:
        name = f"{folder}data/{key}"
        return name if name in archive.entries or f"{folder}{key}" not in archive.entries else f"{folder}{key}"

    def write(target: Path, contents: Contents) -> None:
        _write(archive, folder, target, contents)

    sizes = {name.removeprefix(f"{folder}data/"): entry.extent.nbytes for name, entry in archive.entries.items()}
    sizes.update({name.removeprefix(folder): entry.extent.nbytes for name, entry in archive.entries.items()})
    return Container(recipe, name_of, sizes, write)


def _write(archive: Archive, folder: str, target: Path, contents: Contents) -> None:
    fresh = {f"{folder}data/{key}": storage for key, storage in contents.fresh.items()}
    fresh.update({f"{folder}{key}": storage for key, storage in contents.fresh.items()})
    data = f"{folder}data/"
    dropped = {name for key in contents.dropped for name in (f"{data}{key}", f"{folder}{key}")}
    # It promises that every storage lies where PyTorch's own writer would have put it.
    dropped.add(f"{folder}.format_version")
    names = [name for name in archive.entries if name not in dropped]
    last = max((index for index, name in enumerate(names) if name.startswith(data)), default=len(names) - 1)
    names[last + 1 : last + 1] = [
        f"{data}{key}"
        for key in contents.fresh
        if f"{data}{key}" not in archive.entries and f"{folder}{key}" not in archive.entries
    ]
    is_deflated = not all(entry.is_stored for name, entry in archive.entries.items() if name.startswith(data))
    alignment = _alignment(archive, folder)
    pickle = b"".join(emit(contents.recipe))
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        new.comment = old.comment
        for name in names:
            entry = archive.entries.get(name)
            info = _info(old, name)
            info.compress_type = ZIP_STORED if (entry.is_stored if entry else not is_deflated) else ZIP_DEFLATED
            pieces: Iterable[Bytes]
            if name == f"{folder}data.pkl":
                info.file_size, pieces = len(pickle), [pickle]
            elif name in fresh:
                info.file_size, pieces = fresh[name].nbytes, fresh[name].raw()
            else:
                known = archive.entries[name]
                info.file_size, pieces = known.nbytes, archive.pieces(known)
            if info.compress_type == ZIP_STORED:
                info.extra = _padding(new.start_dir, info, alignment)
            with new.open(info, "w") as out:
                for piece in pieces:
                    out.write(piece)
            # The directory needs no padding.
            info.extra = b""


def _info(old: ZipFile, name: str) -> ZipInfo:
    if name not in old.NameToInfo:
        return ZipInfo(name, _EPOCH)
    return written_again(old.getinfo(name))


def _alignment(archive: Archive, folder: str) -> int:
    name = f"{folder}.storage_alignment"
    said = archive.read(name, MAX_MARK_BYTES).decode("ascii", "replace").strip() if name in archive.entries else ""
    return int(said) if said.isdigit() and 0 < int(said) <= MAX_ALIGNMENT else ALIGNMENT


def _padding(at: int, info: ZipInfo, alignment: int) -> bytes:
    """Return an extra field after which the bytes of an entry begin at a round place, as PyTorch pads them."""
    is_big = info.file_size > _ZIP64_ABOVE
    begin = at + _HEADER_BYTES + len(info.filename.encode()) + 4 + (_ZIP64_BYTES if is_big else 0)
    fill = -begin % alignment
    return _PADDING + fill.to_bytes(2, "little") + b"Z" * fill
