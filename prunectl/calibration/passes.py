"""Forward passes of calibration batches: they end at the last requested layer and reuse results of earlier passes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from prunectl.training.backend import CachingModel, InputCallback, InspectableModel, LayerInput, PassEnd, RepeatedPass
from prunectl.training.data.source import Arrays

AHEAD_BYTES = 256 << 20
"""Most bytes of layer inputs, Gram matrices or weights that are kept to save passes through the network."""


@dataclass(slots=True)
class InputCounts:
    """Captures by tensor and batch number, which tell where a pass may end, and the bytes of all captures by tensor."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, index: int, capture: LayerInput) -> None:
        """Count a capture in a batch."""
        counts = self.counts.setdefault(capture.name, {})
        counts[index] = counts.get(index, 0) + 1
        self.nbytes[capture.name] = self.nbytes.get(capture.name, 0) + capture.inputs.nbytes

    def learn(self, seen: InputCounts) -> None:
        """Add the counts of tensors that have none yet."""
        for name in seen.counts.keys() - self.counts.keys():
            self.counts[name], self.nbytes[name] = seen.counts[name], seen.nbytes[name]

    def expected(self, names: Collection[str], index: int) -> int | None:
        """How many captures of some tensors a batch will give; None if that is not known."""
        if not all(name in self.counts for name in names):
            return None
        return sum(self.counts[name].get(index, 0) for name in names)


@dataclass(slots=True)
class Passes:
    """Runs numbered batches through networks, reusing results of earlier passes while they fit in memory."""

    input_counts: InputCounts = field(default_factory=InputCounts)
    _repeated: dict[tuple[int, int], RepeatedPass] = field(default_factory=dict)
    """By the identity of the network and the number of the batch."""
    _held_bytes: int = 0
    """Bytes that the repeated passes keep in memory together."""

    def run(
        self, network: InspectableModel, names: Collection[str], index: int, x: Arrays, callback: InputCallback
    ) -> None:
        """Run a batch until all inputs of some tensors are captured, or to its end if their number is unknown."""
        left = self.input_counts.expected(names, index)
        if left == 0:
            return
        repeated = self._repeated.get((id(network), index))
        if repeated is None and isinstance(network, CachingModel):
            # The first pass shows what later ones may skip, so it has to reach the end.
            repeated = self._repeated[id(network), index] = network.cached_pass()
            left = None

        def counted(capture: LayerInput) -> None:
            nonlocal left
            callback(capture)
            if left is not None:
                left -= 1
                if left == 0:
                    raise PassEnd

        before = 0 if repeated is None else repeated.nbytes
        try:
            (repeated or network).observe(names, x, counted)
        except PassEnd as end:
            # A reference cycle of the exception and its frames would keep all captured inputs alive.
            end.__traceback__ = None
        if repeated is not None:
            self._held_bytes += repeated.nbytes - before
            if self._held_bytes > AHEAD_BYTES:
                self._held_bytes -= repeated.nbytes
                repeated.clear()
