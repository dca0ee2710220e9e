"""Open the zip format of PyTorch 1.6 and later (a pickle, and an entry per storage), and build models from pickles."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, UntrustedError
from prunectl.formats import budgets, extents, state_dict, zip_read
from prunectl.formats.base import Array, ModelFile, ModelInfo, NameAllocator, Role, Storage, Tensor
from prunectl.formats.budgets import MAX_SEARCHED
from prunectl.formats.extents import Extent
from prunectl.formats.state_dict import StateUse
from prunectl.formats.torch import tree, views
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, Persistent, PickleDict, describe_value
from prunectl.formats.torch.pickle.vm import PickleProgram, interpret
from prunectl.formats.torch.views import StorageInfo, View
from prunectl.formats.zip_read import Archive, ZipEntry

SCRIPT_CODE = "TorchScript code"
"""The entry of `ModelInfo.code` for TorchScript, whose code fixes the dtypes of its weights."""


def open_model(path: Path) -> ModelFile:
    """Open a zip that torch.save or torch.jit.save wrote."""
    archive = zip_read.open_archive(path)
    folder = top_folder(archive)
    code = [entry for name, entry in archive.entries.items() if name.startswith(f"{folder}code/")]
    is_script = bool(code) or f"{folder}constants.pkl" in archive.entries
    sources = [pickle_source(archive, folder, "data")]
    if f"{folder}constants.pkl" in archive.entries:
        # The code refers to them as CONSTANTS.c0 and so on; a frozen model keeps all of its weights there.
        sources.append(pickle_source(archive, folder, "constants", prefix="CONSTANTS.c"))
    about = ModelInfo(
        producer=_producer(archive, folder, "TorchScript" if is_script else "zip"),
        code=(SCRIPT_CODE,) if is_script else (),
        code_bytes=sum(entry.extent.nbytes for entry in code),
        is_compressed=any(not entry.is_stored for entry in archive.entries.values() if entry not in code),
    )
    if is_script:
        from prunectl.formats.torch import script  # noqa: PLC0415 - only TorchScript has code to read

        texts, is_whole = script.code(archive, folder)
        declared, uses = script.parameters(texts), script.uses(texts) if is_whole else None
        sources = [
            replace(source, program=_without_own_classes(source.program), parameters=declared, uses=uses)
            for source in sources
        ]
    return model_from_pickle(path, "torch", sources, about, decoder(archive))


def _without_own_classes(program: PickleProgram) -> PickleProgram:
    """The program without foreign calls of the classes that the TorchScript code in the file defines."""
    foreign_calls = tuple(call for call in program.foreign_calls if not call.partition(" ")[2].startswith("__torch__."))
    return replace(program, foreign_calls=foreign_calls)


def top_folder(archive: Archive) -> str:
    """The top folder of the archive, with its slash: `archive/`, named after the file, or empty if there is none."""
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

    return PickleSource(program_of(archive, entry), find, prefix=prefix, is_flat=entry.is_stored)


def storage_of(archive: Archive, name: str, info: StorageInfo, *, big_endian: bool) -> Storage:
    """The storage in an entry of the archive, refused unless it is as long as the pickle says."""
    entry = archive.entries[name]
    if entry.nbytes != info.nbytes:
        raise InputError(
            f"{archive.path} is damaged: its entry {name} has {entry.nbytes} bytes, but its pickle has {info.nbytes}"
        )
    extent = entry.extent if entry.is_stored else None
    return Storage(name, entry.nbytes, extent, entry.extent.nbytes, big_endian)


def decoder(archive: Archive) -> Callable[[Tensor], Array]:
    """A function that reads a tensor from a compressed entry."""

    def inflated(key: str) -> NDArray[np.uint8]:
        return archive.inflated(archive.entries[key])

    shared = lru_cache(maxsize=1)(inflated)

    def decode(tensor: Tensor) -> Array:
        # An entry that several tensors share is inflated once while they are read one after another.
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


def program_of(archive: Archive, entry: ZipEntry) -> PickleProgram:
    """Interpret a pickle in the archive."""
    subject = f"its entry {entry.name}"
    if not entry.is_stored:
        return interpret(archive.read(entry.name, budgets.MAX_PICKLE_BYTES), archive.path, subject)
    with archive.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = entry.extent.offset
        return interpret(data, archive.path, subject, start=begin, end=begin + entry.extent.nbytes)


def read_marker(archive: Archive, name: str) -> str:
    """The text of a small entry, such as the version; empty if there is no such entry."""
    if name not in archive.entries:
        return ""
    return describe_value(archive.read(name, budgets.MAX_VERSION_BYTES).decode("ascii", "replace").strip())


def _producer(archive: Archive, folder: str, kind: str) -> str:
    version = read_marker(archive, f"{folder}version") or read_marker(archive, f"{folder}.data/version")
    return f"pytorch ({kind} format {version})" if version else f"pytorch ({kind} format)"


MAX_FACTS = 20
MAX_VALUE_CHARACTERS = 60

_OPTIMIZERS: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = (
    ("NAdam", frozenset({"betas", "momentum_decay"}), frozenset()),
    ("Adam", frozenset({"betas", "eps", "amsgrad"}), frozenset()),
    ("Adamax", frozenset({"betas", "eps"}), frozenset({"amsgrad", "decoupled_weight_decay"})),
    ("RAdam", frozenset({"betas", "eps", "decoupled_weight_decay"}), frozenset({"amsgrad"})),
    ("SGD", frozenset({"momentum", "dampening"}), frozenset()),
    ("RMSprop", frozenset({"alpha", "eps", "centered"}), frozenset()),
    ("ASGD", frozenset({"lambd", "alpha", "t0"}), frozenset()),
    ("Rprop", frozenset({"etas", "step_sizes"}), frozenset()),
    ("Adadelta", frozenset({"rho", "eps"}), frozenset()),
    ("Adagrad", frozenset({"lr_decay", "initial_accumulator_value"}), frozenset()),
    ("LBFGS", frozenset({"max_iter", "history_size"}), frozenset()),
    ("Adafactor", frozenset({"beta2_decay", "d"}), frozenset()),
    ("Muon", frozenset({"momentum", "ns_steps"}), frozenset()),
)
"""Name, settings that its parameter groups have, settings that they lack; the first matching row counts."""


def optimizer(root: Any) -> str:
    """The name of the optimizer whose state the checkpoint holds."""
    if not isinstance(root, PickleDict):
        return _optimizer_name(root)
    candidates = [root, *(value for key, value in root.items[:MAX_SEARCHED] if _is_about_optimizer(key))]
    for candidate in candidates:
        items = candidate if isinstance(candidate, list | tuple) else [candidate]
        for item in items[:8]:
            if name := _optimizer_name(item):
                return name
    return (
        "optimizer state"
        if len(candidates) > 1 and any(isinstance(c, PickleDict) and c.items for c in candidates[1:])
        else ""
    )


def _is_about_optimizer(key: Any) -> bool:
    return isinstance(key, str) and "optim" in key.lower()


def _optimizer_name(value: Any) -> str:
    if isinstance(value, OpaqueCall) and isinstance(value.function, Global) and value.path.startswith("torch.optim."):
        return value.function.name
    groups = (
        value.plain().get("param_groups") if isinstance(value, PickleDict) and len(value.items) < MAX_SEARCHED else None
    )
    group = groups[0] if isinstance(groups, list | tuple) and groups else None
    if not isinstance(group, PickleDict):
        return ""
    settings = group.plain()
    for name, present, absent in _OPTIMIZERS:
        if present <= settings.keys() and not absent & settings.keys():
            return "AdamW" if name == "Adam" and settings.get("decoupled_weight_decay") is True else name
    return "optimizer state"


def training(root: Any) -> tuple[str, ...]:
    """The numbers and short strings in a checkpoint, such as `epoch 12` or `best_acc 0.93`."""
    if not isinstance(root, PickleDict):
        return ()
    facts = [
        f"{_label(key)} {_format_value(value)}"
        for key, value in root.items[:MAX_SEARCHED]
        if isinstance(key, str) and _is_short(value)
    ]
    return tuple(facts[:MAX_FACTS])


def _label(key: str) -> str:
    return "pytorch-lightning" if key == "pytorch-lightning_version" else describe_value(key)


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= MAX_VALUE_CHARACTERS
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else describe_value(str(value))


def notes(root: Any) -> tuple[str, ...]:
    """Notes for the user on second, averaged copies of the weights in a checkpoint."""
    if not isinstance(root, PickleDict):
        return ()
    keys = [
        key
        for key, value in root.items[:MAX_SEARCHED]
        if isinstance(key, str)
        and key in state_dict.AVERAGES
        and isinstance(tree.inner_tensor(value), PickleDict | OpaqueCall)
    ]
    return tuple(
        f"The file holds a second copy of the weights under {key}, averaged over the training." for key in keys
    )


def sections(root: Any) -> frozenset[str]:
    """The keys of a checkpoint whose values are containers or objects, such as `state_dict`."""
    if not isinstance(root, PickleDict):
        return frozenset()
    return frozenset(
        key
        for key, value in root.items
        if isinstance(key, str)
        and (
            isinstance(value, PickleDict | list | tuple) or (isinstance(value, OpaqueCall) and value.state is not None)
        )
    )


MAX_FOREIGN_CALLS = 100
_VERBS = {"calls": "call", "class": "make an instance of", "imports": "import"}


@dataclass(frozen=True, slots=True)
class PickleSource:
    """An interpreted pickle, and where the container keeps its storages."""

    program: PickleProgram
    find: Callable[[StorageInfo], Storage]
    listed: Mapping[str, OpaqueCall] = field(default_factory=dict)
    """Tensors that the container itself lists, by their persistent ids."""
    prefix: str = ""
    """The prefix of the tensors' names."""
    parameters: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The trained attributes of each TorchScript class that declares them, by its dotted path."""
    uses: Mapping[tuple[str, str], StateUse] | None = None
    """The uses of tensors in TorchScript code, by class and attribute; None without code that was followed."""
    is_flat: bool = True
    """Whether the pickle is stored uncompressed, so that its offsets are offsets in the file."""


def storages_by_key(path: Path, located: Mapping[str, Storage]) -> Callable[[StorageInfo], Storage]:
    """A function that finds a storage by its key, refused unless it is as long as the pickle says."""

    def find(info: StorageInfo) -> Storage:
        storage = located.get(info.key)
        if storage is None or storage.nbytes != info.nbytes:
            raise InputError(f"{path} is damaged: it does not hold the whole storage {describe_value(info.key)}")
        return storage

    return find


def tensors(path: Path, source: PickleSource, uses: dict[str, StateUse | None]) -> tuple[list[Tensor], int]:
    """The tensors of a program, and how many NumPy arrays cannot be read; fills ``uses`` with each tensor's use."""
    rebuilt: list[Tensor] = []
    allocator = NameAllocator()
    storages: dict[StorageInfo, Storage] = {}
    missing = 0
    for leaf in tree.list_tensors(path, source.program.value, source.parameters):
        value = source.listed.get(str(leaf.value.id)) if isinstance(leaf.value, Persistent) else leaf.value
        if value is None:
            raise InputError(f"{path} is damaged: it does not hold {leaf.name}")
        # Two paths can spell one name, such as {"a.b": x, "a": {"b": y}}.
        name = allocator.unique(source.prefix + leaf.name)
        if views.is_array(value):
            flat = views.flat_array(value)
            if flat is None or not source.is_flat:
                missing += 1
                continue
            rebuilt.append(_of_numpy(path, name, flat))
        else:
            role = Role.STATE if leaf.is_buffer else Role.OTHER
            view = views.view_of(path, value, name)
            if view.storage not in storages:
                storages[view.storage] = source.find(view.storage)
            rebuilt.append(replace(_of_view(name, view, storages[view.storage]), kind=leaf.kind, role=role))
            if source.uses is not None:
                uses[name] = source.uses.get(
                    (leaf.owner, leaf.attribute) if leaf.owner else (tree.CONSTANTS, f"c{leaf.name}")
                )
    return rebuilt, missing


