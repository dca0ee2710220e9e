"""A framework's own pruning wrappers around the weights of a saved model, and the schedules stored in them."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.analysis.tensor_io import bitwise_equal
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import (
    WEIGHTS,
    WRAPPING,
    Family,
    ModelFile,
    Role,
    StripOptions,
    StripPart,
)
from prunectl.formats.keras.config import PRUNED_PREFIX, layers, object_in, string_in, untuple
from prunectl.formats.registry import by_name, open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.destination import Destination
from prunectl.pruning.masks import Mask, Pooling
from prunectl.pruning.schedules import ChainedSchedule, Schedule, SparsitySchedule
from prunectl.pruning.strip import strip
from prunectl.training.backend import LoadOptions
from prunectl.training.mask_schedule import MaskScheduler
from prunectl.training.request import FinetuneRequest


@dataclass(frozen=True, slots=True)
class WrapperSpec:
    """The masks and schedules that wrappers are to hold."""

    masks: Mapping[str, Mask]
    """The kept weights by tensor; later training holds the others at zero."""
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    """The schedule by which each tensor is pruned in later training, if pruning is not finished."""
    step: int = -1
    """The number of steps taken under the schedules; -1 before the first, as in tfmot."""
    pattern: NMPattern | BlockPattern | None = None
    pool: Pooling = Pooling.AVG
    origin: LoadOptions = field(default_factory=LoadOptions)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that is to get a wrapper."""
        return tuple(dict.fromkeys((*self.masks, *self.schedules)))


@dataclass(frozen=True, slots=True)
class WrapperFormat:
    """A framework's wrappers, and the file formats that can hold them."""

    formats: frozenset[str]
    kind: str
    """The kind that our readers report for such wrappers."""
    writer: str
    """`module:function` in `prunectl.training` that writes a wrapped copy and returns the tensors without a wrapper."""
    has_schedules: bool


WRAPPER_FORMATS = (
    WrapperFormat(frozenset({"torch"}), "torch.nn.utils.prune", "wrap.state_dict:wrap_pickle", has_schedules=False),
    WrapperFormat(
        frozenset({"safetensors"}),
        "torch.nn.utils.prune",
        "wrap.state_dict:wrap_safetensors",
        has_schedules=False,
    ),
    WrapperFormat(
        frozenset({"keras-h5", "keras", "saved-model"}),
        "tfmot",
        "tfmot.wrappers:wrap",
        has_schedules=True,
    ),
)


def wrapper_format(model: ModelFile, *, has_schedule: bool) -> WrapperFormat:
    """The wrappers that a model's format can hold; refuse a model that can hold none."""
    matching = next((row for row in WRAPPER_FORMATS if model.format in row.formats), None)
    if matching is None:
        raise InputError(
            f"{model.path} ({by_name(model.format).title}) cannot hold pruning wrappers: no framework supports them",
            hint="wrappers go into state dicts of PyTorch (.pt, .safetensors) and models of Keras 2; "
            "prune without --wrap",
        )
    if model.about.pruning_wrappers:
        raise InputError(
            f"{model.path} already has pruning wrappers ({model.about.pruning_wrappers[0].kind})",
            hint=f"remove them first: prunectl strip {model.path} -o plain{model.path.suffix} --only masks,wrappers",
        )
    if has_schedule and not matching.has_schedules:
        raise UsageError(
            f"{model.path} cannot hold a schedule: PyTorch's wrappers are only masks",
            hint="leave out --schedule, or use prunectl finetune --schedule",
        )
    return matching


def wrap(model: ModelFile, wrapping: WrapperSpec, target: Path) -> tuple[str, ...]:
    """Write a copy with wrappers, and return the tensors that could get none."""
    row = wrapper_format(model, has_schedule=bool(wrapping.schedules))
    module, _, name = row.writer.partition(":")
    write: Callable[[ModelFile, WrapperSpec, Path], tuple[str, ...]] = getattr(
        importlib.import_module(f"prunectl.training.{module}"), name
    )
    bare = write(model, wrapping, target)
    written = open_model(target)
    wrapped_layers = {wrapper.layer for wrapper in written.about.wrappers if wrapper.kind == row.kind}
    expected = frozenset(wrapping.names).difference(bare)
    for tensor in model.tensors:
        if tensor.name in expected and tensor.layer not in wrapped_layers:
            raise WorkError(f"{tensor.name} of {model.path} has no wrapper in the output; nothing was written")
    return bare


def strip_wrappers(model: ModelFile, folder: Path) -> ModelFile:
    """Write a copy without wrappers to a folder; weights that the masks hold at zero are zero in it."""
    target = folder / model.path.name
    # A SavedModel is rebuilt without its wrappers, and loses its training configuration by that.
    parts = frozenset(StripPart) if model.family is Family.SAVED_MODEL else WRAPPING
    strip(model.path, StripOptions(parts), Destination(target), is_packed=False)
    return open_model(target)


