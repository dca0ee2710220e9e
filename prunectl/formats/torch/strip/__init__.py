"""Strip a PyTorch file (a zip, or a file before 1.6): copy it without the parts that only training needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipInfo

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import WRAPPING, CopyChoice, ModelFile, RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.budgets import MAX_ALIGNMENT, MAX_PICKLE_BYTES
from prunectl.formats.patch import patch_files
from prunectl.formats.state_dict import AVERAGES, GRADIENT_LEAVES, MODEL_ROOTS, OPTIMIZER_ROOTS, TRAINING_ROOTS
from prunectl.formats.torch.legacy import mapped, open_legacy_container
from prunectl.formats.torch.model import SCRIPT_CODE, read_marker, top_folder
from prunectl.formats.torch.pickle.edit import (
    CheckpointContainer,
    CheckpointEdits,
    Entry,
    called_name,
    dict_of,
    entries,
    is_tensor,
    replace_entries,
    storage_keys,
    storage_ref,
    storage_refs,
    string_of,
    text_node,
)
from prunectl.formats.torch.pickle.ir import IRNode, emit_pickle, parse_ir, reachable
from prunectl.formats.torch.strip.masks import MaskedWeight, halve, iter_nested_dicts, materialise_masked, unwrap
from prunectl.formats.zip_read import Archive, open_archive
from prunectl.formats.zip_write import Content, rewrite_zip

_GRADIENTS = frozenset({"grad", "grads", "gradient", "gradients"})
_TRAINING = TRAINING_ROOTS - {"scaler", "grad_scaler"} | {"message_hub", "param_schedulers"}
_FACTS = frozenset(
    {
        *("epoch", "epochs", "global_step", "step", "steps", "iteration", "iterations", "iter", "iters", "updates"),
        *("loss", "losses", "train_loss", "val_loss", "valid_loss", "test_loss", "train_losses", "val_losses"),
        *("acc", "accuracy", "train_acc", "val_acc", "test_acc", "acc1", "metric", "metrics", "history"),
        *("train_metrics", "train_results", "date", "git", "wandb_id", "random_state", "lr", "learning_rate"),
    }
)
_LIGHTNING = "pytorch-lightning_version"
_LIGHTNING_READS = frozenset({"epoch", "global_step"})
"""Keys that Lightning's own loader reads from an older checkpoint."""
_OPTIMIZER_MARKS = ({"state", "param_groups"}, {"state", "hypers"})
_SCALER_MARK = "growth_factor"


@dataclass(frozen=True, slots=True)
class CheckpointSection:
    """A top-level entry of a checkpoint."""

    node: IRNode
    storages: frozenset[str]
    is_tensor: bool

    @property
    def is_container(self) -> bool:
        """Whether tensors lie in it."""
        return bool(self.storages) and not self.is_tensor

    def keys(self) -> set[str]:
        """The string keys of its own entries."""
        return set(dict_of(self.node))


def training_sections(sections: Mapping[str, CheckpointSection]) -> dict[str, StripPart]:
    """The entries that only training needs; none unless another entry holds a model."""
    parts = {
        name: needed for name, section in sections.items() if (needed := _part_of(name, section, sections)) is not None
    }
    is_checkpoint = any(section.is_container for name, section in sections.items() if name not in parts)
    return parts if is_checkpoint else {}


def _part_of(name: str, section: CheckpointSection, all_sections: Mapping[str, CheckpointSection]) -> StripPart | None:
    low = name.lower()
    if section.node.raw == b"N":
        return None
    if not section.node.is_atom and not section.is_tensor and _is_optimizer(low, section):
        return StripPart.OPTIMIZER
    if low in _GRADIENTS and section.storages:
        return StripPart.GRADIENTS
    if _is_averaged_copy(name, all_sections):
        return StripPart.TRAINING
    if _LIGHTNING in all_sections and name in _LIGHTNING_READS:
        return None
    return StripPart.TRAINING if _is_for_training(low, section) else None


def _is_optimizer(name: str, section: CheckpointSection) -> bool:
    is_named = name in OPTIMIZER_ROOTS or "optim" in name
    return is_named or any(marks <= section.keys() for marks in _OPTIMIZER_MARKS)


def _is_for_training(name: str, section: CheckpointSection) -> bool:
    if name in _TRAINING or ("rng" in name.split("_") and not section.is_container):
        return True
    if "scaler" in name:
        # Some checkpoints keep the scaler of their data under this name, and predictions need it.
        return _SCALER_MARK in section.keys()  # noqa: SIM118 (these are not a dictionary's)
    if "sched" in name and not section.node.is_atom:
        return True
    is_fact = name in _FACTS or name.startswith("best_")
    return is_fact and not section.is_container


