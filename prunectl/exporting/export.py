"""Export of a model file to another format: convert, compare with the source, then replace the target atomically."""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.analysis.sizes import CodecName, compress, get_codec, iter_model_bytes
from prunectl.analysis.stats import ModelStats, SizeStats, measure_stats
from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.errors import InputError, PrunectlError, UsageError, WorkError
from prunectl.exporting.compare import Comparison, ExportResult, compare, tolerance_of
from prunectl.exporting.folder import export_folder, makes_folder
from prunectl.exporting.job import ExportJob, apply_input_options, check_known, make_samples
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.routes import KERAS, Route, Target, check_options, find_route, load, target_of
from prunectl.formats import atomic
from prunectl.formats.atomic import check_beside, write_text
from prunectl.formats.base import Array, ModelFile, ModelInfo, Role, Storage, StripOptions, Tensor
from prunectl.formats.registry import by_name, open_model
from prunectl.formats.scratch import temporary_files, utf8_path
from prunectl.pruning import destination
from prunectl.pruning.destination import BIG_BYTES, Destination
from prunectl.pruning.strip import stats_for_report, strip
from prunectl.training import user_code
from prunectl.training.runtimes import with_arrays


def check_card(request: ExportRequest, output: Destination) -> None:
    """Refuse a model card that cannot be written, before any work begins."""
    card = request.card
    if card is None:
        return
    check_beside(card)
    if os.path.abspath(card) == os.path.abspath(output.target):
        raise UsageError("--card and --output name the same file")
    if card.is_dir() or (os.path.lexists(card) and not output.is_forced):
        raise UsageError(f"{card} exists", hint="choose another --output, or replace it with --force")


def write_card(request: ExportRequest, content: str, output: Destination) -> None:
    """Write the model card, if the request has one."""
    if request.card is not None:
        write_text(request.card, content, is_forced=output.is_forced)


def card_text(result: ExportResult) -> str:
    """The model card in Markdown; it is the same for the same run."""
    name = Path(result.after.path).name
    rows = (("source", result.before, result.source), ("result", result.after, result.target))
    lines = [
        f"# {name}",
        "",
        f"{result.target}, exported from {Path(result.before.path).name} ({result.source}) by prunectl.",
        "",
        "| | format | weights | zero | bytes | packed | gzip |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_row(title, stats, kind) for title, stats, kind in rows),
        "",
        *_comparison_lines(result),
        "",
        *(f"- {remark}" for remark in result.notes),
        *([""] if result.notes else []),
        "| | SHA-256 |",
        "| --- | --- |",
        *(f"| {title} | {stats.sha256 or '-'} |" for title, stats, _ in rows),
        "",
    ]
    return "\n".join(lines)


def _row(title: str, stats: ModelStats, kind: str) -> str:
    sparsity = "-" if stats.sparsity is None else f"{stats.sparsity:.1%}"
    packed, compressed = (_count_text(size) for size in (stats.bytes.packed, stats.bytes.compressed))
    cells = (title, kind, _count_text(stats.params.total), sparsity, _count_text(stats.bytes.raw), packed, compressed)
    return f"| {' | '.join(cells)} |"


