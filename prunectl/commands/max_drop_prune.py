"""`prune --max-drop`: the way to prune that goes as far as the metric on some data holds."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import typer

from prunectl.commands.max_drop import found, noted, refuse
from prunectl.commands.prune_ways import Way, limits_of, settled
from prunectl.errors import UsageError
from prunectl.formats.table import open_model
from prunectl.measuring.patterns import CHANNELS, ZerosOf
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.request import BATCH_SIZE, SAMPLES, Request, shape_of
from prunectl.reporting.held_report import with_held
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter
from prunectl.sweeping import point as points
from prunectl.sweeping.inputs import digests
from prunectl.sweeping.pruned import looks, pruned
from prunectl.sweeping.requests import check_cut
from prunectl.sweeping.search import Search
from prunectl.training.asked import asked as metrics_of
from prunectl.training.better import check_direction
from prunectl.training.judging.drop import max_drop
from prunectl.training.network import Means, Origin
from prunectl.training.request import Request as Judging

_OTHERS = {
    "wrap": "wrappers prune later",
    "schedule": "wrappers prune later",
    "latency": "only the result is timed, by prune --sparsity",
}
_LEAST = 0.01


def way_within(ctx: typer.Context, asked: Request) -> Way:
    """Return the way that finds how much may go, and refuse what does not go with it before a file is opened."""
    said, reporter = ctx.params, ctx.obj
    assert isinstance(reporter, Reporter)
    limit = max_drop(said["max_drop"])
    refuse(ctx, _OTHERS)
    if not asked.data:
        raise UsageError("--max-drop is judged on data, and there is none", hint="such as --data test.npz")
    if asked.pattern != CHANNELS and isinstance(shape_of(asked)[0], ZerosOf):
        raise UsageError(f"the pattern {asked.pattern} decides the sparsity by itself", hint="leave out --max-drop")
    origin = Origin(asked.model, asked.custom_objects, is_trusted=said["trust"], seed=asked.seed, inputs=asked.inputs)
    means = Means(loss=asked.loss, seed=asked.seed, **metrics_of((said["metric"],)))
    check_direction(means)
    judging = Judging(asked.data, batch_size=asked.batch_size, means=means, origin=origin)
    does_look = looks(replace(asked, sparsity=_LEAST))
    if not does_look and asked.samples != SAMPLES:
        raise UsageError(
            f"the strategy {asked.strategy} looks at no data, and all of it is judged", hint="leave out --samples"
        )
    plain = asked if does_look else _without_data(asked)
    if asked.pattern == CHANNELS:
        check_cut(replace(plain, sparsity=_LEAST))
    limits = limits_of(said)
    settled(ctx, replace(plain, sparsity=_LEAST))

    def make(path: Path, sparsity: float, output: Output) -> None:
        pruned(path, replace(plain, sparsity=sparsity), output, is_trusted=origin.is_trusted, limits=limits)

    choices = noted({**asdict(asked), "metric": said["metric"], **limits}, {"sparsity", "is_packed"}.__contains__)
    name = points.Way(asked.strategy, asked.scope, "", asked.pattern, ",".join(asked.params))
    words = (asked.strategy, asked.policy, asked.loss, asked.model, asked.custom_objects, *means.metrics)

    def within(path: Path, place: Output | None) -> Report:
        outputs.check(open_model(path), place)
        files = digests(specs=(asked.data,), functions=words)
        searched = Search(name, limit, judging, make, choices, files)
        with found(path, searched, Path(said["tried"]) if said["tried"] else None, reporter) as held:
            report = settled(ctx, replace(plain, sparsity=held.best.sparsity))(path, place)
            return with_held(report, held, asked.data, does_look=does_look)

    return within


def _without_data(asked: Request) -> Request:
    """Return what is asked of weights alone, which takes no data; a cut is also proved on some."""
    if asked.pattern == CHANNELS:
        return replace(asked, loss="")
    return replace(asked, data="", batch_size=BATCH_SIZE, loss="")
