"""Equivalence check: the pruned network must compute the same as the original with zeroed channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from prunectl.analysis import timing
from prunectl.analysis.timing import Latency
from prunectl.channels.adapter import Feeds, GraphAdapter, PrunedShapes, RemovedIndices, Runner
from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.labels import AxisRole, LabelTrace
from prunectl.channels.plan import ChannelPlan
from prunectl.errors import WorkError, first_line
from prunectl.formats.base import Array

TOLERANCE = 1e-4
"""The largest allowed difference of the two, relative to the largest output."""
TOLERANCE_FLOAT64 = 1e-6
"""The same in float64, where rounding hides no error; not smaller, as some layers always compute in float32."""
RUNS = 2
_ZEROED = frozenset({AxisRole.OUT, AxisRole.IN, AxisRole.BIAS, AxisRole.SCALE, AxisRole.SHIFT})
"""The roles of weights that are set to zero; zeroing a variance or a divisor would give NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The difference of two networks, relative to the largest output."""

    error: float
    """In the networks' own precision."""
    error_float64: float | None = None
    """In float64; None if the runtime or the original cannot run in float64."""
    batches: int = 0
    """The number of batches of the user's data that they were run on, besides random ones."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two networks of an equivalence check."""

    source: GraphAdapter
    original: Any
    pruned: Any
    after: PrunedShapes
    inner: Sequence[str]

    def runners(self) -> tuple[Runner, Runner]:
        """The runners of the original with zeroed channels and of the pruned network."""
        return self.source.runner(self.original, self.inner), self.source.runner(self.pruned, self.inner)

    def in_float64(self, built: tuple[Runner, Runner]) -> tuple[Runner, Runner]:
        """The same two runners in float64, made from those in the networks' own precision."""
        original, pruned = (
            self.source.to_float64(run, network, self.inner)
            for network, run in zip((self.original, self.pruned), built, strict=True)
        )
        return original, pruned

    def difference(self, expected: list[Any], actual: list[Any]) -> float:
        """The largest relative difference of their outputs and observed inner values."""
        outer = len(expected) - len(self.inner)
        inner = [self.after.slice_value(*pair) for pair in zip(self.inner, expected[outer:], strict=True)]
        pairs = zip([*expected[:outer], *inner], actual, strict=True)
        return max((relative_difference(first, second) for first, second in pairs), default=0.0)


def verify(
    adapter: GraphAdapter, pruned: Any, plan: ChannelPlan, seed: int, batches: Sequence[Feeds] = ()
) -> Verification:
    """The largest difference of the two networks; WorkError if it is above the tolerance.

    If only dead channels are removed, the original is run without zeroed channels: its outputs must not change at all.
    """
    # Inner values may differ with dead channels: a constant may have been folded into a weight after the layer.
    inner = [] if plan.is_lossless else _changed_layers(adapter, plan.after)
    original = adapter.with_weights(
        {} if plan.is_lossless else _with_zeroed_channels(adapter.graph, plan.after.trace, plan.removed)
    )
    pair = _Pair(adapter, original, pruned, plan.after, inner)
    random = np.random.default_rng(seed)
    random_batches = [adapter.random_inputs(random) for _ in range(RUNS)]
    runners = pair.runners()
    error = _error_as_run(pair, runners, [*random_batches, *batches])
    return Verification(
        error, _error_in_float64(pair, runners, random_batches[0]) if adapter.has_float64 else None, len(batches)
    )


def _error_as_run(pair: _Pair, runners: tuple[Runner, Runner], inputs: Sequence[Feeds]) -> float:
    original, pruned = runners
    worst = 0.0
    for feeds in inputs:
        try:
            worst = max(worst, pair.difference(original(feeds), pruned(feeds)))
        except Exception as error:
            raise _cannot_run(pair, error) from error
    return _checked(worst, TOLERANCE)


def _error_in_float64(pair: _Pair, built: tuple[Runner, Runner], feeds: Feeds) -> float | None:
    """The difference in float64; None if the original itself cannot run in float64."""
    wide = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in feeds.items()}
    try:
        original, pruned = pair.in_float64(built)
        expected = original(wide)
    except Exception:  # noqa: BLE001 - a user's own layer may take float32 only, and raise anything
        return None
    try:
        return _checked(pair.difference(expected, pruned(wide)), TOLERANCE_FLOAT64, " in float64")
    except WorkError:
        raise
    except Exception as error:
        raise _cannot_run(pair, error) from error


def _cannot_run(pair: _Pair, error: Exception) -> WorkError:
    return WorkError(
        f"the pruned network cannot run: {first_line(error)}; nothing was written",
        hint=pair.source.length_hint,
    )


def _checked(error: float, limit: float, where: str = "") -> float:
    if not error <= limit:
        raise WorkError(
            f"the outputs of the pruned network differ from the original's by {error:.1e}{where}, more than {limit:g}; "
            "nothing was written",
            hint="leave out some layers with --exclude",
        )
    return error


def relative_difference(expected: Any, actual: Any) -> float:
    """The largest difference, relative to the largest |expected|; infinite if shapes or places of NaN/inf differ."""
    left, right = np.asarray(expected), np.asarray(actual)
    if left.shape != right.shape:
        return float("inf")
    if left.dtype.kind not in "fiub" or not left.size:
        return 0.0 if np.array_equal(left, right) else float("inf")
    left_wide, right_wide = left.astype(np.float64), right.astype(np.float64)
    is_number = np.isfinite(left_wide)
    if not np.array_equal(is_number, np.isfinite(right_wide)):
        return float("inf")
    difference = np.abs(left_wide - right_wide)[is_number].max(initial=0.0)
    return float(difference / max(np.abs(left_wide)[is_number].max(initial=0.0), np.finfo(np.float32).tiny))


def _with_zeroed_channels(graph: ChannelGraph, trace: LabelTrace, removed: RemovedIndices) -> dict[str, Array]:
    """The weights of the original that produce or read removed channels, with zeros at their indices."""
    roles = {(record.tensor, record.axis): record.role for record in trace.axis_records}
    arrays: dict[str, Array] = {}
    for (name, axis), indices in removed.items():
        if roles[name, axis] in _ZEROED:
            array = arrays.setdefault(name, np.array(graph.weights[name]))
            np.moveaxis(array, axis, 0)[indices] = 0
    return arrays


def _changed_layers(adapter: GraphAdapter, after: PrunedShapes) -> list[str]:
    """The observable outputs of the layers that lost inputs or outputs.

    The outputs of the network alone may hide an error: a softmax may saturate, or a signal may vanish before the end.
    """
    names = [
        node.outputs[0]
        for node in adapter.graph.nodes
        if node.kind in {OpKind.CONVOLUTION, OpKind.LINEAR}
        and any(map(after.has_changed, (node.inputs[0], node.outputs[0])))
    ]
    observable = adapter.observable.difference(adapter.graph.outputs)
    return [name for name in dict.fromkeys(names) if name in observable]


_SECONDS = 3.0
"""The time for measuring both networks, unless the fewest rounds take longer."""


def measure_latency(adapter: GraphAdapter, pruned: Any, seed: int) -> tuple[Latency, ...]:
    """The latency of both networks in their own runtime, for one example."""
    feeds = adapter.random_inputs(np.random.default_rng(seed))
    runners = (adapter.runner(adapter.with_weights({}), ()), adapter.runner(pruned, ()))
    return timing.measure([partial(run, feeds) for run in runners], seconds=_SECONDS, seed=seed)
