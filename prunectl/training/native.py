"""Networks that prune by themselves, as those of tfmot do: they are told how, and asked which masks came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.pruning.masks import Pool
from prunectl.pruning.schedules import Schedule
from prunectl.pruning.selection import Mask
from prunectl.training.keeper import Keeper
from prunectl.training.network import Network


@dataclass(frozen=True, slots=True)
class Native:
    """How a network is to prune itself."""

    schedules: Mapping[str, Schedule]
    """By tensor; a step is a batch, the first is 1."""
    pattern: ZerosOf | Block | None = None
    pool: Pool = Pool.AVG
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """What is zero already."""
    step: int = 0
    """How many steps were made before."""
    is_all: bool = True
    """Whether it must be able to prune every one of them."""
    logdir: Path | None = None


@runtime_checkable
class SelfPruning(Protocol):
    """What such a network can do beside being trained."""

    def prune_by(self, native: Native) -> frozenset[str]:
        """Get ready to prune, and return what will be pruned; nothing, and nothing changed, if it cannot be done."""

    def masks(self) -> dict[str, Mask]:
        """Return what stays at the moment."""

    def end_epoch(self) -> None:
        """Do what is done between epochs."""


@dataclass(slots=True)
class NativeKeeper(Keeper):
    """Knows the masks that a network makes for itself."""

    source: Any = None
    """The network, as one that prunes by itself."""
    per_epoch: int = 1
    last: int = 0
    """The step at which training ends."""
    is_stale: bool = False
    """Whether the network has made masks that were not asked for yet."""
    is_settled: bool = False

    def begin(self, network: Network) -> None:
        """Leave the masks to the network, which has them already."""

    def turn(self, network: Network, step: int) -> bool:
        """Follow what the network does; once it has taken its last turn, see to the exact number of zeros."""
        schedule = self.rules.schedule
        assert schedule is not None
        if step and step != self.turned_at and (step % self.per_epoch == 0 or step == self.last):
            self.source.end_epoch()
        self.turned_at = step
        is_over = step >= schedule.last_turn and step > 0
        if is_over and not self.is_settled:
            # tfmot keeps what is as great as its threshold, and so all that ties with it; and it rounds what it keeps
            # where we round what goes: of an odd half a weight, it may drop one fewer.
            self._look()
            exact = self._cut(step, network.weights(self.rules.names), {})
            self.masks = {name: mask & exact[name] if name in exact else mask for name, mask in self.masks.items()}
            network.mask(self.masks)
            self.is_settled = True
        # The batch of this step is tfmot's next one.
        self.is_stale = schedule.prunes_at(step + 1) or step + 1 == schedule.last_turn
        return is_over

    def _look(self) -> None:
        self.masks = self.source.masks()
        self.is_stale = False

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        if self.is_stale:
            self._look()
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)
