"""Is a written file what its manifest says, and its source with zeros added?"""

from __future__ import annotations

from collections.abc import Iterator

from prunectl.formats.base import ModelFile
from prunectl.gating.against import Held, against
from prunectl.gating.budget import Limit
from prunectl.gating.finding import Finding
from prunectl.gating.keys import Metric
from prunectl.gating.limits import judged
from prunectl.gating.record import Record, Recorded
from prunectl.measuring import archive
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.zeros import count_zeros


def verify(
    model: ModelFile, record: Record | None, source: ModelFile | None, meter: Meter = unwatched
) -> tuple[Finding, ...]:
    """Return a verdict for everything that must hold; each counts what does not."""
    held = list(_recorded(model, record)) if record is not None else []
    if source is not None:
        cuts = {cut.name for cut in record.cuts} if record is not None else None
        found, gained = against(model, source, cuts, meter)
        held += found
        if record is not None:
            held += _run(source, record, gained)
    return tuple(_finding(model, one) for one in held)


def _recorded(model: ModelFile, record: Record) -> Iterator[Held]:
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
    yield Held("zeros", "tensors", len(wrong), f"The first: {wrong[0]}." if wrong else "")
    yield _digest("digest", model, record.output_sha256)


def _run(source: ModelFile, record: Record, gained: dict[str, int]) -> Iterator[Held]:
    """Yield whether the run of the manifest leads from the source to the file."""
    yield _digest("source-digest", source, record.input_sha256)
    if record.has_doomed:
        return
    wrong = [cut for cut in record.cuts if not _is_explained(cut, gained)]
    note = f"The first: {wrong[0].name} lost {gained.get(wrong[0].name, 0)} weights." if wrong else ""
    yield Held("dropped", "tensors", len(wrong), note)


def _is_explained(cut: Recorded, gained: dict[str, int]) -> bool:
    # A weight that was zero before may have been dropped as well.
    return gained.get(cut.name, cut.dropped + 1) <= cut.dropped


def _digest(name: str, model: ModelFile, wanted: str) -> Held:
    found = archive.sha256(model)
    note = "" if found == wanted else f"{model.path.name} has {found[:12]}…, the manifest says {wanted[:12]}…"
    return Held(name, "sha256", int(found != wanted), note)


def _finding(model: ModelFile, one: Held) -> Finding:
    limit = Limit(one.id, Metric.COUNT, 1, fail=0)
    return judged(str(model.path), one.metric, one.actual, limit, note=one.note)
