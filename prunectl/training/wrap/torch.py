"""A PyTorch state dict with masks, as torch.nn.utils.prune has them: `weight_orig` beside `weight_mask`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.torch import views, zip_strip
from prunectl.formats.torch.entries import arguments, called, entries, replace_entries, text, text_node
from prunectl.formats.torch.recipe import Node
from prunectl.formats.torch.renumber import Numbers
from prunectl.formats.torch.storages import Contents, Fresh, asks, is_tensor, moved
from prunectl.formats.torch.unwrap import StateDict, dictionaries
from prunectl.formats.zips import open_archive
from prunectl.training.wrap.masks import MASK, ORIGINAL, masked
from prunectl.training.wrap.wrapping import Wrapping


def wrap(model: ModelFile, wrapping: Wrapping, target: Path) -> tuple[str, ...]:
    """Write the copy; every weight gets its mask."""
    archive = open_archive(model.path)
    if zip_strip.is_script(archive) or model.about.code:
        raise InputError(
            f"{model.path} is a whole model with its code, and masks go beside the weights of a state dict",
            hint="torch.save(model.state_dict(), ...), or prune without --wrap",
        )
    container = zip_strip.open_container(model, archive)
    root = container.recipe.root
    masks = masked(model, wrapping.masks)
    taken = {ask.key for ask in asks(root)} | container.sizes.keys()
    keys = dict(zip(masks, (key for number in count() if (key := str(number)) not in taken), strict=False))
    missing = set(masks)
    for place in list(dictionaries(root)):
        missing -= _put_beside(place, keys, masks)
    if missing:
        raise InputError(f"{model.path} keeps {min(missing)} in a way that no mask can be put beside")
    tensors = {tensor.name: tensor for tensor in model.tensors}
    fresh: dict[str, Fresh] = {}
    for name, mask in masks.items():
        blocks = [mask]
        fresh[keys[name]] = Numbers(tensors[name], mask.size, lambda blocks=blocks: iter(blocks)).fresh()  # type: ignore[misc]
    container.write(target, Contents(container.recipe, frozenset(), fresh))
    return ()


def _put_beside(place: StateDict, keys: Mapping[str, str], masks: Mapping[str, Array]) -> set[str]:
    """Give the weights of one dictionary their new names and their masks, and return which it had."""
    done: set[str] = set()
    put: list[tuple[Node, Node]] = []
    for key, item in entries(place.node) or ():
        leaf = text(key)
        name = place.prefix + (leaf or "")
        plain = _plain(item) if leaf is not None and name in masks and name not in done and is_tensor(item) else None
        mask = moved(plain, keys[name], masks[name].shape) if plain is not None else None
        if mask is None or leaf is None:
            put.append((key, item))
            continue
        put += [(text_node(leaf + ORIGINAL), item), (text_node(leaf + MASK), mask)]
        done.add(name)
    if done:
        replace_entries(place.node, put)
    return done


def _plain(node: Node) -> Node | None:
    """Return the tensor inside what makes it a parameter: a mask is none."""
    while called(node) not in views.PLAIN:
        given = arguments(node)
        if not given:
            return None
        node = given[0]
    return node
