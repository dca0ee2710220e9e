"""`--max-drop`: the search for the largest sparsity within a drop, for `prune` and `finetune`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunectl.analysis.patterns import CHANNEL, NMPattern
from prunectl.analysis.stats import ModelStats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.commands.prune import build_mode, report_of
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.registry import by_name, load, open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest, parse_pattern
from prunectl.pruning.strip import stats_for_report
from prunectl.reporting.finetune import TrainingProgress
from prunectl.reporting.max_drop import max_drop_report, with_search
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.sweep import trial_line
from prunectl.sweeping.journal import digests
from prunectl.sweeping.requests import check_channels, needs_data
from prunectl.sweeping.sweep import Search, SearchResult, Watcher, search
from prunectl.sweeping.trial import Variant
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.finetune import finetune
from prunectl.training.max_drop import parse_drop
from prunectl.training.monitor import check_direction, monitored_metric
from prunectl.training.request import INPUT, FinetuneRequest, check, parse_metrics

if TYPE_CHECKING:
    from prunectl.commands.finetune import Finetune
    from prunectl.commands.prune import Prune


@contextmanager
def run_search(path: Path, spec: Search, tried: Path | None, watcher: Watcher) -> Generator[SearchResult]:
    """Yield the result of a search, with its models in the given folder or in a temporary one."""
    if tried is not None:
        yield search(path, spec, tried, watcher)
    else:
        with temporary_folder() as scratch:
            yield search(path, spec, scratch, watcher)


def _teller(reporter: Reporter) -> Watcher:
    """A watcher that prints a line for each trial."""
    return lambda *trial: reporter.note(trial_line(*trial))


def journal_key(choices: Mapping[str, Any], is_left_out: Callable[[str], bool]) -> dict[str, Any]:
    """The choices that affect results, flattened, as the journal of a search records them."""
    flat: dict[str, Any] = {}
    for name, value in choices.items():
        inner = {f"{name} {key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: item for key, item in inner.items() if not is_left_out(key)}
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


_LEAST_PRUNED = 0.01


@dataclass(frozen=True, slots=True)
class PruneSearch:
    """A search by `prune` for the largest sparsity within a drop."""

    pruning: PruneRequest
    """The request to prune at the sparsity that is found."""
    start: Callable[[Path, Destination | None], Search]
    """Makes the search for a model, after checking that the output can be written."""
    looks_at_data: bool
    """Whether weights are ranked by the data that the drop is measured on."""


def search_mode(
    reporter: Reporter, options: Prune, request: PruneRequest, limits: Mapping[str, Any]
) -> Callable[[Path, Destination | None], Report]:
    """The search for the largest sparsity within a drop, with its report; conflicts are rejected before it opens."""
    spec = prune_search(options, request, limits)
    build_mode(options, replace(spec.pruning, sparsity=_LEAST_PRUNED), limits)

    def run(path: Path, destination: Destination | None) -> Report:
        result, search_result = prune_within(spec, options, limits, _teller(reporter))(path, destination)
        report = report_of(result, options, spec.pruning, destination)
        return with_search(report, search_result, request.data, looks_at_data=spec.looks_at_data)

    return run


def prune_within(
    spec: PruneSearch,
    options: Prune,
    limits: Mapping[str, Any],
    watcher: Watcher,
    meter: ProgressFactory = no_progress,
) -> Callable[[Path, Destination | None], tuple[Any, SearchResult]]:
    """A function that prunes to the sparsity that a search finds, and returns the result and the search."""

    def run(path: Path, destination: Destination | None) -> tuple[Any, SearchResult]:
        with run_search(path, spec.start(path, destination), options.tried, watcher) as search_result:
            best = replace(spec.pruning, sparsity=search_result.best.sparsity)
            # The accuracy of the result was measured, so a tensor left with nothing is allowed.
            mode = build_mode(replace(options, allow_empty=True), best, limits, meter)
            return mode(path, destination), search_result

    return run


def prune_search(options: Prune, request: PruneRequest, limits: Mapping[str, Any]) -> PruneSearch:
    """The search that the options ask for; conflicts are rejected before a file is opened."""
    limit = parse_drop(options.max_drop)
    if not request.data:
        raise UsageError("--max-drop needs data to measure the drop on", hint="add --data test.npz")
    if request.pattern != CHANNEL and isinstance(parse_pattern(request)[0], NMPattern):
        raise UsageError(f"the pattern {request.pattern} fixes the sparsity", hint="leave out --max-drop")
    origin = LoadOptions(
        request.model, request.custom_objects, is_trusted=options.trust, seed=request.seed, inputs=request.inputs
    )
    means = TrainOptions(loss=request.loss, seed=request.seed, **parse_metrics((options.metric,)))
    check_direction(means)
    evaluation = FinetuneRequest(request.data, batch_size=request.batch_size or BATCH_SIZE, means=means, origin=origin)
    looks_at_data = needs_data(replace(request, sparsity=_LEAST_PRUNED))
    if not looks_at_data and request.samples != SAMPLES:
        raise UsageError(
            f"--samples has no effect: {request.strategy} uses no data, and the drop is measured on all of it",
            hint="leave out --samples",
        )
    pruning = request if looks_at_data else _drop_data_options(request)
    if request.pattern == CHANNEL:
        check_channels(replace(pruning, sparsity=_LEAST_PRUNED))

    def make(path: Path, sparsity: float, output: Destination) -> None:
        # A small step may be smaller than one channel.
        trial = replace(options, allow_empty=True, manifest=None)
        build_mode(trial, replace(pruning, sparsity=sparsity), limits)(path, output)

    choices = journal_key(
        {**asdict(request), "metric": options.metric, **limits}, {"sparsity", "is_packed"}.__contains__
    )
    variant = Variant(request.strategy, request.scope, "", request.pattern, ",".join(request.params))
    functions = (request.strategy, request.policy, request.loss, request.model, request.custom_objects, *means.metrics)

    def start(path: Path, destination: Destination | None) -> Search:
        outputs.check(open_model(path), destination)
        files = digests(specs=(request.data,), functions=functions)
        return Search(variant, limit, evaluation, make, choices, files)

    return PruneSearch(pruning, start, looks_at_data)


def _drop_data_options(request: PruneRequest) -> PruneRequest:
    """The request without data, for strategies that rank by weights alone; a channel cut is verified on some."""
    if request.pattern == CHANNEL:
        return replace(request, loss="")
    return replace(request, data="", batch_size=BATCH_SIZE, loss="")


_PROCESSES, _LEAST_FINETUNED = "WORLD_SIZE", 0.01
_NOT_IN_SEARCH = frozenset({"pruning sparsity"})


def finetune_search(
    reporter: Reporter, options: Finetune, request: FinetuneRequest
) -> Callable[[Path, Destination], Report]:
    """The search for the largest sparsity within a drop, with its report."""

    def make(path: Path, sparsity: float, output: Destination) -> None:
        with TrainingProgress(reporter.settings, None, monitored_metric(request.means)) as progress:
            finetune(path, request_at(request, sparsity), output, progress.watch)

    run = training_search(request, options.max_drop, make)

    def report(path: Path, destination: Destination) -> Report:
        result = run(path, destination, options.tried, _teller(reporter))
        surveys = (replace(result.before, path=options.model), result.after)
        return max_drop_report(result.search, surveys, options.model, str(destination.target), result.notes)

    return report


@dataclass(frozen=True, slots=True)
class TrainingSearch:
    """The result of a search whose trials are trained."""

    search: SearchResult
    before: ModelStats
    after: ModelStats
    notes: tuple[str, ...]


def training_search(
    request: FinetuneRequest, max_drop: str, make: Callable[[Path, float, Destination], None]
) -> Callable[[Path, Destination, Path | None, Watcher], TrainingSearch]:
    """The search for the largest sparsity within a drop; conflicts are rejected before a file is opened."""
    limit = parse_drop(max_drop)
    if os.environ.get(_PROCESSES, "1") != "1":
        raise UsageError(
            "--max-drop cannot be used with torchrun", hint="search in one process, then train with --sparsity"
        )
    pruning = request.pruning
    if isinstance(parse_pattern(pruning)[0], NMPattern):
        raise UsageError(f"the pattern {pruning.pattern} fixes the sparsity", hint="leave out --max-drop")
    check(request_at(request, _LEAST_FINETUNED))
    check_direction(request.means)
    variant = Variant(pruning.strategy, pruning.scope, request.ramping.name, pruning.pattern, ",".join(pruning.params))

    def run(path: Path, destination: Destination, tried: Path | None, watcher: Watcher) -> TrainingSearch:
        model = open_model(path)
        outputs.check(model, destination)
        # Measured before the run: with --in-place the result replaces the file.
        before = stats_for_report(model)
        spec = Search(
            variant, limit, request, make, journal_key(request.choices, _NOT_IN_SEARCH.__contains__), _files(request)
        )
        with run_search(path, spec, tried, watcher) as result:
            _copy_result(model, open_model(result.path), destination)
        after = replace(stats_for_report(open_model(_result_path(model, destination))), path=str(destination.target))
        judged = f"The drop was measured on {request.data}, the training data: add --val or --val-split."
        notes = () if request.val or request.val_split else (judged,)
        return TrainingSearch(result, before, after, notes)

    return run


def request_at(request: FinetuneRequest, sparsity: float) -> FinetuneRequest:
    """A request to train at a sparsity."""
    return replace(request, pruning=replace(request.pruning, sparsity=sparsity))


def _files(request: FinetuneRequest) -> dict[str, str]:
    means, origin, pruning = request.means, request.origin, request.pruning
    functions = (
        means.loss,
        *means.metrics,
        means.custom_step,
        origin.model,
        origin.custom_objects,
        request.distill_model,
    )
    named = (pruning.strategy, pruning.policy, request.ramping.name)
    models = () if request.distill == INPUT else (request.distill,)
    return digests(specs=(request.data, request.val), functions=(*functions, *named), models=models)


def _copy_result(model: ModelFile, result: ModelFile, output: Destination) -> None:
    """Copy a model that was written elsewhere to the output."""
    with outputs.staging_dir(model, output) as (folder, target):
        targets = outputs.staged_paths(result, folder, target)
        if output.is_in_place and not model.path.is_dir():
            # File by file, under the names of the output's files.
            originals = outputs.staged_paths(model, folder, target)
            files = zip(dict.fromkeys(result.files), dict.fromkeys(model.files), strict=True)
            targets = {new: originals[old] for new, old in files}
        load(by_name(result.format).writer)(result, targets, ())


def _result_path(model: ModelFile, output: Destination) -> Path:
    return model.path if output.is_in_place else output.target
