"""Pruning wrappers as a framework has them, around the weights of a saved model: who puts them there?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import PARAMETRIZATION, WEIGHTS, ModelFile
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.stripping import Part, Wish
from prunectl.formats.table import by_name, open_model
from prunectl.measuring.blocks import same_numbers
from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.pruning.masks import Pool
from prunectl.pruning.output import Output
from prunectl.pruning.schedules import Schedule
from prunectl.pruning.selection import Mask
from prunectl.pruning.strip import strip
from prunectl.training.network import Origin


@dataclass(frozen=True, slots=True)
class Wrapping:
    """What wrappers are to say."""

    masks: Mapping[str, Mask]
    """What stays, by tensor; whoever trains on keeps the rest at zero."""
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    """How each tensor is pruned in later training, where it is not done yet."""
    step: int = -1
    """How many steps were made under the schedules; -1 before the first, as tfmot has it."""
    pattern: ZerosOf | Block | None = None
    pool: Pool = Pool.AVG
    origin: Origin = field(default_factory=Origin)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that is to have a wrapper."""
        return tuple(dict.fromkeys((*self.masks, *self.schedules)))


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A framework's wrappers, and the files that they are put into."""

    formats: frozenset[str]
    kind: str
    """What our readers call such wrappers."""
    writer: str
    """`module:function` in this package that writes a wrapped copy, and returns what was left without a wrapper."""
    has_schedules: bool


WRAPPERS = (
    Wrapper(frozenset({"torch"}), "torch.nn.utils.prune", "wrap.torch:wrap", has_schedules=False),
    Wrapper(
        frozenset({"safetensors"}),
        "torch.nn.utils.prune",
        "wrap.safetensors:wrap",
        has_schedules=False,
    ),
    Wrapper(
        frozenset({"keras-h5", "keras", "saved-model"}),
        "tfmot",
        "tfmot.wrap:wrap",
        has_schedules=True,
    ),
)


def wrapper_of(model: ModelFile, *, has_schedule: bool) -> Wrapper:
    """Return what wraps a model, or say that nothing can."""
    found = next((row for row in WRAPPERS if model.format in row.formats), None)
    if found is None:
        raise InputError(
            f"{model.path} ({by_name(model.format).title}) cannot be wrapped: no framework prunes such files",
            hint="wrappers go into state dicts of PyTorch (.pt, .safetensors) and models of Keras 2; "
            "prune without --wrap",
        )
    if any(wrapper.kind != PARAMETRIZATION for wrapper in model.about.wrappers):
        raise InputError(
            f"{model.path} has pruning wrappers already ({model.about.wrappers[0].kind})",
            hint=f"take them off first: prunectl strip {model.path} -o plain{model.path.suffix} --only masks,wrappers",
        )
    if has_schedule and not found.has_schedules:
        raise UsageError(
            f"the wrappers of PyTorch are masks, which hold no schedule: {model.path} cannot keep one",
            hint="leave out --schedule here, and give it to prunectl finetune",
        )
    return found


def wrap(model: ModelFile, wrapping: Wrapping, target: Path) -> tuple[str, ...]:
    """Write a copy with wrappers, and return which tensors could get none."""
    found = wrapper_of(model, has_schedule=bool(wrapping.schedules))
    module, _, name = found.writer.partition(":")
    write: Callable[[ModelFile, Wrapping, Path], tuple[str, ...]] = getattr(
        importlib.import_module(f"prunectl.training.{module}"), name
    )
    bare = write(model, wrapping, target)
    _check_wrapped(model, found, wrapping, target, frozenset(bare))
    return bare


def _check_wrapped(model: ModelFile, row: Wrapper, wrapping: Wrapping, target: Path, bare: frozenset[str]) -> None:
    written = open_model(target)
    around = {wrapper.layer for wrapper in written.about.wrappers if wrapper.kind == row.kind}
    for tensor in model.tensors:
        if tensor.name in wrapping.names and tensor.name not in bare and tensor.layer not in around:
            raise WorkError(f"{tensor.name} of {model.path} came out without a wrapper")


def unwrapped(model: ModelFile, folder: Path) -> ModelFile:
    """Return a copy without wrappers in a folder: what their masks hold at zero is zero in it."""
    target = folder / model.path.name
    # A SavedModel is built anew without its wrappers, and has no training configuration after that.
    parts = frozenset(Part) if model.format == "saved-model" else frozenset({Part.MASKS, Part.WRAPPERS})
    strip(model.path, Wish(parts), Output(target), is_packed=False)
    return open_model(target)


def check_stripped(plain: ModelFile, wrapped: Path) -> None:
    """Refuse a wrapped file whose wrappers, taken off again, do not leave what they should."""
    with temporary_folder() as scratch:
        found = unwrapped(open_model(wrapped), scratch)
        held = {tensor.name: tensor for tensor in found.tensors}
        for tensor in plain.tensors:
            if tensor.role not in WEIGHTS:
                continue
            other = held.get(tensor.name)
            if other is None or other.shape != tensor.shape or not same_numbers(plain, tensor, found, other):
                raise WorkError(f"{tensor.name} would come out of its wrapper with other numbers; nothing was written")
