"""What is typed with `--max-drop`, as a search: in which folder, and what it says while it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from prunectl.analysis.patterns import CHANNEL, NMPattern
from prunectl.commands._command import option_name
from prunectl.commands.prune_modes import PruneMode, build_mode, channel_limits
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.registry import by_name, load, open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import BATCH_SIZE, SAMPLES, PruneRequest, parse_pattern
from prunectl.pruning.strip import stats_for_report
from prunectl.reporting.max_drop import max_drop_report, with_search
from prunectl.reporting.progress import TrainingProgress
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.sweep import trial_line
from prunectl.sweeping import trial as points
from prunectl.sweeping.journal import digests
from prunectl.sweeping.max_drop import Search, SearchResult, search
from prunectl.sweeping.requests import check_channels, needs_data, prune_to
from prunectl.sweeping.trial import Variant
from prunectl.training.backend import Means, ModelOrigin
from prunectl.training.evaluation.max_drop import max_drop
from prunectl.training.finetune import finetune
from prunectl.training.monitor import check_direction
from prunectl.training.request import FinetuneRequest, check
from prunectl.training.request import FinetuneRequest as Judging
from prunectl.training.request import asked as metrics_of

_AMOUNTS = ("sparsity", "compression", "target_gzip", "target_packed", "params", "flops", "dead")


def reject_conflicts(ctx: typer.Context, others: Mapping[str, str]) -> None:
    """Refuse what says how much goes as well, and others with the reason why."""
    for name in _AMOUNTS:
        if ctx.params.get(name):
            option = option_name(ctx, name)
            raise UsageError(f"{option} and --max-drop both say how much goes", hint=f"leave out {option}")
    for name, why in others.items():
        if ctx.params.get(name):
            raise UsageError(f"{option_name(ctx, name)} does not go with --max-drop: {why}")


@contextmanager
def run_search(path: Path, asked: Search, tried: Path | None, reporter: Reporter) -> Generator[SearchResult]:
    """Yield what a search came to, its models in the folder that was named or in one that goes away."""

    def run(folder: Path) -> SearchResult:
        return search(path, asked, folder, lambda *made: reporter.note(trial_line(*made)))

    if tried is not None:
        yield run(tried)
    else:
        with temporary_folder() as scratch:
            yield run(scratch)


def journal_key(words: Mapping[str, Any], is_free: Callable[[str], bool]) -> dict[str, Any]:
    """Return choices as they are noted, those in tables by the names of both, without what decides no number."""
    flat: dict[str, Any] = {}
    for name, value in words.items():
        inner = {f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: one for key, one in inner.items() if not is_free(key)}
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


_NOT_FOR_PRUNE = {
    "wrap": "wrappers prune later",
    "schedule": "wrappers prune later",
    "latency": "only the result is timed, by prune --sparsity",
}
_LEAST_PRUNED = 0.01


def way_within(ctx: typer.Context, asked: PruneRequest) -> PruneMode:
    """Return the way that finds how much may go, and refuse what does not go with it before a file is opened."""
    said, reporter = ctx.params, ctx.obj
    assert isinstance(reporter, Reporter)
    limit = max_drop(said["max_drop"])
    reject_conflicts(ctx, _NOT_FOR_PRUNE)
    if not asked.data:
        raise UsageError("--max-drop is judged on data, and there is none", hint="such as --data test.npz")
    if asked.pattern != CHANNEL and isinstance(parse_pattern(asked)[0], NMPattern):
        raise UsageError(f"the pattern {asked.pattern} decides the sparsity by itself", hint="leave out --max-drop")
    origin = ModelOrigin(
        asked.model, asked.custom_objects, is_trusted=said["trust"], seed=asked.seed, inputs=asked.inputs
    )
    means = Means(loss=asked.loss, seed=asked.seed, **metrics_of((said["metric"],)))
    check_direction(means)
    judging = Judging(asked.data, batch_size=asked.batch_size, means=means, origin=origin)
    does_look = needs_data(replace(asked, sparsity=_LEAST_PRUNED))
    if not does_look and asked.samples != SAMPLES:
        raise UsageError(
            f"the strategy {asked.strategy} looks at no data, and all of it is judged", hint="leave out --samples"
        )
    plain = asked if does_look else _without_data(asked)
    if asked.pattern == CHANNEL:
        check_channels(replace(plain, sparsity=_LEAST_PRUNED))
    limits = channel_limits(said)
    build_mode(ctx, replace(plain, sparsity=_LEAST_PRUNED))

    def make(path: Path, sparsity: float, output: Destination) -> None:
        prune_to(path, replace(plain, sparsity=sparsity), output, is_trusted=origin.is_trusted, limits=limits)

    choices = journal_key({**asdict(asked), "metric": said["metric"], **limits}, {"sparsity", "is_packed"}.__contains__)
    name = points.Variant(asked.strategy, asked.scope, "", asked.pattern, ",".join(asked.params))
    words = (asked.strategy, asked.policy, asked.loss, asked.model, asked.custom_objects, *means.metrics)

    def within(path: Path, place: Destination | None) -> Report:
        outputs.check(open_model(path), place)
        files = digests(specs=(asked.data,), functions=words)
        searched = Search(name, limit, judging, make, choices, files)
        with run_search(path, searched, Path(said["tried"]) if said["tried"] else None, reporter) as held:
            report = build_mode(ctx, replace(plain, sparsity=held.best.sparsity))(path, place)
            return with_search(report, held, asked.data, does_look=does_look)

    return within


def _without_data(asked: PruneRequest) -> PruneRequest:
    """Return what is asked of weights alone, which takes no data; a cut is also proved on some."""
    if asked.pattern == CHANNEL:
        return replace(asked, loss="")
    return replace(asked, data="", batch_size=BATCH_SIZE, loss="")


_NOT_FOR_FINETUNE = {
    "checkpoint_dir": "each try is a run of its own; --tried DIR goes on where a search was stopped",
    "resume": "--tried DIR goes on where a search was stopped",
    "logdir": "each try is a run of its own",
    "keep_wrappers": "what has wrappers is not judged",
}
_PROCESSES, _LEAST_FINETUNED = "WORLD_SIZE", 0.01
_NOT_IN_SEARCH = frozenset({"pruning sparsity"})


def within(ctx: typer.Context, asked: FinetuneRequest) -> Callable[[Path, Destination], Report]:
    """Return what finds how much may go, and refuse what does not go with it before a file is opened."""
    said, reporter = ctx.params, ctx.obj
    assert isinstance(reporter, Reporter)
    limit = max_drop(said["max_drop"])
    reject_conflicts(ctx, _NOT_FOR_FINETUNE)
    if os.environ.get(_PROCESSES, "1") != "1":
        raise UsageError("--max-drop trains in one process", hint="search without torchrun, then train with --sparsity")
    pruning = asked.pruning
    if isinstance(parse_pattern(pruning)[0], NMPattern):
        raise UsageError(f"the pattern {pruning.pattern} decides the sparsity by itself", hint="leave out --max-drop")
    check(_at(asked, _LEAST_FINETUNED))
    check_direction(asked.means)

    def make(path: Path, sparsity: float, output: Destination) -> None:
        with TrainingProgress(reporter.settings, None) as progress:
            finetune(path, _at(asked, sparsity), output, progress.watch)

    way = Variant(pruning.strategy, pruning.scope, asked.ramping.name, pruning.pattern, ",".join(pruning.params))

    def run(path: Path, place: Destination) -> Report:
        model = open_model(path)
        outputs.check(model, place)
        # As it is now: in place, the result takes its place.
        before = replace(stats_for_report(model), path=said["model"])
        tried = Path(said["tried"]) if said["tried"] else None
        searched = Search(
            way, limit, asked, make, journal_key(asked.choices, _NOT_IN_SEARCH.__contains__), _files(asked)
        )
        with run_search(path, searched, tried, reporter) as held:
            _adopt(model, open_model(held.path), place)
        after = replace(stats_for_report(open_model(_written(model, place))), path=str(place.target))
        remarks = () if asked.val or asked.val_split else (_itself(asked),)
        return max_drop_report(held, (before, after), said["model"], str(place.target), remarks)

    return run


def _at(asked: FinetuneRequest, sparsity: float) -> FinetuneRequest:
    return replace(asked, pruning=replace(asked.pruning, sparsity=sparsity))


def _files(asked: FinetuneRequest) -> dict[str, str]:
    means, origin, pruning = asked.means, asked.origin, asked.pruning
    words = (means.loss, *means.metrics, means.custom_step, origin.model, origin.custom_objects, asked.distill_model)
    own = (pruning.strategy, pruning.policy, asked.ramping.name)
    return digests(specs=(asked.data, asked.val), functions=(*words, *own), models=(asked.distill,))


def _adopt(model: ModelFile, made: ModelFile, output: Destination) -> None:
    """Put what was made elsewhere where the result goes."""
    with outputs.staging_dir(model, output) as (folder, target):
        places = outputs.staged_paths(made, folder, target)
        if output.is_in_place and not model.path.is_dir():
            # File by file under the names that are there.
            own = outputs.staged_paths(model, folder, target)
            files = zip(dict.fromkeys(made.files), dict.fromkeys(model.files), strict=True)
            places = {new: own[old] for new, old in files}
        load(by_name(made.format).writer)(made, places, ())


def _written(model: ModelFile, output: Destination) -> Path:
    return model.path if output.is_in_place else output.target


def _itself(asked: FinetuneRequest) -> str:
    return f"Judged by {asked.data} itself: say --val or --val-split to know what holds on other data."
