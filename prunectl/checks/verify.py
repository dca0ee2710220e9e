"""Is a written file what its manifest says, and its source with zeros added?"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.analysis import sizes
from prunectl.analysis.tensor_io import ProgressFactory, count_zeros, no_progress, nonzero_mask
from prunectl.checks.matching import TensorView, bitwise_differs, iter_paired_chunks
from prunectl.checks.parse import Limit
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import PrunectlError, attempt
from prunectl.formats.base import Capability, ModelFile, Tensor
from prunectl.formats.registry import by_name, load
from prunectl.pruning.manifest import ManifestRecord, RecordedTensor


@dataclass(frozen=True, slots=True)
class Violation:
    """What was found of something that must be nothing."""

    id: str
    metric: str
    actual: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Tally:
    """What is not as it must be in a tensor."""

    other: int
    """Kept weights that are not what they were, to the bit."""
    lost: int
    """Zeros that are none any more."""
    gained: int


def verify_source(
    model: ModelFile, source: ModelFile, cuts: Container[str] | None = None, meter: ProgressFactory = no_progress
) -> tuple[list[Violation], dict[str, int]]:
    """Return what differs, and the zeros added by tensor; with cuts, zeros may be added to these alone."""
    pairs = _pairs(model, source)
    tallies = {}
    with meter("comparing", sum(tensor.nbytes for tensor, _ in pairs)) as bar:
        for tensor, was in pairs:
            tallies[tensor.name] = _tally(model, tensor, source, was)
            bar.advance(tensor.nbytes)
    found = [
        Violation("architecture", "differences", *_format_counts(list(_architecture(model, source)))),
        Violation("kept-weights", "weights_changed", *_sum({name: one.other for name, one in tallies.items()})),
        Violation("kept-zeros", "zeros_lost", *_sum({name: one.lost for name, one in tallies.items()})),
    ]
    if cuts is not None:
        strange = {name: one.gained for name, one in tallies.items() if name not in cuts and name not in model.copies}
        found.append(Violation("other-tensors", "zeros_gained", *_sum(strange)))
    return found, {name: one.gained for name, one in tallies.items()}


def _pairs(model: ModelFile, source: ModelFile) -> list[tuple[Tensor, Tensor]]:
    was = {tensor.name: tensor for tensor in source.tensors}
    pairs = ((tensor, was.get(tensor.name)) for tensor in model.tensors)
    return [(tensor, old) for tensor, old in pairs if old is not None and _kind(tensor) == _kind(old)]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


def _tally(model: ModelFile, tensor: Tensor, source: ModelFile, was: Tensor) -> _Tally:
    other = lost = gained = 0
    for now, then in iter_paired_chunks(TensorView(model, tensor), TensorView(source, was)):
        kept, had = nonzero_mask(now), nonzero_mask(then)
        other += int(np.count_nonzero(kept & had & bitwise_differs(now, then)))
        lost += int(np.count_nonzero(kept & ~had))
        gained += int(np.count_nonzero(had & ~kept))
    return _Tally(other, lost, gained)


def _architecture(model: ModelFile, source: ModelFile) -> Iterator[str]:
    """Yield what is built in another way."""
    if model.format != source.format:
        yield f"the format is {model.format}, and was {source.format}"
    is_kind = {tensor.name: _kind(tensor) for tensor in model.tensors}
    was_kind = {tensor.name: _kind(tensor) for tensor in source.tensors}
    for name in dict.fromkeys((*was_kind, *is_kind)):
        if name not in is_kind:
            yield f"{name} is gone"
        elif name not in was_kind:
            yield f"{name} is new"
        elif is_kind[name] != was_kind[name]:
            yield f"{name} has another shape or type"
    if model.about.keras != source.about.keras:
        yield "the configuration of Keras is another"
    if model.format == source.format and Capability.FLOPS & by_name(model.format).can:
        # A file without a graph has none before and after.
        here, there = (attempt(load(by_name(one.format).graph), one) for one in (model, source))
        if not (here == there or (isinstance(here, PrunectlError) and isinstance(there, PrunectlError))):
            yield "the graph has other operations"


def _format_counts(differences: list[str]) -> tuple[int, str]:
    return len(differences), f"The first: {differences[0]}." if differences else ""


def _sum(counts: dict[str, int]) -> tuple[int, str]:
    first = next((f"The first: {name} has {count}." for name, count in counts.items() if count), "")
    return sum(counts.values()), first


def verify(
    model: ModelFile, record: ManifestRecord | None, source: ModelFile | None, meter: ProgressFactory = no_progress
) -> tuple[Finding, ...]:
    """Return a verdict for everything that must hold; each counts what does not."""
    held = list(_recorded(model, record)) if record is not None else []
    if source is not None:
        cuts = {cut.name for cut in record.cuts} if record is not None else None
        found, gained = verify_source(model, source, cuts, meter)
        held += found
        if record is not None:
            held += _run(source, record, gained)
    return tuple(_finding(model, one) for one in held)


def _recorded(model: ModelFile, record: ManifestRecord) -> Iterator[Violation]:
    """Yield whether the bytes, the tensors and the zeros are those of the manifest."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    wrong = []
    for cut in record.cuts:
        tensor = tensors.get(cut.name)
        if tensor is None:
            wrong.append(f"{cut.name} is not there")
        elif tensor.shape != cut.shape:
            wrong.append(f"{cut.name} has another shape")
        elif (zeros := count_zeros(model, tensor)) != cut.zeros:
            wrong.append(f"{cut.name} has {zeros} zeros, and had {cut.zeros}")
    yield Violation("zeros", "tensors", len(wrong), f"The first: {wrong[0]}." if wrong else "")
    yield _digest("digest", model, record.output_sha256)


def _run(source: ModelFile, record: ManifestRecord, gained: dict[str, int]) -> Iterator[Violation]:
    """Yield whether the run of the manifest leads from the source to the file."""
    yield _digest("source-digest", source, record.input_sha256)
    if record.has_doomed:
        return
    wrong = [cut for cut in record.cuts if not _accounted_for(cut, gained)]
    note = f"The first: {wrong[0].name} lost {gained.get(wrong[0].name, 0)} weights." if wrong else ""
    yield Violation("dropped", "tensors", len(wrong), note)


def _accounted_for(cut: RecordedTensor, gained: dict[str, int]) -> bool:
    # A weight that was zero before may have been dropped as well.
    return gained.get(cut.name, cut.dropped + 1) <= cut.dropped


def _digest(name: str, model: ModelFile, wanted: str) -> Violation:
    found = sizes.sha256(model)
    note = "" if found == wanted else f"{model.path.name} has {found[:12]}…, the manifest says {wanted[:12]}…"
    return Violation(name, "sha256", int(found != wanted), note)


def _finding(model: ModelFile, one: Violation) -> Finding:
    limit = Limit(one.id, MetricUnit.COUNT, 1, fail=0)
    return evaluate_limit(str(model.path), one.metric, one.actual, limit, note=one.note)
