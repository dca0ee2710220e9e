"""The length of training, and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prunectl.errors import UsageError, WorkError

LrSchedule = Callable[[float], float]
"""Maps the fraction of training that is done to a factor of the learning rate."""

LR_SCHEDULES: Mapping[str, LrSchedule] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2.0,
    # A tenth of the learning rate from halfway on, and a hundredth in the last quarter.
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The length of training, the learning-rate schedule and early stopping."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    """The number of examples in a step, over all processes."""
    seed: int = 0
    rate: str = "constant"
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    patience: int | None = None
    """Early stopping: training ends after so many epochs without an improvement."""
    keeps_best: bool = True

    @property
    def epochs(self) -> int:
        """Number of epochs; the last may be shorter."""
        return math.ceil(self.steps / self.steps_per_epoch) if self.steps_per_epoch else 0

    def rate_at(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return LR_SCHEDULES[self.rate]((step - self.warmup) / max(self.steps - self.warmup, 1))


def resolve_steps(
    examples: int, batch_size: int, *, epochs: int | None, steps: int | None, default_epochs: int, ranks: int = 1
) -> tuple[int, int]:
    """The total number of steps and the steps in an epoch, the same in every process."""
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
    # Examples that remain after an equal split among the processes are not in this epoch (see `Rows` and `shared_out`).
    per_epoch = math.ceil(examples // ranks / (batch_size // ranks))
    if steps is not None:
        return steps, per_epoch
    return (default_epochs if epochs is None else epochs) * per_epoch, per_epoch


class DivergedError(WorkError):
    """The loss or the weights became NaN or infinite in training."""
