"""The file of PyTorch 0.2 to 1.5, written again around a changed program."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.torch import views
from prunectl.formats.torch.emit import emit, emitted
from prunectl.formats.torch.entries import items, text, text_node, value
from prunectl.formats.torch.legacy import COUNT_BYTES
from prunectl.formats.torch.recipe import Bytes, Deed, Node
from prunectl.formats.torch.record import record
from prunectl.formats.torch.storages import Container, Contents, asks

_PIECE_BYTES = 1 << 20
_PROTOCOL = b"\x80\x02"


def open_container(model: ModelFile) -> Container:
    """Return the program and the storages of a file."""
    path = model.path
    with path.open("rb") as file:
        # Stays open as long as something of the program lies in it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 0
    for _ in range(3):
        begin = record(data, path, start=begin).end
    recipe = record(data, path, start=begin)
    listed = record(data, path, start=recipe.end)
    itemsizes = {ask.key: views.stored(path, value(ask.id)).dtype.itemsize for ask in asks(recipe.root)}
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

    def write(target: Path, contents: Contents) -> None:
        keys = [key for key in places if key not in contents.dropped]
        keys += [key for key in contents.fresh if key not in places]
        with target.open("xb") as out:
            out.write(memoryview(data)[:begin])
            out.writelines(emit(contents.recipe))
            names = Node(b"]", [], [Deed(ord("e"), [text_node(key) for key in keys])] if keys else [])
            out.write(_PROTOCOL + emitted(names))
            for key in keys:
                out.writelines(_storage(data, places, contents, key))

    sizes = {key: nbytes - COUNT_BYTES for key, (_, nbytes) in places.items()}
    return Container(recipe, str, sizes, write)


def _storage(data: mmap.mmap, places: dict[str, tuple[int, int]], contents: Contents, key: str) -> Iterator[Bytes]:
    if key in contents.fresh:
        fresh = contents.fresh[key]
        yield (fresh.nbytes // fresh.itemsize).to_bytes(COUNT_BYTES, "little")
        yield from fresh.raw()
        return
    at, nbytes = places[key]
    for begin in range(at, at + nbytes, _PIECE_BYTES):
        yield data[begin : min(begin + _PIECE_BYTES, at + nbytes)]
