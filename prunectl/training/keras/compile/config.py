"""How a model is going to be trained: as the user says, else as its file says, else as its outputs suggest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import part
from prunectl.formats.safe_json import parse_object
from prunectl.formats.tensorflow.graph_def import read_graph, read_keras_metadata
from prunectl.training.backend import Array, Means
from prunectl.training.data.source import each
from prunectl.training.keras.backend import Library
from prunectl.training.keras.compile import losses, optimizers, outputs
from prunectl.training.keras.compile.losses import Loss
from prunectl.training.keras.compile.optimizers import ChosenOptimizer
from prunectl.training.keras.compile.outputs import Answer
from prunectl.training.keras.load import Loaded, first_line
from prunectl.training.keras.masking import Grip, GripThree, GripTwo

_PARTS = ("loss", "metrics", "weighted_metrics", "loss_weights")


def said(file: ModelFile) -> dict[str, Any]:
    """The parts of a training configuration, as the file words them."""
    found = _configuration(file)
    parts = {key: found[key] for key in _PARTS if found.get(key)}
    optimizer = found.get("optimizer_config") or found.get("optimizer")
    if optimizer:
        parts["optimizer"] = optimizer
    return parts


def _configuration(file: ModelFile) -> Mapping[str, Any]:
    if file.format == "keras":
        return part(file.about.keras, "compile_config")
    if file.format == "keras-h5":
        return _of_hdf5(file)
    return _of_folder(file)


def _of_hdf5(file: ModelFile) -> Mapping[str, Any]:
    with h5py.File(file.path, "r", locking=False) as held:
        text = held.attrs.get("training_config")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return parse_object(text, file.path, "training_config") if isinstance(text, str) else {}


def _of_folder(file: ModelFile) -> Mapping[str, Any]:
    metadata = file.path / "keras_metadata.pb"
    objects = read_keras_metadata(metadata) if metadata.is_file() else read_graph(file.path / "saved_model.pb").objects
    for found in objects:
        if found.metadata and found.identifier.startswith("_tf_keras"):
            training = part(parse_object(found.metadata, file.path, "its Keras metadata"), "training_config")
            if training:
                return training
    return {}


_UNKNOWN = (ValueError, TypeError, AttributeError, KeyError, ImportError)
"""What Keras raises at a name that it does not know."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that Keras has to be told before it trains."""

    chosen: ChosenOptimizer
    losses: tuple[Loss | None, ...]
    """One for each output."""
    metrics: tuple[list[Any], ...]
    loss_weights: Any
    notes: tuple[str, ...]


def recipe(loaded: Loaded, means: Means, answers: Sequence[Answer]) -> Recipe:
    """How a model is trained."""
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
        return tuple(
            losses.wanted_losses(library, case.means.loss, *pair) for pair in zip(answers, targets, strict=True)
        )
    found: list[Loss | None] = []
    for answer, y, entry_part in zip(answers, targets, _per_output(entry, answers), strict=True):
        if entry_part:
            loss, note = losses.fitted(library, _loss_of_file(case.loaded, entry_part), answer, y)
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
        return losses.known(losses.losses_of_file(loaded.library, entry, loaded.objects))
    except _UNKNOWN as error:
        raise UsageError(
            f"{loaded.file.path} was trained with a loss that is not known here: {first_line(error)}",
            hint="choose one with --loss, or say what it is with --custom-objects mod:DICT",
        ) from error


def _optimizer(case: _Case) -> ChosenOptimizer:
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
                losses.check_metric_shape(name, answer, y)
        return tuple(
            [losses.wanted_metrics(library, name, loss, case.loaded.objects) for name in names] for loss in found
        )
    parts = _metrics_per_output(case.file.get("metrics"), case.answers)
    if not any(parts):
        every = zip(found, case.answers, targets, strict=True)
        return tuple(losses.default(library, *one) for one in every)
    read = [[one for entry in part for one in _metric_of_file(case, entry)] for part in parts]
    return tuple(
        _distinct([losses.accuracy(library, loss) if one == "accuracy" else one for one in part])
        for part, loss in zip(read, found, strict=True)
    )


def _metric_of_file(case: _Case, entry: Any) -> list[Any]:
    """A metric, or nothing where it is not known."""
    try:
        case.loaded.vouch_for(entry)
        return [losses.metrics_of_file(case.library, entry, case.loaded.objects)]
    except _UNKNOWN as error:
        case.notes.append(f"A metric of the file is left out, it is not known here: {first_line(error)}.")
        return []


def _distinct(found: Sequence[Any]) -> list[Any]:
    """Metrics without those that have the name of another."""
    return list({getattr(one, "name", one): one for one in found}.values())


def _per_output(entry: Any, answers: Sequence[Answer]) -> list[Any]:
    """What a file says of each output, where one word may stand for all."""
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
    """How much each output counts, as a list."""
    if isinstance(entry, dict):
        return [entry.get(answer.name, 1.0) for answer in answers]
    return entry if isinstance(entry, list) and len(entry) == len(answers) else None


def compiled(library: Library, model: Any, recipe: Recipe, frozen: Sequence[Any], *, is_compiled: bool) -> Grip:
    """Compile a model, and return the grip on its weights."""
    words: dict[str, Any] = {
        "optimizer": _scaled(library, model, recipe.chosen.optimizer),
        "loss": outputs.for_outputs(model, [loss.what if loss is not None else None for loss in recipe.losses]),
        "metrics": outputs.for_outputs(model, recipe.metrics),
        "loss_weights": outputs.for_outputs(model, recipe.loss_weights) if recipe.loss_weights else None,
    }
    if is_compiled:
        words["jit_compile"] = True
    model.compile(**words)
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if library.is_two:
        moved = [one for one in model.trainable_variables if not any(one is other for other in frozen)]
        grip: Grip = GripTwo(library, inner, moved)
        model.optimizer.build(moved)
        return grip
    model.optimizer.build(model.trainable_variables)
    return GripThree(library, inner)


def _scaled(library: Library, model: Any, optimizer: Any) -> Any:
    """An optimizer that scales the loss, where gradients are of 16 bits and would vanish."""
    policies = (getattr(layer, "dtype_policy", None) for layer in model._flatten_layers())  # noqa: SLF001
    if "mixed_float16" not in {getattr(policy, "name", "") for policy in policies}:
        return optimizer
    home = library.keras.mixed_precision if library.is_two else library.keras.optimizers
    return home.LossScaleOptimizer(optimizer)


def optimizer_variables(model: Any) -> list[Any]:
    """All that the optimizer keeps, also what wraps it."""
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    found = {id(one): one for held in (model.optimizer, inner) for one in held.variables}
    return list(found.values())
