"""What is in a model: every tensor measured, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from prunectl.formats.base import PRUNABLE, WEIGHTS, About, ModelFile, Operation, Role, Tensor
from prunectl.measuring.histogram import Histogram
from prunectl.measuring.patterns import Pattern
from prunectl.measuring.regularity import regularity
from prunectl.measuring.ties import ties
from prunectl.measuring.zeros import count_zeros

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Sizes of the whole model."""

    raw: int
    packed: int | None = None
    """As the container's own lossless compression would leave it."""
    compressed: int | None = None
    """As the codec of the report leaves it."""


@dataclass(frozen=True, slots=True)
class Params:
    """Counts of parameters; tied tensors count once."""

    total: int
    prunable: int
    zero: int | None
    prunable_zero: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the file, and whether a trained model needs it."""

    name: str
    bytes: int
    is_dead: bool


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One tensor, measured."""

    name: str
    layer: str
    kind: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    params: int
    bytes: int
    is_prunable: bool
    """Whether its zeros are what sparsity is about."""
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


@dataclass(frozen=True, slots=True)
class Survey:
    """A model, measured: what the reports are drawn from."""

    path: str
    format: str
    bytes: Bytes
    params: Params
    parts: tuple[Part, ...]
    layers: tuple[LayerRow, ...]
    about: About
    pattern: str = ""
    macs: int | None = None
    macs_unknown: tuple[str, ...] = ()
    histogram: Histogram | None = None
    advice: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def sparsity(self) -> float | None:
        """Share of all parameters that are zero."""
        return ratio(self.params.zero, self.params.total)

    @property
    def prunable_sparsity(self) -> float | None:
        """Share of the prunable parameters that are zero."""
        return ratio(self.params.prunable_zero, self.params.prunable)


def ratio(part: int | None, whole: int) -> float | None:
    """Return a share; unknown if the part is, none of nothing."""
    if part is None:
        return None
    return part / whole if whole else 0.0


def survey(
    model: ModelFile,
    chosen: Iterable[Tensor],
    *,
    has_zeros: bool = True,
    has_channels: bool = True,
    pattern: Pattern | None = None,
    tick: Tick = lambda _: None,
) -> Survey:
    """Measure some tensors of a model; without zeros no weight is read, without channels none twice."""
    rows = []
    chosen = tuple(chosen)
    tied_to = ties(chosen)
    # Of tensors that are measured alike, all but the first are told from it.
    known: dict[tuple[object, ...], LayerRow] = {}
    uses = Counter(tensor.storage.key for tensor in chosen)
    for tensor in chosen:
        row = _row(tensor, tied_to.get(tensor.name, ""))
        same = _identity(tensor) if has_zeros and uses[tensor.storage.key] > 1 else None
        if same is not None and same in known:
            twin = known[same]
            row = replace(row, zeros=twin.zeros, dead_channels=twin.dead_channels, conforming=twin.conforming)
        elif has_zeros:
            row = replace(row, zeros=count_zeros(model, tensor))
            row = _looked_at_again(model, tensor, row, pattern) if has_channels else row
            if same is not None:
                known[same] = row
        rows.append(row)
        tick(tensor.storage.stored_bytes)
    raw = model.nbytes
    return Survey(
        path=str(model.path),
        format=model.format,
        bytes=Bytes(raw=raw),
        params=totals(rows),
        parts=_parts(model, raw),
        layers=tuple(rows),
        about=model.about,
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common that are measured alike."""
    return tensor.view, tensor.out_axis, tensor.inputs_axis, tensor.is_prunable


def totals(rows: Iterable[LayerRow]) -> Params:
    """Add up what a model needs to predict, each storage once."""
    counted = [row for row in rows if row.role in WEIGHTS and not row.tied_to]
    prunable = [row for row in counted if row.is_prunable]
    return Params(
        total=sum(row.params for row in counted),
        prunable=sum(row.params for row in prunable),
        zero=_sum_known(counted),
        prunable_zero=_sum_known(prunable),
    )


def with_macs(measured: Survey, operations: Iterable[Operation]) -> Survey:
    """Return the survey with the multiply-accumulates of the graph, and of each weight."""
    macs: Counter[str] = Counter()
    unknown = []
    for operation in operations:
        if operation.macs is None:
            unknown.append(operation.layer)
        else:
            macs[operation.weight] += operation.macs
    rows = tuple(replace(row, macs=macs.get(row.name)) for row in measured.layers)
    return replace(measured, layers=rows, macs=macs.total(), macs_unknown=tuple(unknown))


def _sum_known(rows: list[LayerRow]) -> int | None:
    zeros = [row.zeros for row in rows]
    return sum(zero for zero in zeros if zero is not None) if None not in zeros else None


def _row(tensor: Tensor, tied_to: str) -> LayerRow:
    return LayerRow(
        name=tensor.name,
        layer=tensor.layer,
        kind=tensor.kind,
        role=tensor.role,
        shape=tensor.shape,
        dtype=tensor.dtype.name,
        params=tensor.size,
        bytes=tensor.storage.stored_bytes,
        is_prunable=tensor.is_prunable or _is_quantised(tensor),
        tied_to=tied_to,
        channels=None if tensor.out_axis is None else tensor.shape[tensor.out_axis],
    )


def _is_quantised(tensor: Tensor) -> bool:
    """Whether it is a kernel in 8 bits, pruned before it was quantised: zeros stay zeros in signed bytes."""
    return tensor.role in PRUNABLE and tensor.dtype.name == "int8" and len(tensor.shape) >= 2


def _looked_at_again(model: ModelFile, tensor: Tensor, row: LayerRow, pattern: Pattern | None) -> LayerRow:
    if tensor.out_axis is None or not tensor.size:
        return row
    wanted = pattern if tensor.is_prunable else None
    if wanted is None and (row.zeros or 0) < tensor.size // tensor.shape[tensor.out_axis]:
        # Fewer zeros than a channel has weights: none can be dead, and no second look is needed.
        return replace(row, dead_channels=0)
    found = regularity(model, tensor, tensor.out_axis, wanted)
    return replace(row, dead_channels=found.dead_channels, conforming=found.conforming)


def _parts(model: ModelFile, raw: int) -> tuple[Part, ...]:
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
    dead = {"masks", "optimizer", "example inputs"}
    return tuple(Part(name, size, name in dead) for name, size in sizes.items() if size or name == "weights")
