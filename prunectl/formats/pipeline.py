"""Pipelines of diffusers: a `model_index.json`, and a folder for each part, of which some hold weights; one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, abbreviated
from prunectl.formats import registry
from prunectl.formats.base import ModelFile, ModelInfo, Tensor
from prunectl.formats.folder import Companions, companions, files_in, real_file
from prunectl.formats.safe_json import read_object

INDEX = "model_index.json"


def open_pipeline(path: Path) -> ModelFile:
    """Open the parts of a pipeline as one model, its tensors under the names of their parts."""
    index = real_file(path, INDEX)
    if index is None:
        raise InputError(f"{path} is refused: its {INDEX} is a link that leads out of it")
    parts = [part for name in read_object(index, "it") if (part := _part(path, name)) is not None]
    if not parts:
        raise InputError(f"{path} is a pipeline of diffusers without weights in safetensors")
    beside = [companions(part) for part in parts]
    # By the names of the parts: the same is said of a copy of the folder elsewhere.
    named = [Path(part.path.parent.name) for part in parts]
    notes = [note for found, name in zip(beside, named, strict=True) for note in found.notes(name, _COPIED)]
    tensors = tuple(tensor for part in parts for tensor in _named(part))
    weights = [file for part in parts for file in part.files]
    files = dict.fromkeys((path / INDEX, *weights, *(path / name for name in _copied(path))))
    about = ModelInfo(
        producer=f"pipeline of {', '.join(part.path.parent.name for part in parts)}",
        wrappers=tuple(wrapper for part in parts for wrapper in part.about.wrappers),
        notes=(*notes, *(note for part in parts for note in part.about.notes)),
    )
    return ModelFile(path, "diffusers", tensors, about, tuple(files))


_COPIED = "the same weights in another form, copied as they are"


def _part(path: Path, name: Any) -> ModelFile | None:
    """The weights of a part; None for one without, such as a scheduler."""
    if not isinstance(name, str) or name.startswith(("_", ".")) or "/" in name or "\\" in name:
        return None
    folder = path / name
    if folder.is_symlink() or not folder.is_dir() or registry.resolve(folder) == folder:
        return None
    model = registry.open_model(folder)
    if any(tensor.storage.extent is None or tensor.storage.extent.path.suffix == ".bin" for tensor in model.tensors):
        raise InputError(
            f"{folder} has its weights in {model.path.name}, but a pipeline is pruned as a whole in safetensors alone",
            hint=f"prunectl export {abbreviated(str(folder))} -o OUT makes them",
        )
    return model


def _named(part: ModelFile) -> Iterator[Tensor]:
    name = part.path.parent.name
    for tensor in part.tensors:
        storage = replace(tensor.storage, key=f"{name}/{tensor.storage.key}")
        yield replace(tensor, name=f"{name}.{tensor.name}", layer=f"{name}.{tensor.layer}", storage=storage)


def _copied(path: Path) -> tuple[Path, ...]:
    """Everything that lies in the folder of a pipeline, but for links that lead out of it."""
    found: Companions = files_in(path)
    return found.copied
