"""Model folders, such as those of Hugging Face: which files beside the weights are copied with them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import SCRATCH, InputError, abbreviated, reading
from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, StripPart
from prunectl.formats.extents import REMOTE, file_chunks
from prunectl.formats.patch import copy_range
from prunectl.units import listed

LEDGER = ".prunectl-parts"
"""The folder in which `prune --part` records its progress, inside an unfinished output folder."""
_IGNORED = frozenset({".git", ".cache", "__pycache__", LEDGER})
OTHER_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|diffusion_pytorch_model|tf_model|flax_model|rust_model)\b.*"
    r"\.(safetensors|bin|h5|msgpack|ot)(\.index(\.[\w-]+)?\.json)?"
)
"""Copies of the weights in another format or precision, which are not copied: they would contradict the output."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".onnx_data", ".h5", ".msgpack", ".gguf"}
"""Suffixes of weights in subfolders, such as another module of sentence-transformers, or an export of this model."""
MASKS_IN_SHARDS = (
    "strip removes masks only from a single file; in PyTorch, call torch.nn.utils.prune.remove before saving"
)
"""The hint for sharded weights with masks, which neither strip nor export can remove."""
_TRAINING_STATE = {
    StripPart.OPTIMIZER: re.compile(r"optimizer(_\d+)?\.(pt|bin)|(optimizer_\d+|global_step\d+)/.*"),
    StripPart.TRAINING: re.compile(
        r"(scheduler|scaler|sampler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|"
        r"trainer_state\.json|training_args\.bin|latest|zero_to_fp32\.py|meta\.pt"
    ),
}
"""Files with which the Trainer of Hugging Face, Accelerate, Lightning and DeepSpeed resume training."""
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
"""The cache of Hugging Face keeps the files of a model in `blobs`, and links to them in `snapshots`."""


@dataclass(frozen=True, slots=True)
class Companions:
    """The files beside the weights in the folder of a model, by paths relative to the folder."""

    copied: tuple[Path, ...]
    """Files that are copied into the output."""
    other_weights: tuple[Path, ...]
    """Further copies of the weights, which are not copied into the output."""
    links: tuple[Path, ...]
    """Links that lead out of the folder; not copied, because their targets may be private."""

    def notes(self, folder: Path, others: str = "the same weights, unpruned, and not copied") -> tuple[str, ...]:
        """Notes for the user on the files that were not copied, or were copied without being pruned."""
        weights = f"{listed(self.other_weights, _SHOWN)} in {folder}: {others}."
        links = f"{listed(self.links, _SHOWN)} in {folder}: not copied, because links may not lead out of the folder."
        nested = [path for path in self.copied if len(path.parts) > 1 and path.suffix in _WEIGHT_SUFFIXES]
        nested = [path for path in nested if not any(map(training_part, (path, Path(path.name))))]
        inside = f"{listed(nested, _SHOWN)} in {folder}: copied unchanged; to prune one, give its path."
        notes = (weights if self.other_weights else "", links if self.links else "", inside if nested else "")
        return tuple(filter(None, notes))


def companions(model: ModelFile) -> Companions:
    """The files beside the weights of a model that was opened by its folder; none for a file."""
    if model.folder is None:
        return Companions((), (), ())
    beside = files_in(model.folder, frozenset(file.relative_to(model.folder) for file in model.files))
    others = tuple(path for path in beside.copied if len(path.parts) == 1 and OTHER_WEIGHTS.fullmatch(path.name))
    copied = tuple(path for path in beside.copied if path not in set(others))
    links = tuple(path for path in beside.links if len(path.parts) > 1 or not OTHER_WEIGHTS.fullmatch(path.name))
    other_links = tuple(path for path in beside.links if path not in set(links))
    return Companions(copied, tuple(sorted((*others, *other_links))), links)


def files_in(folder: Path, own: Container[Path] = ()) -> Companions:
    """All files of a folder that may be copied, and links that may not, except for those in `own`."""
    copied: list[Path] = []
    links: list[Path] = []
    for path in _walk(folder, folder):
        if path in own:
            continue
        (copied if real_file(folder, path) is not None else links).append(path)
        if len(copied) + len(links) > budgets.MAX_FILES:
            raise InputError(f"{folder} is refused: it has more than {budgets.MAX_FILES} files")
    return Companions(tuple(copied), (), tuple(links))


def training_state(model: ModelFile) -> dict[Path, StripPart]:
    """Files beside the weights that are only needed to resume training, with the part that each belongs to."""
    parts = {path: training_part(path) for path in companions(model).copied}
    return {path: part for path, part in parts.items() if part is not None}


def training_part(path: Path) -> StripPart | None:
    """The part of the training state that a file belongs to, by its relative path; None for a file of the model."""
    return next((part for part, names in _TRAINING_STATE.items() if names.fullmatch(path.as_posix())), None)


def is_training_state(path: Path) -> bool:
    """Whether a file, or a folder with all its content, is training state, judged by its name."""
    return training_part(Path(path.name, "_") if path.is_dir() else Path(path.name)) is not None


def copy_companions(model: ModelFile, target: Path, left_out: Container[Path] = ()) -> None:
    """Copy the files beside the weights of a model into a folder, except for those in `left_out`."""
    for path in companions(model).copied:
        if path in left_out:
            continue
        if model.folder is not None and (source := real_file(model.folder, path)) is not None:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target / path):
                raise InputError(
                    f"{abbreviated(str(path))} of {model.folder} would take the place of weights that were written",
                    hint="no index names that file: remove it, or give it another name",
                )
            _copy(source, target / path)


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    """Yield files and links in the order of their names; sockets and the like are skipped."""
    with reading(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name in _IGNORED or SCRATCH.fullmatch(entry.name):
            continue
        if entry.is_symlink() or entry.is_file():
            yield Path(entry.path).relative_to(root)
        elif entry.is_dir():
            yield from _walk(Path(entry.path), root)


def real_file(folder: Path, path: Path | str) -> Path | None:
    """The resolved path of a file in a folder; None for a link that leads out of the folder, or to no file."""
    real, root = (folder / path).resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == _SNAPSHOTS:
        allowed.append(root.parent.parent / _BLOBS)
    return real if real.is_file() and any(real.is_relative_to(parent) for parent in allowed) else None


def _copy(source: Path, target: Path) -> None:
    if source in REMOTE:
        with target.open("xb") as writer:
            writer.writelines(file_chunks(source))
        return
    with reading(source):
        # If a link or a pipe has replaced the file meanwhile, do not follow it or wait for it.
        old = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(old, "rb", closefd=True) as reader, target.open("xb") as writer:
        facts = os.fstat(reader.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{source} is not a file")
        copy_range(source, reader.fileno(), writer.fileno(), 0, facts.st_size)


_SHOWN = 3
