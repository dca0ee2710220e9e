"""Statistics of a model: of every tensor, and the totals."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prunectl.analysis.tensor_io import blocks, count_zeros, is_contiguous, nonzero_mask
from prunectl.formats import extents
from prunectl.formats.base import PRUNABLE, WEIGHTS, ModelFile, ModelInfo, Operation, Role, Tensor, dtype_name

if TYPE_CHECKING:
    from prunectl.analysis.patterns import Pattern
    from prunectl.formats.families import Architecture

_EXPONENTS = range(-1100, 1100)
_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of weights by magnitude."""

    zero: int
    below: int
    """Weights that are not zero, but smaller than the first edge."""
    edges: tuple[float, ...]
    """Ascending powers of two; a bin reaches from one edge to the next."""
    counts: tuple[int, ...]
    not_finite: int


def histogram(model: ModelFile, tensors: Iterable[Tensor]) -> Histogram:
    """Histogram of the magnitudes of some tensors: a bin for each power of two, at most the sixteen largest."""
    totals = np.zeros(len(_EXPONENTS), np.int64)
    zero = not_finite = 0
    for tensor in tensors:
        for block in blocks(model, tensor):
            values = block.astype(np.float64).ravel()
            finite = values[np.isfinite(values)]
            not_finite += values.size - finite.size
            nonzero = finite[finite != 0]
            zero += finite.size - nonzero.size
            # frexp gives 0.5 <= m < 1 with v = m * 2**e, so that the bin of v is [2**(e-1), 2**e).
            exponents = np.frexp(nonzero)[1] - 1
            totals += np.bincount(exponents - _EXPONENTS.start, minlength=totals.size)
    filled = np.flatnonzero(totals)
    if not filled.size:
        return Histogram(zero, 0, (), (), not_finite)
    first = max(int(filled[0]), int(filled[-1]) - _SHOWN + 1)
    counts = tuple(int(count) for count in totals[first : int(filled[-1]) + 1])
    edges = tuple(_power(_EXPONENTS[first + step]) for step in range(len(counts) + 1))
    return Histogram(zero, int(totals[:first].sum()), edges, counts, not_finite)


def _power(exponent: int) -> float:
    """2 to the power of `exponent`; the largest float if that is too large."""
    return math.ldexp(1.0, exponent) if exponent < sys.float_info.max_exp else sys.float_info.max


Run = tuple[int, int, str]
"""First byte and end of a range of a storage, and the name of the tensor that owns it."""


def find_tied_tensors(tensors: Iterable[Tensor], first: Container[str] = ()) -> dict[str, str]:
    """The names of tied tensors, each with the name of its owner: the tensor whose bytes it overlaps.

    Views of different parts of one storage, such as the weights of a recurrent layer in one buffer, are not tied.
    Tensors named in `first` become owners before others, then weights, then larger tensors, then earlier ones.
    """
    tied_to: dict[str, str] = {}
    runs_of: defaultdict[str, list[Run]] = defaultdict(list)
    tensors = tuple(tensors)
    uses = Counter(tensor.storage.key for tensor in tensors)
    shared = (tensor for tensor in tensors if uses[tensor.storage.key] > 1)
    for tensor in sorted(shared, key=lambda item: (item.name not in first, item.role not in WEIGHTS, -item.size)):
        runs, run = runs_of[tensor.storage.key], _run(tensor)
        i = bisect_right(runs, run)
        neighbours = runs[max(i - 1, 0) : i + 1]
        overlapping = (other for other in neighbours if other[0] < run[1] and run[0] < other[1])
        owner = next(overlapping, None)
        if owner is not None:
            tied_to[tensor.name] = owner[2]
        elif tensor.size:
            runs.insert(i, run)
    return tied_to


def _run(tensor: Tensor) -> Run:
    length = tensor.size
    if tensor.strides is not None and tensor.size:
        length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    begin = tensor.start * tensor.dtype.itemsize
    return begin, begin + length * tensor.dtype.itemsize, tensor.name


Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SizeStats:
    """Sizes of the whole model."""

    raw: int
    packed: int | None = None
    """Size with the container's own lossless compression."""
    compressed: int | None = None
    """Size with the codec of the report."""


@dataclass(frozen=True, slots=True)
class ParamCounts:
    """Counts of parameters; tied tensors count once."""

    total: int
    prunable: int
    zero: int | None
    prunable_zero: int | None


