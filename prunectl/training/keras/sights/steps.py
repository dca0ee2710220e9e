"""A recurrent layer, gone through again step by step, since the layer itself may hide its steps in one operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.training.keras.library import Library
from prunectl.training.keras.sights.meeting import numbers_in, tree
from prunectl.training.network import Array


@dataclass(frozen=True, slots=True)
class Steps:
    """What a recurrent layer goes through."""

    library: Library
    layer: Any
    sequences: Any
    states: Any
    mask: Array | None
    """Examples by steps: where it is False, a step leaves no trace."""

    def run(self) -> Iterator[Array | None]:
        """Run the cell once for each step, and yield for which examples it counts; None for all."""
        axis = 0 if getattr(self.layer, "time_major", False) else 1
        order = range(int(self.sequences.shape[axis]))
        states = self.states
        for at in reversed(order) if self.layer.go_backwards else order:
            _, after = self.layer.cell(self.sequences[at] if axis == 0 else self.sequences[:, at], states)
            keep = self.mask[:, at] if self.mask is not None else None
            states = self._followed(states, after, keep)
            yield keep

    def _followed(self, before: Any, after: Any, keep: Array | None) -> Any:
        nest = tree(self.library)
        old, new = nest.flatten(before), nest.flatten(after)
        if keep is not None:
            new = [self._chosen(keep, *pair) for pair in zip(new, old, strict=True)]
        return nest.pack_sequence_as(before, new)

    def _chosen(self, keep: Array, new: Any, old: Any) -> Any:
        where = self.library.tensorflow.where if self.library.is_two else self.library.keras.ops.where
        return where(keep.reshape(-1, *(1,) * (len(new.shape) - 1)), new, old)


def steps(library: Library, layer: Any, said: Mapping[str, Any]) -> Steps | None:
    """Return the steps of a layer that is called with arguments; None where they cannot be told."""
    words = dict(said)
    sequences = words.pop(next(iter(words)))
    states, mask, constants = words.get("initial_state"), words.get("mask"), words.get("constants")
    if library.is_two:
        sequences, states, constants = layer._process_inputs(sequences, states, constants)  # noqa: SLF001
    elif states is None:
        states = layer.states if layer.stateful else layer.get_initial_state(batch_size=sequences.shape[0])
    if constants or numbers_in(library, sequences) is None:
        return None
    states = list(states) if isinstance(states, list | tuple) else [states]
    return Steps(library, layer, sequences, _plain(library, states), _mask(library, layer, mask))


def _plain(library: Library, states: Any) -> Any:
    """Return states as tensors, where a layer keeps some in variables."""
    change = library.tensorflow.convert_to_tensor if library.is_two else library.keras.ops.convert_to_tensor
    return tree(library).map_structure(change, states)


def _mask(library: Library, layer: Any, mask: Any) -> Array | None:
    found = tree(library).flatten(mask)[0] if mask is not None else None
    array = numbers_in(library, found) if found is not None else None
    if array is None:
        return None
    return (array.T if getattr(layer, "time_major", False) else array).astype(np.bool_)
