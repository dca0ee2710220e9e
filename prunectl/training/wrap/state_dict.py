"""A PyTorch state dict with masks in the form of torch.nn.utils.prune: `weight_orig` and `weight_mask`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safetensors import (
    SafetensorsEntry,
    array_entry,
    header_without_tensors,
    unchanged_entry,
    write_entries,
)
from prunectl.formats.torch import strip, views
from prunectl.formats.torch.pickle.edit import (
    CheckpointEdits,
    NewStorage,
    arguments,
    called_name,
    entries,
    is_tensor,
    replace_entries,
    storage_refs,
    string_of,
    text_node,
    with_storage,
)
from prunectl.formats.torch.pickle.ir import IRNode
from prunectl.formats.torch.strip.masks import StateDict, TensorData, iter_nested_dicts
from prunectl.formats.zip_read import open_archive
from prunectl.pruning.masks import Mask
from prunectl.training.wrap import WrapperSpec

ORIGINAL, MASK = "_orig", "_mask"
"""The suffixes that torch.nn.utils.prune adds to the name of a weight."""


def mask_entries(model: ModelFile, masks: Mapping[str, Mask]) -> dict[str, Array]:
    """The masks of the pruned tensors and of their aliases, in the data type of the weight."""
    known = {tensor.name: tensor for tensor in model.tensors}
    arrays: dict[str, Array] = {}
    by_view = {known[name].view_key: name for name in masks}
    by_storage: dict[str, str] = {known[name].storage.key: name for name in masks}
    for tensor in model.tensors:
        name = by_view.get(tensor.view_key)
        if name is not None:
            arrays[tensor.name] = np.ascontiguousarray(masks[name]).astype(tensor.dtype)
        elif tensor.storage.key in by_storage:
            raise InputError(
                f"{tensor.name} of {model.path} shares some numbers with {by_storage[tensor.storage.key]}, "
                "and a mask would separate them",
                hint="prune without --wrap, or skip the tensor with --exclude",
            )
    names = {tensor.name for tensor in model.tensors}
    for name in arrays:
        for new in (name + ORIGINAL, name + MASK):
            if new in names:
                raise InputError(f"{model.path} already has a tensor {new} beside {name}")
    return arrays


def wrap_pickle(model: ModelFile, wrapping: WrapperSpec, target: Path) -> tuple[str, ...]:
    """Write a copy of a checkpoint in which every pruned weight has its mask."""
    if model.about.code:
        raise InputError(
            f"{model.path} is a whole pickled model, but masks can be added only to a state dict",
            hint="save it with torch.save(model.state_dict(), ...), or prune without --wrap",
        )
    container = strip.open_zip_container(model, open_archive(model.path))
    root = container.ir.root
    masks = mask_entries(model, wrapping.masks)
    used_keys = {ref.key for ref in storage_refs(root)} | container.sizes.keys()
    keys = dict(zip(masks, (key for number in count() if (key := str(number)) not in used_keys), strict=False))
    missing = set(masks)
    for nested in list(iter_nested_dicts(root)):
        missing -= _add_masks(nested, keys, masks)
    if missing:
        raise InputError(f"{model.path} stores {min(missing)} in a way that allows no mask beside it")
    tensors = {tensor.name: tensor for tensor in model.tensors}
    fresh: dict[str, NewStorage] = {}
    for name, mask in masks.items():
        blocks = [mask]
        fresh[keys[name]] = TensorData(tensors[name], mask.size, lambda blocks=blocks: iter(blocks)).to_storage()  # type: ignore[misc]
    container.write(target, CheckpointEdits(container.ir, frozenset(), fresh))
    return ()


def _add_masks(nested: StateDict, keys: Mapping[str, str], masks: Mapping[str, Array]) -> set[str]:
    """Rename the weights of one dictionary, add their masks, and return the names of these weights."""
    done: set[str] = set()
    new_entries: list[tuple[IRNode, IRNode]] = []
    for key, item in entries(nested.node) or ():
        leaf = string_of(key)
        name = nested.prefix + (leaf or "")
        plain = _plain(item) if leaf is not None and name in masks and name not in done and is_tensor(item) else None
        mask = with_storage(plain, keys[name], masks[name].shape) if plain is not None else None
        if mask is None or leaf is None:
            new_entries.append((key, item))
            continue
        new_entries += [(text_node(leaf + ORIGINAL), item), (text_node(leaf + MASK), mask)]
        done.add(name)
    if done:
        replace_entries(nested.node, new_entries)
    return done


def _plain(node: IRNode) -> IRNode | None:
    """The tensor inside the call that makes it a Parameter, since a mask is a plain tensor; None if not found."""
    while called_name(node) not in views.VIEW_CALLS:
        parts = arguments(node)
        if not parts:
            return None
        node = parts[0]
    return node


def wrap_safetensors(model: ModelFile, wrapping: WrapperSpec, target: Path) -> tuple[str, ...]:
    """Write a copy of a checkpoint in which every pruned weight has its mask."""
    masks = mask_entries(model, wrapping.masks)
    entries: list[SafetensorsEntry] = []
    for tensor in model.tensors:
        name, mask = tensor.name, masks.get(tensor.name)
        entry = unchanged_entry(tensor, name if mask is None else name + ORIGINAL)
        entries.append(entry)
        if mask is not None:
            entries.append(array_entry(name + MASK, mask))
    # Wide data types first, as in the safetensors library, so that each tensor begins at a multiple of its item size.
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    write_entries(target, header_without_tensors(model.path), entries)
    return ()
