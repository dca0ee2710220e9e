"""From a file to a file of another format: converted, run beside its source, and only then put in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prunectl.errors import UsageError, WorkError
from prunectl.exporting import card as cards
from prunectl.exporting.checks import check, check_place
from prunectl.exporting.job import Job
from prunectl.exporting.measured import measured
from prunectl.exporting.naming import naming
from prunectl.exporting.pairs import Pair, load, pair_of
from prunectl.exporting.parity import Parity, compare
from prunectl.exporting.request import Request
from prunectl.exporting.result import Exported
from prunectl.exporting.said import settled
from prunectl.exporting.samples import check_known, samples
from prunectl.exporting.targets import Target, target_of
from prunectl.exporting.tolerances import tolerance_of
from prunectl.formats import outputs as places
from prunectl.formats.base import PARAMETRIZATION, ModelFile
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.stripping import Wish
from prunectl.formats.table import by_name, open_model
from prunectl.measuring.survey import Survey
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.strip import strip, surveyed
from prunectl.training import trusted


def export(path: Path, request: Request, output: Output) -> Exported:
    """Write a model in another format, or nothing at all."""
    if output.is_stream and not request.to:
        raise UsageError("standard output has no suffix that names a format", hint="say it: --to onnx")
    target = target_of(request.to, output.target)
    request = replace(request, to=target.name)
    check(request, target, output)
    model = open_model(path)
    pair = pair_of(model, target, has_code=request.has_code)
    beside = load(pair, pair.beside)(output.target) if pair.beside else ()
    check_place(model, output, target, beside)
    cards.check(request, output)
    if pair.opener:
        # A graph is run as it is; what Keras rebuilds may be built by the user's own function instead.
        is_run = pair.opener == "by_tensorflow:open_live"
        trusted.check(model, replace(request.origin, model="") if is_run else request.origin)
    # Before any work, so that what is missing is said first.
    load(pair, pair.writer)
    with (
        temporary_folder() as scratch,
        places.replacing(output.target, may_replace=output.is_forced, model=model) as folder,
    ):
        written = folder / output.target.name
        plain, stripped = _plain(model, scratch)
        with naming(path, plain.path):
            job = _job(plain, request, pair, scratch)
            said = load(pair, pair.writer)(job, written)
        if output.is_stream and len(list(folder.iterdir())) > 1:
            raise WorkError(f"{path} becomes more than one file, which does not fit through standard output")
        if request.is_packed or request.is_sparse:
            _pack(written, folder, target)
        with naming(path, plain.path):
            parity = _compared(job, pair, written)
        before, after = surveyed(model), replace(measured(written, target), path=str(output.target))
        remarks = (*stripped, *_remarks(job), *said, *_lost_zeros(before, after))
        found = Exported(
            before, after, by_name(model.format).title, target.title, parity, remarks, _beside(folder, output.target)
        )
        text = cards.text(found)
    cards.write(request, text, output)
    return found


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
    return compare(job.live, load(pair, pair.runner)(job, written), job.inputs, tolerance_of(job.request))


def _beside(folder: Path, target: Path) -> tuple[tuple[str, int], ...]:
    others = sorted(file for file in folder.iterdir() if file.name != target.name)
    return tuple((str(target.parent / file.name), file.stat().st_size) for file in others)


def _remarks(job: Job) -> tuple[str, ...]:
    live, inputs = job.live, job.samples
    return (*(live.notes if live is not None else ()), *(inputs.notes if inputs is not None else ()))


def _lost_zeros(before: Survey, after: Survey) -> tuple[str, ...]:
    had, has = before.params.zero or 0, after.params.zero or 0
    if has >= had:
        return ()
    why = "what was folded, rounded or held twice has other zeros than its source"
    return (f"{has:,} of its weights are zero, and {had:,} were: {why}.",)
