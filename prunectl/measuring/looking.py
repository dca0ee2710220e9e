"""What `inspect` looks for in a model, and in which order it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from prunectl.formats.base import Can, ModelFile
from prunectl.formats.names import select
from prunectl.formats.table import by_name, load, require
from prunectl.measuring import advice, archive
from prunectl.measuring.histogram import histogram
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.patterns import Pattern
from prunectl.measuring.survey import LayerRow, Survey, survey, with_macs


class Order(StrEnum):
    """What comes first."""

    SIZE = "size"
    SPARSITY = "sparsity"
    PARAMS = "params"
    NAME = "name"


_KEYS: dict[Order, Callable[[LayerRow], Any]] = {
    Order.SIZE: lambda row: -row.bytes,
    Order.SPARSITY: lambda row: -(row.sparsity or 0.0),
    Order.PARAMS: lambda row: -row.params,
    Order.NAME: lambda row: row.name,
}


@dataclass(frozen=True, slots=True)
class Look:
    """What to look for."""

    layers: str = ""
    order: Order | None = None
    pattern: str = ""
    has_histogram: bool = False
    has_flops: bool = False
    has_zeros: bool = True
    has_digest: bool = False
    """Whether to hash the model, which reads every byte of it."""


def look(model: ModelFile, wanted: Look, pattern: Pattern | None = None, meter: Meter = unwatched) -> Survey:
    """Return a survey of a model with everything that is wanted in it."""
    if wanted.has_flops:
        require(model, Can.FLOPS)
    chosen = select(model, wanted.layers) if wanted.layers else model.tensors
    total = sum(tensor.storage.stored_bytes for tensor in chosen)
    with meter(f"reading {model.path.name}", total) as bar:
        found = survey(model, chosen, has_zeros=wanted.has_zeros, pattern=pattern, tick=bar.advance)
    if wanted.has_flops:
        found = with_macs(found, load(by_name(model.format).graph)(model))
    if wanted.has_histogram:
        found = replace(found, histogram=histogram(model, (tensor for tensor in chosen if tensor.is_prunable)))
    if wanted.has_digest and wanted.has_zeros:
        found = replace(found, sha256=archive.sha256(model))
    if wanted.order:
        found = replace(found, layers=tuple(sorted(found.layers, key=_KEYS[wanted.order])))
    return replace(found, pattern=wanted.pattern, advice=advice.advise(found))
