"""The file of PyTorch 0.2 to 1.5, written again around a changed program."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.patch import patch_files
from prunectl.formats.torch import views
from prunectl.formats.torch.archive import MAX_MARK_BYTES, MAX_PICKLE_BYTES, top_folder
from prunectl.formats.torch.exported import examples
from prunectl.formats.torch.legacy import COUNT_BYTES
from prunectl.formats.torch.pickle.edit import (
    CheckpointContainer,
    CheckpointEdits,
    items,
    storage_refs,
    text,
    text_node,
    value,
)
from prunectl.formats.torch.pickle.ir import Bytes, IRNode, Mutation, emit_pickle, emitted, parse_ir
from prunectl.formats.zip_read import Archive, open_archive, written_again
from prunectl.formats.zip_write import LEVEL, rewrite_zip

_PIECE_BYTES = 1 << 20
_PROTOCOL = b"\x80\x02"


def open_legacy_container(model: ModelFile) -> CheckpointContainer:
    """Return the program and the storages of a file."""
    path = model.path
    with path.open("rb") as file:
        # Stays open as long as something of the program lies in it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 0
    for _ in range(3):
        begin = parse_ir(data, path, start=begin).end
    recipe = parse_ir(data, path, start=begin)
    listed = parse_ir(data, path, start=recipe.end)
    itemsizes = {
        ask.key: views.parse_persistent_id(path, value(ask.id)).dtype.itemsize for ask in storage_refs(recipe.root)
    }
    places: dict[str, tuple[int, int]] = {}
    at = listed.end
    for node in items(listed.root):
        key = text(node)
        key = str(value(node)) if key is None else key
        if key not in itemsizes:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        nbytes = COUNT_BYTES + int.from_bytes(data[at : at + COUNT_BYTES], "little") * itemsizes[key]
        places[key] = at, nbytes
        at += nbytes

    def write(target: Path, contents: CheckpointEdits) -> None:
        keys = [key for key in places if key not in contents.dropped]
        keys += [key for key in contents.fresh if key not in places]
        with target.open("xb") as out:
            out.write(memoryview(data)[:begin])
            out.writelines(emit_pickle(contents.recipe))
            names = IRNode(b"]", [], [Mutation(ord("e"), [text_node(key) for key in keys])] if keys else [])
            out.write(_PROTOCOL + emitted(names))
            for key in keys:
                out.writelines(_storage(data, places, contents, key))

    sizes = {key: nbytes - COUNT_BYTES for key, (_, nbytes) in places.items()}
    return CheckpointContainer(recipe, str, sizes, write)


def _storage(
    data: mmap.mmap, places: dict[str, tuple[int, int]], contents: CheckpointEdits, key: str
) -> Iterator[Bytes]:
    if key in contents.fresh:
        fresh = contents.fresh[key]
        yield (fresh.nbytes // fresh.itemsize).to_bytes(COUNT_BYTES, "little")
        yield from fresh.raw()
        return
    at, nbytes = places[key]
    for begin in range(at, at + nbytes, _PIECE_BYTES):
        yield data[begin : min(begin + _PIECE_BYTES, at + nbytes)]


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


def open_zip_container(model: ModelFile, archive: Archive) -> CheckpointContainer:
    """Return the program and the storages of a zip."""
    folder = top_folder(archive)
    entry = archive.entries[f"{folder}data.pkl"]
    if entry.is_stored:
        with model.path.open("rb") as file:
            # Stays open as long as something of the program lies in it.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = entry.extent.offset
        recipe = parse_ir(data, model.path, start=begin, end=begin + entry.extent.nbytes)
    else:
        recipe = parse_ir(archive.read(entry.name, MAX_PICKLE_BYTES), model.path)

    def name_of(key: str) -> str:
        name = f"{folder}data/{key}"
        return name if name in archive.entries or f"{folder}{key}" not in archive.entries else f"{folder}{key}"

    def write(target: Path, contents: CheckpointEdits) -> None:
        _write(archive, folder, target, contents)

    sizes = {name.removeprefix(f"{folder}data/"): entry.extent.nbytes for name, entry in archive.entries.items()}
    sizes.update({name.removeprefix(folder): entry.extent.nbytes for name, entry in archive.entries.items()})
    return CheckpointContainer(recipe, name_of, sizes, write)


def _write(archive: Archive, folder: str, target: Path, contents: CheckpointEdits) -> None:
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
    pickle = b"".join(emit_pickle(contents.recipe))
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


def strip(model: ModelFile, wish: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy whose example inputs are empty, as PyTorch saves a program that has none; return what went."""
    if wish.to_half:
        raise InputError(
            f"{model.path} is an exported program, whose graph says of which type its weights are",
            hint="leave out --half, or export a model in half precision",
        )
    if StripPart.MASKS in wish.parts and any(tensor.role is Role.MASK for tensor in model.tensors):
        raise InputError(
            f"{model.path} is an exported program, whose graph multiplies its weights by masks",
            hint="strip the rest with --only examples, or strip the model before it is exported",
        )
    archive = open_archive(model.path)
    found = examples(archive) if StripPart.EXAMPLES in wish.parts else ()
    if not found:
        patch_files(model, targets, ())
        return ()
    rewrite_zip(archive, targets[model.path], {entry.name: (0, ()) for entry in found})
    return tuple(
        RemovedItem(entry.name.rpartition("data/")[2], StripPart.EXAMPLES, entry.extent.nbytes) for entry in found
    )
