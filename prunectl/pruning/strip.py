"""Stripping, from a file to a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import WorkError
from prunectl.formats.base import PARAMETRIZATION, Can, ModelFile, Role
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.table import by_name, load, open_model, require
from prunectl.measuring.blocks import same_numbers
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.measuring.survey import Survey, survey
from prunectl.measuring.zeros import count_zeros
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output


@dataclass(frozen=True, slots=True)
class Stripped:
    """What went, and what is left."""

    removed: tuple[Removed, ...]
    before: Survey
    after: Survey


def strip(path: Path, wish: Wish, output: Output | None, *, is_packed: bool) -> Stripped:
    """Write a model again without what it does not need to predict; without an output, into a scratch file."""
    model = open_model(path)
    # What has nothing to strip may still be packed.
    require(model, Can.PACK if is_packed else Can.STRIP)
    row = by_name(model.format)
    outputs.check(model, output)
    with outputs.workplace(model, output) as (folder, target):
        places = outputs.places(model, folder, target)
        removed: tuple[Removed, ...] = ()
        if row.stripper:
            removed = load(row.stripper)(model, wish, places)
        else:
            load(row.writer)(model, places, ())
        written = places.get(model.path, folder / target.name)
        if is_packed:
            outputs.pack(written, folder)
        found = open_model(written)
        _verify(model, found, wish, frozenset(thing.name for thing in removed))
        before, after = surveyed(model), surveyed(found)
    return Stripped(removed, before, replace(after, path=str(target)) if output is not None else after)


def _verify(model: ModelFile, found: ModelFile, wish: Wish, removed: frozenset[str]) -> None:
    """Hold what was written against the input: nothing is left that should go, and nothing else has changed."""
    left = [wrapper for wrapper in found.about.wrappers if wrapper.kind != PARAMETRIZATION]
    if Part.MASKS in wish.parts and left:
        raise WorkError(f"{model.path} came out with wrappers still around {left[0].layer}")
    wrapped = {wrapper.layer for wrapper in model.about.wrappers}
    known = {tensor.name: tensor for tensor in model.tensors}
    for tensor in found.tensors:
        old = known.get(tensor.name)
        if old is None or tensor.layer in wrapped:
            continue
        if tensor.name in removed and tensor.role == Role.OPTIMIZER and count_zeros(found, tensor) == tensor.size:
            # Where a graph still asks for the state of an optimizer, it gets zeros.
            continue
        if old.shape != tensor.shape or not same_numbers(model, old, found, tensor):
            raise WorkError(f"{tensor.name} of {model.path} came out with other numbers than it had")


def surveyed(model: ModelFile) -> Survey:
    """Return what is in a model; its compressed size, too, if it is small."""
    if model.nbytes <= outputs.BIG_BYTES:
        return measure(model, pick(CodecName.GZIP, None))
    return survey(model, model.tensors, has_channels=False)
