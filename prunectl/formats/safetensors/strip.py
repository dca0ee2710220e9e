"""A safetensors file without masks, optimizer state, gradients and averaged copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats import state_dict
from prunectl.formats.base import WRAPPING, Array, ModelFile, RemovedItem, Role, StripOptions, StripPart, Tensor
from prunectl.formats.patch import HALF, HALVED, apply_mask, broadcast_mask, patch_files, to_float16
from prunectl.formats.safetensors import SafetensorsEntry, header_without_tensors, unchanged_entry, write_entries
from prunectl.formats.state_dict import OPTIMIZER_ROOTS, MaskedParam

_AVERAGES = ("ema.", "model_ema.", "ema_model.", "swa_model.")
_GRADIENTS = (".grad", ".main_grad")


def strip(model: ModelFile, wish: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy without the parts that are to go, and return what went."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    dead = {name: part for name in tensors if (part := _part(name, tensors)) in wish.parts}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dead}
    removed = [RemovedItem(name, part, tensors[name].nbytes) for name, part in dead.items() if part is not None]
    wrapped: tuple[MaskedParam, ...] = ()
    if wish.parts & WRAPPING:
        wrapped = tuple(weight for weight in state_dict.find(kept, {}) if _fits(weight, kept))
        removed += [
            RemovedItem(mask, StripPart.MASKS, kept[mask].nbytes) for weight in wrapped for mask in weight.masks
        ]
        removed += [
            RemovedItem(name, StripPart.WRAPPERS, 0) for name in dict.fromkeys(weight.wrapper for weight in wrapped)
        ]
        _refuse_others(model, kept, wrapped)
    if not removed and not (wish.to_half and any(tensor.dtype in HALVED for tensor in kept.values())):
        patch_files(model, targets, ())
        return ()
    entries = [_halved(model, entry, wish) for entry in _entries(model, kept, wrapped)]
    # Wide numbers first, as the format's own library has it: each then begins at a multiple of its width.
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    write_entries(targets[model.path], header_without_tensors(model.path), entries)
    return tuple(removed)


def _part(name: str, tensors: Mapping[str, Tensor]) -> StripPart | None:
    root, dot, rest = name.partition(".")
    if dot and root in OPTIMIZER_ROOTS:
        return StripPart.OPTIMIZER
    if name.endswith(_GRADIENTS) and name.rpartition(".")[0] in tensors:
        return StripPart.GRADIENTS
    is_copy = name.startswith(_AVERAGES) and (rest in tensors or f"model.{rest}" in tensors)
    return StripPart.TRAINING if is_copy else None


def _fits(weight: MaskedParam, tensors: Mapping[str, Tensor]) -> bool:
    original = tensors[weight.original]
    return original.is_float and all(
        tensors[mask].shape in (original.shape, original.shape[:1]) for mask in weight.masks
    )


def _refuse_others(model: ModelFile, kept: Mapping[str, Tensor], wrapped: tuple[MaskedParam, ...]) -> None:
    known = {mask for weight in wrapped for mask in weight.masks}
    for name, tensor in kept.items():
        if tensor.role == Role.MASK and name not in known:
            raise InputError(f"{model.path} holds {abbreviated(name)}, a mask that does not fit its weight")


def _entries(
    model: ModelFile, kept: Mapping[str, Tensor], wrapped: tuple[MaskedParam, ...]
) -> Iterator[SafetensorsEntry]:
    """Yield the tensors of the output, as they were or as products, in the order of the header."""
    products = {weight.original: weight for weight in wrapped}
    masks = {mask for weight in wrapped for mask in weight.masks}
    plain = state_dict.renamed(kept, wrapped)
    for name, tensor in kept.items():
        if name not in masks:
            entry = unchanged_entry(tensor, plain[name])
            yield replace(entry, blocks=_product(model, products[name], kept)) if name in products else entry


def _product(model: ModelFile, weight: MaskedParam, kept: Mapping[str, Tensor]) -> Callable[[], Iterator[Array]]:
    def numbers() -> Iterator[Array]:
        weights = model.read(kept[weight.original])
        factors = (broadcast_mask(weights, model.read(kept[mask])) for mask in weight.masks)
        yield from apply_mask(weights, [factor for factor in factors if factor is not None])

    return numbers


def _halved(model: ModelFile, entry: SafetensorsEntry, options: StripOptions) -> SafetensorsEntry:
    if not options.to_half or entry.dtype not in HALVED:
        return entry
    return replace(entry, dtype=HALF, blocks=lambda: to_float16(iter(entry.blocks()), model.path, entry.name))
