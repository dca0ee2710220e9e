"""How long training takes, and how fast it learns at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prunectl.errors import UsageError, WorkError

LrSchedule = Callable[[float], float]
"""From the part of training that is done to a share of the learning rate."""

LR_SCHEDULES: Mapping[str, LrSchedule] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2.0,
    # A tenth from the middle on, a hundredth in the last quarter.
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long, in which pieces, and when to stop."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    """Of all processes together."""
    seed: int = 0
    rate: str = "constant"
    warmup: int = 0
    """Steps over which the rate rises from nothing."""
    patience: int | None = None
    """Epochs without an improvement after which training ends."""
    keeps_best: bool = True

    @property
    def epochs(self) -> int:
        """Number of epochs, the last perhaps a short one."""
        return math.ceil(self.steps / self.steps_per_epoch) if self.steps_per_epoch else 0

    def rate_at(self, step: int) -> float:
        """The share of the learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return LR_SCHEDULES[self.rate]((step - self.warmup) / max(self.steps - self.warmup, 1))


def resolve_steps(
    examples: int, batch_size: int, *, epochs: int | None, steps: int | None, default_epochs: int, ranks: int = 1
) -> tuple[int, int]:
    """The number of steps in all and in an epoch, which is the same in each of several processes."""
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps cannot be used together")
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    if batch_size % ranks:
        raise UsageError(
            f"--batch-size {batch_size} is not a multiple of the {ranks} processes",
            hint=f"--batch-size {math.ceil(batch_size / ranks) * ranks}",
        )
    if examples < ranks:
        raise UsageError(f"{examples} examples are too few for {ranks} processes: some would get none")
    # What is left over when the examples are shared out is not in this epoch (see `Rows` and `shared_out`).
    per_epoch = math.ceil(examples // ranks / (batch_size // ranks))
    if steps is not None:
        return steps, per_epoch
    return (default_epochs if epochs is None else epochs) * per_epoch, per_epoch


class DivergedError(WorkError):
    """Training went astray: its loss or its weights are finite numbers no more."""
