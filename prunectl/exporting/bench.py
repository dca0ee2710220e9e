"""How fast each model is in the runtime that opens it: the same inputs, in turns, with the same number of threads."""

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
    """The options of `bench`, each called as it is typed."""

    batch_size: tuple[int, ...] = ()
    """Empty for what the models were saved for, or else 1."""
    threads: int = 1
    seconds: float = 5.0
    """At most, for each batch size."""
    input: tuple[InputOption, ...] = ()
    data: str = ""
    seed: int = 0
    builder: str = ""
    custom_objects: str = ""
    trust: bool = False

    @property
    def origin(self) -> TimedOptions:
        """How a model becomes a network of its framework."""
        return TimedOptions(self.builder, self.custom_objects, self.trust, self.seed, threads=self.threads)


OPTIONS = tuple(field.name for field in fields(BenchRequest))


def parse_request(options: Mapping[str, Any]) -> BenchRequest:
    """Parse options, by the names of the command line; those that are not given have their defaults."""
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
    """By how many bytes the peak of resident memory grew while it was loaded and first run; None where not known."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The latencies of some models, for each batch size in the order of the models."""

    models: tuple[BenchedModel, ...]
    latencies: Mapping[int, tuple[Latency, ...]]
    threads: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model in its runtime."""

    file: ModelFile
    runnable: RunnableModel
    inputs: tuple[InputSpec, ...]
    is_open: bool
    """Whether it leaves shapes open, which `--input` gives."""

    @property
    def fixed_batch_size(self) -> int | None:
        """The batch size that it was saved for, if it has a fixed one."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape), None)


def bench(paths: Sequence[Path], request: BenchRequest, meter: ProgressFactory = no_progress) -> Benchmark:
    """Measure the latency of each model beside the others."""
    files = [open_model(path) for path in paths]
    routes = [running_route(file) for file in files]
    check_exists(request.data)
    for file in files:
        user_code.check(file, request.origin)
        user_code.require_network(file, request.origin)
    # What is missing is said, and loaded, before anything is measured.
    openers = [load(route, route.opener) for route in routes]
    with _as_before():
        opened, memory = [], []
        # A runtime takes memory of its own when it first runs anything.
        for file, opener in {opener: (file, opener) for file, opener in zip(files, openers, strict=True)}.values():
            first = _open(file, opener, request)
            _prepare(first, first.fixed_batch_size or 1, request)
            del first
        for file, opener in zip(files, openers, strict=True):
            with _peak_growth() as grown:
                opened.append(_open(file, opener, request))
                sizes = request.batch_size or (opened[0].fixed_batch_size or 1,)
                for size in sizes:
                    _prepare(opened[-1], size, request)
            memory.append(grown)
        if request.input and not any(each.is_open for each in opened):
            raise UsageError("--input has no use: the models give the shapes of all inputs", hint="leave out --input")
        latencies = {}
        with meter("measuring batch sizes", Items(len(sizes))) as bar:
            for size in sizes:
                runs = [_prepare(each, size, request) for each in opened]
                latencies[size] = measure(runs, seconds=request.seconds, seed=request.seed)
                bar.advance(1)
    models = tuple(_describe(each, grown[0] if grown else None) for each, grown in zip(opened, memory, strict=True))
    return Benchmark(models, latencies, request.threads, tuple(_notes(opened, request.threads)))


def _open(file: ModelFile, opener: Any, request: BenchRequest) -> _Opened:
    names = (option.name for option in request.input)
    runnable: RunnableModel = opener(file, with_arrays(request.origin, file, request.data, *names))
    # Of several models, whose layouts may differ, those are told the shape that do not know it.
    is_open = any(spec.shape is None or None in spec.shape[1:] for spec in runnable.inputs)
    inputs = apply_input_options(runnable.inputs, request.input if is_open else ())
    # The batch is that of --batch-size, whatever example --input gives, unless the model has one of its own.
    inputs = tuple(
        replace(spec, shape=(own.shape[0] if own.shape else None, *spec.shape[1:])) if spec.shape else spec
        for own, spec in zip(runnable.inputs, inputs, strict=True)
    )
    check_known(inputs, ExportRequest(data=request.data, input=request.input))
    if not inputs:
        raise InputError(f"{file.path} takes no inputs, so nothing can be run on batches of any size")
    return _Opened(file, runnable, inputs, is_open=is_open)


def _prepare(opened: _Opened, size: int, request: BenchRequest) -> Timed:
    """What runs a batch of some size, tried once: an error names the model."""
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
def _as_before() -> Iterator[None]:
    """Give PyTorch back its number of threads, for who goes on in this process."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else 0
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(threads)


@contextmanager
def _peak_growth() -> Iterator[list[int]]:
    """Collect by how many bytes the peak of resident memory grows; nothing where the system does not tell."""
    grown: list[int] = []
    before = None
    with suppress(OSError):
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _peak_bytes()
    yield grown
    if before is not None:
        grown.append(max(0, _peak_bytes() - before))


def _return_freed_memory() -> None:
    """Let the C library give back what is free, which would hide what is taken again; glibc alone can."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
