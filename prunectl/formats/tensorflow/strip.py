"""Removal of training state from SavedModels and checkpoints, and of pruning wrappers from SavedModels (verified)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, MissingExtraError, UntrustedError, UsageError, WorkError
from prunectl.formats import extents, safe_json, trust
from prunectl.formats.base import WRAPPING, Array, ModelFile, RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.extents import mmap_file
from prunectl.formats.patch import apply_mask, patch_files, pieces
from prunectl.formats.protobuf import BYTES, WireError, length_prefix, raw_fields
from prunectl.formats.safe_json import parse_object
from prunectl.formats.tensorflow import object_graph, variables
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry, read_bundle, slice_key
from prunectl.formats.tensorflow.bundle_write import BundleEdits, rewrite_bundle
from prunectl.formats.tensorflow.graph_def import read_graph, variables_used_by_functions
from prunectl.formats.tensorflow.object_graph import ObjectGraph, find_ownership
from prunectl.formats.tensorflow.rebuild_worker import EXTRA, MODULES
from prunectl.formats.tensorflow.variables import METRICS, VALUE_SUFFIX, without_optimizer


def strip_saved_model(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the folder without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: its graph fixes the type of every variable",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        return unwrap(model, options, targets)
    unwritten = dict(targets)
    removed: list[RemovedItem] = []
    if StripPart.TRAINING in options.parts:
        changed, items = training_in(model.path)
        for path, content in changed.items():
            unwritten.pop(path).write_bytes(content)
        removed += items
    index = model.path / "variables" / "variables.index"
    if index.is_file():
        bundle = read_bundle(index)
        zeroed = {key: part for key, part in _zeroable_entries(model, bundle).items() if part in options.parts}
        items = zeroed_items(bundle, zeroed)
        # Zeroing saves no bytes if no entries share the zeros.
        if any(item.bytes for item in items):
            owned = {index, *bundle.shards.values()}
            rewrite_bundle(
                bundle, BundleEdits(zeros=storage_keys(bundle, zeroed)), {path: unwritten.pop(path) for path in owned}
            )
            removed += items
    patch_files(model, unwritten, ())
    return tuple(removed)


def _zeroable_entries(model: ModelFile, bundle: Bundle) -> Mapping[bytes, StripPart]:
    """Entries that only training needs and that may be reset to zero, unlike rates and factors of an optimizer.

    The graph restores every variable by its name, even if it is only served, so no entry can be removed.
    """
    graph = object_graph.read(bundle)
    numbers = {entry.key for entry in bundle.numbers()}
    zeroed_already = bundle.shared.keys() | {entry.key for entry in bundle.shared.values()}
    names = graph.full_names
    # A signature may train, or an object named like an optimizer may be part of the model.
    used = variables_used_by_functions(read_graph(model.path / "saved_model.pb")) if graph.nodes else frozenset()
    return {
        key: part
        for key, part in training_state(bundle, graph).items()
        if key in numbers
        and not storage_keys(bundle, [key]) <= zeroed_already
        and (bool(bundle.entries[key].shape) or bundle.entries[key].dtype.kind == "i")
        and names.get(key.decode("utf-8", "backslashreplace"), "") not in used
    }


def strip_checkpoint(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the checkpoint without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: the program that restores it expects the original types",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        raise InputError(
            f"{model.path} has pruning wrappers, such as the one around {model.about.wrappers[0].layer}, "
            "but a checkpoint does not hold the model to remove them from",
            hint="strip the saved model instead, or only the other parts: --only optimizer,training",
        )
    bundle = read_bundle(model.path)
    graph = object_graph.read(bundle)
    optimizer_state = {key: part for key, part in training_state(bundle, graph).items() if part is StripPart.OPTIMIZER}
    if not optimizer_state or StripPart.OPTIMIZER not in options.parts:
        patch_files(model, targets, ())
        return ()
    texts = {}
    if graph.nodes:
        texts[object_graph.KEY] = object_graph.remove_nodes(graph, find_ownership(graph).training_only)
    rewrite_bundle(
        bundle, BundleEdits(drops=storage_keys(bundle, optimizer_state) | optimizer_state.keys(), texts=texts), targets
    )
    return removed_items(bundle, optimizer_state)


_METADATA_FILE_PATH = (1, 5)
"""Protobuf field numbers that lead to each JSON text in `keras_metadata.pb`."""
_GRAPH_FILE_PATH = (2, 7, 1, 4, 3)
"""Field numbers that lead to each JSON text in `saved_model.pb`, where Keras before 2.5 stored them."""
_TRAINING = "training_config"


def training_in(folder: Path) -> tuple[dict[Path, bytes], tuple[RemovedItem, ...]]:
    """The new content of the file with training configurations, and the removed items; both empty if there are none."""
    metadata = folder / "keras_metadata.pb"
    path, field_path = (
        (metadata, _METADATA_FILE_PATH) if metadata.is_file() else (folder / "saved_model.pb", _GRAPH_FILE_PATH)
    )
    stripped = _without_training_configs(path, field_path)
    saved = path.stat().st_size - len(stripped)
    if not saved:
        return {}, ()
    return {path: stripped}, (RemovedItem(_TRAINING, StripPart.TRAINING, max(saved, 0)),)


def _without_training_configs(path: Path, field_path: tuple[int, ...]) -> bytes:
    """The content of the file without its training configurations."""

    def without_training(text: bytes) -> bytes:
        if f'"{_TRAINING}"'.encode() not in text:
            return text
        facts = parse_object(text, path, "its Keras metadata")
        if facts.get(_TRAINING) is None:
            return text
        return json.dumps({key: value for key, value in facts.items() if key != _TRAINING}).encode()

    data = mmap_file(path)
    try:
        return _map_messages(data, 0, len(data), field_path, without_training)
    except WireError as error:
        raise InputError(f"{path} is damaged: its Keras metadata holds {error}") from error


def _map_messages(
    data: memoryview, begin: int, end: int, field_path: tuple[int, ...], change: Callable[[bytes], bytes]
) -> bytes:
    if not field_path:
        return change(bytes(data[begin:end]))
    encoded = bytearray()
    for raw, field in raw_fields(data, begin, end):
        if field.number == field_path[0] and field.wire == BYTES:
            message = _map_messages(data, field.begin, field.end, field_path[1:], change)
            is_same = message == data[field.begin : field.end]
            encoded += raw if is_same else length_prefix(field.number, len(message)) + message
        else:
            encoded += raw
    return bytes(encoded)


_COUNTERS = frozenset({"save_counter"})
"""Not removed, because `tf.train.Checkpoint` restores it."""


def training_state(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, StripPart]:
    """The entries that only training needs; entries that might be weights are left out."""
    state = _state_by_ownership(bundle, graph) if graph.nodes else _state_by_name(bundle, graph)
    for key in bundle.entries:
        if key.startswith(METRICS.encode()):
            state[key] = StripPart.TRAINING
    return state


def storage_keys(bundle: Bundle, keys: Iterable[bytes]) -> frozenset[bytes]:
    """Keys of the entries that hold the data: of the slices if a tensor is partitioned, else its own key."""
    entries = [bundle.entries[key] for key in keys]
    keys_without_slices = {entry.key for entry in entries if not entry.slices}
    return frozenset(
        keys_without_slices | {slice_key(entry.key, bounds) for entry in entries for bounds in entry.slices}
    )


def _state_by_ownership(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, StripPart]:
    """Entries that belong to optimizers according to the object graph."""
    keys = frozenset(key.encode() for key in find_ownership(graph).keys(graph))
    return {key: StripPart.OPTIMIZER for key in bundle.entries if key in keys}


def _state_by_name(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, StripPart]:
    """Entries named like optimizer state, if they are scalars or belong to a weight of the same shape."""
    roles = {tensor.name: tensor.role for tensor in variables.tensors_of(bundle, graph, {})}
    entries = {entry.name.removesuffix(VALUE_SUFFIX): entry for entry in bundle.numbers()}
    weights = {name: entry for name, entry in entries.items() if roles.get(name) is not Role.OPTIMIZER}
    return {
        entry.key: StripPart.OPTIMIZER
        for name, entry in entries.items()
        if name not in weights and name.rpartition("/")[2] not in _COUNTERS and _is_state(name, entry, entries, weights)
    }


def _is_state(
    name: str, entry: BundleEntry, entries: Mapping[str, BundleEntry], weights: Mapping[str, BundleEntry]
) -> bool:
    """Whether an entry is a scalar, or its name contains that of a weight of the same shape."""
    parent = entries.get(name.rpartition("/")[0])
    if not entry.shape or (parent is not None and parent.shape == entry.shape):
        return True
    parts = without_optimizer(name).split("/")
    inner = ("/".join(parts[begin:end]) for begin in range(len(parts)) for end in range(begin + 1, len(parts) + 1))
    return any(weights[part].shape == entry.shape for part in inner if part in weights)


def removed_items(bundle: Bundle, dropped: Mapping[bytes, StripPart]) -> tuple[RemovedItem, ...]:
    """Removed entries, with the bytes that they did not share."""
    return tuple(
        RemovedItem(_name(key), part, _own_bytes(bundle, bundle.entries[key])) for key, part in dropped.items()
    )


def zeroed_items(bundle: Bundle, zeroed: Mapping[bytes, StripPart]) -> tuple[RemovedItem, ...]:
    """Zeroed entries, with the bytes saved: in each shard the longest entry is kept, and the others share its zeros."""
    longest: dict[int, tuple[int, bytes]] = {}
    for key in zeroed:
        for piece in storage_keys(bundle, [key]):
            entry = bundle.entries[piece]
            longest[entry.shard] = max(longest.get(entry.shard, (0, b"")), (entry.nbytes, key))
    kept_bytes: dict[bytes, int] = {}
    for nbytes, key in longest.values():
        kept_bytes[key] = kept_bytes.get(key, 0) + nbytes
    return tuple(
        RemovedItem(_name(key), part, max(_own_bytes(bundle, bundle.entries[key]) - kept_bytes.get(key, 0), 0))
        for key, part in zeroed.items()
    )


def _own_bytes(bundle: Bundle, entry: BundleEntry) -> int:
    return sum(bundle.entries[key].nbytes for key in storage_keys(bundle, [entry.key]) if key not in bundle.shared)


def _name(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace").removesuffix(VALUE_SUFFIX)


_REMOVED_ROLES = frozenset({Role.MASK, Role.SCHEDULE, Role.OPTIMIZER})


def verify(model: ModelFile, rebuilt: Path) -> None:
    """Raise unless a rebuilt model has every weight, bit for bit equal to the weight times its mask."""
    wrapped, plain = (read_bundle(path / "variables" / "variables.index") for path in (model.path, rebuilt))
    graph, new_graph = object_graph.read(wrapped), object_graph.read(plain)
    pairs, masks = object_graph.match_objects(graph, new_graph), object_graph.match_masks(graph)
    tensors = {tensor.storage.key: tensor for tensor in model.tensors}
    for entry in plain.numbers():
        key = entry.name
        old = tensors.pop(pairs.get(key, ""), None)
        if old is None:
            raise WorkError(
                f"the output of {model.path} has a variable that the source lacks: {key.removesuffix(VALUE_SUFFIX)}"
            )
        weight = model.read(old)
        mask = next((tensor for tensor in model.tensors if tensor.storage.key == masks.get(old.storage.key)), None)
        expected = apply_mask(weight, [model.read(mask)] if mask else [])
        extent = plain.extent(entry)
        if (
            entry.shape != old.shape
            or entry.dtype != old.dtype
            or not _same(expected, extents.view(extent, dtype=entry.dtype, shape=entry.shape))
        ):
            raise WorkError(f"{old.name} of {model.path} has different values in the output; nothing was written")
    if missing := [tensor.name for tensor in tensors.values() if tensor.role not in _REMOVED_ROLES]:
        raise WorkError(f"the output of {model.path} lacks {missing[0]}; nothing was written")


def _same(expected: Iterator[Array], array: Array) -> bool:
    return all(
        block.tobytes() == expected_block.tobytes()
        for block, (expected_block,) in zip(expected, pieces([array]), strict=True)
    )


SIGNATURES = frozenset({"serving_default", "__saved_model_init_op"})
_SECONDS, _SECONDS_PER_MB = 300, 1
_MEMORY_BYTES, _MEMORY_PER_BYTE = 16 << 30, 16
_HINT = "strip the other parts only: add --only optimizer,training"
_OTHER_FORMAT = f"save it as .keras, which is stripped without its code, or {_HINT}"
_REBUILT_FILES = ("saved_model.pb", "keras_metadata.pb", "fingerprint.pb", "variables")


def unwrap(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the model as tfmot strips it, its weights times their masks; returns the removed items."""
    _check_rebuildable(model, options)
    for module in MODULES:
        # Only searched for, because an import would load it into this process.
        if importlib.util.find_spec(module) is None:
            safe_json.require(module, extra=EXTRA)
    target = targets[model.path / "saved_model.pb"].parent
    _rebuild(model, target)
    for source, target_file in targets.items():
        if source.relative_to(model.path).parts[0] not in _REBUILT_FILES:
            target_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target_file)
    verify(model, target)
    return _unwrapped_items(model)


