"""Does the smaller network do what it should? The original, its channels silenced, must say the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunectl.channels.after import After
from prunectl.channels.graph import Graph, Kind
from prunectl.channels.plan import Plan
from prunectl.channels.source import Removed, Source
from prunectl.channels.trace import Part, Trace
from prunectl.errors import WorkError, first_line
from prunectl.formats.base import Array

TOLERANCE = 1e-4
"""How far the two may be apart, relative to the largest number that comes out."""
RUNS = 3
_SILENT = frozenset({Part.OUT, Part.IN, Part.BIAS, Part.SCALE, Part.SHIFT})
"""What is set to zero; a variance of zero, or a number that others are divided by, would give no numbers."""


def prove(source: Source, smaller: Any, plan: Plan, seed: int) -> float:
    """Return how far the two networks are apart at most; WorkError if that is too far.

    Where channels are dead, nothing is silenced: without them, the network says what it always said.
    """
    # What a constant was folded into may lie behind the layer that read it.
    inner = [] if plan.is_lossless else _changed(source, plan.after)
    silent = source.with_weights({} if plan.is_lossless else _silenced(source.graph, plan.after.trace, plan.gone))
    one, other = source.runner(silent, inner), source.runner(smaller, inner)
    random = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(RUNS):
        feeds = source.feeds(random)
        try:
            said, whole = other(feeds), one(feeds)
            outer = len(whole) - len(inner)
            whole[outer:] = [plan.after.without(*pair) for pair in zip(inner, whole[outer:], strict=True)]
            worst = max([worst, *(apart(first, second) for first, second in zip(whole, said, strict=True))])
        except Exception as error:
            raise WorkError(f"the cut network cannot be run: {first_line(error)}; nothing was written") from error
    if not worst <= TOLERANCE:
        raise WorkError(
            f"the cut network differs from the original by {worst:.1e}, more than {TOLERANCE:g}; nothing was written",
            hint="leave out some layers with --exclude",
        )
    return worst


def apart(one: Any, other: Any) -> float:
    """Return the largest difference, relative to the largest number; infinite where shapes or gaps differ."""
    first, second = np.asarray(one), np.asarray(other)
    if first.shape != second.shape:
        return float("inf")
    if first.dtype.kind not in "fiub" or not first.size:
        return 0.0 if np.array_equal(first, second) else float("inf")
    wide, other_wide = first.astype(np.float64), second.astype(np.float64)
    is_number = np.isfinite(wide)
    if not np.array_equal(is_number, np.isfinite(other_wide)):
        return float("inf")
    difference = np.abs(wide - other_wide)[is_number].max(initial=0.0)
    return float(difference / max(np.abs(wide)[is_number].max(initial=0.0), np.finfo(np.float32).tiny))


def _silenced(graph: Graph, trace: Trace, removed: Removed) -> dict[str, Array]:
    """Return the weights of the original that make or read what was cut, with zeros in these places."""
    parts = {(note.tensor, note.axis): note.part for note in trace.notes}
    found: dict[str, Array] = {}
    for (name, axis), indices in removed.items():
        if parts[name, axis] in _SILENT:
            array = found.setdefault(name, np.array(graph.weights[name]))
            np.moveaxis(array, axis, 0)[indices] = 0
    return found


def _changed(source: Source, after: After) -> list[str]:
    """Return what the layers say that lost inputs or outputs.

    A softmax at the end of a network may hide what is wrong before it, and a signal may die on its way there.
    """
    names = [
        node.outputs[0]
        for node in source.graph.nodes
        if node.kind in {Kind.CONVOLUTION, Kind.LINEAR}
        and any(map(after.has_changed, (node.inputs[0], node.outputs[0])))
    ]
    showable = source.showable.difference(source.graph.outputs)
    return [name for name in dict.fromkeys(names) if name in showable]
