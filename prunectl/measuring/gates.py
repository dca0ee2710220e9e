"""Limits on a model, and whether it keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.measuring.survey import Survey
from prunectl.units import Units, nbytes, percent, printable


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit, and what was found."""

    id: str
    metric: str
    limit: float
    """An integer where it counts bytes, a fraction where it is a share."""
    actual: float
    ok: bool
    model: str
    level: str = "error"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model must keep to; None where it may do as it likes."""

    max_raw: int | None = None
    max_packed: int | None = None
    max_compressed: int | None = None
    min_sparsity: float | None = None
    baseline: Survey | None = None
    max_growth_bytes: int | None = None
    """Growth of the compressed size over the baseline's, in bytes."""
    max_growth_ratio: float | None = None
    """The same, as a share of the baseline's."""


def judge(found: Survey, limits: Limits) -> tuple[Gate, ...]:
    """Return every limit that was set, each with its verdict."""
    sizes = found.bytes
    gates = [
        _at_most(found, "max-raw", "bytes.raw", limits.max_raw, sizes.raw),
        _at_most(found, "max-packed", "bytes.packed", limits.max_packed, sizes.packed),
        _at_most(found, "max-gzip", "bytes.compressed", limits.max_compressed, sizes.compressed),
    ]
    if limits.min_sparsity is not None:
        actual = found.prunable_sparsity or 0.0
        enough = actual >= limits.min_sparsity
        gates.append(Gate("min-sparsity", "prunable_sparsity", limits.min_sparsity, actual, enough, found.path))
    if limits.baseline is not None and sizes.compressed is not None and limits.baseline.bytes.compressed:
        before = limits.baseline.bytes.compressed
        growth = sizes.compressed - before
        gates.append(_at_most(found, "max-growth", "bytes.compressed", limits.max_growth_bytes, growth))
        gates.append(_at_most(found, "max-growth", "bytes.compressed", limits.max_growth_ratio, growth / before))
    return tuple(gate for gate in gates if gate is not None)


def _at_most(found: Survey, name: str, metric: str, limit: float | None, actual: float | None) -> Gate | None:
    if limit is None or actual is None:
        return None
    return Gate(name, metric, limit, actual, actual <= limit, found.path)


def gate_sentence(gate: Gate, units: Units) -> str:
    """Return a limit and what was found, as people read them."""
    is_bytes = isinstance(gate.limit, int)
    found, limit = (nbytes(int(value), units) if is_bytes else percent(value) for value in (gate.actual, gate.limit))
    return f"{gate.id}: {printable(gate.model)} has {found}, the limit is {limit}"
