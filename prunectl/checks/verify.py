"""Verification of a file against its manifest and its dense source."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from prunectl.analysis import sizes
from prunectl.analysis.tensor_io import ProgressFactory, count_zeros, no_progress
from prunectl.checks.matching import ElementChanges, TensorView, count_changes
from prunectl.checks.parse import Limit
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import PrunectlError, attempt
from prunectl.formats.base import Capability, ModelFile, Tensor
from prunectl.formats.registry import by_name, load
from prunectl.pruning.manifest import ManifestRecord


@dataclass(frozen=True, slots=True)
class Violation:
    """A property to verify, and the number of its violations, which must be zero."""

    id: str
    metric: str
    actual: int
    note: str = ""


def verify_source(
    model: ModelFile, source: ModelFile, cuts: Container[str] | None = None, meter: ProgressFactory = no_progress
) -> tuple[list[Violation], dict[str, int]]:
    """Differences from the source, and the number of new zeros by tensor; only tensors in `cuts` may gain zeros."""
    pairs = _pairs(model, source)
    changes: dict[str, ElementChanges] = {}
    with meter("comparing", sum(tensor.nbytes for tensor, _ in pairs)) as bar:
        for tensor, old in pairs:
            changes[tensor.name] = count_changes(TensorView(model, tensor), TensorView(source, old))
            bar.advance(tensor.nbytes)
    kept_changed = {name: counts.kept_changed for name, counts in changes.items()}
    zeros_lost = {name: counts.zeros_lost for name, counts in changes.items()}
    zeros_added = {name: counts.zeros_added for name, counts in changes.items()}
    violations = [
        Violation("architecture", "differences", *_format_counts(list(_architecture_differences(model, source)))),
        Violation("kept-weights", "weights_changed", *_total_and_first(kept_changed)),
        Violation("kept-zeros", "zeros_lost", *_total_and_first(zeros_lost)),
    ]
    if cuts is not None:
        unplanned = {name: n for name, n in zeros_added.items() if name not in cuts and name not in model.duplicates}
        violations.append(Violation("other-tensors", "zeros_gained", *_total_and_first(unplanned)))
    return violations, zeros_added


def _pairs(model: ModelFile, source: ModelFile) -> list[tuple[Tensor, Tensor]]:
    originals = {tensor.name: tensor for tensor in source.tensors}
    pairs = ((tensor, originals.get(tensor.name)) for tensor in model.tensors)
    return [(tensor, old) for tensor, old in pairs if old is not None and _signature(tensor) == _signature(old)]


def _signature(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


def _architecture_differences(model: ModelFile, source: ModelFile) -> Iterator[str]:
    """Yield differences of format, tensors, Keras configuration and graph."""
    if model.format != source.format:
        yield f"the format is {model.format} instead of {source.format}"
    signatures = {tensor.name: _signature(tensor) for tensor in model.tensors}
    old_signatures = {tensor.name: _signature(tensor) for tensor in source.tensors}
    for name in dict.fromkeys((*old_signatures, *signatures)):
        if name not in signatures:
            yield f"{name} is missing"
        elif name not in old_signatures:
            yield f"{name} was added"
        elif signatures[name] != old_signatures[name]:
            yield f"{name} has a different shape or type"
    if model.about.keras != source.about.keras:
        yield "the Keras configuration differs"
    if model.format == source.format and Capability.FLOPS & by_name(model.format).can:
        # Two graphs that cannot be read count as equal.
        graph, source_graph = (attempt(load(by_name(side.format).graph), side) for side in (model, source))
        if not (
            graph == source_graph or (isinstance(graph, PrunectlError) and isinstance(source_graph, PrunectlError))
        ):
            yield "the operations of the graph differ"


def _format_counts(differences: list[str]) -> tuple[int, str]:
    return len(differences), f"First: {differences[0]}." if differences else ""


def _total_and_first(counts: dict[str, int]) -> tuple[int, str]:
    first = next((f"First: {name}, with {count}." for name, count in counts.items() if count), "")
    return sum(counts.values()), first


def verify(
    model: ModelFile, record: ManifestRecord | None, source: ModelFile | None, meter: ProgressFactory = no_progress
) -> tuple[Finding, ...]:
    """A finding for each property that must hold, with the number of violations."""
    if record is not None and record.removed:
        return tuple(_finding(model, violation) for violation in _check_digests(model, record, source))
    violations = list(_check_record(model, record)) if record is not None else []
    if source is not None:
        cuts = {cut.name for cut in record.cuts} if record is not None else None
        source_violations, zeros_added = verify_source(model, source, cuts, meter)
        violations += source_violations
        if record is not None:
            violations += _check_run(source, record, zeros_added)
    return tuple(_finding(model, violation) for violation in violations)


def _check_digests(model: ModelFile, record: ManifestRecord, source: ModelFile | None) -> Iterator[Violation]:
    """Check only the digests: if channels or layers were removed, tensors cannot be compared with the source's."""
    digest = _digest("digest", model, record.output_sha256)
    scope = f"The run removed {record.removed}: only digests are compared, not weights."
    yield replace(digest, note=digest.note or scope)
    if source is not None:
        yield _digest("source-digest", source, record.input_sha256)


def _check_record(model: ModelFile, record: ManifestRecord) -> Iterator[Violation]:
    """Check the bytes, the tensors and the zeros against the manifest."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    wrong = []
    for cut in record.cuts:
        tensor = tensors.get(cut.name)
        if tensor is None:
            wrong.append(f"{cut.name} is missing")
        elif tensor.shape != cut.shape:
            wrong.append(f"{cut.name} has a different shape")
        elif (zeros := count_zeros(model, tensor)) != cut.zeros:
            wrong.append(f"{cut.name} has {zeros} zeros instead of {cut.zeros}")
    yield Violation("zeros", "tensors", len(wrong), f"First: {wrong[0]}." if wrong else "")
    yield _digest("digest", model, record.output_sha256)


def _check_run(source: ModelFile, record: ManifestRecord, zeros_added: dict[str, int]) -> Iterator[Violation]:
    """Check that the run of the manifest read this source, and added no more zeros than recorded."""
    yield _digest("source-digest", source, record.input_sha256)
    if record.zeroed_nonfinite:
        return
    # There may be fewer new zeros than dropped weights: some of these were zero before.
    wrong = [cut for cut in record.cuts if not (zeros_added.get(cut.name, cut.dropped + 1) <= cut.dropped)]
    note = f"First: {wrong[0].name}, with {zeros_added.get(wrong[0].name, 0)} new zeros." if wrong else ""
    yield Violation("dropped", "tensors", len(wrong), note)


def _digest(name: str, model: ModelFile, expected: str) -> Violation:
    actual = sizes.sha256(model)
    note = (
        ""
        if actual == expected
        else f"{model.path.name} has the SHA-256 {actual[:12]}…, the manifest has {expected[:12]}…"
    )
    return Violation(name, "sha256", int(actual != expected), note)


def _finding(model: ModelFile, violation: Violation) -> Finding:
    limit = Limit(violation.id, MetricUnit.COUNT, 1, fail=0)
    return evaluate_limit(str(model.path), violation.metric, violation.actual, limit, note=violation.note)
