"""Functions that load a framework: `finetune`, `sweep`, `evaluate` and `bench`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack, overload

from prunectl.api.in_memory import by_own_names, named_objects
from prunectl.api.keywords import (
    AnyPath,
    CodeOptions,
    Data,
    EvaluateOptions,
    FinetuneOptions,
    Names,
    SweepOptions,
    as_keywords,
    check_type,
    names,
    parse_keywords,
    parse_text,
    ratio,
)
from prunectl.api.models import destination_of, local_path
from prunectl.api.pruning import search_line, trial_reporter
from prunectl.api.results import (
    EngineResult,
    EvaluationResult,
    OnProgress,
    SweepResult,
    TrainingResult,
    meter_of,
    size_lines,
    title_of,
)
from prunectl.commands._requests import OPTION_RULES, Mode
from prunectl.commands.max_drop import TrainingSearch, request_at, training_search
from prunectl.commands.sweep import USUAL, parse_names, parse_param
from prunectl.errors import UsageError
from prunectl.exporting import bench as benching
from prunectl.exporting.bench import Benchmark
from prunectl.pruning.destination import Destination
from prunectl.reporting.bench import bench_report
from prunectl.reporting.max_drop import max_drop_report
from prunectl.reporting.report import Report
from prunectl.sweeping.sweep import sweep as run_sweep
from prunectl.sweeping.trial import SweepConfig
from prunectl.training.evaluate import evaluate_file
from prunectl.training.finetune import finetune as train
from prunectl.training.host import host_settings
from prunectl.training.logger import LogEntry, ProgressEvent
from prunectl.training.max_drop import parse_drop
from prunectl.training.request import FinetuneRequest, parse_request
from prunectl.units import duration

OnEpoch = Callable[[LogEntry], object] | None


@dataclass(frozen=True, slots=True, repr=False)
class TrainingSearchResult(EngineResult, TrainingSearch):
    """The highest sparsity at which a trained model stays within the allowed drop, and all that were tried."""

    output: str = ""
    command: ClassVar[str] = "finetune"

    def report(self) -> Report:
        """The report of `finetune --max-drop`."""
        return max_drop_report(self.search, (self.before, self.after), self.before.path, self.output, self.notes)

    def lines(self) -> tuple[str, ...]:
        """Sizes and the metric before and after."""
        return (title_of(self.before, self.output), *size_lines(self.before, self.after), search_line(self.search))


@overload
def finetune(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    max_drop: str,
    tried: AnyPath | None = None,
    force: bool = False,
    in_place: bool = False,
    on_epoch: OnEpoch = None,
    on_progress: OnProgress = None,
    **options: Unpack[FinetuneOptions],
) -> TrainingSearchResult: ...


@overload
def finetune(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    force: bool = False,
    in_place: bool = False,
    on_epoch: OnEpoch = None,
    on_progress: OnProgress = None,
    **options: Unpack[FinetuneOptions],
) -> TrainingResult: ...


@as_keywords()
@host_settings()
def finetune(
    model: AnyPath,
    output: AnyPath,
    /,
    *,
    max_drop: str = "",
    tried: AnyPath | None = None,
    force: bool = False,
    in_place: bool = False,
    on_epoch: OnEpoch = None,
    on_progress: OnProgress = None,
    **options: Unpack[FinetuneOptions],
) -> TrainingResult | TrainingSearchResult:
    """Train a model with its zeros kept, or prune it while it trains.

    The options are those of the command line: ``data="train.npz"``, ``sparsity="80%"``, ``schedule="cosine"`` …; data
    may also be arrays ``(x, y)``, a torch Dataset or DataLoader, or a ``tf.data.Dataset``, and the model's builder a
    class or a function. ``on_epoch`` is called with the metrics of each epoch when it is over, ``on_progress`` after
    each step. With ``max_drop="1pp"`` the model is trained at several sparsities, and the result of the highest that
    costs no more than that is written; ``tried`` is a folder for the runs, from which a search can be resumed.
    """
    destination = destination_of(model, output, force=force, in_place=in_place)
    watch = EpochWatcher(on_epoch, on_progress)
    if tried is not None and not max_drop:
        raise UsageError("tried needs max_drop", hint="add max_drop='0.5pp'")
    folder = local_path("tried", tried) if tried is not None else None
    with named_objects(parse_keywords("finetune", FinetuneOptions, options)) as named:
        request = parse_request(named, is_searched=bool(max_drop))
        path = local_path("model", model)
        if max_drop:
            return _search_trained(path, destination, request, (max_drop, folder), watch)
        result = by_own_names(train(path, request, destination, watch))
    for entry in result.history:
        watch.tell(entry)
    return TrainingResult.of(result, output=str(destination.target))


def _search_trained(
    path: Path,
    destination: Destination,
    request: FinetuneRequest,
    limit: tuple[str, Path | None],
    watch: EpochWatcher,
) -> TrainingSearchResult:
    """Search for the highest sparsity within an allowed drop, with a training run at each one tried."""
    _refuse_options_of_one_run(request)
    max_drop, tried = limit

    def make(source: Path, sparsity: float, output: Destination) -> None:
        watch.begin()
        for entry in train(source, request_at(request, sparsity), output, watch).history:
            watch.tell(entry)

    run = training_search(request, max_drop, make)
    search = run(path, destination, tried, trial_reporter(watch.on_progress))
    return TrainingSearchResult.of(by_own_names(search), output=str(destination.target))


def _refuse_options_of_one_run(request: FinetuneRequest) -> None:
    """Refuse the options that the command refuses beside `--max-drop`."""
    given = {
        "sparsity": request.pruning.sparsity is not None,
        "checkpoint_dir": request.checkpoint_dir is not None,
        "resume": request.is_resumed,
        "logdir": request.logdir is not None,
        "keep_wrappers": request.keeps_wrappers,
    }
    for rule in OPTION_RULES["finetune"]:
        for name in rule.options:
            if rule.never & Mode.SEARCH and given[name]:
                raise UsageError(rule.message.format(name), hint=rule.hint.format(name))


@as_keywords()
def sweep(
    model: AnyPath, output: AnyPath, /, *, data: str, on_progress: OnProgress = None, **options: Unpack[SweepOptions]
) -> SweepResult:
    """Prune a model in many ways, and compare size and accuracy of the results (Pareto front).

    The folder keeps every finished trial: the same call resumes a sweep that was stopped. Trials run in separate
    processes, so data and models must be files or names of code.
    """
    check_type("data", data, AnyPath)
    parsed = parse_keywords("sweep", SweepOptions, options)
    drop = parse_text("max_drop", parse_drop, parsed["max_drop"]) if parsed.get("max_drop") else None
    config = _sweep_config(os.fspath(data), parsed, is_search=drop is not None)
    swept = run_sweep(
        local_path("model", model),
        config,
        local_path("output", output),
        jobs=parsed.get("jobs", 1),
        on=parsed.get("on", ""),
        max_drop=drop,
        watcher=trial_reporter(on_progress),
    )
    return SweepResult.of(swept, model=str(model))


_SAME = "val val_split epochs batch_size samples lr optimizer loss metric policy seed custom_objects"
_FIELDS = {**{name: name for name in _SAME.split()}, "layers": "only", "builder": "model"}
"""Options of `sweep`, each with the name of its field in SweepConfig."""


def _sweep_config(data: str, parsed: Mapping[str, Any], *, is_search: bool) -> SweepConfig:
    """The configuration of a sweep from parsed keywords; a search has no list of sparsities by default."""
    lists: dict[str, Any] = {
        name: parse_names(",".join(names(parsed[name])), name)
        for name in ("strategies", "scopes", "patterns", "schedules")
        if name in parsed
    }
    return SweepConfig(
        data=data,
        params=tuple(map(parse_param, parsed.get("param", ()))),
        sparsities=_ratios(parsed.get("sparsities", () if is_search else USUAL)),
        exclude=parsed.get("exclude", ()),
        is_trusted=parsed.get("trust", False),
        **lists,
        **{field: parsed[name] for name, field in _FIELDS.items() if name in parsed},
    )


def _ratios(values: Any) -> tuple[float, ...]:
    listed = values.split(",") if isinstance(values, str) else [values] if isinstance(values, int | float) else values
    return tuple(sorted({ratio("sparsities", value) for value in listed}))


class EpochWatcher:
    """Reports each epoch once, when it is over."""

    def __init__(self, on_epoch: OnEpoch, on_progress: OnProgress) -> None:
        if on_epoch is not None and not callable(on_epoch):
            raise TypeError(f"on_epoch must be a function, not {type(on_epoch).__name__}")
        self._on_epoch = on_epoch
        self._told = 0
        self.on_progress = on_progress
        self._bar = meter_of(on_progress)

    def begin(self) -> None:
        """Begin another run, whose epochs are reported from the first on."""
        self._told = 0

    def __call__(self, event: ProgressEvent) -> None:
        """Report a step, and the epoch that it ended."""
        with self._bar(f"epoch {event.epoch} of {event.epochs}", event.steps) as bar:
            bar.advance(event.step)
        if event.last is not None:
            self.tell(event.last)

    def tell(self, entry: LogEntry) -> None:
        """Report an epoch, unless it was reported already."""
        if self._on_epoch is not None and entry.epoch > self._told:
            self._told = entry.epoch
            self._on_epoch(by_own_names(entry))


class BenchOptions(CodeOptions, total=False):
    """Options of `bench`; each has the default of the command line."""

    batch_size: int | Sequence[int]
    threads: int
    seconds: float
    input: Names
    data: Data
    seed: int


@dataclass(frozen=True, slots=True, repr=False)
class BenchResult(EngineResult, Benchmark):
    """Latencies of models, and whether they differ by more than the noise."""

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
    """Measure how fast models are, each in the runtime that opens it; the others are compared with the first.

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
    model: AnyPath, /, data: Data, *, on_progress: OnProgress = None, **options: Unpack[EvaluateOptions]
) -> EvaluationResult:
    """Evaluate a model on data: `value` is the first metric that was named, or the one that fits the data.

    ``prunectl.evaluate("model.pt", (x, y), metric="accuracy", builder=Net)``. ``on_progress`` is called after each
    batch, with the number of examples.
    """
    path = local_path("model", model)
    if data is None:
        raise UsageError("no data is given", hint="write prunectl.evaluate('model.h5', 'test.npz')")
    with named_objects({**parse_keywords("evaluate", EvaluateOptions, options), "data": data}) as named:
        request = parse_request(named)
        result = by_own_names(evaluate_file(path, request, meter_of(on_progress)))
    return EvaluationResult.of(result, path=str(model))
