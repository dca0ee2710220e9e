"""Pruning, from a file to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import WorkError
from prunectl.formats.base import Can, ModelFile
from prunectl.formats.isolated import one_child
from prunectl.formats.outputs import flush
from prunectl.formats.table import by_name, open_model, require
from prunectl.formats.workers import workers
from prunectl.measuring import archive
from prunectl.measuring.codecs import CodecName, compress, pick
from prunectl.measuring.looking import Look, look
from prunectl.measuring.patterns import ZerosOf
from prunectl.measuring.sizes import measure, packed_bytes
from prunectl.measuring.survey import Survey, survey
from prunectl.pruning import output as outputs
from prunectl.pruning import plan as planning
from prunectl.pruning import target as targets
from prunectl.pruning import together
from prunectl.pruning.execute import Method, Tally, execute, verify
from prunectl.pruning.output import Output
from prunectl.pruning.plan import Choice, Plan, Wish
from prunectl.pruning.request import Request, method_of, wish_of


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was planned and what came of it."""

    request: Request
    sparsity: float
    plan: Plan
    tallies: dict[str, Tally]
    before: Survey
    after: Survey
    notes: tuple[str, ...] = ()
    """What the user should know of how it came about, each a full sentence."""


def prune(
    path: Path, request: Request, output: Output | None, *, has_digests: bool = False, method: Method | None = None
) -> Pruned:
    """Prune a model; without an output, into a scratch file that is measured and thrown away."""
    # The input and what was written are read by one child, where it takes a child to read them.
    with one_child():
        return _prune(open_model(path), request, output, has_digests=has_digests, method=method)


def _prune(
    model: ModelFile, request: Request, output: Output | None, *, has_digests: bool, method: Method | None
) -> Pruned:
    method = method or method_of(request)
    if request.is_packed:
        require(model, Can.PACK)
    outputs.check(model, output)
    wish = wish_of(request)
    choice = planning.choose(model, wish, can_reencode=by_name(model.format).is_reencoded)
    method, choice = together.scored(model, choice, method)
    sparsity = _sparsity(model, request, wish, choice, method)
    plan = planning.make(choice, wish, sparsity)
    with outputs.workplace(model, output) as (folder, target), workers(1) as aside:
        is_small = model.nbytes <= outputs.BIG_BYTES
        counting = aside.submit(survey, model, model.tensors, has_channels=is_small)
        written, tallies = _write(model, plan, method, folder, target, is_packed=request.is_packed)
        # What has to be on the disk before it may be renamed gets there while it is read back.
        flushing = aside.submit(flush, folder) if output is not None else None
        result = open_model(written)
        before, after = counting.result(), verify(model, result, tallies, has_channels=is_small)
        _check_pattern(result, plan, method)
        if flushing is not None:
            flushing.result()
        if after.bytes.raw <= outputs.BIG_BYTES:
            codec = pick(CodecName.GZIP, None)
            before = measure(model, codec, known=before if is_small else None)
            after = measure(result, codec, known=after if is_small else None)
        elif has_digests:
            # Now, as an output in place takes the input's.
            before = replace(before, sha256=archive.sha256(model))
            after = replace(after, sha256=archive.sha256(result))
    shown = str(target if output is not None else "the result")
    return Pruned(request, sparsity, plan, tallies, before, replace(after, path=shown))


def _write(
    model: ModelFile, plan: Plan, method: Method, folder: Path, target: Path, *, is_packed: bool
) -> tuple[Path, dict[str, Tally]]:
    """Write the pruned model into a folder, and return by which path it is opened."""
    places = outputs.places(model, folder, target)
    tallies = execute(model, plan, method, places)
    written = places.get(model.path, folder / target.name)
    if is_packed:
        outputs.pack(written, folder)
    return written, tallies


def _check_pattern(written: ModelFile, plan: Plan, method: Method) -> None:
    """Look for the pattern in the file itself."""
    if not isinstance(method.pattern, ZerosOf):
        return
    names = {cut.tensor.name for cut in plan.cuts}
    found = look(written, Look(), method.pattern)
    broken = [row.name for row in found.layers if row.name in names and (row.conforming or 1.0) < 1.0]
    if broken:
        raise WorkError(f"{broken[0]} came out without the pattern that was asked for")


def _sparsity(model: ModelFile, request: Request, wish: Wish, choice: Choice, method: Method) -> float:
    """Return the sparsity that was asked for, or that gives the size that was asked for."""
    if isinstance(wish.pattern, ZerosOf):
        return wish.pattern.zeros / wish.pattern.group
    if request.compression is not None:
        total = survey(model, model.tensors, has_zeros=False).params.total
        return targets.at_compression(model.path, choice, total, request.compression)
    target, what = request.target_gzip, "gzip"
    if target is None:
        target, what = request.target_packed, "packed"
    if target is None:
        return request.sparsity or 0.0
    if what == "packed":
        require(model, Can.PACK)

    def size_at(sparsity: float) -> int:
        with outputs.workplace(model, None) as (folder, target):
            plan = planning.make(choice, wish, sparsity)
            written = open_model(_write(model, plan, method, folder, target, is_packed=False)[0])
            if what == "packed":
                return packed_bytes(written, lambda _: None)
            return compress(archive.stream(written), pick(CodecName.GZIP, None)).nbytes

    return targets.reach(size_at, target, what)
