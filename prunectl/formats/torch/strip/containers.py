"""The file of PyTorch 0.2 to 1.5, written again around a changed program."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipInfo

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.budgets import MAX_ALIGNMENT, MAX_PICKLE_BYTES
from prunectl.formats.extents import BLOCK_BYTES
from prunectl.formats.patch import patch_files
from prunectl.formats.torch import views
from prunectl.formats.torch.exported import examples
from prunectl.formats.torch.legacy import COUNT_BYTES
from prunectl.formats.torch.model import read_marker, top_folder
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
from prunectl.formats.zip_read import Archive, open_archive
from prunectl.formats.zip_write import Content, rewrite_zip

_PROTOCOL = b"\x80\x02"


def open_legacy_container(model: ModelFile) -> CheckpointContainer:
    """The program and the storages of a file."""
    path = model.path
    with path.open("rb") as file:
        # Stays open as long as something of the program lies in it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 0
    for _ in range(3):
        begin = parse_ir(data, path, start=begin).end
    ir = parse_ir(data, path, start=begin)
    key_list = parse_ir(data, path, start=ir.end)
    itemsizes = {
        ref.key: views.parse_persistent_id(path, value(ref.id)).dtype.itemsize for ref in storage_refs(ir.root)
    }
    runs: dict[str, tuple[int, int]] = {}
    offset = key_list.end
    for node in items(key_list.root):
        key = text(node)
        key = str(value(node)) if key is None else key
        if key not in itemsizes:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        nbytes = COUNT_BYTES + int.from_bytes(data[offset : offset + COUNT_BYTES], "little") * itemsizes[key]
        runs[key] = offset, nbytes
        offset += nbytes

    def write(target: Path, edits: CheckpointEdits) -> None:
        keys = [key for key in runs if key not in edits.dropped]
        keys += [key for key in edits.new_storages if key not in runs]
        with target.open("xb") as out:
            out.write(memoryview(data)[:begin])
            out.writelines(emit_pickle(edits.ir))
            names = IRNode(b"]", [], [Mutation(ord("e"), [text_node(key) for key in keys])] if keys else [])
            out.write(_PROTOCOL + emitted(names))
            for key in keys:
                out.writelines(_storage(data, runs, edits, key))

    sizes = {key: nbytes - COUNT_BYTES for key, (_, nbytes) in runs.items()}
    return CheckpointContainer(ir, str, sizes, write)


def _storage(data: mmap.mmap, runs: dict[str, tuple[int, int]], edits: CheckpointEdits, key: str) -> Iterator[Bytes]:
    if key in edits.new_storages:
        new = edits.new_storages[key]
        yield (new.nbytes // new.itemsize).to_bytes(COUNT_BYTES, "little")
        yield from new.raw()
        return
    offset, nbytes = runs[key]
    for begin in range(offset, offset + nbytes, BLOCK_BYTES):
        yield data[begin : min(begin + BLOCK_BYTES, offset + nbytes)]


ALIGNMENT = 64


def is_script(archive: Archive) -> bool:
    """Whether there is code beside the weights, which knows their types."""
    folder = top_folder(archive)
    return any(name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in archive.entries)


def open_zip_container(model: ModelFile, archive: Archive) -> CheckpointContainer:
    """The program and the storages of a zip."""
    folder = top_folder(archive)
    entry = archive.entries[f"{folder}data.pkl"]
    if entry.is_stored:
        with model.path.open("rb") as file:
            # Stays open as long as something of the program lies in it.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = entry.extent.offset
        ir = parse_ir(data, model.path, start=begin, end=begin + entry.extent.nbytes)
    else:
        ir = parse_ir(archive.read(entry.name, MAX_PICKLE_BYTES), model.path)

    def name_of(key: str) -> str:
        name = f"{folder}data/{key}"
        return name if name in archive.entries or f"{folder}{key}" not in archive.entries else f"{folder}{key}"

    def write(target: Path, edits: CheckpointEdits) -> None:
        _write(archive, folder, target, edits)

    sizes = {name.removeprefix(f"{folder}data/"): entry.extent.nbytes for name, entry in archive.entries.items()}
    sizes.update({name.removeprefix(folder): entry.extent.nbytes for name, entry in archive.entries.items()})
    return CheckpointContainer(ir, name_of, sizes, write)


def _write(archive: Archive, folder: str, target: Path, edits: CheckpointEdits) -> None:
    written = {f"{folder}data/{key}": storage for key, storage in edits.new_storages.items()}
    written.update({f"{folder}{key}": storage for key, storage in edits.new_storages.items()})
    data = f"{folder}data/"
    dropped = {name for key in edits.dropped for name in (f"{data}{key}", f"{folder}{key}")}
    # It promises that every storage lies where PyTorch's own writer would have put it.
    dropped.add(f"{folder}.format_version")
    names = [name for name in archive.entries if name not in dropped]
    last = max((index for index, name in enumerate(names) if name.startswith(data)), default=len(names) - 1)
    names[last + 1 : last + 1] = [
        f"{data}{key}"
        for key in edits.new_storages
        if f"{data}{key}" not in archive.entries and f"{folder}{key}" not in archive.entries
    ]
    is_deflated = not all(entry.is_stored for name, entry in archive.entries.items() if name.startswith(data))
    pickle = b"".join(emit_pickle(edits.ir))
    changed: dict[str, Content] = {name: (written[name].nbytes, written[name].raw()) for name in written}
    changed[f"{folder}data.pkl"] = len(pickle), (pickle,)

    def revise(info: ZipInfo) -> None:
        if info.filename not in archive.entries and is_deflated:
            info.compress_type = ZIP_DEFLATED

    rewrite_zip(archive, target, changed, names=names, revise=revise, alignment=_alignment(archive, folder))


def _alignment(archive: Archive, folder: str) -> int:
    marker = read_marker(archive, f"{folder}.storage_alignment")
    return int(marker) if marker.isdigit() and 0 < int(marker) <= MAX_ALIGNMENT else ALIGNMENT


def strip(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy whose example inputs are empty, as PyTorch saves a program that has none; return what went."""
    if options.to_half:
        raise InputError(
            f"{model.path} is an exported program, whose graph says of which type its weights are",
            hint="leave out --half, or export a model in half precision",
        )
    if StripPart.MASKS in options.parts and any(tensor.role is Role.MASK for tensor in model.tensors):
        raise InputError(
            f"{model.path} is an exported program, whose graph multiplies its weights by masks",
            hint="strip the rest with --only examples, or strip the model before it is exported",
        )
    archive = open_archive(model.path)
    entries = examples(archive) if StripPart.EXAMPLES in options.parts else ()
    if not entries:
        patch_files(model, targets, ())
        return ()
    rewrite_zip(archive, targets[model.path], {entry.name: (0, ()) for entry in entries})
    return tuple(
        RemovedItem(entry.name.rpartition("data/")[2], StripPart.EXAMPLES, entry.extent.nbytes) for entry in entries
    )