def _is_averaged_copy(name: str, sections: Mapping[str, CheckpointSection]) -> bool:
    """Whether an entry is a copy of the weights (averaged or not), and another entry holds the weights in use."""
    if not sections[name].is_container:
        return False
    averages = [other for other in sections if other in AVERAGES and sections[other].is_container]
    if "updates" in sections and "ema" in averages:
        # The layout of YOLO: its loader takes the average if there is one.
        return name == "model"
    models = [other for other in sections if other in MODEL_ROOTS - AVERAGES and sections[other].is_container]
    return name in averages and bool(models)


_WITH_STATE = frozenset(
    {"torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"},
)


@dataclass(frozen=True, slots=True)
class _RemovedSection:
    """A removed entry, and the keys of its storages."""

    name: str
    part: StripPart
    storages: frozenset[str] = frozenset()


def strip(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write a copy without the parts in the options, and return the removed items.

    Masks and wrappers are removed together if either is requested: neither means anything alone.
    """
    container = _open(model, options)
    if container is None:
        patch_files(model, targets, ())
        return ()
    root = container.ir.root
    keys_before = frozenset(ref.key for ref in storage_refs(root))
    removed = [
        *(_keep_copy(model.path, root, options.copies) if options.copies is not None else ()),
        *_drop_sections(model.path, root, options),
        *(_drop_all_gradients(root) if StripPart.GRADIENTS in options.parts else ()),
    ]
    masked_weights: list[MaskedWeight] = []
    if options.parts & WRAPPING:
        by_name = {tensor.name: tensor for tensor in model.tensors}
        masked_weights = unwrap(root, by_name if options.copies is None else options.copies.kept(model.tensors))
        removed += _removed_masks({container.name_of(key): key for key in keys_before}, masked_weights)
        _reject_other_masks(model, removed)
    data = materialise_masked(model, container, masked_weights)
    new_storages = {key: tensor_data.to_storage() for key, tensor_data in data.items()}
    if options.to_half:
        new_storages.update(halve(model, container, data))
    if not removed and not new_storages:
        patch_files(model, targets, ())
        return ()
    keys_after = frozenset(ref.key for ref in storage_refs(root))
    container.write(targets[model.path], CheckpointEdits(container.ir, keys_before - keys_after, new_storages))
    return tuple(_removed_items(removed, keys_after, container))


def _open(model: ModelFile, options: StripOptions) -> CheckpointContainer | None:
    """The container to edit; None for TorchScript, from which nothing can be removed."""
    if model.format != "torch":
        return open_legacy_container(model)
    if SCRIPT_CODE not in model.about.code:
        return open_zip_container(model, open_archive(model.path))
    if options.to_half:
        raise InputError(
            f"{model.path} is a TorchScript program, whose code fixes the type of its weights",
            hint="leave out --half, or script a model in half precision",
        )
    if options.parts & WRAPPING:
        _reject_other_masks(model, [])
    return None


def _drop_sections(path: Path, root: IRNode, options: StripOptions) -> list[_RemovedSection]:
    """Remove the entries of a checkpoint that only training needs."""
    pairs = entries(root) or []
    sections: dict[str, CheckpointSection] = {}
    work = 0
    for key, item in pairs:
        if (name := string_of(key)) is None:
            continue
        nodes = reachable(item)
        storages = frozenset(ref.key for node in nodes.values() if (ref := storage_ref(node)) is not None)
        sections[name] = CheckpointSection(item, storages, is_tensor(item))
        work += len(nodes)
        if work > budgets.MAX_CHECKPOINT_VALUES:
            raise InputError(f"{path} is refused: its values refer to each other without end")
    removed = {name: part for name, part in training_sections(sections).items() if part in options.parts}
    if not removed:
        return []
    # The loader of YOLO reads the key `model` even if it takes the average, so the key stays, with None.
    kept = [
        (key, IRNode(b"N") if name in removed else item)
        for key, item in pairs
        if (name := string_of(key)) not in removed or name == "model"
    ]
    replace_entries(root, kept)
    return [_RemovedSection(name, part, sections[name].storages) for name, part in removed.items()]


def _keep_copy(path: Path, root: IRNode, choice: CopyChoice) -> list[_RemovedSection]:
    """Keep one of two copies of the weights, under the names that the network's class expects."""
    dicts = list(iter_nested_dicts(root))
    nodes = {f"{state.prefix}{name}": item for state in dicts for name, item in dict_of(state.node).items()}
    removed = [item for name, item in nodes.items() if choice.is_removed(name)]
    if choice.sources.keys() <= nodes.keys() and set(choice.sources.values()) <= nodes.keys():
        removed = [nodes[name] for name in choice.sources] or removed
        for state in dicts:
            pairs = entries(state.node) or []
            remaining = [entry for entry in pairs if not choice.is_removed(f"{state.prefix}{string_of(entry[0])}")]
            replace_entries(state.node, [_kept_entry(state.prefix, entry, nodes, choice) for entry in remaining])
    elif (
        not choice.lacking
        and {choice.home, choice.other} <= dict_of(root).keys()
        and (module := _module(nodes, choice)) is not None
    ):
        # Whole modules: the other takes the place of the one at home.
        removed = [nodes[choice.home]]
        kept = [(key, module if string_of(key) == choice.home else item) for key, item in entries(root) or ()]
        replace_entries(root, [entry for entry in kept if string_of(entry[0]) != choice.other])
    else:
        removed = []
    if not removed:
        raise InputError(
            f"{path}: a copy of its weights lies in objects that only their class can open",
            hint="save the state dict of the copy to keep",
        )
    storages = frozenset(key for node in removed for key in storage_keys(node))
    copies = " and ".join((choice.other, *choice.more))
    return [_RemovedSection(choice.home if choice.sources else copies, StripPart.TRAINING, storages)]


def _module(nodes: Mapping[str, IRNode], choice: CopyChoice) -> IRNode | None:
    """The module that can replace the one at home: of the same class, either itself or an attribute of an object."""
    name, source = next(iter(choice.sources.items()))
    suffix = name.removeprefix(f"{choice.home}.")
    inside = source.removeprefix(f"{choice.other}.").removesuffix(suffix).rstrip(".")
    node: IRNode | None = nodes[choice.other]
    for part in inside.split(".") if inside else ():
        state = _attributes(node) if node is not None else {}
        modules = dict_of(state["_modules"]) if "_modules" in state else {}
        node = state.get(part, modules.get(part))
    kind = called_name(nodes[choice.home])
    return node if node is not None and kind and called_name(node) == kind else None


def _attributes(node: IRNode) -> dict[str, IRNode]:
    """The attributes in the state that BUILD gives to an object."""
    given = (mutation.parts[0] for mutation in node.mutations if mutation.code == ord("b"))
    return {name: item for state in given for name, item in dict_of(state).items()}


def _kept_entry(prefix: str, entry: Entry, nodes: Mapping[str, IRNode], choice: CopyChoice) -> Entry:
    """An entry under its new name, with the value of the copy that is kept."""
    key, item = entry
    name = f"{prefix}{string_of(key)}"
    if name not in choice.names:
        return entry
    new = choice.names[name]
    if name in choice.sources:
        item = nodes[choice.sources[name]]
    if new == name:
        return key, item
    # The new name is a full path; the keys of this dictionary are without its prefix.
    return text_node(new.removeprefix(prefix)), item


def _drop_all_gradients(root: IRNode) -> list[_RemovedSection]:
    """Remove gradients: those beside their weights, and those in the state of a parameter."""
    removed: list[_RemovedSection] = []
    for state_dict in list(iter_nested_dicts(root)):
        names = dict_of(state_dict.node)
        gradients = {name: item for name, item in names.items() if _is_gradient(name, item, names)}
        removed += _drop_gradients(state_dict.node, state_dict.prefix, gradients)
    for node in reachable(root).values():
        if called_name(node) in _WITH_STATE:
            for argument in node.parts[1].parts:
                carried = {name: item for name, item in dict_of(argument).items() if name in {"grad", "main_grad"}}
                removed += _drop_gradients(
                    argument, "", {name: item for name, item in carried.items() if not item.is_atom}
                )
    return removed


def _drop_gradients(node: IRNode, prefix: str, removed: dict[str, IRNode]) -> list[_RemovedSection]:
    if removed:
        replace_entries(node, [entry for entry in entries(node) or () if string_of(entry[0]) not in removed])
    return [_RemovedSection(prefix + name, StripPart.GRADIENTS, storage_keys(item)) for name, item in removed.items()]


def _is_gradient(name: str, node: IRNode, names: dict[str, IRNode]) -> bool:
    owners = [name.removesuffix(leaf) for leaf in GRADIENT_LEAVES if name.endswith(leaf)]
    return any(owner in names for owner in owners) and is_tensor(node)


def _removed_masks(key_of: Mapping[str, str], masked_weights: Iterable[MaskedWeight]) -> list[_RemovedSection]:
    """The removed masks and wrappers; ``key_of`` has the keys of their storages in the pickle."""
    removed: dict[str, _RemovedSection] = {}
    for masked in masked_weights:
        for mask in masked.masks:
            storages = frozenset({key_of[mask.storage.key]})
            removed.setdefault(mask.name, _RemovedSection(mask.name, StripPart.MASKS, storages))
        wrapper = masked.parent.prefix + masked.wrapper
        removed.setdefault(
            wrapper, _RemovedSection(wrapper, StripPart.WRAPPERS, frozenset({key_of[masked.tensor.storage.key]}))
        )
    return list(removed.values())


def _reject_other_masks(model: ModelFile, removed: Iterable[_RemovedSection]) -> None:
    """Refuse a file with masks that were not removed, such as those that code in the file applies."""
    names = tuple(section.name for section in removed)
    inside = tuple(f"{name}." for name in names)
    for tensor in model.tensors:
        if tensor.role == Role.MASK and tensor.name not in names and not tensor.name.startswith(inside):
            raise InputError(
                f"{model.path} holds the mask {tensor.name}, which code in the file or its shape ties to its weight",
                hint="strip the rest with --only optimizer,training,gradients, or save the state dict of the model",
            )


def _removed_items(
    removed: Iterable[_RemovedSection], keys_after: frozenset[str], container: CheckpointContainer
) -> Iterable[RemovedItem]:
    """Yield the removed items with the bytes of their storages; a storage that several share counts once."""
    counted = set(keys_after)
    for item in removed:
        yield RemovedItem(item.name, item.part, sum(container.sizes.get(key, 0) for key in item.storages - counted))
        counted |= item.storages


ALIGNMENT = 64


def open_zip_container(model: ModelFile, archive: Archive) -> CheckpointContainer:
    """The IR of a zip's pickle, and its storages."""
    folder = top_folder(archive)
    entry = archive.entries[f"{folder}data.pkl"]
    if entry.is_stored:
        begin = entry.extent.offset
        ir = parse_ir(mapped(model.path), model.path, start=begin, end=begin + entry.extent.nbytes)
    else:
        ir = parse_ir(archive.read(entry.name, MAX_PICKLE_BYTES), model.path)

    def name_of(key: str) -> str:
        names = _storage_names(folder, key)
        return next(filter(archive.entries.__contains__, names), names[0])

    sizes = {
        name.removeprefix(start): entry.extent.nbytes
        for start in _storage_names(folder, "")
        for name, entry in archive.entries.items()
    }
    return CheckpointContainer(ir, name_of, sizes, partial(_write, archive, folder))


def _storage_names(folder: str, key: str) -> tuple[str, str]:
    """The possible entries of a storage: in the folder `data`, or beside the pickle."""
    return f"{folder}data/{key}", f"{folder}{key}"


def _write(archive: Archive, folder: str, target: Path, edits: CheckpointEdits) -> None:
    data = f"{folder}data/"
    dropped = {name for key in edits.dropped for name in _storage_names(folder, key)}
    # This entry promises that every storage lies where PyTorch's own writer would have put it.
    dropped.add(f"{folder}.format_version")
    names = [name for name in archive.entries if name not in dropped]
    last = max((index for index, name in enumerate(names) if name.startswith(data)), default=len(names) - 1)
    names[last + 1 : last + 1] = [
        f"{data}{key}" for key in edits.new_storages if archive.entries.keys().isdisjoint(_storage_names(folder, key))
    ]
    is_deflated = not all(entry.is_stored for name, entry in archive.entries.items() if name.startswith(data))
    pickle = b"".join(emit_pickle(edits.ir))
    changed: dict[str, Content] = {
        name: (storage.nbytes, storage.raw())
        for key, storage in edits.new_storages.items()
        for name in _storage_names(folder, key)
    }
    changed[f"{folder}data.pkl"] = len(pickle), (pickle,)

    def revise(info: ZipInfo) -> None:
        if info.filename not in archive.entries and is_deflated:
            info.compress_type = ZIP_DEFLATED

    rewrite_zip(archive, target, changed, names=names, revise=revise, alignment=_alignment(archive, folder))


def _alignment(archive: Archive, folder: str) -> int:
    marker = read_marker(archive, f"{folder}.storage_alignment")
    return int(marker) if marker.isdigit() and 0 < int(marker) <= MAX_ALIGNMENT else ALIGNMENT
