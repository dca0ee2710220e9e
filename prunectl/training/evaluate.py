"""Evaluation of a model file on the user's data, in its training framework or in its inference runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.registry import by_name, open_model
from prunectl.training.backend import ModelSignature, PredictingModel
from prunectl.training.data.adapt import adapt, check_batches, nothing_counts
from prunectl.training.data.next_token import shift_if_causal
from prunectl.training.data.registry import check_exists, open_source
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source, as_tuple, peek, train_val_split
from prunectl.training.data.text import batch_size
from prunectl.training.finetune import open_training_data, validate_training_data
from prunectl.training.monitor import check_direction, make_monitor, metric_mismatch, monitored_metric
from prunectl.training.request import FinetuneRequest
from prunectl.training.runtimes import load_predictor, load_trainable, with_arrays
from prunectl.training.task import IGNORED_LABEL, FinalActivation, Task, TaskKind, infer_task, label_axis

_THRESHOLD = 0.5
Score = Callable[[Array, Array], Array]
"""A function of outputs and targets that returns a number for each example."""


def evaluate_predictions(
    predict: Callable[[Arrays], Arrays],
    batches: Iterable[Batch],
    metric: str,
    name: str,
    *,
    output: int = 0,
    is_channels_first: bool = True,
    is_label: bool = False,
) -> tuple[str, float]:
    """The name of the metric of one output, and its mean over the examples.

    `is_label` says that the output holds the labels themselves, and not a score for each.
    """
    total, count, chosen = 0.0, 0.0, metric
    single: list[tuple[Array, Array]] = []
    task: Task | None = None
    for batch in batches:
        assert batch.y is not None
        predictions, ys = np.asarray(as_tuple(predict(batch.x))[output]), as_tuple(batch.y)
        targets, outputs = ys[output if len(ys) > 1 else 0], predictions.astype(np.float64)
        task = task or infer_task(
            outputs.shape[1:], FinalActivation.UNKNOWN, targets, is_channels_first=is_channels_first
        )
        chosen = chosen or ("accuracy" if task.is_classification or is_label else "mae")
        if chosen not in _SCORES:
            raise UsageError(
                f"{chosen} is not a known metric for a model that is not trained",
                did_you_mean=tuple(get_close_matches(chosen, _SCORES)),
                hint=f"known: {', '.join(_SCORES)}; a loss can be computed only for models that can be trained",
            )
        score = _SCORES[chosen]
        if score is _accuracy and (is_label or task.kind is TaskKind.BINARY or outputs.size == len(outputs)):
            if targets.size != outputs.size:
                raise metric_mismatch(chosen, outputs.shape, targets.shape)
            single.append((predictions.reshape(-1), targets.reshape(-1)))
        else:
            if score is _accuracy:
                score = partial(_accuracy, is_channels_first=is_channels_first)
            total += float(_compute_score(chosen, score, outputs, targets).sum())
        # Ignored labels match no class, and are left out of the count, as in PyTorch.
        count += len(outputs) * (np.mean(targets != IGNORED_LABEL) if _SCORES[chosen] is _accuracy else 1)
    if not count:
        raise nothing_counts(name)
    return chosen, (_single_accuracy(single, is_label=is_label) if single else float(total / count))


def _compute_score(name: str, score: Score, outputs: Array, targets: Array) -> Array:
    """Compute a score; mismatched shapes are the user's error."""
    try:
        return score(outputs, targets)
    except ValueError as error:
        raise metric_mismatch(name, outputs.shape, targets.shape, str(error)) from error


def _single_accuracy(batches: Sequence[tuple[Array, Array]], *, is_label: bool) -> float:
    """Accuracy of one number for each target: a label, or a score of two classes.

    Integers are labels if each is one of the targets. Scores are logits if any of them is outside 0 to 1.
    """
    outputs, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
    if is_label or (outputs.dtype.kind in "iu" and np.isin(outputs, targets).all()):
        return float(np.mean((outputs == targets)[targets != IGNORED_LABEL]))
    is_logit = outputs.min() < 0 or outputs.max() > 1
    return float(np.mean((outputs > (0.0 if is_logit else _THRESHOLD)) == (targets > _THRESHOLD)))


def _accuracy(outputs: Array, targets: Array, *, is_channels_first: bool = True) -> Array:
    if targets.dtype.kind == "f" and targets.shape != outputs.shape and not (targets == targets.round()).all():
        raise ValueError("the targets are not labels")
    axis = label_axis(outputs.shape[1:], targets.shape[1:], is_channels_first=is_channels_first)
    if axis is None:
        axis = outputs.ndim - 1
    answers = outputs.argmax(axis=axis)
    labels = targets.argmax(axis=axis) if targets.shape == outputs.shape else targets.reshape(answers.shape)
    return _mean_by_example(answers == labels)


def _absolute(outputs: Array, targets: Array) -> Array:
    return _mean_by_example(np.abs(outputs - targets.reshape(outputs.shape)))


def _squared(outputs: Array, targets: Array) -> Array:
    return _mean_by_example(np.square(outputs - targets.reshape(outputs.shape)))


def _mean_by_example(values: Array) -> Array:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1))