def verify_roundtrip(plain: ModelFile, wrapped: Path) -> None:
    """Refuse a wrapped file that, once stripped of its wrappers, does not have the weights of the plain file."""
    with temporary_folder() as scratch:
        stripped = strip_wrappers(open_model(wrapped), scratch)
        tensors = {tensor.name: tensor for tensor in stripped.tensors}
        for tensor in plain.tensors:
            if tensor.role not in WEIGHTS:
                continue
            other = tensors.get(tensor.name)
            if other is None or other.shape != tensor.shape or not bitwise_equal(plain, tensor, stripped, other):
                raise WorkError(f"stripping the wrapper of {tensor.name} would change its values; nothing was written")


KIND = "tfmot"


@dataclass(frozen=True, slots=True)
class SavedPruning:
    """The schedules in the wrappers of a file, by layer, and the number of steps taken under them."""

    schedules: Mapping[str, Schedule]
    step: int
    """The number of batches trained on, as counted by tfmot."""
    block: BlockPattern | None = None
    pool: Pooling = Pooling.AVG
    unknown: tuple[str, ...] = ()
    """Class names of schedules that prunectl does not know."""

    def is_open_after(self, steps: int) -> bool:
        """Whether a schedule still has pruning steps left after so many more training steps."""
        return any(schedule.last_update_step > self.step + steps for schedule in self.schedules.values())

    def notes(self, steps: int) -> tuple[str, ...]:
        """Notes for the user after so many more training steps."""
        parts = [f"The file's schedule {name} is not known: its zeros are kept." for name in self.unknown]
        if self.is_open_after(steps):
            end = max(schedule.last_update_step for schedule in self.schedules.values())
            parts.append(f"The file's schedule ends at step {end}, but training ended at step {self.step + steps}.")
        return tuple(parts)


def read_saved_pruning(model: ModelFile) -> SavedPruning | None:
    """Read the schedules in the wrappers of a file; None if it has no wrappers of tfmot."""
    if not any(wrapper.kind == KIND for wrapper in model.about.wrappers):
        return None
    schedules: dict[str, Schedule] = {}
    unknown: dict[str, None] = {}
    blocks: dict[tuple[Any, ...], None] = {}
    for layer in layers(model.about.keras):
        if layer.kind != "PruneLowMagnitude":
            continue
        config = object_in(layer.config, "pruning_schedule")
        schedule = read_schedule(config)
        if schedule is None:
            unknown[str(config.get("class_name"))] = None
            continue
        schedules[layer.name.removeprefix(PRUNED_PREFIX)] = schedule
        blocks[_block(layer.config)] = None
    size = next(iter(blocks), (1, 1, Pooling.AVG))
    block = BlockPattern(size[0], size[1]) if size[:2] != (1, 1) and len(blocks) == 1 else None
    return SavedPruning(schedules, _step(model), block, size[2], tuple(unknown))


def _block(config: Mapping[str, Any]) -> tuple[Any, ...]:
    rows, columns = untuple(config.get("block_size")) or (1, 1)
    return (rows, columns, Pooling.MAX if config.get("block_pooling_type") == "MAX" else Pooling.AVG)


def _step(model: ModelFile) -> int:
    """The steps counted by the wrappers; 0 for the -1 that tfmot writes before the first."""
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    counted = [
        int(model.read(tensor))
        for tensor in model.tensors
        if tensor.dtype.kind == "i" and not tensor.shape and tensor.layer in wrapped and tensor.role != Role.OPTIMIZER
    ]
    return max([0, *counted])


def check_wrappable(model: ModelFile, request: FinetuneRequest, scheduler: MaskScheduler) -> None:
    """Refuse, before training, a model that could not be wrapped after it."""
    if not request.keeps_wrappers:
        return
    wrapper_format(model, has_schedule=False)
    if not scheduler.masks and scheduler.rules.schedule is None:
        raise UsageError(
            f"--keep-wrappers cannot be used: {model.path} has no zeros",
            hint="add --sparsity 80%, or leave out --keep-wrappers",
        )


def spec_of_result(
    scheduler: MaskScheduler, request: FinetuneRequest, saved: SavedPruning | None, steps: int
) -> WrapperSpec:
    """The wrappers of a training result: its masks, and the schedules of the file if they have not ended."""
    rules = scheduler.rules
    wrapping = WrapperSpec(
        dict(scheduler.masks), pattern=rules.selection.pattern, pool=rules.method.pool, origin=request.origin
    )
    if saved is None or request.prunes or not saved.is_open_after(steps):
        return wrapping
    schedules = {
        tensor.name: saved.schedules[tensor.layer] for tensor in rules.choice.tensors if tensor.layer in saved.schedules
    }
    return WrapperSpec(wrapping.masks, schedules, saved.step + steps, saved.block, saved.pool, request.origin)


