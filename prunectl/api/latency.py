"""`bench` and `eval` as functions: how fast models are, and how good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, Unpack

from prunectl.api.in_memory import named_objects
from prunectl.api.keywords import (
    AnyPath,
    Code,
    Data,
    EvaluateOptions,
    Names,
    as_keywords,
    parse_keywords,
)
from prunectl.api.paths import local_path
from prunectl.api.results import EngineResult, EvaluationResult, OnProgress, meter_of
from prunectl.errors import UsageError
from prunectl.exporting import bench as benching
from prunectl.exporting.bench import Benchmark
from prunectl.reporting.bench import bench_report
from prunectl.reporting.report import Report
from prunectl.training.evaluate import evaluate_file
from prunectl.training.quiet import host_settings
from prunectl.training.request import parse_request
from prunectl.units import duration


class BenchOptions(TypedDict, total=False):
    """Options of `bench`; each has the default of the command line."""

    batch_size: int | Sequence[int]
    threads: int
    seconds: float
    input: Names
    data: Data
    seed: int
    builder: Code
    custom_objects: str | Mapping[str, Any]
    trust: bool


@dataclass(frozen=True, slots=True, repr=False)
class BenchResult(EngineResult, Benchmark):
    """How fast some models are, and whether they differ by more than noise."""

    command: ClassVar[str] = "bench"

    def report(self) -> Report:
        """The table of latencies, and a verdict for each model but the first."""
        return bench_report(self)

    def lines(self) -> tuple[str, ...]:
        """The median latencies, and the verdicts."""
        medians = [
            f"{model.path}  {duration(latency.median.middle)} (batch size {size})"
            for size, latencies in self.latencies.items()
            for model, latency in zip(self.models, latencies, strict=True)
        ]
        return (*medians, *self.report().notes)


@as_keywords()
@host_settings()
def bench(
    model: AnyPath, /, *others: AnyPath, on_progress: OnProgress = None, **options: Unpack[BenchOptions]
) -> BenchResult:
    """Measure how fast models are, each in the runtime that opens it; the first is compared with.

    ``prunectl.bench("model.onnx", "small.onnx", batch_size=[1, 16])``. ``on_progress`` is called after each batch size.
    """
    paths = [local_path("model", path) for path in (model, *others)]
    parsed = parse_keywords("bench", BenchOptions, options)
    if (sizes := parsed.get("batch_size")) is not None:
        parsed["batch_size"] = ",".join(map(str, [sizes] if isinstance(sizes, int) else sizes))
    with named_objects(parsed) as named:
        request = benching.parse_request(named)
        return BenchResult.of(benching.bench(paths, request, meter_of(on_progress)))


@as_keywords()
@host_settings()
def evaluate(
    model: AnyPath, data: Data, /, *, on_progress: OnProgress = None, **options: Unpack[EvaluateOptions]
) -> EvaluationResult:
    """Measure how good a model is on data: `value` is the metric that was named first, or the one that fits the data.

    ``prunectl.evaluate("model.pt", (x, y), metric="accuracy", builder=Net)``. ``on_progress`` is called after each
    batch, with the number of examples.
    """
    path = local_path("model", model)
    if data is None:
        raise UsageError("no data is given", hint="write prunectl.evaluate('model.h5', 'test.npz')")
    with named_objects({**parse_keywords("evaluate", EvaluateOptions, options), "data": data}) as named:
        request = parse_request(named)
        result = evaluate_file(path, request, meter_of(on_progress))
    return EvaluationResult.of(result, path=str(model))