_SCORES: dict[str, Score] = {"accuracy": _accuracy, "mae": _absolute, "mse": _squared}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of evaluating a model."""

    metric: str
    logs: dict[str, float]
    notes: tuple[str, ...]
    higher_is_better: bool
    """Whether a higher value of the metric is better."""

    @property
    def value(self) -> float:
        """The value of the monitored metric."""
        return self.logs[self.metric]

    @property
    def is_finite(self) -> bool:
        """Whether the value is neither NaN nor infinite."""
        return math.isfinite(self.value)


def evaluate_file(path: Path, request: FinetuneRequest, meter: ProgressFactory = no_progress) -> Evaluation:
    """Evaluate a file on the validation data, or on `request.data` if there is none."""
    check_direction(request.means)
    model = open_model(path)
    if model.about.pruning_wrappers:
        raise UsageError(
            f"{path} has pruning wrappers",
            hint=f"remove them first: prunectl strip {path} -o plain{path.suffix}",
        )
    check_exists(request.data, request.val)
    network = load_predictor(model, request.origin)
    return _by_framework(model, request, meter) if network is None else _by_runtime(network, model, request, meter)


def evaluate_baseline(path: Path, request: FinetuneRequest, meter: ProgressFactory = no_progress) -> Evaluation:
    """Evaluate the unpruned model; raise if the metric is NaN or infinite."""
    result = evaluate_file(path, request, meter)
    if not result.is_finite:
        raise WorkError(
            f"{result.metric} is {result.value:g} for {path}",
            hint="check that the data is scaled as in training (?norm=unit)",
        )
    return result


def _with_progress(model: ModelFile, source: Source, batch_size: int, meter: ProgressFactory) -> Iterator[Batch]:
    """The batches of a source, in order, with progress counted in examples."""
    with meter(f"evaluating {model.path.name}", Items(source.count or 0)) as bar:
        for batch in source.batches(EpochOrder(batch_size)):
            yield batch
            bar.advance(len(as_tuple(batch.x)[0]))


def _by_framework(model: ModelFile, request: FinetuneRequest, meter: ProgressFactory) -> Evaluation:
    origin = with_arrays(request.origin, model, request.val or request.data)
    with closing(load_trainable(model, origin)) as network:
        data = open_training_data(network, request)
        network.prepare(replace(request.means, example=data.example, is_evaluated=True))
        notes = (*data.notes, *validate_training_data(data, network.signature, request))
        judged = data.val or data.train
        size = batch_size(judged, network.signature, request.batch_size)
        logs = dict(network.evaluate(_with_progress(model, judged, size, meter)))
        monitor = make_monitor(logs, request.means, (port.name for port in network.signature.outputs))
        return Evaluation(monitor.name, logs, (*notes, *network.notes), monitor.higher_is_better)


def _by_runtime(
    network: PredictingModel, model: ModelFile, request: FinetuneRequest, meter: ProgressFactory
) -> Evaluation:
    title = by_name(model.format).title
    if request.epochs:
        raise InputError(
            f"{model.path} ({title}) cannot be trained: no framework can compute gradients for it",
            hint="leave out --epochs, or use the Keras or PyTorch model that it was exported from",
        )
    if request.means.loss:
        raise UsageError(f"--loss cannot be used with {model.path}: {title} computes no loss", hint="leave out --loss")
    signature, seed = network.signature, request.means.seed
    opened = open_source(request.val or request.data, signature=signature, seed=seed)
    source, notes = adapt(opened, signature)
    source = shift_if_causal(source, replace(signature, ignored_label=IGNORED_LABEL), network.predict)
    notes = (*notes, *source.notes)
    if request.val_split:
        source = train_val_split(source, request.val_split, seed)[1]
    notes += check_batches(source, signature, needs_targets=True)
    batches = _with_progress(model, source, request.batch_size, meter)
    output, requested, prefix = _select_output(model, signature, source, monitored_metric(request.means))
    metric, value = evaluate_predictions(
        network.predict,
        batches,
        requested,
        source.name,
        output=output,
        is_channels_first=signature.is_channels_first,
        # A model without numeric outputs is refused when it predicts.
        is_label=any(port.is_label for port in signature.outputs[output : output + 1]),
    )
    logs = {f"{prefix}{metric}": value}
    monitor = make_monitor(logs, request.means, (port.name for port in signature.outputs))
    return Evaluation(monitor.name, logs, tuple(dict.fromkeys(notes)), monitor.higher_is_better)


def _select_output(model: ModelFile, signature: ModelSignature, source: Source, metric: str) -> tuple[int, str, str]:
    """The index of the evaluated output, its metric, and the prefix of the metric's name (as in Keras, if several)."""
    first = peek(source, 1)
    count = len(as_tuple(first.y)) if first is not None and first.y is not None else 0
    names = [port.name for port in signature.outputs]
    if model.family is Family.LITE and count != len(names):
        # The converter may reorder the outputs of the original model.
        raise UsageError(
            f"{model.path} has {len(names)} outputs, but the data has {count} arrays of targets",
            hint=f"name arrays as the outputs are: {', '.join(names)}",
        )
    output = next((index for index, name in enumerate(names) if metric.startswith(f"{name}_")), None)
    if output is None and (count == 1 or count != len(names)):
        return 0, metric, ""
    output = output or 0
    prefix = f"{names[output]}_"
    return output, metric.removeprefix(prefix), prefix
