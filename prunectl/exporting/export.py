"""From a file to a file of another format: converted, run beside its source, and only then put in place."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.analysis.sizes import CodecName, compress, get_codec, iter_model_bytes
from prunectl.analysis.stats import ModelStats, SizeStats, measure_stats
from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.exporting.compare import Comparison, ExportResult, compare, tolerance_of
from prunectl.exporting.inputs import apply_input_options
from prunectl.exporting.job import ExportJob, check_known, samples
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.routes import Route, Target, check_options, find_route, load, target_of
from prunectl.formats import atomic as places
from prunectl.formats.atomic import write_text
from prunectl.formats.base import PARAMETRIZATION, Array, ModelFile, ModelInfo, Role, Storage, StripOptions, Tensor
from prunectl.formats.registry import by_name, open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import BIG_BYTES, Destination
from prunectl.pruning.strip import strip, surveyed
from prunectl.training import user_code


def check_card(request: ExportRequest, output: Destination) -> None:
    """Refuse a card that cannot be written, before any work begins."""
    card = request.card
    if card is None:
        return
    if not card.parent.is_dir():
        raise UsageError(f"{card.parent} is not a folder", hint=f"mkdir -p {card.parent}")
    if os.path.abspath(card) == os.path.abspath(output.target):
        raise UsageError("--card and --output name the same file")
    if card.is_dir() or (os.path.lexists(card) and not output.is_forced):
        raise UsageError(f"{card} exists", hint="write elsewhere, or replace it with --force")


def write(request: ExportRequest, content: str, output: Destination) -> None:
    """Write the card, if one was asked for."""
    if request.card is not None:
        write_text(request.card, content, is_forced=output.is_forced)


def card_text(found: ExportResult) -> str:
    """Return a card in Markdown: the same run gives the same card."""
    name = Path(found.after.path).name
    rows = (("source", found.before, found.source), ("result", found.after, found.target))
    lines = [
        f"# {name}",
        "",
        f"{found.target}, made of {Path(found.before.path).name} ({found.source}) by prunectl.",
        "",
        "| | format | weights | zero | bytes | packed | gzip |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_row(title, survey, kind) for title, survey, kind in rows),
        "",
        *_parity(found),
        "",
        *(f"- {remark}" for remark in found.remarks),
        *([""] if found.remarks else []),
        "| | SHA-256 |",
        "| --- | --- |",
        *(f"| {title} | {survey.sha256 or '-'} |" for title, survey, _ in rows),
        "",
    ]
    return "\n".join(lines)


def _row(title: str, found: ModelStats, kind: str) -> str:
    sparsity = "-" if found.sparsity is None else f"{found.sparsity:.1%}"
    packed, compressed = (_count(size) for size in (found.bytes.packed, found.bytes.compressed))
    cells = (title, kind, _count(found.params.total), sparsity, _count(found.bytes.raw), packed, compressed)
    return f"| {' | '.join(cells)} |"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _parity(found: ExportResult) -> list[str]:
    parity = found.parity
    if parity is None:
        return ["The weights are the same to the bit."]
    what = "examples" if parity.is_data else "random inputs"
    apart = f"{parity.largest:.3g} at most, {parity.mean:.3g} on average"
    said = [f"On {parity.examples:,} {what} the outputs are apart by {apart}."]
    if parity.tolerance.noise is not None:
        said.append(f"By their root mean square the differences are {parity.noise:.2%} of the outputs.")
    if parity.top1 is not None:
        said.append(f"The largest answer is the same one for {parity.top1:.2%} of them.")
    return said


_FIRST_OPSET = 9
"""Before it, weights had to be inputs as well."""


def check(request: ExportRequest, target: Target, output: Destination) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    check_options(target, request.typed)
    if request.opset is not None and request.opset < _FIRST_OPSET:
        raise UsageError(f"--opset {request.opset} is older than what prunectl writes", hint="it begins with 9")
    fewer = [f"--{name}" for name in ("half", "bf16", "int8") if name in request.typed]
    if len(fewer) > 1:
        raise UsageError(f"{' and '.join(fewer)} exclude each other")
    for option, value in (("--atol", request.atol), ("--rtol", request.rtol)):
        if value is not None and not value >= 0:
            raise UsageError(f"{option} takes a number that is not negative, and not {value:g}")
    if not request.data and request.samples is not None and request.is_int8:
        raise UsageError("--int8 with --samples needs examples", hint="add --data SPEC")
    if request.has_code and output.is_stream:
        raise UsageError("--code writes a second file, which does not fit through standard output", hint="say -o OUT")


def check_place(model: ModelFile, output: Destination, target: Target, beside: Iterable[Path]) -> None:
    """Refuse to write over the input, or over anything else unless the user said so."""
    if output.is_stream:
        if target.name == "saved-model":
            raise UsageError("a SavedModel is a folder, and does not fit through standard output")
        return
    for place in (output.target, *beside):
        if any(os.path.lexists(place) and places.is_same(file, place) for file in model.files):
            raise UsageError(f"{place} belongs to the input", hint="write elsewhere")
    whole = model if model.path.is_dir() else replace(model, format=target.name, files=(model.path,))
    places.check_target(whole, output.target, is_forced=output.is_forced, is_in_place=False)
    for place in beside:
        if os.path.lexists(place) and not output.is_forced:
            raise UsageError(f"{place} exists", hint="write elsewhere, or replace it with --force")


def measure(path: Path, target: Target) -> ModelStats:
    """Return what is in a file that was written."""
    if target.name != "npz":
        return surveyed(open_model(path))
    model = _npz(path)
    found = measure_stats(model, model.tensors, has_channels=False)
    if model.nbytes > BIG_BYTES:
        return found
    compressed = compress(iter_model_bytes(model), get_codec(CodecName.GZIP, None))
    with zipfile.ZipFile(path) as archive:
        is_packed = any(info.compress_type for info in archive.infolist())
    sizes = SizeStats(model.nbytes, model.nbytes if is_packed else None, compressed.nbytes)
    return replace(found, bytes=sizes, sha256=compressed.sha256)


def _npz(path: Path) -> ModelFile:
    arrays: dict[str, Array] = {}
    with np.load(path, allow_pickle=False) as held:
        for name in held.files:
            arrays[name] = held[name]
    tensors = tuple(
        Tensor(name, "", array.shape, array.dtype, Role.OTHER, Storage(name, array.nbytes, None, array.nbytes))
        for name, array in arrays.items()
    )
    return ModelFile(path, "npz", tensors, ModelInfo(), (path,), lambda tensor: arrays[tensor.name])


@contextmanager
def naming_original(path: Path, copy: Path) -> Generator[None]:
    """Let errors name a path in place of that of its copy."""
    try:
        yield
    except PrunectlError as error:
        error.message = error.message.replace(str(copy), str(path))
        error.hint = error.hint.replace(str(copy), str(path))
        error.args = (error.message,)
        raise


def export(path: Path, request: ExportRequest, output: Destination) -> ExportResult:
    """Write a model in another format, or nothing at all."""
    if output.is_stream and not request.to:
        raise UsageError("standard output has no suffix that names a format", hint="say it: --to onnx")
    target = target_of(request.to, output.target)
    request = replace(request, to=target.name)
    check(request, target, output)
    model = open_model(path)
    pair = find_route(model, target, has_code=request.has_code)
    beside = load(pair, pair.beside)(output.target) if pair.beside else ()
    check_place(model, output, target, beside)
    check_card(request, output)
    if pair.opener:
        # A graph is run as it is; what Keras rebuilds may be built by the user's own function instead.
        is_run = pair.opener == "tensorflow:open_live"
        user_code.check(model, replace(request.origin, model="") if is_run else request.origin)
    # Before any work, so that what is missing is said first.
    load(pair, pair.writer)
    with (
        temporary_folder() as scratch,
        places.atomic_replace(output.target, may_replace=output.is_forced, model=model) as folder,
    ):
        written = folder / output.target.name
        plain, stripped = _plain(model, scratch)
        with naming_original(path, plain.path):
            job = _job(plain, request, pair, scratch)
            said = load(pair, pair.writer)(job, written)
        if output.is_stream and len(list(folder.iterdir())) > 1:
            raise WorkError(f"{path} becomes more than one file, which does not fit through standard output")
        if request.is_packed or request.is_sparse:
            _pack(written, folder, target)
        with naming_original(path, plain.path):
            parity = _compared(job, pair, written)
        before, after = surveyed(model), replace(measure(written, target), path=str(output.target))
        remarks = (*stripped, *_remarks(job), *said, *_lost_zeros(before, after))
        found = ExportResult(
            before, after, by_name(model.format).title, target.title, parity, remarks, _beside(folder, output.target)
        )
        text = card_text(found)
    write(request, text, output)
    return found


def _plain(model: ModelFile, scratch: Path) -> tuple[ModelFile, tuple[str, ...]]:
    """Return a model without wrappers of pruning, its weights multiplied by their masks."""
    kinds = dict.fromkeys(wrapper.kind for wrapper in model.about.wrappers if wrapper.kind != PARAMETRIZATION)
    if not kinds:
        return model, ()
    place = scratch / "stripped" / model.path.name
    place.parent.mkdir()
    strip(model.path, StripOptions(), Destination(place), is_packed=False)
    return open_model(place), (f"The wrappers and masks of {', '.join(kinds)} were taken off first.",)


def _job(model: ModelFile, request: ExportRequest, pair: Route, scratch: Path) -> ExportJob:
    if not pair.opener:
        return ExportJob(model, request, scratch=scratch)
    live = load(pair, pair.opener)(model, request.origin)
    flows = apply_input_options(live.inputs, request.inputs)
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
    return ExportJob(model, request, flows, inputs, live, scratch)


def _pack(written: Path, folder: Path, target: Target) -> None:
    # The archives of NumPy are written packed, and TensorFlow Lite's sparse tensors by its converter.
    if target.name not in {"npz", "tflite"}:
        outputs.pack(written, folder)


def _compared(job: ExportJob, pair: Route, written: Path) -> Comparison | None:
    if not pair.runner:
        return None
    return compare(job.live, load(pair, pair.runner)(job, written), job.inputs, tolerance_of(job.request))


def _beside(folder: Path, target: Path) -> tuple[tuple[str, int], ...]:
    others = sorted(file for file in folder.iterdir() if file.name != target.name)
    return tuple((str(target.parent / file.name), file.stat().st_size) for file in others)


def _remarks(job: ExportJob) -> tuple[str, ...]:
    live, inputs = job.live, job.samples
    return (*(live.notes if live is not None else ()), *(inputs.notes if inputs is not None else ()))


def _lost_zeros(before: ModelStats, after: ModelStats) -> tuple[str, ...]:
    had, has = before.params.zero or 0, after.params.zero or 0
    if has >= had:
        return ()
    why = "what was folded, rounded or held twice has other zeros than its source"
    return (f"{has:,} of its weights are zero, and {had:,} were: {why}.",)