def _check_rebuildable(model: ModelFile, options: StripOptions) -> None:
    """Refuse models that cannot be rebuilt, before any work begins."""
    graph = read_graph(model.path / "saved_model.pb")
    needed = WRAPPING | ({StripPart.OPTIMIZER} if model.about.optimizer else set())
    needed |= {StripPart.TRAINING} if model.about.training else set()
    if not needed <= options.parts:
        raise UsageError(
            f"{model.path} is rebuilt without its wrappers, which also removes {', '.join(sorted(needed - WRAPPING))}",
            hint=f"write --only {','.join(part for part in StripPart if part in needed)}",
        )
    if model.about.keras is None:
        raise InputError(
            f"{model.path} has wrappers, but no configuration to rebuild the model from", hint=_OTHER_FORMAT
        )
    if facts := trust.facts_in(model.about.keras):
        raise UntrustedError(
            f"{model.path} was not rebuilt without its wrappers, because that could run code: {trust.worded(facts)}",
            hint=_OTHER_FORMAT,
        )
    if unknown := set(graph.signatures) - SIGNATURES:
        raise InputError(f"{model.path} would lose its signatures {', '.join(sorted(unknown))}", hint=_HINT)
    if graph.assets or len(graph.graphs) > 1:
        what_is_lost = "the files that its graph reads" if graph.assets else "all of its graphs but one"
        raise InputError(f"{model.path} would lose {what_is_lost}", hint=_HINT)


