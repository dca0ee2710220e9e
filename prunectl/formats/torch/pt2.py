"""The zip of torch.export: weights as plain entries, and a JSON that says how to see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import state_dict, zips
from prunectl.formats.base import About, ModelFile, Role, Storage, Tensor
from prunectl.formats.json_text import parse_object
from prunectl.formats.state_dict import Use
from prunectl.formats.torch import pt2_graph, pt2_nested, pt2_uses, views, zip_file
from prunectl.formats.torch.dtypes import DTYPES, SCALAR_TYPES
from prunectl.formats.torch.values import shown
from prunectl.formats.torch.views import Stored
from prunectl.formats.zips import Archive, Entry

MAX_JSON_BYTES = 12 << 20
STRIDED = 7
"""The number of the dense layout."""
_CONFIGS = (("data/weights/", "_weights_config.json"), ("data/constants/", "_constants_config.json"))


def open_model(path: Path) -> ModelFile:
    """Open a zip that torch.export.save wrote."""
    archive = zips.open_archive(path)
    folder = _top_folder(archive)
    models = [name for name in archive.entries if name.startswith(f"{folder}models/") and name.endswith(".json")]
    is_old = not models and pt2_nested.PROGRAM in archive.entries
    models = [pt2_nested.PROGRAM] if is_old else models
    if not models:
        raise InputError(f"{path} is damaged: it has no model in its folder models")
    tensors: list[Tensor] = []
    uses: dict[str, Use | None] = {}
    about = About(producer="pytorch")
    for entry in models:
        name = PurePosixPath(entry).stem
        graph = _graph(archive, entry)
        about = replace(about, producer=pt2_graph.producer(graph) or about.producer)
        prefix = f"{name}." if len(models) > 1 else ""
        found = list(
            pt2_nested.tensors(archive, graph)
            if is_old
            else (one for part, end in _CONFIGS for one in _tensors(archive, folder, part, f"{name}{end}", graph))
        )
        kinds = pt2_graph.kinds(graph)
        uses |= {prefix + tensor: use for tensor, use in pt2_uses.uses(graph, found).items()}
        tensors += [replace(tensor, name=prefix + tensor.name, kind=kinds.get(tensor.name, "")) for tensor in found]
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    views.refuse_rereading(path, tensors)
    described = state_dict.describe(tensors, uses=uses)
    code = [entry for entry in archive.entries.values() if entry.name.startswith(f"{folder}data/aotinductor/")]
    return ModelFile(
        path=path,
        format="torch-export",
        tensors=described,
        about=replace(
            about,
            wrappers=state_dict.wrappers(described),
            code=("compiled code",) if code else (),
            code_bytes=sum(entry.extent.nbytes for entry in code),
            example_bytes=sum(entry.extent.nbytes for entry in examples(archive)),
            notes=_notes(archive, folder),
            is_compressed=any(tensor.storage.extent is None for tensor in described),
        ),
        files=(path,),
        decode=zip_file.decoder(archive),
    )


def examples(archive: Archive) -> tuple[Entry, ...]:
    """Return the inputs that the programs were exported with, where they are not empty."""
    folder = f"{_top_folder(archive)}data/sample_inputs/"
    starts = (folder, pt2_nested.EXAMPLES)
    return tuple(entry for name, entry in archive.entries.items() if name.startswith(starts) and entry.nbytes)


def _top_folder(archive: Archive) -> str:
    formats = [name for name in archive.entries if name == "archive_format" or name.endswith("/archive_format")]
    return min(formats, key=lambda name: (name.count("/"), name), default="").removesuffix("archive_format")


def _graph(archive: Archive, entry: str) -> dict[str, Any]:
    """Return the graph of a model; none when it is too big to be read for its facts."""
    if archive.entries[entry].nbytes > MAX_JSON_BYTES:
        return {}
    return parse_object(archive.read(entry, MAX_JSON_BYTES), archive.path, f"its entry {entry}")


def _tensors(archive: Archive, folder: str, part: str, config: str, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that one configuration lists."""
    name = f"{folder}{part}{config}"
    if name not in archive.entries:
        # PyTorch 2.8 put all weights into one entry.
        old = f"{folder}{part}{config.removesuffix('_weights_config.json').removesuffix('_constants_config.json')}.pt"
        if old in archive.entries:
            yield from pt2_nested.inside(archive, old, graph)
            return
        raise InputError(f"{archive.path} is damaged: it has no entry {name}")
    is_big = archive.entries.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder", 64) == b"big"
    listed = parse_object(archive.read(name, MAX_JSON_BYTES), archive.path, f"its entry {name}").get("config")
    if not isinstance(listed, dict):
        raise InputError(f"{archive.path} is damaged: its entry {name} lists no tensors")
    for tensor, facts in listed.items():
        if isinstance(facts, dict) and facts.get("tensor_meta") is not None and facts.get("use_pickle") is not True:
            yield _tensor(archive, tensor, f"{folder}{part}{facts.get('path_name')}", facts, big_endian=bool(is_big))


def _tensor(archive: Archive, name: str, entry: str, facts: dict[str, Any], *, big_endian: bool) -> Tensor:
    path, meta = archive.path, facts["tensor_meta"]
    try:
        shape, strides = _integers(meta["sizes"]), _integers(meta["strides"])
        start, code, layout = meta["storage_offset"]["as_int"], meta["dtype"], meta["layout"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: it does not say how {shown(name)} lies in its entry") from error
    if type(code) is not int or code not in SCALAR_TYPES or layout != STRIDED:
        raise InputError(f"{path} holds {shown(name)} in a type or a layout that prunectl does not read")
    if entry not in archive.entries:
        raise InputError(f"{path} is damaged: it has no entry {shown(entry)}")
    dtype = DTYPES[SCALAR_TYPES[code]]
    found = archive.entries[entry]
    count, rest = divmod(found.nbytes, dtype.itemsize)
    if rest:
        raise InputError(f"{path} is damaged: {found.nbytes} bytes are not a whole number of elements of {shown(name)}")
    view = views.see(path, name, Stored(entry, dtype, count), dtype, (start, shape, strides))
    extent = found.extent if found.is_stored else None
    storage = Storage(entry, found.nbytes, extent, found.extent.nbytes, big_endian)
    role = Role.OTHER if facts.get("is_param") is True else Role.STATE
    return Tensor(name, "", view.shape, dtype, role, storage, start=view.start, strides=view.strides)


def _integers(values: Any) -> tuple[Any, ...]:
    return tuple(value["as_int"] for value in values)


def _notes(archive: Archive, folder: str) -> tuple[str, ...]:
    pickled = [name for name in archive.entries if name.startswith(f"{folder}data/constants/custom_obj_")]
    return ("It also holds objects that PyTorch would unpickle on loading.",) if pickled else ()
