"""From a file to a file of another format: converted, run beside its source, and only then put in place."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.exporting import card as cards
from prunectl.exporting.job import Job
from prunectl.exporting.measured import measured
from prunectl.exporting.pairs import Pair, load, pair_of
from prunectl.exporting.parity import Parity, Tolerance, compare
from prunectl.exporting.request import Request
from prunectl.exporting.result import Exported
from prunectl.exporting.said import settled
from prunectl.exporting.samples import check_known, samples
from prunectl.exporting.targets import Target, check_options, target_of
from prunectl.formats import outputs as places
from prunectl.formats.base import PARAMETRIZATION, ModelFile
from prunectl.formats.stripping import Wish
from prunectl.formats.table import by_name, open_model
from prunectl.measuring.survey import Survey
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.strip import strip, surveyed

_EXACT, _HALF, _INT8 = Tolerance(1e-4, 1e-4), Tolerance(1e-4, 1e-2, 1e-2), Tolerance(1e-4, 1e-2, 0.2)


_FIRST_OPSET = 9
"""Before it, weights had to be inputs as well."""


def export(path: Path, request: Request, output: Output) -> Exported:
    """Write a model in another format, or nothing at all."""
    if output.is_stream and not request.to:
        raise UsageError("standard output has no suffix that names a format", hint="say it: --to onnx")
    target = target_of(request.to, output.target)
    request = replace(request, to=target.name)
    check(request, target)
    model = open_model(path)
    pair = pair_of(model, target)
    _check_place(model, output, target)
    cards.check(request, output)
    # Before any work, so that what is missing is said first.
    load(pair, pair.writer)
    with (
        tempfile.TemporaryDirectory(prefix="prunectl-") as scratch,
        places.replacing(output.target, may_replace=output.is_forced) as folder,
    ):
        written = folder / output.target.name
        plain, stripped = _plain(model, Path(scratch))
        job = _job(plain, request, pair, Path(scratch))
        said = load(pair, pair.writer)(job, written)
        if request.is_packed or request.is_sparse:
            _pack(written, folder, target)
        parity = _compared(job, pair, written)
        before, after = surveyed(model), replace(measured(written, target), path=str(output.target))
        remarks = (*stripped, *_remarks(job), *said, *_lost_zeros(before, after))
        found = Exported(before, after, by_name(model.format).title, target.title, parity, remarks)
        text = cards.text(found)
    cards.write(request, text, output)
    return found


def check(request: Request, target: Target) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    check_options(target, request.typed)
    if request.opset is not None and request.opset < _FIRST_OPSET:
        raise UsageError(f"--opset {request.opset} is older than what prunectl writes", hint="it begins with 9")
    if request.is_half and request.is_int8:
        raise UsageError("--half and --int8 exclude each other")
    for option, value in (("atol", request.atol), ("rtol", request.rtol)):
        if value is not None and not value >= 0:
            raise UsageError(f"--{option} takes a number that is not negative, and not {value:g}")
    if not request.data and request.samples is not None and request.is_int8:
        raise UsageError("--int8 with --samples needs examples", hint="add --data SPEC")


def _check_place(model: ModelFile, output: Output, target: Target) -> None:
    if output.is_stream:
        if target.name == "saved-model":
            raise UsageError("a SavedModel is a folder, and does not fit through standard output")
        return
    if any(os.path.lexists(output.target) and places.is_same(file, output.target) for file in model.files):
        raise UsageError(f"{output.target} belongs to the input", hint="write elsewhere")
    whole = model if model.path.is_dir() else replace(model, format=target.name, files=(model.path,))
    places.check_target(whole, output.target, is_forced=output.is_forced, is_in_place=False)


def _plain(model: ModelFile, scratch: Path) -> tuple[ModelFile, tuple[str, ...]]:
    """Return a model without wrappers of pruning, its weights multiplied by their masks."""
    kinds = dict.fromkeys(wrapper.kind for wrapper in model.about.wrappers if wrapper.kind != PARAMETRIZATION)
    if not kinds:
        return model, ()
    place = scratch / "stripped" / model.path.name
    place.parent.mkdir()
    strip(model.path, Wish(), Output(place), is_packed=False)
    return open_model(place), (f"The wrappers and masks of {', '.join(kinds)} were taken off first.",)


def _job(model: ModelFile, request: Request, pair: Pair, scratch: Path) -> Job:
    if not pair.opener:
        return Job(model, request, scratch=scratch)
    live = load(pair, pair.opener)(model, request.origin)
    flows = settled(live.inputs, request.inputs)
    check_known(flows, request)
    inputs = samples(live, flows, request)
    # What no file says, an example does.
    flows = tuple(
        replace(
            flow,
            shape=flow.shape if flow.shape is not None else (None, *array.shape[1:]),
            dtype=flow.dtype or array.dtype.name,
        )
        for flow, array in zip(flows, inputs.batches[0], strict=True)
    )
    return Job(model, request, flows, inputs, live, scratch)


def _pack(written: Path, folder: Path, target: Target) -> None:
    # The archives of NumPy are written packed, and TensorFlow Lite's sparse tensors by its converter.
    if target.name not in {"npz", "tflite"}:
        outputs.pack(written, folder)


def _compared(job: Job, pair: Pair, written: Path) -> Parity | None:
    if not pair.runner:
        return None
    request = job.request
    usual = _HALF if request.is_half else _INT8 if request.is_int8 else _EXACT
    if request.atol is not None or request.rtol is not None:
        atol = usual.atol if request.atol is None else request.atol
        usual = Tolerance(atol, usual.rtol if request.rtol is None else request.rtol)
    return compare(job.live, load(pair, pair.runner)(job, written), job.inputs, usual)


def _remarks(job: Job) -> tuple[str, ...]:
    live, inputs = job.live, job.samples
    return (*(live.notes if live is not None else ()), *(inputs.notes if inputs is not None else ()))


def _lost_zeros(before: Survey, after: Survey) -> tuple[str, ...]:
    had, has = before.params.zero or 0, after.params.zero or 0
    if has >= had:
        return ()
    why = "what was folded, rounded or held twice has other zeros than its source"
    return (f"{has:,} of its weights are zero, and {had:,} were: {why}.",)