def _rebuild(model: ModelFile, target: Path) -> None:
    request = {
        "config": model.about.keras,
        "source": str(model.path.resolve()),
        "target": str(target.resolve()),
        "memory_bytes": _MEMORY_BYTES + _MEMORY_PER_BYTE * model.nbytes,
    }
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_USE_LEGACY_KERAS": "1"}
    # -P keeps Python from importing a tensorflow.py in the working directory.
    command = [sys.executable, "-P", "-m", "prunectl.formats.tensorflow.rebuild_worker"]
    try:
        process = subprocess.run(  # noqa: S603 - this package's own module
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            env={**os.environ, **environment},
            timeout=_SECONDS + _SECONDS_PER_MB * (model.nbytes >> 20),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{model.path} takes too long to rebuild without its wrappers", hint=_HINT) from error
    _reraise(model.path, process.stdout)


def _reraise(path: Path, output: bytes) -> None:
    """Raise the error that the worker reported, or an error if it reported nothing."""
    try:
        response: Any = json.loads(output)
        kind, message, hint = response["kind"], response.get("message", ""), response.get("hint", "")
    except (ValueError, TypeError, KeyError) as error:
        raise WorkError(f"{path} cannot be rebuilt: the Keras process ended without an answer", hint=_HINT) from error
    if kind == MissingExtraError.kind:
        raise MissingExtraError(message, hint=hint)
    if kind != "done":
        raise InputError(f"{path} cannot be rebuilt without its wrappers: {message}", hint=hint or _HINT)


def _unwrapped_items(model: ModelFile) -> tuple[RemovedItem, ...]:
    parts = {Role.MASK: StripPart.MASKS, Role.SCHEDULE: StripPart.WRAPPERS, Role.OPTIMIZER: StripPart.OPTIMIZER}
    removed = (
        RemovedItem(
            tensor.name,
            StripPart.TRAINING if tensor.name.startswith(METRICS) else parts[tensor.role],
            tensor.storage.stored_bytes,
        )
        for tensor in model.tensors
        if tensor.role in parts
    )
    return (*removed, *training_in(model.path)[1])
