"""Latency of models, each in its own runtime: same inputs and number of threads, runs of all models interleaved."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from prunectl.analysis.stats import measure_stats
from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.analysis.timing import Latency, Timed, measure
from prunectl.channels.lengths import InputOption, parse_input
from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting.job import (
    InputSpec,
    RunnableModel,
    TimedOptions,
    apply_input_options,
    check_known,
    make_samples,
)
from prunectl.exporting.request import ExportRequest, refuse_unknown
from prunectl.exporting.routes import load, running_route
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.registry import open_model
from prunectl.training import user_code
from prunectl.training.data.registry import check_exists
from prunectl.training.runtimes import with_arrays

_INPUT = "x:1,3,224,224:f32"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """The options of `bench`, named as on the command line."""

    batch_size: tuple[int, ...] = ()
    """Empty for the batch size that the first model was saved with, or 1 if it has none."""
    threads: int = 1
    seconds: float = 5.0
    """Time limit for each batch size; at least six rounds are run all the same."""
    input: tuple[InputOption, ...] = ()
    data: str = ""
    seed: int = 0
    builder: str = ""
    custom_objects: str = ""
    trust: bool = False

    @property
    def origin(self) -> TimedOptions:
        """Options to load a model into its framework."""
        return TimedOptions(self.builder, self.custom_objects, self.trust, self.seed, threads=self.threads)


OPTIONS = tuple(field.name for field in fields(BenchRequest))


def parse_request(options: Mapping[str, Any]) -> BenchRequest:
    """Parse options named as on the command line; missing options take their defaults."""
    refuse_unknown("bench", options, OPTIONS)
    parsed = dict(options)
    if "batch_size" in parsed:
        parsed["batch_size"] = _parse_batch_sizes(parsed["batch_size"])
    if parsed.get("seed", 0) < 0:
        raise UsageError(f"--seed {parsed['seed']} is negative", hint="use 0 or a larger number")
    parsed["input"] = tuple(parse_input(text, _INPUT) for text in options.get("input", ()))
    return BenchRequest(**parsed)


def _parse_batch_sizes(text: str) -> tuple[int, ...]:
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"--batch-size {text!r} is not a list of numbers above 0", hint="write --batch-size 1,16")
    return tuple(dict.fromkeys(map(int, sizes)))


@dataclass(frozen=True, slots=True)
class BenchedModel:
    """A model that was measured."""

    path: str
    runtime: str
    params: int
    sparsity: float | None
    memory: int | None
    """Growth of the peak resident memory in bytes while the model was loaded and first run; None if unknown."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Latencies by batch size, each in the order of the models."""

    models: tuple[BenchedModel, ...]
    latencies: Mapping[int, tuple[Latency, ...]]
    threads: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model loaded in its runtime."""

    file: ModelFile
    runnable: RunnableModel
    inputs: tuple[InputSpec, ...]
    is_open: bool
    """Whether an input has an unknown shape or open axes besides the batch, which `--input` sets."""

    @property
    def fixed_batch_size(self) -> int | None:
        """The batch size that the model was saved with; None if its batch axis is open."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape), None)


def bench(paths: Sequence[Path], request: BenchRequest, meter: ProgressFactory = no_progress) -> Benchmark:
    """Measure the latency of each model beside the others."""
    files = [open_model(path) for path in paths]
    routes = [running_route(file) for file in files]
    check_exists(request.data)
    for file in files:
        user_code.check(file, request.origin)
        user_code.require_network(file, request.origin)
    # All runtimes are imported first: a missing package is reported before anything is measured.
    openers = [load(route, route.opener) for route in routes]
    with _restore_torch_threads():
        opened, memory = [], []
        # A runtime allocates memory of its own on its first run, which must not be counted as a model's.
        for file, opener in {opener: (file, opener) for file, opener in zip(files, openers, strict=True)}.values():
            first = _open(file, opener, request)
            _prepare(first, first.fixed_batch_size or 1, request)
            del first
        for file, opener in zip(files, openers, strict=True):
            with _peak_growth() as growth:
                opened.append(_open(file, opener, request))
                sizes = request.batch_size or (opened[0].fixed_batch_size or 1,)
                for size in sizes:
                    _prepare(opened[-1], size, request)
            memory.append(growth)
        if request.input and not any(each.is_open for each in opened):
            raise UsageError("--input has no use: the models fix the shapes of all inputs", hint="leave out --input")
        latencies = {}
        with meter("measuring batch sizes", Items(len(sizes))) as bar:
            for size in sizes:
                runs = [_prepare(each, size, request) for each in opened]
                latencies[size] = measure(runs, seconds=request.seconds, seed=request.seed)
                bar.advance(1)
    models = tuple(_describe(each, more[0] if more else None) for each, more in zip(opened, memory, strict=True))
    return Benchmark(models, latencies, request.threads, tuple(_notes(opened, request.threads)))


