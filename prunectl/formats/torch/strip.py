"""A copy of a PyTorch file without what a trained model does not need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, Role
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.torch import legacy_strip, sections, zip_strip
from prunectl.formats.torch.entries import called, entries, replace_entries, text, texts
from prunectl.formats.torch.halve import halve
from prunectl.formats.torch.recipe import Node, reachable
from prunectl.formats.torch.renumber import multiply
from prunectl.formats.torch.sections import Section
from prunectl.formats.torch.storages import Container, Contents, ask_of, asks, is_tensor, keys
from prunectl.formats.torch.unwrap import Product, dictionaries, unwrap
from prunectl.formats.writing import write_flat
from prunectl.formats.zips import open_archive

MAX_WORK = 8_000_000
"""Looked at once, all values of a program are far fewer."""
_GRADIENT_LEAVES = (".grad", ".main_grad")
_WITH_STATE = frozenset(
    {"torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"},
)
_PARTS_OF_MASKS = frozenset({Part.MASKS, Part.WRAPPERS})


@dataclass(frozen=True, slots=True)
class _Gone:
    """What went, and the storages that it used."""

    name: str
    part: Part
    storages: frozenset[str] = frozenset()


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write a copy without the parts that are to go, and return what went.

    A mask and its wrapper go together, whichever of them is asked for: neither means anything alone.
    """
    container = _open(model, wish)
    if container is None:
        write_flat(model, targets, ())
        return ()
    root = container.recipe.root
    before = frozenset(ask.key for ask in asks(root))
    gone = [*_sections(model.path, root, wish), *(_gradients(root) if Part.GRADIENTS in wish.parts else ())]
    products: list[Product] = []
    if wish.parts & _PARTS_OF_MASKS:
        products = unwrap(root, {tensor.name: tensor for tensor in model.tensors})
        gone += _masks({container.name_of(key): key for key in before}, products)
        _refuse_others(model, gone)
    numbers = multiply(model, container, products)
    fresh = {key: held.fresh() for key, held in numbers.items()}
    if wish.is_half:
        fresh.update(halve(model, container, numbers))
    if not gone and not fresh:
        write_flat(model, targets, ())
        return ()
    kept = frozenset(ask.key for ask in asks(root))
    container.write(targets[model.path], Contents(container.recipe, before - kept, fresh))
    return tuple(_counted(gone, kept, container))


def _open(model: ModelFile, wish: Wish) -> Container | None:
    """Return what can be changed; None where there is nothing that could go."""
    if model.format != "torch":
        return legacy_strip.open_container(model)
    archive = open_archive(model.path)
    if not zip_strip.is_script(archive):
        return zip_strip.open_container(model, archive)
    if wish.is_half:
        raise InputError(
            f"{model.path} is a TorchScript program, whose code says of which type its weights are",
            hint="leave out --half, or make the program from a model in half precision",
        )
    if wish.parts & _PARTS_OF_MASKS:
        _refuse_others(model, [])
    return None


def _sections(path: Path, root: Node, wish: Wish) -> list[_Gone]:
    """Take the entries out of a checkpoint that only training needs."""
    inside = entries(root) or []
    found: dict[str, Section] = {}
    work = 0
    for key, item in inside:
        if (name := text(key)) is None:
            continue
        below = reachable(item)
        storages = frozenset(ask.key for node in below.values() if (ask := ask_of(node)) is not None)
        found[name] = Section(item, storages, is_tensor(item))
        work += len(below)
        if work > MAX_WORK:
            raise InputError(f"{path} is refused: its values share each other without end")
    dead = {name: part for name, part in sections.dead(found).items() if part in wish.parts}
    if not dead:
        return []
    # The loader of YOLO asks for the model even where it takes the average.
    kept = [
        (key, Node(b"N") if name in dead else item)
        for key, item in inside
        if (name := text(key)) not in dead or name == "model"
    ]
    replace_entries(root, kept)
    return [_Gone(name, part, found[name].storages) for name, part in dead.items()]


def _gradients(root: Node) -> list[_Gone]:
    """Take gradients out: those beside their weights, and those that a parameter carries along."""
    gone: list[_Gone] = []
    for place in list(dictionaries(root)):
        names = texts(place.node)
        dead = {name: item for name, item in names.items() if _is_gradient(name, item, names)}
        gone += _dropped(place.node, place.prefix, dead)
    for node in reachable(root).values():
        if called(node) in _WITH_STATE:
            for given in node.parts[1].parts:
                carried = {name: item for name, item in texts(given).items() if name in {"grad", "main_grad"}}
                gone += _dropped(given, "", {name: item for name, item in carried.items() if not item.is_atom})
    return gone


def _dropped(node: Node, prefix: str, dead: dict[str, Node]) -> list[_Gone]:
    if dead:
        replace_entries(node, [entry for entry in entries(node) or () if text(entry[0]) not in dead])
    return [_Gone(prefix + name, Part.GRADIENTS, keys(item)) for name, item in dead.items()]


def _is_gradient(name: str, node: Node, names: dict[str, Node]) -> bool:
    owners = [name.removesuffix(leaf) for leaf in _GRADIENT_LEAVES if name.endswith(leaf)]
    return any(owner in names for owner in owners) and is_tensor(node)


def _masks(known: Mapping[str, str], products: Iterable[Product]) -> list[_Gone]:
    """Return the masks and the wrappers that went; the known are the keys of storages."""
    gone: dict[str, _Gone] = {}
    for product in products:
        for mask in product.masks:
            storages = frozenset({known[mask.storage.key]})
            gone.setdefault(mask.name, _Gone(mask.name, Part.MASKS, storages))
        wrapper = product.place.prefix + product.wrapper
        gone.setdefault(wrapper, _Gone(wrapper, Part.WRAPPERS, frozenset({known[product.tensor.storage.key]})))
    return list(gone.values())


def _refuse_others(model: ModelFile, gone: Iterable[_Gone]) -> None:
    """Refuse masks that code applies, which cannot go without it."""
    names = tuple(thing.name for thing in gone)
    inside = tuple(f"{name}." for name in names)
    for tensor in model.tensors:
        if tensor.role == Role.MASK and tensor.name not in names and not tensor.name.startswith(inside):
            raise InputError(
                f"{model.path} holds {tensor.name}, a mask that code from the file or a shape of its own ties to its "
                "weight",
                hint="strip the rest with --only optimizer,training,gradients, or save the state dict of the model",
            )


def _counted(gone: Iterable[_Gone], kept: frozenset[str], container: Container) -> Iterable[Removed]:
    """Yield what went with the bytes that went with it; what several share counts once."""
    spent = set(kept)
    for thing in gone:
        yield Removed(thing.name, thing.part, sum(container.sizes.get(key, 0) for key in thing.storages - spent))
        spent |= thing.storages
