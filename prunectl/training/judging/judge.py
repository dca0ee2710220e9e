"""How good is a file on the user's data? Run by the framework that trains it, or by onnxruntime."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import ModelFile
from prunectl.formats.table import open_model
from prunectl.training.better import check_direction, decider, first_of
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
    is_up: bool
    """Whether more of the metric is better."""

    @property
    def value(self) -> float:
        """The number that decides."""
        return self.logs[self.metric]

    @property
    def is_finite(self) -> bool:
        """Whether it is a number at all."""
        return math.isfinite(self.value)


def judge(path: Path, request: Request) -> Judged:
    """Return how good a model is on what it is judged by: the data itself, if nothing else is named."""
    check_direction(request.means)
    model = open_model(path)
    if model.about.wrappers:
        raise UsageError(
            f"{path} has pruning wrappers",
            hint=f"prunectl strip {path} -o plain{path.suffix} first",
        )
    return _by_onnxruntime(model, request) if model.format == "onnx" else _by_framework(model, request)


def judge_whole(path: Path, request: Request) -> Judged:
    """Return how good a model is of which a number is expected: one that nothing was taken from."""
    found = judge(path, request)
    if not found.is_finite:
        raise WorkError(f"{found.metric} is {found.value:g} for {path}", hint="is the data scaled as in training?")
    return found


def _by_framework(model: ModelFile, request: Request) -> Judged:
    with closing(open_network(model, request.origin)) as network:
        found = read(network, request)
        network.prepare(replace(request.means, example=found.example))
        notes = (*found.notes, *look_over(found, network.signature, request))
        logs = dict(evaluated(network, found.val or found.train, request.batch_size))
        found_by = decider(logs, request.means, (port.name for port in network.signature.outputs))
        return Judged(found_by.name, logs, (*notes, *network.notes), found_by.is_up)


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
    metric, value = scored(network.predict, batches, first_of(request.means), source.name)
    logs = {metric: value}
    return Judged(metric, logs, tuple(dict.fromkeys(notes)), decider(logs, request.means).is_up)
