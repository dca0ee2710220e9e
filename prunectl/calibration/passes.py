"""Forward passes of calibration batches: as far as the last layer that is asked for, the next one from there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from prunectl.training.backend import CachingModel, InputCallback, InspectableModel, LayerInput, PassEnd, RepeatedPass
from prunectl.training.data.source import Arrays

AHEAD_BYTES = 256 << 20
"""Layer inputs, Gram matrices or weights of several tensors that are held to save passes through a whole network."""


@dataclass(slots=True)
class Sights:
    """How often each tensor meets inputs in each batch, and how large these are: where a pass may end."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, index: int, sight: LayerInput) -> None:
        """Count one."""
        counts = self.counts.setdefault(sight.name, {})
        counts[index] = counts.get(index, 0) + 1
        self.nbytes[sight.name] = self.nbytes.get(sight.name, 0) + sight.inputs.nbytes

    def learn(self, seen: Sights) -> None:
        """Remember those of tensors that nothing was known of."""
        for name in seen.counts.keys() - self.counts.keys():
            self.counts[name], self.nbytes[name] = seen.counts[name], seen.nbytes[name]

    def expected(self, names: Collection[str], index: int) -> int | None:
        """How many there will be of some tensors; None where that is not known."""
        if not all(name in self.counts for name in names):
            return None
        return sum(self.counts[name].get(index, 0) for name in names)


@dataclass(slots=True)
class Passes:
    """Runs numbered batches through networks, which remember what they did where they can, while there is room."""

    sights: Sights = field(default_factory=Sights)
    _repeated: dict[tuple[int, int], RepeatedPass] = field(default_factory=dict)
    """By the identity of the network and the number of the batch."""
    _held_bytes: int = 0
    """What all of them hold."""

    def run(self, network: InspectableModel, names: Collection[str], index: int, x: Arrays, see: InputCallback) -> None:
        """Run a batch as far as some tensors meet inputs; to its end where it is not known how often they do."""
        left = self.sights.expected(names, index)
        if left == 0:
            return
        repeated = self._repeated.get((id(network), index))
        if repeated is None and isinstance(network, CachingModel):
            # The first pass tells what later ones may skip: it has to reach the end.
            repeated = self._repeated[id(network), index] = network.cached_pass()
            left = None

        def counted(sight: LayerInput) -> None:
            nonlocal left
            see(sight)
            if left is not None:
                left -= 1
                if left == 0:
                    raise PassEnd

        before = 0 if repeated is None else repeated.nbytes
        try:
            (repeated or network).observe(names, x, counted)
        except PassEnd as end:
            # It is held by frames that it holds itself, with all that was seen in them.
            end.__traceback__ = None
        if repeated is not None:
            self._held_bytes += repeated.nbytes - before
            if self._held_bytes > AHEAD_BYTES:
                self._held_bytes -= repeated.nbytes
                repeated.clear()
