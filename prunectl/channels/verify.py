"""Does the smaller network do what it should? The original, its channels silenced, must say the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from prunectl.channels.adapter import Feeds, GraphAdapter, PrunedShapes, RemovedIndices, Runner
from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.labels import AxisRole, LabelTrace
from prunectl.channels.plan import ChannelPlan
from prunectl.errors import WorkError, first_line
from prunectl.formats.base import Array

TOLERANCE = 1e-4
"""How far the two may be apart, relative to the largest number that comes out."""
TOLERANCE_WIDE = 1e-6
"""The same in float64, where rounding hides nothing; some layers have numbers in float32 whatever they are told."""
RUNS = 2
_ZEROED = frozenset({AxisRole.OUT, AxisRole.IN, AxisRole.BIAS, AxisRole.SCALE, AxisRole.SHIFT})
"""What is set to zero; a variance of zero, or a number that others are divided by, would give no numbers."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How far two networks are apart, relative to the largest number that comes out."""

    error: float
    """As their runtime calculates."""
    wide: float | None = None
    """In float64, where their runtime can."""
    batches: int = 0
    """How many batches of the user's own data they were run on, besides random ones."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both networks, and what is compared."""

    source: GraphAdapter
    whole: Any
    smaller: Any
    after: PrunedShapes
    inner: Sequence[str]

    def runners(self, *, is_wide: bool) -> tuple[Runner, Runner]:
        """Return what runs the original, its channels silenced, and what runs the smaller network."""
        one, other = (self.source.runner(net, self.inner, is_wide=is_wide) for net in (self.whole, self.smaller))
        return one, other

    def apart(self, whole: list[Any], said: list[Any]) -> float:
        """Return how far apart what they say is."""
        outer = len(whole) - len(self.inner)
        inner = [self.after.without(*pair) for pair in zip(self.inner, whole[outer:], strict=True)]
        pairs = zip([*whole[:outer], *inner], said, strict=True)
        return max((relative_difference(first, second) for first, second in pairs), default=0.0)


def verify(
    source: GraphAdapter, smaller: Any, plan: ChannelPlan, seed: int, given: Sequence[Feeds] = ()
) -> Verification:
    """Return how far the two networks are apart at most; WorkError if that is too far.

    Where channels are dead, nothing is silenced: without them, the network says what it always said.
    """
    # What a constant was folded into may lie behind the layer that read it.
    inner = [] if plan.is_lossless else _changed(source, plan.after)
    silent = source.with_weights(
        {} if plan.is_lossless else _with_zeroed_channels(source.graph, plan.after.trace, plan.gone)
    )
    pair = _Pair(source, silent, smaller, plan.after, inner)
    random = np.random.default_rng(seed)
    made = [source.feeds(random) for _ in range(RUNS)]
    error = _in_usual(pair, [*made, *given])
    return Verification(error, _in_float64(pair, made[0]) if source.has_float64 else None, len(given))


def _in_usual(pair: _Pair, inputs: Sequence[Feeds]) -> float:
    one, other = pair.runners(is_wide=False)
    worst = 0.0
    for feeds in inputs:
        try:
            worst = max(worst, pair.apart(one(feeds), other(feeds)))
        except Exception as error:
            raise _unable(error) from error
    return _within(worst, TOLERANCE)


def _in_float64(pair: _Pair, feeds: Feeds) -> float | None:
    """Return how far they are apart where numbers are long; None if the original itself does not run so."""
    wide = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in feeds.items()}
    try:
        one, other = pair.runners(is_wide=True)
        whole = one(wide)
    except Exception:  # noqa: BLE001 - a layer of somebody's own may take 32 bits alone
        return None
    try:
        return _within(pair.apart(whole, other(wide)), TOLERANCE_WIDE, " in float64")
    except WorkError:
        raise
    except Exception as error:
        raise _unable(error) from error


def _unable(error: Exception) -> WorkError:
    return WorkError(f"the cut network cannot be run: {first_line(error)}; nothing was written")


def _within(found: float, limit: float, where: str = "") -> float:
    if not found <= limit:
        raise WorkError(
            f"the cut network differs from the original by {found:.1e}{where}, more than {limit:g}; "
            "nothing was written",
            hint="leave out some layers with --exclude",
        )
    return found


def relative_difference(one: Any, other: Any) -> float:
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


def _with_zeroed_channels(graph: ChannelGraph, trace: LabelTrace, removed: RemovedIndices) -> dict[str, Array]:
    """Return the weights of the original that make or read what was cut, with zeros in these places."""
    parts = {(note.tensor, note.axis): note.part for note in trace.notes}
    found: dict[str, Array] = {}
    for (name, axis), indices in removed.items():
        if parts[name, axis] in _ZEROED:
            array = found.setdefault(name, np.array(graph.weights[name]))
            np.moveaxis(array, axis, 0)[indices] = 0
    return found


def _changed(source: GraphAdapter, after: PrunedShapes) -> list[str]:
    """Return what the layers say that lost inputs or outputs.

    A softmax at the end of a network may hide what is wrong before it, and a signal may die on its way there.
    """
    names = [
        node.outputs[0]
        for node in source.graph.nodes
        if node.kind in {OpKind.CONVOLUTION, OpKind.LINEAR}
        and any(map(after.has_changed, (node.inputs[0], node.outputs[0])))
    ]
    showable = source.showable.difference(source.graph.outputs)
    return [name for name in dict.fromkeys(names) if name in showable]


_SECONDS = 2.0
"""How long the two are run at most, in turns, so that what else the machine does falls on both."""
_RUNS = 50
_WARM = 2


def latency(source: GraphAdapter, smaller: Any, seed: int) -> tuple[float, float]:
    """Return the median seconds of a run of both networks in their own runtime."""
    feeds = source.feeds(np.random.default_rng(seed))
    runners = (source.runner(source.with_weights({}), ()), source.runner(smaller, ()))
    for run in runners * _WARM:
        run(feeds)
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(taken[0]) < _RUNS and (not taken[1] or time.perf_counter() - began < _SECONDS):
        for run, seconds in zip(runners, taken, strict=True):
            seconds.append(_timed(run, feeds))
    return median(taken[0]), median(taken[1])


def _timed(run: Runner, feeds: Feeds) -> float:
    began = time.perf_counter()
    run(feeds)
    return time.perf_counter() - began
