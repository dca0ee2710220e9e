"""One point of a sweep, from a file to a file: pruned, trained, judged, weighed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from prunectl.calibrating import prune as calibrating
from prunectl.errors import WorkError
from prunectl.formats.table import open_model
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.pruning import prune as pruning
from prunectl.pruning.output import Output
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.judge import judge
from prunectl.sweeping.point import BASE, Outcome, Point
from prunectl.sweeping.requests import looks_at_data, pruning_of, training_of
from prunectl.training.finetune import finetune


def attempt(path: Path, choices: Choices, folder: Path, point: Point) -> Outcome:
    """Make a point in its own folder, which only a noted point needs to keep, and return what came of it."""
    if point == BASE:
        return _weighed(path, choices, "")
    place = folder / point.name
    place.mkdir(exist_ok=True)
    output = Output(place / f"model{''.join(path.suffixes[-1:])}", is_forced=True)
    _made(path, choices, point, output)
    return _weighed(output.target, choices, output.target.relative_to(folder).as_posix())


def _made(path: Path, choices: Choices, point: Point, output: Output) -> None:
    if not choices.epochs:
        _pruned(path, choices, point, output)
    elif looks_at_data(point):
        with tempfile.TemporaryDirectory(prefix="prunectl-") as scratch:
            between = Output(Path(scratch) / path.name)
            _pruned(path, choices, point, between)
            finetune(between.target, training_of(choices, point), output)
    else:
        finetune(path, training_of(choices, point), output)


def _pruned(path: Path, choices: Choices, point: Point, output: Output) -> None:
    request = pruning_of(choices, point)
    if request.data:
        calibrating.prune(path, request, output, is_trusted=choices.is_trusted)
    else:
        pruning.prune(path, request, output)


def _weighed(path: Path, choices: Choices, name: str) -> Outcome:
    survey = measure(open_model(path), pick(CodecName.GZIP, None))
    judged = judge(path, choices)
    if not math.isfinite(judged.value):
        raise WorkError(f"{judged.metric} is {judged.value:g} for {path}", hint="is the data scaled as in training?")
    assert survey.bytes.compressed is not None
    logs = {key: value for key, value in judged.logs.items() if math.isfinite(value)}
    sparsity = survey.sparsity or 0.0
    return Outcome(
        judged.metric, judged.value, logs, sparsity, survey.bytes.raw, survey.bytes.compressed, name, judged.notes
    )
