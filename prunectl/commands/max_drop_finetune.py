"""`finetune --max-drop`: training that prunes as far as the metric holds; each try is a run of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from prunectl.commands.max_drop import found, noted, refuse
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.table import by_name, load, open_model
from prunectl.measuring.patterns import ZerosOf
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.request import shape_of
from prunectl.pruning.strip import surveyed
from prunectl.reporting.held_report import held_report
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.training_progress import TrainingProgress
from prunectl.sweeping.inputs import digests
from prunectl.sweeping.point import Way
from prunectl.sweeping.search import Search
from prunectl.training.better import check_direction
from prunectl.training.finetune import finetune
from prunectl.training.judging.drop import max_drop
from prunectl.training.request import Request, check

_OTHERS = {
    "checkpoint_dir": "each try is a run of its own; --tried DIR goes on where a search was stopped",
    "resume": "--tried DIR goes on where a search was stopped",
    "logdir": "each try is a run of its own",
    "keep_wrappers": "what has wrappers is not judged",
}
_PROCESSES, _LEAST = "WORLD_SIZE", 0.01
_FREE = frozenset({"pruning sparsity"})


def within(ctx: typer.Context, asked: Request) -> Callable[[Path, Output], Report]:
    """Return what finds how much may go, and refuse what does not go with it before a file is opened."""
    said, reporter = ctx.params, ctx.obj
    assert isinstance(reporter, Reporter)
    limit = max_drop(said["max_drop"])
    refuse(ctx, _OTHERS)
    if os.environ.get(_PROCESSES, "1") != "1":
        raise UsageError("--max-drop trains in one process", hint="search without torchrun, then train with --sparsity")
    pruning = asked.pruning
    if isinstance(shape_of(pruning)[0], ZerosOf):
        raise UsageError(f"the pattern {pruning.pattern} decides the sparsity by itself", hint="leave out --max-drop")
    check(_at(asked, _LEAST))
    check_direction(asked.means)

    def make(path: Path, sparsity: float, output: Output) -> None:
        with TrainingProgress(reporter.settings, None) as progress:
            finetune(path, _at(asked, sparsity), output, progress.watch)

    way = Way(pruning.strategy, pruning.scope, asked.ramping.name, pruning.pattern, ",".join(pruning.params))

    def run(path: Path, place: Output) -> Report:
        model = open_model(path)
        outputs.check(model, place)
        # As it is now: in place, the result takes its place.
        before = replace(surveyed(model), path=said["model"])
        tried = Path(said["tried"]) if said["tried"] else None
        searched = Search(way, limit, asked, make, noted(asked.choices, _FREE.__contains__), _files(asked))
        with found(path, searched, tried, reporter) as held:
            _adopt(model, open_model(held.path), place)
        after = replace(surveyed(open_model(_written(model, place))), path=str(place.target))
        remarks = () if asked.val or asked.val_split else (_itself(asked),)
        return held_report(held, (before, after), said["model"], str(place.target), remarks)

    return run


def _at(asked: Request, sparsity: float) -> Request:
    return replace(asked, pruning=replace(asked.pruning, sparsity=sparsity))


def _files(asked: Request) -> dict[str, str]:
    means, origin, pruning = asked.means, asked.origin, asked.pruning
    words = (means.loss, *means.metrics, means.custom_step, origin.model, origin.custom_objects, asked.distill_model)
    own = (pruning.strategy, pruning.policy, asked.ramping.name)
    return digests(specs=(asked.data, asked.val), functions=(*words, *own), models=(asked.distill,))


def _adopt(model: ModelFile, made: ModelFile, output: Output) -> None:
    """Put what was made elsewhere where the result goes."""
    with outputs.workplace(model, output) as (folder, target):
        places = outputs.places(made, folder, target)
        if output.is_in_place and not model.path.is_dir():
            # File by file under the names that are there.
            own = outputs.places(model, folder, target)
            files = zip(dict.fromkeys(made.files), dict.fromkeys(model.files), strict=True)
            places = {new: own[old] for new, old in files}
        load(by_name(made.format).writer)(made, places, ())


def _written(model: ModelFile, output: Output) -> Path:
    return model.path if output.is_in_place else output.target


def _itself(asked: Request) -> str:
    return f"Judged by {asked.data} itself: say --val or --val-split to know what holds on other data."