def wrap_in_place(written: Path, wrapping: WrapperSpec) -> None:
    """Add wrappers to a result that was just written."""
    plain = open_model(written)
    with tempfile.TemporaryDirectory(dir=written.parent, prefix=".wrapped-") as scratch:
        target = Path(scratch) / written.name
        wrap(plain, wrapping, target)
        verify_roundtrip(plain, target)
        if written.is_dir():
            shutil.rmtree(written)
        os.replace(target, written)


OWN_SCHEDULE_CLASS = "prunectl>Planned"
"""The name under which our own schedule class is registered in Keras."""
_POWER = 3.0
_FOREVER = -1


@dataclass(frozen=True, slots=True)
class ResumedSchedule:
    """The rest of a schedule under which `since` steps were taken already."""

    schedule: Schedule
    since: int

    @property
    def final(self) -> float:
        """The sparsity at the end."""
        return self.schedule.final

    @property
    def last_update_step(self) -> int:
        """The last pruning step, counted from now."""
        return max(self.schedule.last_update_step - self.since, 0)

    def sparsity_at(self, step: int) -> float:
        """The sparsity of the original schedule at a step counted from now."""
        return self.schedule.sparsity_at(step + self.since)

    def prunes_at(self, step: int) -> bool:
        """Whether the original schedule prunes at a step counted from now."""
        return self.schedule.prunes_at(step + self.since)


def power_of(ramp: SparsitySchedule) -> float:
    """The power of a polynomial schedule."""
    params = dict(param.split("=", 1) for param in ramp.params)
    return float(params.get("power", _POWER))


def has_tfmot_class(schedule: Schedule) -> bool:
    """Whether tfmot has a class for a schedule."""
    if not isinstance(schedule, SparsitySchedule):
        return False
    # In a polynomial that ends where it begins, tfmot would divide by zero.
    return schedule.curve == "constant" or (schedule.curve == "polynomial" and (schedule.end or 0) > schedule.begin)


def tfmot_reaches_end(schedule: Schedule) -> bool:
    """Whether tfmot's own class for a schedule updates the mask at its last step, and so reaches the final sparsity."""
    if not has_tfmot_class(schedule) or not isinstance(schedule, SparsitySchedule):
        return False
    return schedule.curve == "constant" or (schedule.last_update_step - schedule.begin) % schedule.frequency == 0


def to_config(schedule: Schedule) -> dict[str, Any]:
    """The configuration of one of our own schedules, for a Keras file."""
    if isinstance(schedule, SparsitySchedule):
        return {
            "curve": schedule.curve,
            "final": schedule.final,
            "begin": schedule.begin,
            "end": schedule.end,
            "initial": schedule.initial,
            "frequency": schedule.frequency,
            "params": list(schedule.params),
        }
    if isinstance(schedule, ChainedSchedule):
        return {"first": to_config(schedule.first), "at": schedule.switch_step, "second": to_config(schedule.second)}
    if isinstance(schedule, ResumedSchedule):
        return {"since": schedule.since, "schedule": to_config(schedule.schedule)}
    raise UsageError(f"a {type(schedule).__name__} cannot be saved in a file: it is not a registered schedule")


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of our own in a configuration that `to_config` made."""
    if "first" in config:
        return ChainedSchedule(from_config(config["first"]), config["at"], from_config(config["second"]))
    if "since" in config:
        return ResumedSchedule(from_config(config["schedule"]), config["since"])
    return SparsitySchedule(**{**config, "params": tuple(config["params"])})


def read_schedule(entry: Mapping[str, Any]) -> Schedule | None:
    """The schedule in the configuration of a wrapper; None if its class is unknown."""
    name, config = string_in(entry, "class_name"), object_in(entry, "config")
    try:
        if name == "ConstantSparsity":
            return SparsitySchedule(
                "constant", config["target_sparsity"], config["begin_step"], _end(config), 0.0, config["frequency"]
            )
        if name == "PolynomialDecay":
            power = f"power={float(config['power'])!r}"
            first, final = config["initial_sparsity"], config["final_sparsity"]
            return SparsitySchedule(
                "polynomial", final, config["begin_step"], _end(config), first, config["frequency"], (power,)
            )
        return from_config(config) if name == OWN_SCHEDULE_CLASS else None
    except (KeyError, TypeError, ValueError):
        # The configuration of another version, with other keys.
        return None


def _end(config: Mapping[str, Any]) -> int | None:
    return None if config["end_step"] == _FOREVER else int(config["end_step"])
