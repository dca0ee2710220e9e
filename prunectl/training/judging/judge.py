"""How good is a file on the user's data? Run by the framework that trains it, or by onnxruntime."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import ModelFile
from prunectl.formats.table import open_model
from prunectl.training.better import judged_by
from prunectl.training.data.adapt import adapt
from prunectl.training.data.check import check
from prunectl.training.data.source import Order
from prunectl.training.data.spec import open_source
from prunectl.training.data.split import split
from prunectl.training.judging.scores import scored
from prunectl.training.loop import evaluated
from prunectl.training.onnx.open import open_observed
from prunectl.training.reading import look_over, read
from prunectl.training.request import Request
from prunectl.training.runtimes import open_network


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model is worth."""

    metric: str
    logs: dict[str, float]
    notes: tuple[str, ...]

    @property
    def value(self) -> float:
        """The number that decides."""
        return self.logs[self.metric]


def judge(path: Path, request: Request) -> Judged:
    """Return how good a model is on what it is judged by: the data itself, if nothing else is named."""
    model = open_model(path)
    if model.about.wrappers:
        raise UsageError(
            f"{path} has pruning wrappers",
            hint=f"prunectl strip {path} -o plain{path.suffix} first",
        )
    found = _by_onnxruntime(model, request) if model.format == "onnx" else _by_framework(model, request)
    if not math.isfinite(found.value):
        raise WorkError(f"{found.metric} is {found.value:g} for {path}", hint="is the data scaled as in training?")
    return found


def _metric(request: Request) -> str:
    return next(iter(request.means.metrics), "")


def _by_framework(model: ModelFile, request: Request) -> Judged:
    with closing(open_network(model, request.origin)) as network:
        found = read(network, request)
        network.prepare(replace(request.means, example=found.example))
        notes = (*found.notes, *look_over(found, network.signature, request))
        logs = dict(evaluated(network, found.val or found.train, request.batch_size))
        # A framework may have its own word for what was asked: then it comes first among the metrics.
        asked = _metric(request)
        return Judged(asked if asked in logs else judged_by(logs), logs, (*notes, *network.notes))


def _by_onnxruntime(model: ModelFile, request: Request) -> Judged:
    if request.epochs:
        raise InputError(
            f"{model.path} (ONNX) cannot be trained: it holds no graph that a framework can differentiate",
            hint="leave out --epochs, or take the Keras or PyTorch file that it was made from",
        )
    if request.means.loss:
        raise UsageError("--loss is for models that can be trained, and onnxruntime takes none", hint="leave it out")
    network = open_observed(model, request.origin)
    signature, seed = network.signature, request.means.seed
    opened = open_source(request.val or request.data, signature=signature, seed=seed)
    source, notes = adapt(opened, signature)
    if request.val_split:
        source = split(source, request.val_split, seed)[1]
    notes += check(source, signature, needs_targets=True, classes=None)
    batches = source.batches(Order(request.batch_size))
    metric, value = scored(network.predict, batches, _metric(request), source.name)
    return Judged(metric, {metric: value}, tuple(dict.fromkeys(notes)))
