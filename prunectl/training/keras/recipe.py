"""How a model is going to be trained: as the user says, else as its file says, else as its outputs suggest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunectl.errors import UsageError
from prunectl.training.data.source import each
from prunectl.training.keras import losses, metrics, optimizers
from prunectl.training.keras.answers import Answer
from prunectl.training.keras.library import Library
from prunectl.training.keras.loading import Loaded, first_line
from prunectl.training.keras.losses import Loss
from prunectl.training.keras.optimizers import Chosen
from prunectl.training.keras.said import said
from prunectl.training.network import Array, Means

_UNKNOWN = (ValueError, TypeError, AttributeError, KeyError, ImportError)
"""What Keras raises at a name that it does not know."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that Keras has to be told before it trains."""

    chosen: Chosen
    losses: tuple[Loss | None, ...]
    """One for each output."""
    metrics: tuple[list[Any], ...]
    loss_weights: Any
    notes: tuple[str, ...]


def recipe(loaded: Loaded, means: Means, answers: Sequence[Answer]) -> Recipe:
    """Return how a model is trained."""
    case = _Case(loaded, means, answers, said(loaded.file) if loaded.is_whole else {})
    targets = _targets(means, len(answers))
    found = _losses(case, targets)
    for loss, answer, y in zip(found, answers, targets, strict=True):
        if loss is not None:
            losses.check_shape(loss, answer, y)
    return Recipe(
        losses=found,
        chosen=_optimizer(case),
        metrics=_metrics(case, found, targets),
        loss_weights=_weights(case.file.get("loss_weights"), answers),
        notes=tuple(dict.fromkeys(case.notes)),
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """What is known, and what is found out about it on the way."""

    loaded: Loaded
    means: Means
    answers: Sequence[Answer]
    file: Mapping[str, Any]
    """What the file says, in its words."""
    notes: list[str] = field(default_factory=list)

    @property
    def library(self) -> Library:
        """The Keras that trains."""
        return self.loaded.library


def _targets(means: Means, count: int) -> tuple[Array | None, ...]:
    if means.example is None or means.example.y is None:
        return (None,) * count
    found = each(means.example.y)
    if len(found) != count:
        raise UsageError(f"the model has {count} outputs, the data has {len(found)} arrays of targets")
    return found


def _losses(case: _Case, targets: Sequence[Array | None]) -> tuple[Loss | None, ...]:
    library, answers, entry = case.library, case.answers, case.file.get("loss")
    if case.means.loss:
        return tuple(losses.wanted(library, case.means.loss, *pair) for pair in zip(answers, targets, strict=True))
    found: list[Loss | None] = []
    for answer, y, part in zip(answers, targets, _per_output(entry, answers), strict=True):
        if part:
            loss, note = losses.fitted(library, _loss_of_file(case.loaded, part), answer, y)
            case.notes.extend([note] if note else [])
            found.append(loss)
            continue
        chosen = losses.chosen(library, answer, y) if not entry else None
        if chosen is not None:
            where = f" for {answer.name}" if len(answers) > 1 else ""
            ending = " from logits" if chosen.is_of_logits else ""
            case.notes.append(
                f"Nothing says which loss: {chosen.name}{ending} fits the outputs and the targets{where}."
            )
        found.append(chosen)
    return tuple(found)


def _loss_of_file(loaded: Loaded, entry: Any) -> Loss:
    try:
        loaded.vouch_for(entry)
        return losses.known(losses.of_file(loaded.library, entry, loaded.objects))
    except _UNKNOWN as error:
        raise UsageError(
            f"{loaded.file.path} was trained with a loss that is not known here: {first_line(error)}",
            hint="choose one with --loss, or say what it is with --custom-objects mod:DICT",
        ) from error


def _optimizer(case: _Case) -> Chosen:
    library, means, entry = case.library, case.means, case.file.get("optimizer")
    if not means.optimizer and entry:
        try:
            case.loaded.vouch_for(entry)
            chosen = optimizers.of_file(library, entry, case.loaded.objects, lr=means.lr, clip=means.clip)
        except _UNKNOWN as error:
            case.notes.append(
                f"The file's optimizer is not known here ({first_line(error)}): {optimizers.DEFAULT} it is."
            )
        else:
            if chosen.schedule is not None:
                case.notes.append("The learning rate follows the schedule of the file, from its beginning.")
            return chosen
    return optimizers.wanted(library, means.optimizer, lr=means.lr, clip=means.clip)


def _metrics(case: _Case, found: Sequence[Loss | None], targets: Sequence[Array | None]) -> tuple[list[Any], ...]:
    library, names = case.library, case.means.metrics
    if names:
        for name in names:
            for answer, y in zip(case.answers, targets, strict=True):
                metrics.check_shape(name, answer, y)
        return tuple([metrics.wanted(library, name, loss, case.loaded.objects) for name in names] for loss in found)
    parts = _metrics_per_output(case.file.get("metrics"), case.answers)
    if not any(parts):
        every = zip(found, case.answers, targets, strict=True)
        return tuple(metrics.default(library, *one) for one in every)
    read = [[one for entry in part for one in _metric_of_file(case, entry)] for part in parts]
    return tuple(
        _distinct([metrics.accuracy(library, loss) if one == "accuracy" else one for one in part])
        for part, loss in zip(read, found, strict=True)
    )


def _metric_of_file(case: _Case, entry: Any) -> list[Any]:
    """Return a metric, or nothing where it is not known."""
    try:
        case.loaded.vouch_for(entry)
        return [metrics.of_file(case.library, entry, case.loaded.objects)]
    except _UNKNOWN as error:
        case.notes.append(f"A metric of the file is left out, it is not known here: {first_line(error)}.")
        return []


def _distinct(found: Sequence[Any]) -> list[Any]:
    """Return metrics without those that have the name of another."""
    return list({getattr(one, "name", one): one for one in found}.values())


def _per_output(entry: Any, answers: Sequence[Answer]) -> list[Any]:
    """Return what a file says of each output, where one word may stand for all."""
    if isinstance(entry, dict) and "class_name" not in entry:
        return [entry.get(answer.name) for answer in answers]
    if isinstance(entry, list):
        return (
            entry
            if len(entry) == len(answers)
            else (entry * len(answers) if len(entry) == 1 else [None] * len(answers))
        )
    return [entry] * len(answers)


def _metrics_per_output(entry: Any, answers: Sequence[Answer]) -> list[list[Any]]:
    if len(answers) == 1:
        return [_flat(entry)]
    if isinstance(entry, dict) and "class_name" not in entry:
        return [_flat(entry.get(answer.name)) for answer in answers]
    if isinstance(entry, list) and len(entry) == len(answers):
        return [_flat(part) for part in entry]
    return [_flat(entry) for _ in answers]


def _flat(entry: Any) -> list[Any]:
    if isinstance(entry, dict) and "class_name" not in entry:
        entry = list(entry.values())
    if isinstance(entry, list):
        return [one for part in entry for one in _flat(part)]
    return [entry] if entry else []


def _weights(entry: Any, answers: Sequence[Answer]) -> Any:
    """Return how much each output counts, as a list."""
    if isinstance(entry, dict):
        return [entry.get(answer.name, 1.0) for answer in answers]
    return entry if isinstance(entry, list) and len(entry) == len(answers) else None