@dataclass(frozen=True, slots=True)
class FileSection:
    """A part of the file, such as `weights` or `optimizer`; a dead part is not needed for inference."""

    name: str
    bytes: int
    is_dead: bool


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Statistics of one tensor."""

    name: str
    layer: str
    kind: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    params: int
    bytes: int
    is_prunable: bool
    """Whether its zeros count for the sparsity of the prunable weights."""
    tied_to: str = ""
    zeros: int | None = None
    channels: int | None = None
    dead_channels: int | None = None
    conforming: float | None = None
    """Share of the pattern's groups that follow it."""
    macs: int | None = None

    @property
    def sparsity(self) -> float | None:
        """Share of the elements that are zero."""
        return None if self.zeros is None else self.zeros / self.params if self.params else 0.0

    def reaches(self, sparsity: float) -> bool:
        """Whether at least as many elements are zero as after pruning to a sparsity."""
        return _reaches(self.zeros, [self.params], sparsity)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Error of a compressed size that was estimated from a sample."""

    error: float
    """Half the width of the 95 % interval, as a share of the size."""
    sampled: int
    """Bytes that were compressed for the estimate."""


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Statistics of a model, from which the reports are made."""

    path: str
    format: str
    bytes: SizeStats
    params: ParamCounts
    parts: tuple[FileSection, ...]
    layers: tuple[TensorStats, ...]
    about: ModelInfo
    pattern: str = ""
    macs: int | None = None
    macs_unknown: tuple[str, ...] = ()
    histogram: Histogram | None = None
    advice: tuple[str, ...] = ()
    sha256: str | None = None
    architecture: Architecture | None = None
    """Architecture of a model folder, set by `inspect` only."""
    estimate: Estimate | None = None
    """Set if the compressed size is an estimate."""

    @property
    def sparsity(self) -> float | None:
        """Share of all parameters that are zero."""
        return ratio(self.params.zero, self.params.total)

    @property
    def prunable_sparsity(self) -> float | None:
        """Share of the prunable parameters that are zero."""
        return ratio(self.params.prunable_zero, self.params.prunable)

    def reaches(self, sparsity: float) -> bool:
        """Whether at least as many weights are zero as after pruning to a sparsity, rounded once or in each tensor."""
        sizes = [row.params for row in self.layers if _is_pruned(row)] or [self.params.prunable]
        return _reaches(self.params.prunable_zero, sizes, sparsity)


def whole_weights(sparsity: float, size: int) -> int:
    """Number of zeros among `size` weights; rounding never prunes the last one, as in tfmot, if sparsity is below 1."""
    count = round(sparsity * size)
    return count if sparsity >= 1.0 else min(count, size - 1)


def _reaches(zeros: int | None, sizes: Collection[int], sparsity: float) -> bool:
    if not sum(sizes):
        return sparsity <= 0
    least = min(whole_weights(sparsity, sum(sizes)), sum(whole_weights(sparsity, size) for size in sizes))
    return (zeros or 0) >= least


def ratio(part: int | None, whole: int) -> float | None:
    """A share; None if the part is unknown, and 0 if the whole is 0."""
    if part is None:
        return None
    return part / whole if whole else 0.0


def measure_stats(
    model: ModelFile,
    chosen: Iterable[Tensor],
    *,
    has_zeros: bool = True,
    has_channels: bool = True,
    pattern: Pattern | None = None,
    tick: Tick = lambda _: None,
    zeros: Mapping[str, int] = MappingProxyType({}),
) -> ModelStats:
    """Measure tensors of a model; without `has_zeros` no weight is read, without `has_channels` none is read twice.

    Tensors whose number of zeros is given in `zeros` are only read if `has_channels` is set.
    """
    chosen = tuple(chosen)
    with extents.read_ahead():
        rows = _measure_tensors(model, chosen, pattern, tick, zeros, has_zeros=has_zeros, has_channels=has_channels)
    raw = model.nbytes
    return ModelStats(
        path=str(model.path),
        format=model.format,
        bytes=SizeStats(raw=raw),
        params=totals(rows),
        parts=_parts(model, raw),
        layers=tuple(rows),
        about=model.about,
    )


def _measure_tensors(
    model: ModelFile,
    chosen: Sequence[Tensor],
    pattern: Pattern | None,
    tick: Tick,
    zeros: Mapping[str, int],
    *,
    has_zeros: bool,
    has_channels: bool,
) -> list[TensorStats]:
    rows = []
    tied_to = find_tied_tensors(chosen)
    # Tensors with the same identity have the same contents, so only the first is read.
    known: dict[tuple[object, ...], _Contents] = {}
    uses = Counter(tensor.storage.key for tensor in chosen)
    for tensor in chosen:
        key = _contents_key(tensor) if has_zeros and uses[tensor.storage.key] > 1 else None
        contents = known.get(key, _Contents()) if key is not None else _Contents()
        if contents.zeros is None and not has_channels:
            contents = _Contents(zeros.get(tensor.name))
        if has_zeros and contents.zeros is None:
            contents = _read_contents(model, tensor, pattern, has_channels=has_channels)
            if key is not None:
                known[key] = contents
        rows.append(_row(tensor, tied_to.get(tensor.name, ""), contents))
        tick(tensor.storage.stored_bytes)
    return rows