def _open(file: ModelFile, opener: Any, request: BenchRequest) -> _Opened:
    names = (option.name for option in request.input)
    runnable: RunnableModel = opener(file, with_arrays(request.origin, file, request.data, *names))
    # Only models with open axes take --input: others know their shapes, which may have another layout.
    is_open = any(spec.shape is None or None in spec.shape[1:] for spec in runnable.inputs)
    inputs = apply_input_options(runnable.inputs, request.input if is_open else ())
    # --batch-size sets the batch axis, not --input, unless the model has a fixed batch size.
    inputs = tuple(
        replace(spec, shape=(own.shape[0] if own.shape else None, *spec.shape[1:])) if spec.shape else spec
        for own, spec in zip(runnable.inputs, inputs, strict=True)
    )
    check_known(inputs, ExportRequest(data=request.data, input=request.input))
    if not inputs:
        raise InputError(f"{file.path} takes no inputs, so nothing can be run on batches of any size")
    return _Opened(file, runnable, inputs, is_open=is_open)


def _prepare(opened: _Opened, size: int, request: BenchRequest) -> Timed:
    """A function that runs one batch of the given size; it is called once here, so that errors name the model."""
    fixed = opened.fixed_batch_size
    if fixed not in {None, size}:
        raise UsageError(
            f"{opened.file.path} cannot run batches of {size}: it was saved for {fixed}",
            hint=f"use --batch-size {fixed}",
        )
    samples = make_samples(
        opened.runnable,
        opened.inputs,
        ExportRequest(data=request.data, samples=size, batch_size=size, seed=request.seed, input=request.input),
    )
    batch: tuple[Array, ...] = samples.batches[0]
    if len(batch[0]) < size:
        raise UsageError(f"{request.data} has {len(batch[0])} examples, fewer than a batch of {size}")
    run = opened.runnable.prepare(batch)
    try:
        run()
    except Exception as error:
        raise WorkError(
            f"{opened.runnable.runtime} cannot run {opened.file.path}: {first_line(error)}",
            hint="give the shape of its inputs with --input x:1,3,224,224, or real ones with --data SPEC",
        ) from error
    return run


def _describe(opened: _Opened, memory: int | None) -> BenchedModel:
    stats = measure_stats(opened.file, opened.file.tensors, has_channels=False)
    return BenchedModel(
        str(opened.file.path), opened.runnable.runtime, stats.params.total, stats.prunable_sparsity, memory
    )


def _notes(opened: Sequence[_Opened], threads: int) -> Iterator[str]:
    for each in opened:
        yield from each.runnable.notes
    if any(each.file.family is Family.KERAS for each in opened):
        yield "Keras models are run as a graph, without what predict does around it."
    if any(each.runnable.runtime == "TensorFlow" for each in opened):
        note: str = importlib.import_module("prunectl.exporting.tensorflow").threads_note(threads)
        yield from [note] * bool(note)


@contextmanager
def _restore_torch_threads() -> Iterator[None]:
    """Restore PyTorch's number of threads at the end, for later code in this process."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else 0
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(threads)


@contextmanager
def _peak_growth() -> Iterator[list[int]]:
    """Yield a list that gets the growth of peak resident memory in bytes; it stays empty on systems without /proc."""
    growth: list[int] = []
    before = None
    with suppress(OSError):
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _peak_bytes()
    yield growth
    if before is not None:
        growth.append(max(0, _peak_bytes() - before))


def _return_freed_memory() -> None:
    """Return free heap memory to the system (glibc only): a model that reused it would seem to need less."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
