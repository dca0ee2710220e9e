"""`prunectl sweep`: which way to prune keeps this model good on this data?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import builder_option, custom_objects_option, make_command, option_group
from prunectl.errors import UsageError
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.sweep import sweep_report, trial_line
from prunectl.sweeping.sweep import sweep as run
from prunectl.sweeping.trial import SweepConfig
from prunectl.training.max_drop import parse_drop
from prunectl.units import parse_ratio

_ways = option_group("What to try")
_data = option_group("Data")
_train = option_group("Training")
_file = option_group("Model code")
USUAL = "50%,80%,90%"
_DEFAULT = SweepConfig("")
_STRATEGIES, _SCOPES, _PATTERNS, _SCHEDULES = map(
    ",".join, (_DEFAULT.strategies, _DEFAULT.scopes, _DEFAULT.patterns, _DEFAULT.schedules)
)


def sweep(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model file or folder.")],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the trial models and sweep.jsonl.")
    ],
    data: Annotated[str, _data(metavar="SPEC", help="Data to calibrate, train and judge on: train.npz …")],
    val: Annotated[str, _data(metavar="SPEC", help="Validation data to judge on; else --data.")] = "",
    val_split: Annotated[str, _data(metavar="RATIO", help="Share of --data held out for validation: 10%.")] = "",
    batch_size: Annotated[int, _data(help="Examples per batch.", min=1)] = _DEFAULT.batch_size,
    samples: Annotated[int, _data(help="Calibration examples for each strategy.", min=1)] = _DEFAULT.samples,
    metric: Annotated[
        str, _data(metavar="NAME", help="Metric to compare by: accuracy, loss, f.py:fn:max; else the file's.")
    ] = "",
    strategies: Annotated[
        str, _ways(metavar="NAME,…", help="Strategies to try, e.g. magnitude,lamp,obs.")
    ] = _STRATEGIES,
    scopes: Annotated[str, _ways(metavar="NAME,…", help="Scopes to try, e.g. layer,global.")] = _SCOPES,
    patterns: Annotated[
        str, _ways(metavar="NAME,…", help="Patterns to try, e.g. unstructured,2:4,channel.")
    ] = _PATTERNS,
    param: Annotated[
        list[str] | None,
        _ways(metavar="K=V,…", help="Parameter values to try, e.g. damp=0.01,0.1; repeatable."),
    ] = None,
    sparsities: Annotated[
        str, _ways(metavar="RATIO,…", help=f"Sparsities to try.  [default: {USUAL}, or what --max-drop finds]")
    ] = "",
    schedules: Annotated[
        str, _ways(metavar="NAME,…", help="Schedules to try with --epochs; constant prunes before training.")
    ] = _SCHEDULES,
    max_drop: Annotated[
        str,
        _ways(
            metavar="DROP",
            help="Find the highest sparsity of each variant that costs at most this: 0.5pp, or 0.01 of a loss.",
        ),
    ] = "",
    policy: Annotated[
        str, _ways(metavar="NAME", help="Which tensors to prune, e.g. skip-first-last.")
    ] = _DEFAULT.policy,
    layers: Annotated[str, _ways(metavar="GLOB", help="Prune only the kernels of these, e.g. 'conv*'.")] = "",
    exclude: Annotated[
        list[str] | None, _ways(metavar="GLOB", help="Never prune these tensors, e.g. fc2; repeatable.")
    ] = None,
    epochs: Annotated[int, _train(help="Epochs to train each trial; 0 only prunes.", min=0)] = _DEFAULT.epochs,
    lr: Annotated[
        float | None, _train(help="Learning rate, e.g. 1e-3; else the file's, or the optimizer's own.")
    ] = None,
    optimizer: Annotated[
        str, _train(metavar="NAME", help="Optimizer, e.g. sgd:momentum=0.9; else the file's, or adam.")
    ] = "",
    loss: Annotated[str, _train(metavar="NAME", help="Loss, e.g. cross-entropy, mse or f.py:fn.")] = "",
    seed: Annotated[int, _train(help="Seed of all random choices.")] = _DEFAULT.seed,
    jobs: Annotated[int, typer.Option("-j", "--jobs", metavar="N", help="Trials to run in parallel.", min=1)] = 1,
    on: Annotated[
        str, typer.Option("--on", metavar="PLACE", help="Run on Ray: ray starts it here, ray:ADDRESS joins a cluster.")
    ] = "",
    builder: Annotated[str, builder_option(_file)] = "",
    custom_objects: Annotated[str, custom_objects_option(_file)] = "",
    trust: Annotated[bool, _file("--trust", help="Allow code stored in MODEL to run.")] = False,
) -> int:
    """Prune MODEL in many ways, and compare size and accuracy of the results (Pareto front).

    Every trial is saved in DIR when it is done: the same command resumes an interrupted sweep.

    [dim]$[/] prunectl sweep model.onnx -o trials --data test.npz

    [dim]$[/] prunectl sweep model.onnx -o ranked --data test.npz --strategies lamp,obs

    [dim]$[/] prunectl sweep model.onnx -o within --data test.npz --max-drop 1pp

    """
    reporter: Reporter = ctx.obj
    config = SweepConfig(
        data=data,
        val=val,
        val_split=parse_ratio(val_split) if val_split else 0.0,
        strategies=parse_names(strategies, "--strategies"),
        scopes=parse_names(scopes, "--scopes"),
        patterns=parse_names(patterns, "--patterns"),
        params=tuple(map(parse_param, param or ())),
        sparsities=_ratios(sparsities or ("" if max_drop else USUAL)),
        schedules=parse_names(schedules, "--schedules"),
        epochs=epochs,
        batch_size=batch_size,
        samples=samples,
        lr=lr,
        optimizer=optimizer,
        loss=loss,
        metric=metric,
        policy=policy,
        only=layers,
        exclude=tuple(exclude or ()),
        seed=seed,
        model=builder,
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


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """The names in a comma-separated list, without duplicates."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise UsageError(f"{option} is an empty list")
    return names


def parse_param(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse `NAME=V,V`: a parameter and the values to try."""
    name, sign, values = text.partition("=")
    if not name or not sign:
        raise UsageError(f"{text!r} is not a parameter with values", hint="write --param damp=0.01,0.1")
    return name, parse_names(values, f"--param {name}")


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(sorted(dict.fromkeys(map(parse_ratio, filter(None, map(str.strip, text.split(",")))))))


command = make_command(sweep)