def _count_text(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _comparison_lines(result: ExportResult) -> list[str]:
    comparison = result.comparison
    if comparison is None:
        return ["The weights are identical, bit for bit."]
    inputs = "examples" if comparison.is_data else "random inputs"
    differences = f"at most {comparison.largest:.3g}, {comparison.mean:.3g} on average"
    lines = [f"On {comparison.examples:,} {inputs} the outputs differ by {differences}."]
    if comparison.tolerance.relative_rms is not None:
        lines.append(f"The RMS difference is {comparison.relative_rms:.2%} of the RMS of the outputs.")
    if comparison.top1_agreement is not None:
        lines.append(f"The top-1 answer is the same for {comparison.top1_agreement:.2%} of them.")
    return lines


_FIRST_OPSET = 9
"""Before opset 9, weights had to be listed as inputs as well."""


_STEPS = Items(3)


def check(request: ExportRequest, target: Target, output: Destination) -> None:
    """Refuse options that contradict each other, before a file is opened."""
    check_options(target, request.given_options)
    if request.opset is not None and request.opset < _FIRST_OPSET:
        raise UsageError(f"--opset {request.opset} is older than prunectl can write", hint="use --opset 9 or later")
    precisions = [f"--{name}" for name in ("half", "bf16", "int8") if name in request.given_options]
    if len(precisions) > 1:
        raise UsageError(f"{' and '.join(precisions)} cannot be used together")
    if request.sparse and request.code and precisions:
        raise UsageError(
            f"--sparse cannot be used with {precisions[0]} for PyTorch, which multiplies sparse weights in 32 bits",
            hint=f"leave out {precisions[0]}",
        )
    for option, value in (("--atol", request.atol), ("--rtol", request.rtol)):
        if value is not None and not value >= 0:
            raise UsageError(f"{option} cannot be negative, but is {value:g}")
    if not request.data and request.samples is not None and request.int8:
        raise UsageError("--samples needs --data when used with --int8", hint="add --data SPEC")
    if request.code and output.to_stdout:
        raise UsageError("--code writes a second file and cannot be used with standard output", hint="add -o OUT")


def check_destination(model: ModelFile, output: Destination, target: Target, companions: Iterable[Path]) -> None:
    """Refuse to overwrite the input, and any other file unless --force was given."""
    if output.to_stdout:
        if target.name == "saved-model":
            raise UsageError("a SavedModel is a folder and cannot be written to standard output")
        return
    for path in (output.target, *companions):
        if any(os.path.lexists(path) and atomic.is_same(file, path) for file in model.files):
            raise UsageError(f"{path} is part of the input", hint="choose another --output")
    written = model if model.path.is_dir() else replace(model, format=target.name, files=(model.path,))
    atomic.check_target(
        written,
        output.target,
        is_forced=output.is_forced,
        is_in_place=False,
        is_one_file=model.folder is None and target.name != "saved-model",
    )
    for path in companions:
        if os.path.lexists(path) and not output.is_forced:
            raise UsageError(f"{path} exists", hint="choose another --output, or replace it with --force")


def measure(path: Path, target: Target) -> ModelStats:
    """Statistics of a file that was written."""
    if target.name != "npz":
        return stats_for_report(open_model(path))
    model = _npz(path)
    stats = measure_stats(model, model.tensors, has_channels=False)
    if model.nbytes > BIG_BYTES:
        return stats
    compressed = compress(iter_model_bytes(model), get_codec(CodecName.GZIP, None))
    with zipfile.ZipFile(path) as archive:
        is_packed = any(info.compress_type for info in archive.infolist())
    sizes = SizeStats(model.nbytes, model.nbytes if is_packed else None, compressed.nbytes)
    return replace(stats, bytes=sizes, sha256=compressed.sha256)


def _npz(path: Path) -> ModelFile:
    arrays: dict[str, Array] = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            arrays[name] = archive[name]
    tensors = tuple(
        Tensor(name, "", array.shape, array.dtype, Role.OTHER, Storage(name, array.nbytes, None, array.nbytes))
        for name, array in arrays.items()
    )
    return ModelFile(path, "npz", tensors, ModelInfo(), (path,), lambda tensor: arrays[tensor.name])


@contextmanager
def naming_original(path: Path, copy: Path) -> Generator[None]:
    """Replace the path of a copy by that of the original in errors."""
    try:
        yield
    except PrunectlError as error:
        error.message = error.message.replace(str(copy), str(path))
        error.hint = error.hint.replace(str(copy), str(path))
        error.args = (error.message,)
        raise


def export(
    path: Path, request: ExportRequest, output: Destination, meter: ProgressFactory = no_progress
) -> ExportResult:
    """Write a model in another format atomically, and only if its outputs match those of the source.

    Progress is counted in three steps (loaded, written, compared), because converters report none.
    """
    if makes_folder(path, request, output):
        with meter(f"exporting {path.name}", Items(1)) as bar:
            result = export_folder(path, request, output)
            bar.advance(1)
            return result
    if request.shard_size is not None:
        raise UsageError("--shard-size needs a model folder, and a folder as output", hint="write -o FOLDER")
    if output.to_stdout and not request.to:
        raise UsageError("the format of the output is not given", hint="add --to FORMAT, such as --to onnx")
    target = target_of(request.to, output.target)
    # PyTorch has no layer that stores a weight without its zeros, so its class is written as well.
    request = replace(request, to=target.name, code=request.code or (request.sparse and target.name == "torch"))
    model = open_model(path)
    if model.format == "diffusers":
        # What a pipeline is comes before what the target, often a SavedModel by an output without suffix, cannot be.
        _check_parts(model, target, has_code=request.code)
    check(request, target, output)
    route = find_route(model, target, has_code=request.code)
    companions = load(route, route.companion_files)(output.target) if route.companion_files else ()
    check_destination(model, output, target, companions)
    check_card(request, output)
    if route.opener:
        # A SavedModel is run as its saved graph, without --builder; a model that Keras rebuilds can use --builder.
        runs_as_is = route.opener == "tensorflow:open_runnable"
        user_code.check(model, replace(request.origin, model="") if runs_as_is else request.origin)
        user_code.require_network(model, request.origin)
    # Imported before any work, so that a missing package is reported at once.
    load(route, route.writer)
    with (
        temporary_files() as scratch,
        atomic.atomic_replace(output.target, may_replace=output.is_forced, model=model) as folder,
        meter(f"exporting {path.name}", _STEPS) as bar,
    ):
        written = utf8_path(folder / output.target.name, scratch / "target")
        readable = utf8_path(model.path, scratch / "source")
        plain, stripped = _without_wrappers(model if readable is model.path else open_model(readable), scratch)
        raised: tuple[str, ...] = ()
        if plain.format in KERAS and target.name in {"onnx", "tflite"} and not request.origin.model:
            plain, raised = load(route, "keras:in_float32")(plain, scratch)
        with naming_original(path, plain.path):
            job = _export_job(plain, request, route, scratch)
            bar.advance(1)
            notes = load(route, route.writer)(job, written)
        if output.to_stdout and len(list(folder.iterdir())) > 1:
            raise WorkError(
                f"the export of {path} consists of several files, which cannot be written to standard output"
            )
        # --sparse with --code (PyTorch) needs no packing: the parts of its sparse weights are ordinary tensors.
        if request.pack or (request.sparse and not request.code):
            # write_npz has packed the archive already, and TensorFlow Lite's converter writes sparse tensors itself.
            if target.name not in {"npz", "tflite"}:
                destination.pack(written, folder)
        bar.advance(1)
        with naming_original(path, plain.path):
            comparison = _comparison(job, route, written)
            bar.advance(1)
        before, after = stats_for_report(model), replace(measure(written, target), path=str(output.target))
        all_notes = (
            *stripped,
            *raised,
            *_notes(job),
            *notes,
            *(() if target.is_weights else _note_modules(model)),
            *(() if request.sparse else _note_lost_zeros(before, after)),
        )
        result = ExportResult(
            before,
            after,
            by_name(model.format).title,
            target.title,
            comparison,
            all_notes,
            _companion_files(folder, output.target),
        )
        card = card_text(result)
    write_card(request, card, output)
    return result


def _without_wrappers(model: ModelFile, scratch: Path) -> tuple[ModelFile, tuple[str, ...]]:
    """The model with its pruning wrappers stripped and the masks applied to its weights."""
    kinds = dict.fromkeys(wrapper.kind for wrapper in model.about.pruning_wrappers)
    if not kinds:
        return model, ()
    stripped = scratch / "stripped" / model.path.name
    stripped.parent.mkdir()
    strip(model.path, StripOptions(), Destination(stripped), is_packed=False)
    return open_model(stripped), (f"The pruning wrappers and masks ({', '.join(kinds)}) were removed first.",)


def _export_job(model: ModelFile, request: ExportRequest, route: Route, scratch: Path) -> ExportJob:
    if not route.opener:
        return ExportJob(model, request, scratch=scratch)
    # Texts of a batch are padded to one length, so the attention mask is an input, unless the user names the inputs.
    given = [option.name for option in request.input]
    names = given if given or request.data else ["input_ids", "attention_mask"]
    runnable = load(route, route.opener)(model, with_arrays(request.origin, model, request.data, *names))
    if not runnable.inputs:
        raise InputError(f"{model.path} has no inputs, so nothing can be run to compare its export with it")
    inputs = apply_input_options(runnable.inputs, request.input)
    check_known(inputs, request)
    samples = make_samples(runnable, inputs, request)
    # A shape or dtype that the model does not declare is taken from the samples.
    inputs = tuple(
        replace(
            spec,
            shape=spec.shape if spec.shape is not None else (None, *array.shape[1:]),
            dtype=spec.dtype or array.dtype.name,
        )
        for spec, array in zip(inputs, samples.batches[0], strict=True)
    )
    return ExportJob(model, request, inputs, samples, runnable, scratch)


def _comparison(job: ExportJob, route: Route, written: Path) -> Comparison | None:
    if not route.runner:
        return None
    return compare(job.runnable, load(route, route.runner)(job, written), job.samples, tolerance_of(job.request))


def _note_modules(model: ModelFile) -> tuple[str, ...]:
    """A note on what sentence-transformers computes after the network of a folder."""
    path = None if model.folder is None else model.folder / "modules.json"
    if path is None or not path.is_file():
        return ()
    return (f"The modules after the network in {path}, such as pooling, are not in the output.",)


def _check_parts(model: ModelFile, target: Target, *, has_code: bool) -> None:
    """Refuse a pipeline as a whole where only its networks may have a route to the target."""
    try:
        find_route(model, target, has_code=has_code)
    except UsageError:
        part = model.path / max(model.tensors, key=lambda tensor: tensor.size).name.partition(".")[0]
        raise UsageError(
            f"{model.path} is a pipeline, whose networks are exported one by one",
            hint=f"name one: prunectl export {shlex.quote(str(part))} -o OUT",
        ) from None


def _companion_files(folder: Path, target: Path) -> tuple[tuple[str, int], ...]:
    others = sorted(file for file in folder.iterdir() if file.name != target.name)
    return tuple((str(target.parent / file.name), file.stat().st_size) for file in others)


def _notes(job: ExportJob) -> tuple[str, ...]:
    return (*(job.runnable.notes if job.runnable is not None else ()), *job.samples.notes)


def _note_lost_zeros(before: ModelStats, after: ModelStats) -> tuple[str, ...]:
    zeros_before, zeros_after = before.params.zero or 0, after.params.zero or 0
    if zeros_after >= zeros_before:
        return ()
    why = "folding, rounding and removing duplicates change which weights are zero"
    return (f"{zeros_after:,} of its weights are zero, {zeros_before:,} in the source: {why}.",)
