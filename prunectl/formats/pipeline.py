"""Pipelines of diffusers as one model: a `model_index.json`, and a folder for each part, some of which hold weights.

A training checkpoint of a pipeline has no index, and additional folders with averaged weights (EMA).
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, abbreviated
from prunectl.formats import registry, safetensors
from prunectl.formats.base import WEIGHTS, ModelFile, ModelInfo, RemovedItem, Role, StripOptions, StripPart, Tensor
from prunectl.formats.detect import AVERAGED, PIPELINE_INDEX, parts_without_index
from prunectl.formats.extents import file_bytes
from prunectl.formats.folder import MASKS_IN_SHARDS, OTHER_WEIGHTS, Companions, files_in, real_file, training_part
from prunectl.formats.patch import HALVED, patch_files
from prunectl.formats.safe_json import read_object


def open_pipeline(path: Path) -> ModelFile:
    """Open a pipeline as one model; the names of its tensors begin with those of their parts."""
    index = real_file(path, PIPELINE_INDEX)
    if index is None and (path / PIPELINE_INDEX).is_symlink():
        raise InputError(f"{path} is refused: its {PIPELINE_INDEX} is a link that leads out of it")
    companions = files_in(path)
    inside: dict[str, list[str]] = {}
    for file in (*companions.copied, *companions.links):
        inside.setdefault(file.parent.as_posix(), []).append(file.name)
    # An index does not list the folders of averages.
    listed = parts_without_index(path) if index is None else read_object(index, "it")
    names = dict.fromkeys(each for name in listed for each in (name, f"{name}{AVERAGED}"))
    parts = [part for name in names if (part := _part(path, name, inside.get(name, ()))) is not None]
    if not parts:
        raise InputError(f"{path} is a pipeline of diffusers without weights in safetensors")
    tensors = tuple(tensor for part in parts for tensor in _prefixed(part))
    weights = dict.fromkeys(file for part in parts for file in part.files)
    first = () if index is None else (path / PIPELINE_INDEX,)
    files = dict.fromkeys((*first, *weights, *(path / name for name in companions.copied)))
    links = Companions((), (), companions.links).notes(path)
    notes = (*(note for part in parts for note in _note_others(part, companions, weights)), *links)
    about = ModelInfo(
        producer=f"pipeline of {', '.join(part.path.parent.name for part in parts)}",
        wrappers=tuple(
            replace(wrapper, layer=f"{part.path.parent.name}.{wrapper.layer}")
            for part in parts
            for wrapper in part.about.wrappers
        ),
        notes=(*notes, *(note for part in parts for note in part.about.notes)),
    )
    states = {file: state for part in parts for file, state in part.states.items()}
    return ModelFile(path, "diffusers", tensors, about, tuple(files), has_neighbours=True, states=states)


_COPIED = "the same weights in another form, copied as they are"
_SAFETENSORS = "but a pipeline is pruned as a whole in safetensors alone"
_PICKLES = ("pytorch_model.bin", "adapter_model.bin")
_OTHER_FRAMEWORKS = re.compile(r".*\.onnx([._]data)?|openvino_model\..*|saved_model\.pb")
"""Copies of the weights for other frameworks, by their path in the folder of a part."""


def _is_weights(name: str) -> bool:
    """Whether a file of a part is a copy of its weights in another format or precision, or an index of such files."""
    return OTHER_WEIGHTS.fullmatch(name) is not None or _OTHER_FRAMEWORKS.fullmatch(name) is not None


def _part(path: Path, name: Any, files: Iterable[str]) -> ModelFile | None:
    """The model of a part; None for a part without weights, such as a scheduler."""
    if not isinstance(name, str) or name.startswith(("_", ".")) or "/" in name or "\\" in name:
        return None
    folder = path / name
    # os.path raises no errors for impossible names.
    if os.path.islink(folder) or not os.path.isdir(folder):
        return None
    real = registry.resolve(folder)
    if real.name.startswith(_PICKLES):
        # By its name, because the content of a file at a URL has not been downloaded.
        raise _in_another_form(folder, real.name)
    if real == folder:
        others = [file for file in files if _is_weights(file)]
        if not others:
            return None
        # If the part were skipped, its dense weights would be copied into an output that is called pruned.
        shown = abbreviated(next(filter(_OTHER_FRAMEWORKS.fullmatch, others), others[0]))
        raise InputError(
            f"{folder} has its weights in {shown}, {_SAFETENSORS}",
            hint="rename them as those without a variant: model.safetensors, diffusion_pytorch_model.safetensors",
        )
    model = registry.open_model(folder)
    # By their content, because a file named .safetensors may be a pickle.
    for file in model.files:
        row = registry.recognise(file)
        if row.name not in {"safetensors", "shards"}:
            raise _in_another_form(folder, f"{abbreviated(file.name)} ({row.title})")
    return model


def _in_another_form(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder} has its weights in {what}, {_SAFETENSORS}",
        hint=f"prunectl export {folder} -o OUT makes them",
    )


def _note_others(part: ModelFile, companions: Companions, weights: Container[Path]) -> tuple[str, ...]:
    # With the part's name instead of its path, so that a copy of the folder gets the same note.
    folder = part.path.parent
    others = (
        folder / path.name
        for path in companions.copied
        if path.parent.as_posix() == folder.name and _is_weights(path.name)
    )
    names = tuple(Path(path.name) for path in others if path not in weights)
    return Companions((), names, ()).notes(Path(folder.name), _COPIED)


def _prefixed(part: ModelFile) -> Iterator[Tensor]:
    name = part.path.parent.name
    for tensor in part.tensors:
        storage = replace(tensor.storage, key=f"{name}/{tensor.storage.key}")
        yield replace(tensor, name=f"{name}.{tensor.name}", layer=f"{name}.{tensor.layer}", storage=storage)


def strip(model: ModelFile, options: StripOptions, targets: Mapping[Path, Path]) -> tuple[RemovedItem, ...]:
    """Copy the folder without the parts to strip, and with the chosen copy of weights and their average.

    A part with its weights in one file is stripped as that file alone would be.
    """
    kept, removed = split_files(model, options)
    whole = _whole_files(model, options, kept)
    names = {file: file.relative_to(model.path) for file in targets}
    root = next(target.parents[len(names[file].parts) - 1] for file, target in targets.items())
    patch_files(model, {file: root / name for file, name in kept.items() if file not in whole}, ())
    # Averages inside the file of a part are kept: to remove them, strip that part alone, where a copy can be chosen.
    inside = replace(options, copies=None, parts=options.parts - {StripPart.TRAINING})
    for file in whole:
        items = safetensors.strip(safetensors.open_model(file), inside, {file: root / kept[file]})
        removed += tuple(replace(item, name=f"{names[file].parts[0]}.{item.name}") for item in items)
    emptied = {parent for name in names.values() for parent in name.parents}
    emptied -= {parent for name in kept.values() for parent in name.parents}
    for folder in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        (root / folder).rmdir()
    return removed


def parts_in_one_file(model: ModelFile) -> Iterator[Path]:
    """Yield the file of each part whose weights are in a single file."""
    return (file for file in _by_file(model) if registry.resolve(file.parent) == file)


def _whole_files(model: ModelFile, options: StripOptions, kept: Container[Path]) -> list[Path]:
    """The kept files with all weights of a part, from which strip can remove tensors, or store floats in 16 bits."""
    files = [file for file in parts_in_one_file(model) if file in kept]
    for file, tensors in _by_file(model).items():
        if (
            file in kept
            and file not in files
            and any(tensor.role not in WEIGHTS or (options.to_half and tensor.dtype in HALVED) for tensor in tensors)
        ):
            raise _in_shards(model, file.parent)
    return files


def _in_shards(model: ModelFile, part: Path) -> InputError:
    files = _by_file(model)
    has_masks = any(tensor.role is Role.MASK for file in files if file.parent == part for tensor in files[file])
    hint = f"make one file of them: prunectl export {part} -o OUT --shard-size 1TB"
    if has_masks:
        # Export refuses masks as well.
        hint = MASKS_IN_SHARDS
    return InputError(
        f"{part} is in shards, in which strip can neither store 16-bit floats nor remove single tensors", hint=hint
    )


def _by_file(model: ModelFile) -> dict[Path, list[Tensor]]:
    files: dict[Path, list[Tensor]] = {}
    for tensor in model.tensors:
        if tensor.storage.extent is not None:
            files.setdefault(tensor.storage.extent.path, []).append(tensor)
    return files


def split_files(model: ModelFile, options: StripOptions) -> tuple[dict[Path, Path], tuple[RemovedItem, ...]]:
    """The files that strip keeps, each with its name in the output, and the files that it removes."""
    stored = _by_file(model)
    averages = () if options.copies is None else (options.copies.other, *options.copies.more)
    has_average = options.copies is not None and bool(options.copies.sources)
    replaced = {average.removesuffix(AVERAGED) for average in averages if has_average}
    sources: dict[Path, Path] = {}
    removed: list[RemovedItem] = []
    for file in model.files:
        name = file.relative_to(model.path)
        home, inside = name.parts[0], Path(*name.parts[1:])
        is_weights = file in stored or _is_weights(inside.as_posix())
        part = training_part(name)
        if part not in options.parts:
            part = StripPart.TRAINING if home in averages or (home in replaced and is_weights) else None
        if home in averages and has_average and is_weights:
            name, part = Path(home.removesuffix(AVERAGED)) / inside, None
        if part is not None:
            removed.append(RemovedItem(str(name), part, file_bytes(file)))
        elif name in sources:
            first, second = sorted((sources[name], file))
            raise InputError(
                f"{abbreviated(str(second))} would take the place of {abbreviated(str(first))}",
                hint="an index names it as a file of weights: correct the index",
            )
        else:
            sources[name] = file
    return {file: name for name, file in sources.items()}, tuple(removed)
