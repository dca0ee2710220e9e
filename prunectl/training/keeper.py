"""Which weights are zero at a step? Decided at the turns of a schedule, kept in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from prunectl.formats.base import Array, ModelFile
from prunectl.pruning import live
from prunectl.pruning import plan as planning
from prunectl.pruning.execute import Method
from prunectl.pruning.plan import Choice, Wish
from prunectl.pruning.schedules import Schedule
from prunectl.pruning.selection import Mask
from prunectl.training.diverged import DivergedError
from prunectl.training.evidence import Evidence, informed
from prunectl.training.network import Network
from prunectl.training.regrow import Regrowth, regrown


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides the masks."""

    model: ModelFile
    choice: Choice
    wish: Wish
    method: Method
    schedule: Schedule | None
    """None keeps the masks that there are at the beginning."""
    evidence: Evidence = Evidence.NONE
    regrowth: Regrowth | None = None
    has_others: bool = True
    """Whether tensors without a sparsity of their own are pruned, too."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are pruned."""
        return tuple(tensor.name for tensor in self.choice.tensors)


@dataclass(slots=True)
class Keeper:
    """Knows the masks of the moment."""

    rules: Rules
    masks: dict[str, Mask] = field(default_factory=dict)
    """What stays, by tensor; empty before the first turn."""
    first: Mapping[str, Mask] = field(default_factory=dict)
    """The masks of what was zero in the file: it stays zero, unless it may regrow."""
    turned_at: int = -1

    def begin(self, network: Network) -> None:
        """Put the masks that there are on, and begin to watch."""
        if self.masks:
            network.mask(self.masks)
        if self._watched is not Evidence.NONE:
            network.watch(self._watched, self.rules.names)

    def turn(self, network: Network, step: int) -> bool:
        """Make the masks of a step before its batch is trained on, and return whether it was a turn."""
        if not self._is_turn(step) or step == self.turned_at:
            return False
        weights = network.weights(self.rules.names)
        if step:
            _check_finite(weights, step)
        seen = network.evidence() if self._watched is not Evidence.NONE else {}
        _check_finite({f"the gradient of {name}": array for name, array in seen.items()}, step)
        if self.rules.schedule is not None:
            self.masks = self._cut(step, weights, seen)
        growth = self.rules.regrowth
        if growth is not None and self.masks and step and step < growth.end:
            self.masks = regrown(self.masks, weights, seen, growth.share_at(step))
        network.mask(self.masks)
        if self._watched is not Evidence.MOVEMENT:
            network.forget()
        self.turned_at = step
        return True

    @property
    def _watched(self) -> Evidence:
        return Evidence.GRADIENT if self.rules.regrowth is not None else self.rules.evidence

    def _is_turn(self, step: int) -> bool:
        schedule, growth = self.rules.schedule, self.rules.regrowth
        if growth is not None and growth.prunes_at(step):
            return True
        # A ramp whose end lies between two turns gets one more there, or it would never reach its sparsity.
        return schedule is not None and (schedule.prunes_at(step) or step == schedule.last_turn)

    def _cut(self, step: int, weights: Mapping[str, Array], seen: Mapping[str, Array]) -> dict[str, Mask]:
        rules, schedule = self.rules, self.rules.schedule
        assert schedule is not None
        method = rules.method
        if rules.evidence is not Evidence.NONE and seen:
            method = replace(method, strategy=informed(method.strategy, seen, self.masks))
        wanted = schedule.sparsity_at(step)
        choice = scaled(rules.choice, wanted, schedule.final)
        plan = planning.make(choice, rules.wish, wanted if rules.has_others else 0.0)
        found = live.kept(rules.model, plan, method, choice, weights)
        if rules.regrowth is None:
            found = {name: mask & self.first[name] if name in self.first else mask for name, mask in found.items()}
        return found

    @property
    def zeros(self) -> int:
        """How many weights the masks hold at zero."""
        return sum(int(mask.size - np.count_nonzero(mask)) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors that is held at zero."""
        return self.zeros / max(sum(tensor.size for tensor in self.rules.choice.tensors), 1)


def _check_finite(weights: Mapping[str, Array], step: int) -> None:
    """Tell a training that went astray from a file that holds such numbers."""
    for name, array in weights.items():
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise DivergedError(
                f"{name} is no finite number any more after step {step}: training has gone astray",
                hint="a lower --lr, --clip 1, or data that is scaled (?norm=unit) may help",
            )


def scaled(choice: Choice, wanted: float, final: float) -> Choice:
    """Return a choice whose layers with a sparsity of their own are as far on their way to it as the rest."""
    share = wanted / final if final else 1.0
    return replace(choice, own={name: ratio * share for name, ratio in choice.own.items()})
