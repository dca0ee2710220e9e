"""How good is a file on the user's data? Run by the framework that trains it, or by onnxruntime."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.table import open_model
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import BASE
from prunectl.sweeping.requests import training_of
from prunectl.sweeping.scores import scored
from prunectl.training.better import judged_by
from prunectl.training.data.adapt import adapt
from prunectl.training.data.check import check
from prunectl.training.data.source import Order
from prunectl.training.data.spec import open_source
from prunectl.training.data.split import split
from prunectl.training.loop import evaluated
from prunectl.training.onnx.open import open_observed
from prunectl.training.reading import look_over, read
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


def judge(path: Path, choices: Choices) -> Judged:
    """Return how good a model is on what it is judged by: the data itself, if nothing else is named."""
    model = open_model(path)
    if model.about.wrappers:
        raise UsageError(
            f"{path} has pruning wrappers",
            hint=f"prunectl strip {path} -o plain{path.suffix} first",
        )
    return _by_onnxruntime(model, choices) if model.format == "onnx" else _by_framework(model, choices)


def _by_framework(model: ModelFile, choices: Choices) -> Judged:
    request = training_of(choices, BASE)
    with closing(open_network(model, request.origin)) as network:
        found = read(network, request)
        network.prepare(replace(request.means, example=found.example))
        notes = (*found.notes, *look_over(found, network.signature, request))
        logs = dict(evaluated(network, found.val or found.train, choices.batch_size))
        return Judged(_asked(choices, logs), logs, (*notes, *network.notes))


def _asked(choices: Choices, logs: dict[str, float]) -> str:
    # A framework may have its own word for what was asked: then it comes first among the metrics.
    return choices.metric if choices.metric in logs else judged_by(logs)


def _by_onnxruntime(model: ModelFile, choices: Choices) -> Judged:
    if choices.epochs:
        raise InputError(
            f"{model.path} (ONNX) cannot be trained: it holds no graph that a framework can differentiate",
            hint="leave out --epochs, or sweep the Keras or PyTorch file that it was made from",
        )
    if choices.loss:
        raise UsageError("--loss is for models that can be trained, and onnxruntime takes none", hint="leave it out")
    network = open_observed(model, training_of(choices, BASE).origin)
    signature = network.signature
    opened = open_source(choices.val or choices.data, signature=signature, seed=choices.seed)
    source, notes = adapt(opened, signature)
    if choices.val_split:
        source = split(source, choices.val_split, choices.seed)[1]
    notes += check(source, signature, needs_targets=True, classes=None)
    metric, value = scored(network.predict, source.batches(Order(choices.batch_size)), choices.metric, source.name)
    return Judged(metric, {metric: value}, tuple(dict.fromkeys(notes)))
