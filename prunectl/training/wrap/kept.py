"""What wrappers of tfmot in a file say of how its training was to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.base import ModelFile, Role
from prunectl.formats.keras.config import PRUNED_PREFIX, layers, part
from prunectl.formats.keras.shapes import plain
from prunectl.measuring.patterns import Block
from prunectl.pruning.masks import Pool
from prunectl.pruning.schedules import Schedule
from prunectl.training.wrap.schedules import read

KIND = "tfmot"


@dataclass(frozen=True, slots=True)
class Kept:
    """Schedules that were begun, by layer."""

    schedules: Mapping[str, Schedule]
    step: int
    """How many batches were trained on, as tfmot counts them."""
    block: Block | None = None
    pool: Pool = Pool.AVG
    unknown: tuple[str, ...] = ()
    """Classes of schedules that nobody here knows."""

    def is_open_after(self, steps: int) -> bool:
        """Whether a schedule has turns left after so many steps more."""
        return any(schedule.last_turn > self.step + steps for schedule in self.schedules.values())

    def notes(self, steps: int) -> tuple[str, ...]:
        """Return what a user should know of them after so many steps more."""
        found = [f"The schedule {name} of the file is not known here: its zeros are kept." for name in self.unknown]
        if self.is_open_after(steps):
            end = max(one.last_turn for one in self.schedules.values())
            found.append(
                f"The schedule of the file goes on to step {end}, and training ended at step {self.step + steps}."
            )
        return tuple(found)


def kept(model: ModelFile) -> Kept | None:
    """Return what the wrappers of a file say; None without any."""
    if not any(wrapper.kind == KIND for wrapper in model.about.wrappers):
        return None
    schedules: dict[str, Schedule] = {}
    unknown: dict[str, None] = {}
    blocks: dict[tuple[Any, ...], None] = {}
    for layer in layers(model.about.keras):
        if layer.kind != "PruneLowMagnitude":
            continue
        said = part(layer.config, "pruning_schedule")
        schedule = read(said)
        if schedule is None:
            unknown[str(said.get("class_name"))] = None
            continue
        schedules[layer.name.removeprefix(PRUNED_PREFIX)] = schedule
        blocks[_block(layer.config)] = None
    size = next(iter(blocks), (1, 1, Pool.AVG))
    block = Block(size[0], size[1]) if size[:2] != (1, 1) and len(blocks) == 1 else None
    return Kept(schedules, _step(model), block, size[2], tuple(unknown))


def _block(config: Mapping[str, Any]) -> tuple[Any, ...]:
    rows, columns = plain(config.get("block_size")) or (1, 1)
    return (rows, columns, Pool.MAX if config.get("block_pooling_type") == "MAX" else Pool.AVG)


def _step(model: ModelFile) -> int:
    """Return the steps that the wrappers have counted; tfmot writes -1 before the first."""
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    counted = [
        int(model.read(tensor))
        for tensor in model.tensors
        if tensor.dtype.kind == "i" and not tensor.shape and tensor.layer in wrapped and tensor.role != Role.OPTIMIZER
    ]
    return max([0, *counted])