def _of_view(name: str, view: View, storage: Storage) -> Tensor:
    return Tensor(name, "", view.shape, view.dtype, Role.OTHER, storage, start=view.start, strides=view.strides)


def _of_numpy(path: Path, name: str, flat: views.FlatArray) -> Tensor:
    nbytes = flat.raw.nbytes
    extent = Extent(path, flat.raw.offset, nbytes)
    storage = Storage(f"pickle@{flat.raw.offset}", nbytes, extent, nbytes, flat.big_endian)
    return Tensor(name, "", flat.shape, flat.dtype, Role.OTHER, storage, strides=flat.strides)


def model_from_pickle(
    path: Path,
    format_name: str,
    sources: Sequence[PickleSource],
    about: ModelInfo,
    decode: Callable[[Tensor], Array] | None = None,
) -> ModelFile:
    """Build a model from one or more pickles; facts such as the optimizer come from the first."""
    all_tensors: list[Tensor] = []
    missing = 0
    uses: dict[str, StateUse | None] = {}
    for source in sources:
        rebuilt, unreadable = tensors(path, source, uses)
        all_tensors += rebuilt
        missing += unreadable
    root = sources[0].program.value
    foreign_calls = tuple(dict.fromkeys(call for source in sources for call in source.program.foreign_calls))
    if not all_tensors and not about.code:
        reject_without_tensors(path, foreign_calls)
    described = state_dict.describe(all_tensors, sections(root), uses)
    return ModelFile(
        path=path,
        format=format_name,
        tensors=described,
        about=replace(
            about,
            wrappers=state_dict.wrappers(described),
            optimizer=optimizer(root),
            training=training(root),
            code=(*about.code, *shorten(foreign_calls)),
            notes=(*about.notes, *notes(root), *_numpy_arrays_note(missing)),
        ),
        files=(path,),
        decode=decode,
    )


def reject_without_tensors(path: Path, foreign_calls: Sequence[str]) -> None:
    """Refuse a file without tensors; the error names the first foreign call of its pickle, if it has one."""
    if not foreign_calls:
        raise InputError(f"{path} holds no tensors")
    verb, _, function = foreign_calls[0].partition(" ")
    raise UntrustedError(f"{path} holds no tensors; opened by PyTorch, it would {_VERBS[verb]} {function}")


def shorten(foreign_calls: tuple[str, ...]) -> tuple[str, ...]:
    """The first calls, and how many more there are."""
    more = len(foreign_calls) - MAX_FOREIGN_CALLS
    return foreign_calls if more <= 0 else (*foreign_calls[:MAX_FOREIGN_CALLS], f"and {more} more")


def _numpy_arrays_note(missing: int) -> tuple[str, ...]:
    if not missing:
        return ()
    arrays = "1 NumPy array" if missing == 1 else f"{missing} NumPy arrays"
    return (f"The file also holds {arrays} inside its pickle, which prunectl does not change.",)