def _contents_key(tensor: Tensor) -> tuple[object, ...]:
    """Key of tensors with the same statistics: equal views with equal axes."""
    return tensor.view_key, tensor.out_axis, tensor.reduction_axis, tensor.is_prunable


def _is_pruned(row: TensorStats) -> bool:
    return row.is_prunable and row.role in WEIGHTS and not row.tied_to


def totals(rows: Iterable[TensorStats]) -> ParamCounts:
    """Count the parameters that inference needs, tied tensors once."""
    counted = [row for row in rows if row.role in WEIGHTS and not row.tied_to]
    prunable = [row for row in counted if _is_pruned(row)]
    return ParamCounts(
        total=sum(row.params for row in counted),
        prunable=sum(row.params for row in prunable),
        zero=_sum_or_none(counted),
        prunable_zero=_sum_or_none(prunable),
    )


def with_macs(measured: ModelStats, operations: Iterable[Operation]) -> ModelStats:
    """The statistics with the multiply-accumulates (MACs) of the graph, and of each weight."""
    macs: Counter[str] = Counter()
    unknown = []
    for operation in operations:
        if operation.macs is None:
            unknown.append(operation.layer)
        else:
            macs[operation.weight] += operation.macs
    rows = tuple(replace(row, macs=macs.get(row.name)) for row in measured.layers)
    return replace(measured, layers=rows, macs=macs.total(), macs_unknown=tuple(unknown))


def _sum_or_none(rows: list[TensorStats]) -> int | None:
    zeros = [row.zeros for row in rows]
    return sum(zero for zero in zeros if zero is not None) if None not in zeros else None


class _Contents(NamedTuple):
    """Statistics for which a tensor must be read."""

    zeros: int | None = None
    dead_channels: int | None = None
    conforming: float | None = None


def _row(tensor: Tensor, tied_to: str, contents: _Contents) -> TensorStats:
    return TensorStats(
        name=tensor.name,
        layer=tensor.layer,
        kind=tensor.kind,
        role=tensor.role,
        shape=tensor.shape,
        dtype=dtype_name(tensor.dtype),
        params=tensor.size,
        bytes=tensor.storage.stored_bytes,
        is_prunable=tensor.is_prunable or _is_quantised(tensor),
        tied_to=tied_to,
        zeros=contents.zeros,
        dead_channels=contents.dead_channels,
        conforming=contents.conforming,
        channels=None if tensor.out_axis is None else tensor.shape[tensor.out_axis],
    )


def _is_quantised(tensor: Tensor) -> bool:
    """Whether it is a kernel in 8 bits, pruned before it was quantised: zeros stay zeros in signed bytes."""
    return tensor.role in PRUNABLE and dtype_name(tensor.dtype) == "int8" and len(tensor.shape) >= 2


def _read_contents(model: ModelFile, tensor: Tensor, pattern: Pattern | None, *, has_channels: bool) -> _Contents:
    slabs = None
    if is_contiguous(tensor) and 0 < tensor.nbytes <= extents.BLOCK_BYTES:
        # The tensor is one block, which is read once for both measurements.
        array = next(blocks(model, tensor)).reshape(tensor.shape)
        slabs, zeros = [(0, array)], tensor.size - int(np.count_nonzero(nonzero_mask(array)))
    else:
        zeros = count_zeros(model, tensor)
    if not has_channels or tensor.out_axis is None or not tensor.size:
        return _Contents(zeros)
    applicable = pattern if tensor.is_prunable else None
    if applicable is None and zeros < tensor.size // tensor.shape[tensor.out_axis]:
        # Fewer zeros than a channel has weights: no channel can be dead, and no second pass is needed.
        return _Contents(zeros, 0)
    from prunectl.analysis.patterns import structured_sparsity  # noqa: PLC0415 - dense models do not need it

    structure = structured_sparsity(model, tensor, tensor.out_axis, applicable, slabs)
    return _Contents(zeros, structure.dead_channels, structure.conforming)


def _parts(model: ModelFile, raw: int) -> tuple[FileSection, ...]:
    sizes = {"weights": 0, "masks": 0, "optimizer": 0}
    part_of = {Role.MASK: "masks", Role.SCHEDULE: "masks", Role.OPTIMIZER: "optimizer"}
    seen: set[str] = set()
    for tensor in model.tensors:
        if tensor.storage.key not in seen:
            seen.add(tensor.storage.key)
            sizes[part_of.get(tensor.role, "weights")] += tensor.storage.stored_bytes
    sizes["code"] = model.about.code_bytes
    sizes["example inputs"] = model.about.example_bytes
    sizes["other"] = max(raw - sum(sizes.values()), 0)
    training_only = {"masks", "optimizer", "example inputs"}
    return tuple(
        FileSection(name, size, name in training_only) for name, size in sizes.items() if size or name == "weights"
    )
