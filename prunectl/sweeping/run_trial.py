"""Runs one trial: prune, finetune, evaluate."""

from __future__ import annotations

import math
from pathlib import Path

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.destination import Destination
from prunectl.sweeping.journal import digest, trial_dir
from prunectl.sweeping.requests import is_one_shot, prune_by_request, pruning_of, training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, diverged
from prunectl.training.course import DivergedError
from prunectl.training.evaluate import evaluate_baseline, evaluate_file
from prunectl.training.finetune import finetune
from prunectl.training.request import FinetuneRequest


def evaluate(path: Path, request: FinetuneRequest, name: str) -> TrialResult:
    """What a file is worth, as it is noted under a name; one without is the model as it is."""
    survey = measure(open_model(path), get_codec(CodecName.GZIP, None))
    judged = evaluate_file(path, request) if name else evaluate_baseline(path, request)
    assert survey.bytes.compressed is not None
    logs = {key: value for key, value in judged.logs.items() if math.isfinite(value)}
    sparsity = survey.sparsity or 0.0
    return TrialResult(
        metric=judged.metric,
        value=judged.value if judged.is_finite else math.nan,
        logs=logs,
        sparsity=sparsity,
        raw=survey.bytes.raw,
        gzip=survey.bytes.compressed,
        path=name,
        notes=judged.notes,
        is_up=judged.higher_is_better,
        digest=digest(path),
    )


def run_trial(path: Path, config: SweepConfig, folder: Path, trial: Trial) -> TrialResult:
    """Make a point in its own folder, which only a noted point needs to keep, and return what came of it."""
    if trial == BASELINE:
        return evaluate(path, training_of(config, BASELINE), "")
    output = Destination(trial_dir(folder, trial) / f"model{''.join(path.suffixes[-1:])}", is_forced=True)
    try:
        _write_trial(path, config, trial, output)
    except DivergedError as error:
        return diverged(trial, error)
    return evaluate(output.target, training_of(config, BASELINE), output.target.relative_to(folder).as_posix())


def _write_trial(path: Path, config: SweepConfig, trial: Trial, output: Destination) -> None:
    if not config.epochs:
        _write_pruned(path, config, trial, output)
    elif is_one_shot(trial):
        with temporary_folder() as scratch:
            between = Destination(scratch / path.name)
            _write_pruned(path, config, trial, between)
            finetune(between.target, training_of(config, trial), output)
    else:
        finetune(path, training_of(config, trial), output)


def _write_pruned(path: Path, config: SweepConfig, trial: Trial, output: Destination) -> None:
    # A small step may be less than a channel.
    prune_by_request(
        path, pruning_of(config, trial), output, is_trusted=config.is_trusted, limits={"allow_empty": True}
    )
