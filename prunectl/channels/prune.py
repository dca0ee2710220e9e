"""Cutting channels out, from a file to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.channels.after import After
from prunectl.channels.choose import Loss, choose, removed
from prunectl.channels.couple import families
from prunectl.channels.cutting import Cutting, cutting_of
from prunectl.channels.languages import read
from prunectl.channels.proof import prove
from prunectl.channels.rules import follow
from prunectl.channels.select import candidates
from prunectl.errors import WorkError
from prunectl.formats.base import Can, ModelFile
from prunectl.formats.table import by_name, load, open_model
from prunectl.formats.table import require as require_can
from prunectl.measuring import archive
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.measuring.survey import Survey, survey, with_macs
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.plan import Skip
from prunectl.pruning.request import Request
from prunectl.training.network import Origin


@dataclass(frozen=True, slots=True)
class CutOut:
    """What was cut, and what came of it."""

    request: Request
    cutting: Cutting
    losses: tuple[Loss, ...]
    skips: tuple[Skip, ...]
    """Families that were left alone, by their first maker."""
    before: Survey
    after: Survey
    error: float
    """How far the cut network is from the original with its channels silenced, relative to what comes out."""

    @property
    def channels(self) -> int:
        """How many channels could go."""
        return sum(len(loss.family.groups) for loss in self.losses)

    @property
    def dropped(self) -> int:
        """How many went."""
        return sum(len(loss.dropped) for loss in self.losses)


def prune_channels(
    path: Path,
    request: Request,
    output: Output | None,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
    **limits: Any,
) -> CutOut:
    """Cut channels out of a model; without an output, into a scratch file that is measured and thrown away.

    The limits are those of `cutting_of`: min_channels, round_to, max_ratio.
    """
    cutting = cutting_of(request, **limits)
    model = open_model(path)
    if request.is_packed:
        require_can(model, Can.PACK)
    outputs.check(model, output)
    origin = Origin(request.model, request.custom_objects, is_trusted=is_trusted, seed=request.seed)
    source = read(model, origin)
    trace = follow(source.graph)
    chosen, skips = candidates(model, families(trace), source.graph.weights, cutting)
    losses = choose(chosen, cutting)
    gone = removed(losses)
    left = After(trace, [label for loss in losses for label in loss.labels])
    smaller = source.cut(gone, left)
    error = prove(source, smaller, left, gone, cutting.seed)
    with outputs.workplace(model, output) as (folder, target):
        written = source.write(smaller, folder, target)
        if request.is_packed or model.about.is_compressed:
            # One that was packed comes out packed.
            outputs.pack(written, folder)
        _check(model, written, losses)
        before, after = _measured(model), _measured(open_model(written))
        if has_digests:
            before = replace(before, sha256=archive.sha256(model))
            after = replace(after, sha256=archive.sha256(open_model(written)))
    shown = str(target if output is not None else "the result")
    return CutOut(request, cutting, losses, skips, before, replace(after, path=shown), error)


def _check(model: ModelFile, written: Path, losses: tuple[Loss, ...]) -> None:
    """Hold the shapes of what was written against what was to be cut."""
    gone = removed(losses)
    found = {tensor.name: tensor.shape for tensor in open_model(written).tensors}
    for tensor in model.tensors:
        shape = tuple(length - len(gone.get((tensor.name, axis), ())) for axis, length in enumerate(tensor.shape))
        # Lists of sizes may be others now; what is no float was not cut.
        if tensor.is_float and found.get(tensor.name) != shape:
            raise WorkError(f"{tensor.name} of {model.path} came out with another shape than planned")


def _measured(model: ModelFile) -> Survey:
    if model.nbytes <= outputs.BIG_BYTES:
        found = measure(model, pick(CodecName.GZIP, None))
    else:
        found = survey(model, model.tensors, has_channels=False)
    return with_macs(found, load(by_name(model.format).graph)(model))
