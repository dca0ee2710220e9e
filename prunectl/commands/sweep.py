"""`prunectl sweep`: which way to prune keeps this model good on this data?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import make_command, option_group
from prunectl.errors import UsageError
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.sweep import sweep_report, trial_line
from prunectl.sweeping.sweep import sweep as run
from prunectl.sweeping.trial import SweepConfig
from prunectl.training.max_drop import parse_drop
from prunectl.units import parse_ratio

_ways = option_group("What is tried")
_data = option_group("Data")
_train = option_group("Training")
_file = option_group("What the file does not say")
_USUAL = "50%,80%,90%"
_DEFAULT = SweepConfig("")
_STRATEGIES, _SCOPES, _PATTERNS, _SCHEDULES = map(
    ",".join, (_DEFAULT.strategies, _DEFAULT.scopes, _DEFAULT.patterns, _DEFAULT.schedules)
)


def sweep(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="File or folder.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="For the models and sweep.jsonl.")],
    data: Annotated[str, _data(metavar="SPEC", help="What to learn from, and to look at: train.npz, images/ …")],
    val: Annotated[str, _data(metavar="SPEC", help="What to judge by; else the data itself.")] = "",
    val_split: Annotated[str, _data(metavar="RATIO", help="Judge by this share of the data instead.")] = "",
    batch_size: Annotated[int, _data(help="Examples in a batch.", min=1)] = _DEFAULT.batch_size,
    samples: Annotated[int, _data(help="How many examples strategies look at.", min=1)] = _DEFAULT.samples,
    metric: Annotated[
        str, _data(metavar="NAME", help="What decides: accuracy, loss, f.py:fn:max …; else as the file says.")
    ] = "",
    strategies: Annotated[str, _ways(metavar="NAME,…", help="What goes first.")] = _STRATEGIES,
    scopes: Annotated[str, _ways(metavar="NAME,…", help="layer, global …, as in prune.")] = _SCOPES,
    patterns: Annotated[str, _ways(metavar="NAME,…", help="unstructured, 2:4, block:1x4, channel …")] = _PATTERNS,
    param: Annotated[
        list[str] | None,
        _ways(metavar="K=V,…", help="Values to try, for the strategies that have it; may be repeated."),
    ] = None,
    sparsities: Annotated[
        str, _ways(metavar="RATIO,…", help=f"How much goes.  [default: {_USUAL}, or what --max-drop finds]")
    ] = "",
    schedules: Annotated[
        str, _ways(metavar="NAME,…", help="How it goes while training; constant is before the first step.")
    ] = _SCHEDULES,
    max_drop: Annotated[
        str, _ways(metavar="DROP", help="Find the largest sparsity that costs no more: 0.5pp, or 0.01 of a loss.")
    ] = "",
    policy: Annotated[str, _ways(metavar="NAME", help="Which tensors.")] = _DEFAULT.policy,
    only: Annotated[str, _ways(metavar="GLOB", help="Only these tensors, whatever the policy.")] = "",
    exclude: Annotated[list[str] | None, _ways(metavar="GLOB", help="Not these; may be repeated.")] = None,
    epochs: Annotated[int, _train(help="Train each point so long; 0 prunes alone.", min=0)] = _DEFAULT.epochs,
    lr: Annotated[float | None, _train(help="Learning rate; else as the file says, or the framework.")] = None,
    optimizer: Annotated[str, _train(metavar="NAME", help="Such as adam or sgd:momentum=0.9.")] = "",
    loss: Annotated[str, _train(metavar="NAME", help="Such as cross-entropy or mse, or mod:fn.")] = "",
    seed: Annotated[int, _train(help="Decides what is random.")] = _DEFAULT.seed,
    jobs: Annotated[int, typer.Option("-j", "--jobs", metavar="N", help="Processes side by side.", min=1)] = 1,
    on: Annotated[str, typer.Option("--on", metavar="PLACE", help="ray, or ray:ADDRESS: on a Ray cluster.")] = "",
    build: Annotated[str, _file("--model", metavar="MOD:FN", help="Builds the model, for weights alone.")] = "",
    custom_objects: Annotated[str, _file(metavar="MOD:DICT", help="Explains custom Keras layers.")] = "",
    trust: Annotated[bool, _file("--trust", help="Let code that comes with the file run.")] = False,
) -> int:
    """Try strategies, scopes, patterns, sparsities and schedules on MODEL, and compare what comes of them.

    Each point is kept in DIR as soon as it is made: the same command goes on where it was stopped.

    [dim]$[/] prunectl sweep model.onnx -o points --data test.npz --strategies magnitude,lamp --scopes layer,global

    [dim]$[/] prunectl sweep model.onnx -o shapes --data test.npz --patterns unstructured,2:4,channel

    [dim]$[/] prunectl sweep model.onnx -o within --data test.npz --max-drop 1pp

    [dim]$[/] prunectl sweep net.pt -o tuned --model net.py:Net --data train.npz --epochs 1 --strategies magnitude,obs
    """
    reporter: Reporter = ctx.obj
    config = SweepConfig(
        data=data,
        val=val,
        val_split=parse_ratio(val_split) if val_split else 0.0,
        strategies=_names(strategies, "--strategies"),
        scopes=_names(scopes, "--scopes"),
        patterns=_names(patterns, "--patterns"),
        params=tuple(map(_param, param or ())),
        sparsities=_ratios(sparsities or ("" if max_drop else _USUAL)),
        schedules=_names(schedules, "--schedules"),
        epochs=epochs,
        batch_size=batch_size,
        samples=samples,
        lr=lr,
        optimizer=optimizer,
        loss=loss,
        metric=metric,
        policy=policy,
        only=only,
        exclude=tuple(exclude or ()),
        seed=seed,
        model=build,
        custom_objects=custom_objects,
        is_trusted=trust,
    )
    drop = parse_drop(max_drop) if max_drop else None
    result = run(
        model,
        config,
        output,
        jobs=jobs,
        on=on,
        max_drop=drop,
        watcher=lambda *trial: reporter.note(trial_line(*trial)),
    )
    return reporter.show(sweep_report(result, str(model)))


def _names(text: str, option: str) -> tuple[str, ...]:
    """The names in a list with commas, each once."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise UsageError(f"{option} names nothing")
    return names


def _param(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse `NAME=V,V`: a parameter and the values to try."""
    name, sign, values = text.partition("=")
    if not name or not sign:
        raise UsageError(f"{text!r} is no parameter with values", hint="write --param damp=0.01,0.1")
    return name, _names(values, f"--param {name}")


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(sorted(dict.fromkeys(map(parse_ratio, filter(None, map(str.strip, text.split(",")))))))


command = make_command(sweep)
