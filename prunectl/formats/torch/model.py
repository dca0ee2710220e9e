"""A rebuilt pickle program as a model: names, views and storages put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunectl.errors import InputError, UntrustedError
from prunectl.formats import state_dict
from prunectl.formats.base import About, Array, ModelFile, Role, Storage, Tensor
from prunectl.formats.extents import Extent
from prunectl.formats.state_dict import Use
from prunectl.formats.torch import arrays as torch_numpy
from prunectl.formats.torch import facts as torch_facts
from prunectl.formats.torch import tree
from prunectl.formats.torch import views as torch_views
from prunectl.formats.torch.program import Program
from prunectl.formats.torch.script_code import CONSTANTS
from prunectl.formats.torch.values import Made, Persistent
from prunectl.formats.torch.views import Stored, View

MAX_STRANGERS = 100
_DEEDS = {"calls": "call", "class": "make an instance of", "imports": "import"}


@dataclass(frozen=True, slots=True)
class Source:
    """A program, and where the container keeps what it leaves out."""

    program: Program
    find: Callable[[Stored], Storage]
    named: Mapping[str, Made] = field(default_factory=dict)
    """Tensors that the container itself lists, by their ids."""
    prefix: str = ""
    """What the names begin with."""
    parameters: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The trained attributes of classes that declare them."""
    uses: Mapping[tuple[str, str], Use] | None = None
    """What the code beside the program does with the attributes of its classes, where there is such code."""
    is_flat: bool = True
    """Whether the pickle lies in the file as it is, so that its places are places in the file."""


def tensors(path: Path, source: Source, uses: dict[str, Use | None]) -> tuple[list[Tensor], int]:
    """Return the tensors of a program, and how many NumPy arrays are not to be had; fill in what code uses them for."""
    found: list[Tensor] = []
    names: dict[str, int] = {}
    storages: dict[Stored, Storage] = {}
    missing = 0
    for leaf in tree.leaves(path, source.program.value, source.parameters):
        value = source.named.get(str(leaf.value.id)) if isinstance(leaf.value, Persistent) else leaf.value
        if value is None:
            raise InputError(f"{path} is damaged: it does not hold {leaf.name}")
        name = source.prefix + leaf.name
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            # Two paths can spell one name, such as {"a.b": x, "a": {"b": y}}.
            name = f"{name}#{names[name]}"
        if torch_numpy.is_array(value):
            flat = torch_numpy.flat_array(value)
            if flat is None or not source.is_flat:
                missing += 1
                continue
            found.append(_of_numpy(path, name, flat))
        else:
            role = Role.STATE if leaf.is_buffer else Role.OTHER
            view = torch_views.view_of(path, value, name)
            if view.stored not in storages:
                storages[view.stored] = source.find(view.stored)
            found.append(replace(_of_view(name, view, storages[view.stored]), kind=leaf.kind, role=role))
            if source.uses is not None:
                uses[name] = source.uses.get(
                    (leaf.owner, leaf.attribute) if leaf.owner else (CONSTANTS, f"c{leaf.name}")
                )
    return found, missing


def _of_view(name: str, view: View, storage: Storage) -> Tensor:
    return Tensor(name, "", view.shape, view.dtype, Role.OTHER, storage, start=view.start, strides=view.strides)


def _of_numpy(path: Path, name: str, flat: torch_numpy.FlatArray) -> Tensor:
    nbytes = flat.raw.nbytes
    extent = Extent(path, flat.raw.at, nbytes)
    storage = Storage(f"pickle@{flat.raw.at}", nbytes, extent, nbytes, flat.big_endian)
    return Tensor(name, "", flat.shape, flat.dtype, Role.OTHER, storage, strides=flat.strides)


def build(
    path: Path,
    format_name: str,
    sources: Sequence[Source],
    about: About,
    decode: Callable[[Tensor], Array] | None = None,
) -> ModelFile:
    """Return the model that one program or several rebuild; the first is the one that the facts come from."""
    found: list[Tensor] = []
    missing = 0
    uses: dict[str, Use | None] = {}
    for source in sources:
        more, left_out = tensors(path, source, uses)
        found += more
        missing += left_out
    root = sources[0].program.value
    torch_views.refuse_rereading(path, found)
    strangers = tuple(dict.fromkeys(deed for source in sources for deed in source.program.strangers))
    if not found and not about.code:
        refuse_without_tensors(path, strangers)
    described = state_dict.describe(found, torch_facts.sections(root), uses)
    return ModelFile(
        path=path,
        format=format_name,
        tensors=described,
        about=replace(
            about,
            wrappers=state_dict.wrappers(described),
            optimizer=torch_facts.optimizer(root),
            training=torch_facts.training(root),
            code=(*about.code, *_few(strangers)),
            notes=(*about.notes, *torch_facts.notes(root), *_left_out(missing)),
        ),
        files=(path,),
        decode=decode,
    )


def refuse_without_tensors(path: Path, strangers: Sequence[str]) -> None:
    """Say that there is nothing to prune, and what loading would have done instead."""
    if not strangers:
        raise InputError(f"{path} holds no tensors")
    verb, _, what = strangers[0].partition(" ")
    raise UntrustedError(f"{path} holds no tensors; opened by PyTorch, it would {_DEEDS[verb]} {what}")


def _few(strangers: tuple[str, ...]) -> tuple[str, ...]:
    more = len(strangers) - MAX_STRANGERS
    return strangers if more <= 0 else (*strangers[:MAX_STRANGERS], f"and {more} more")


def _left_out(missing: int) -> tuple[str, ...]:
    if not missing:
        return ()
    arrays = "1 NumPy array" if missing == 1 else f"{missing} NumPy arrays"
    return (f"It also holds {arrays} inside its pickle, which prunectl leaves as they are.",)
