"""The compile configuration including the optimizer: from the options, else from the file, else from the outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py

from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.keras.config import object_in, object_name
from prunectl.formats.safe_json import parse_object
from prunectl.formats.tensorflow.graph_def import read_graph, read_keras_metadata
from prunectl.training import user_code
from prunectl.training.backend import TrainOptions
from prunectl.training.data.source import as_tuple
from prunectl.training.keras import losses, outputs
from prunectl.training.keras._compat import flat_layers
from prunectl.training.keras.backend import KerasLibrary
from prunectl.training.keras.load import LoadedModel, error_line
from prunectl.training.keras.losses import KerasLoss
from prunectl.training.keras.masking import Keras3Masking, OptimizerMasking, TfKerasMasking
from prunectl.training.keras.outputs import ModelOutput
from prunectl.training.monitor import Metric, metric_factory
from prunectl.training.request import DEFAULT_OPTIMIZER, parse_optimizer

_PARTS = ("loss", "metrics", "weighted_metrics", "loss_weights")


def read_training_config(file: ModelFile) -> dict[str, Any]:
    """The training configuration of a file, in its own terms."""
    config = _configuration(file)
    parts = {key: config[key] for key in _PARTS if config.get(key)}
    optimizer = config.get("optimizer_config") or config.get("optimizer")
    if optimizer:
        parts["optimizer"] = optimizer
    return parts


def _configuration(file: ModelFile) -> Mapping[str, Any]:
    if file.format == "keras":
        return object_in(file.about.keras, "compile_config")
    if file.format == "keras-h5":
        with h5py.File(file.path, "r", locking=False) as h5:
            text = h5.attrs.get("training_config")
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return parse_object(text, file.path, "training_config") if isinstance(text, str) else {}
    metadata = file.path / "keras_metadata.pb"
    objects = read_keras_metadata(metadata) if metadata.is_file() else read_graph(file.path / "saved_model.pb").objects
    for node in objects:
        if node.metadata and node.identifier.startswith("_tf_keras"):
            training = object_in(parse_object(node.metadata, file.path, "its Keras metadata"), "training_config")
            if training:
                return training
    return {}


_UNKNOWN_NAME = (ValueError, TypeError, AttributeError, KeyError, ImportError)
"""Exceptions that Keras raises for unknown names."""


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """The arguments of `compile`."""

    scheduled_optimizer: ScheduledOptimizer
    losses: tuple[KerasLoss | None, ...]
    """A loss for each output, or None for an output without one."""
    metrics: tuple[list[Any], ...]
    loss_weights: Any
    notes: tuple[str, ...]
    user_functions: frozenset[str] = frozenset()
    """Names in Keras of the user's metric functions, which are computed over all examples at once."""
    user_metrics: Mapping[str, Callable[[], Metric]] = field(default_factory=dict)
    """The user's metrics with `update` and `compute`, which Keras does not see."""


def resolve_compile_config(loaded: LoadedModel, options: TrainOptions, infos: Sequence[ModelOutput]) -> CompileConfig:
    """Resolve loss, metrics and optimizer."""
    context = _Context(loaded, options, infos, read_training_config(loaded.file) if loaded.has_config else {})
    targets, factories = _targets(options, len(infos)), context.metric_factories
    output_losses = _losses(context, targets)
    for loss, info, y in zip(output_losses, infos, targets, strict=True):
        if loss is not None:
            losses.check_shape(loss, info, y)
    return CompileConfig(
        losses=output_losses,
        scheduled_optimizer=_optimizer(context),
        metrics=_metrics(context, output_losses, targets),
        loss_weights=_loss_weights(context.file.get("loss_weights"), infos),
        notes=tuple(dict.fromkeys(context.notes)),
        user_functions=frozenset(
            metric.__name__
            for name, metric in context.user_metrics.items()
            if name not in factories and not isinstance(metric, type)
        ),
        user_metrics={name.rpartition(":")[2]: factory for name, factory in factories.items()},
    )


@dataclass(frozen=True, slots=True)
class _Context:
    """The sources of a configuration, and the notes gathered while resolving it."""

    loaded: LoadedModel
    options: TrainOptions
    outputs: Sequence[ModelOutput]
    file: Mapping[str, Any]
    """The training configuration in the file."""
    notes: list[str] = field(default_factory=list)

    @property
    def user_metrics(self) -> dict[str, Any]:
        """The user's own metrics by name: functions, classes or objects."""
        return {
            name: user_code.resolve_reference(name, "--metric", "my_module:my_function")
            for name in map(str.strip, self.options.metrics)
            if ":" in name
        }

    @property
    def metric_factories(self) -> dict[str, Callable[[], Metric]]:
        """Factories of those that have `update` and `compute`."""
        factories = {name: metric_factory(name, metric) for name, metric in self.user_metrics.items()}
        return {name: factory for name, factory in factories.items() if factory is not None}

    @property
    def library(self) -> KerasLibrary:
        return self.loaded.library


def _targets(options: TrainOptions, count: int) -> tuple[Array | None, ...]:
    if options.example is None or options.example.y is None:
        return (None,) * count
    arrays = as_tuple(options.example.y)
    if len(arrays) != count:
        raise UsageError(f"the model has {count} outputs, but the data has {len(arrays)} arrays of targets")
    return arrays


def _losses(context: _Context, targets: Sequence[Array | None]) -> tuple[KerasLoss | None, ...]:
    library, infos, entry = context.library, context.outputs, context.file.get("loss")
    if context.options.loss:
        return tuple(
            losses.loss_by_name(library, context.options.loss, *output_and_targets)
            for output_and_targets in zip(infos, targets, strict=True)
        )
    resolved: list[KerasLoss | None] = []
    for output, y, entry_part in zip(infos, targets, _per_output(entry, infos), strict=True):
        if entry_part:
            loss, note = losses.match_targets(library, _loss_of_file(context.loaded, entry_part), output, y)
            context.notes.extend([note] if note else [])
            resolved.append(loss)
            continue
        default = losses.default_loss(library, output, y) if not entry else None
        if default is not None:
            where = f" for {output.name}" if len(infos) > 1 else ""
            ending = " from logits" if default.from_logits else ""
            context.notes.append(
                f"The file names no loss: using {default.name}{ending}, which fits the outputs and targets{where}."
            )
        resolved.append(default)
    return tuple(resolved)


def binary_logits(loaded: LoadedModel, infos: Sequence[ModelOutput]) -> tuple[bool, ...]:
    """For each output, whether the file was compiled with binary cross-entropy from logits."""
    entries = _per_output(read_training_config(loaded.file).get("loss") if loaded.has_config else None, infos)
    return tuple(
        isinstance(entry, dict)
        and object_name(entry) == losses.CrossEntropy.BINARY
        and object_in(entry, "config").get("from_logits") is True
        for entry in entries
    )


def _loss_of_file(loaded: LoadedModel, entry: Any) -> KerasLoss:
    try:
        loaded.check_trusted(entry)
        return losses.describe_loss(losses.loss_from_config(loaded.library, entry, loaded.objects))
    except _UNKNOWN_NAME as error:
        raise UsageError(
            f"{loaded.file.path} was trained with a custom loss: {error_line(error)}",
            hint="choose one with --loss, or provide it with --custom-objects mod:DICT",
        ) from error


def _optimizer(context: _Context) -> ScheduledOptimizer:
    library, options, entry = context.library, context.options, context.file.get("optimizer")
    if not options.optimizer and entry:
        try:
            context.loaded.check_trusted(entry)
            resolved = optimizer_from_config(library, entry, context.loaded.objects, lr=options.lr, clip=options.clip)
        except _UNKNOWN_NAME as error:
            context.notes.append(
                f"The file's optimizer is custom ({error_line(error)}): using {DEFAULT_OPTIMIZER} instead."
            )
        else:
            if resolved.schedule is not None:
                context.notes.append("The learning rate follows the schedule in the file, from its start.")
            return resolved
    return optimizer_by_name(library, options.optimizer, lr=options.lr, clip=options.clip)


def _metrics(
    context: _Context, resolved: Sequence[KerasLoss | None], targets: Sequence[Array | None]
) -> tuple[list[Any], ...]:
    library, names = context.library, context.options.metrics
    if names:
        names = tuple(name for name in names if name.strip() not in context.metric_factories)
        for name in names:
            for output, y in zip(context.outputs, targets, strict=True):
                losses.check_metric_shape(name, output, y)
        return tuple(
            [losses.metric_by_name(library, name, loss, context.loaded.objects) for name in names] for loss in resolved
        )
    parts = _metrics_per_output(context.file.get("metrics"), context.outputs)
    if not any(parts):
        triples = zip(resolved, context.outputs, targets, strict=True)
        return tuple(losses.default_metrics(library, *output) for output in triples)
    metrics_of_outputs = [[metric for entry in part for metric in _metric_of_file(context, entry)] for part in parts]
    return tuple(
        _distinct([losses.accuracy(library, loss) if metric == "accuracy" else metric for metric in part])
        for part, loss in zip(metrics_of_outputs, resolved, strict=True)
    )


def _metric_of_file(context: _Context, entry: Any) -> list[Any]:
    """The metric of a configuration, in a list; empty if it is unknown."""
    try:
        context.loaded.check_trusted(entry)
        return [losses.metric_from_config(context.library, entry, context.loaded.objects)]
    except _UNKNOWN_NAME as error:
        context.notes.append(f"A custom metric of the file was left out: {error_line(error)}.")
        return []


def _distinct(metrics: Sequence[Any]) -> list[Any]:
    """Drop metrics with duplicate names."""
    return list({getattr(metric, "name", metric): metric for metric in metrics}.values())


def _per_output(entry: Any, infos: Sequence[ModelOutput]) -> list[Any]:
    """A configuration's entry for each output; a single entry applies to all."""
    if isinstance(entry, dict) and "class_name" not in entry:
        return [entry.get(output.name) for output in infos]
    if isinstance(entry, list):
        return entry if len(entry) == len(infos) else (entry * len(infos) if len(entry) == 1 else [None] * len(infos))
    return [entry] * len(infos)


def _metrics_per_output(entry: Any, infos: Sequence[ModelOutput]) -> list[list[Any]]:
    if len(infos) == 1:
        return [_flat(entry)]
    if isinstance(entry, dict) and "class_name" not in entry:
        return [_flat(entry.get(output.name)) for output in infos]
    if isinstance(entry, list) and len(entry) == len(infos):
        return [_flat(part) for part in entry]
    return [_flat(entry) for _ in infos]


def _flat(entry: Any) -> list[Any]:
    if isinstance(entry, dict) and "class_name" not in entry:
        entry = list(entry.values())
    if isinstance(entry, list):
        return [metric for part in entry for metric in _flat(part)]
    return [entry] if entry else []


def _loss_weights(entry: Any, infos: Sequence[ModelOutput]) -> Any:
    """The weight of each output's loss, as a list."""
    if isinstance(entry, dict):
        return [entry.get(output.name, 1.0) for output in infos]
    return entry if isinstance(entry, list) and len(entry) == len(infos) else None


def compile_model(
    library: KerasLibrary, model: Any, config: CompileConfig, frozen: Sequence[Any], *, is_compiled: bool
) -> OptimizerMasking:
    """Compile a model; returns the masking of its optimizer."""
    options: dict[str, Any] = {
        "optimizer": _with_loss_scale(library, model, config.scheduled_optimizer.optimizer),
        "loss": outputs.per_output(model, [loss.loss if loss is not None else None for loss in config.losses]),
        "metrics": outputs.per_output(model, config.metrics),
        "loss_weights": outputs.per_output(model, config.loss_weights) if config.loss_weights else None,
    }
    if is_compiled:
        options["jit_compile"] = True
    model.compile(**options)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if library.is_keras2:
        trained = [variable for variable in model.trainable_variables if not any(variable is other for other in frozen)]
        masking: OptimizerMasking = TfKerasMasking(library, optimizer, trained)
        model.optimizer.build(trained)
        return masking
    model.optimizer.build(model.trainable_variables)
    return Keras3Masking(library, optimizer)


def _with_loss_scale(library: KerasLibrary, model: Any, optimizer: Any) -> Any:
    """Scale the loss if gradients are float16, in which they could underflow."""
    policies = (getattr(layer, "dtype_policy", None) for layer in flat_layers(model))
    if "mixed_float16" not in {getattr(policy, "name", "") for policy in policies}:
        return optimizer
    module = library.keras.mixed_precision if library.is_keras2 else library.keras.optimizers
    return module.LossScaleOptimizer(optimizer)


def optimizer_variables(model: Any) -> list[Any]:
    """All variables of the optimizer, and of a loss-scale optimizer around it."""
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    variables = {id(variable): variable for owner in (model.optimizer, inner) for variable in owner.variables}
    return list(variables.values())


_NOT_FOR_USERS = frozenset({"Optimizer", "LossScaleOptimizer"})
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_BASE_PARAMETERS = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)


@dataclass(frozen=True, slots=True)
class ScheduledOptimizer:
    """An optimizer, and the learning-rate schedule from the file, if there is one."""

    optimizer: Any
    schedule: Any = None


def optimizer_by_name(library: KerasLibrary, text: str, *, lr: float | None, clip: float | None) -> ScheduledOptimizer:
    """Create the optimizer that the user chose."""
    spec = parse_optimizer(text)
    cls, settings = spec.resolve(_optimizer_classes(library), _parameters, "learning_rate")
    if lr is not None:
        settings["learning_rate"] = float(lr)
    return ScheduledOptimizer(spec.construct(cls, **_with_clipping(settings, clip)))


def optimizer_from_config(
    library: KerasLibrary,
    entry: Mapping[str, Any] | str,
    objects: Mapping[str, Any],
    *,
    lr: float | None,
    clip: float | None,
) -> ScheduledOptimizer:
    """Create an optimizer from a file's configuration; KeyError if its class is unknown."""
    if isinstance(entry, str):
        return optimizer_by_name(library, entry, lr=lr, clip=clip)
    name = object_name(entry)
    settings = dict(object_in(entry, "config"))
    if "LossScaleOptimizer" in name:
        # Keras wraps the optimizer of each model that needs it.
        inner = settings.get("inner_optimizer")
        return optimizer_from_config(library, inner if isinstance(inner, dict) else {}, objects, lr=lr, clip=clip)
    cls = objects.get(name) or _optimizer_classes(library)[name.lower()]
    settings = _upgrade_settings(library, settings)
    if lr is not None:
        settings["learning_rate"] = float(lr)
    rate, schedule = settings.get("learning_rate"), None
    if isinstance(rate, library.keras.optimizers.schedules.LearningRateSchedule):
        settings["learning_rate"], schedule = float(rate(0)), rate
    parameters = _parameters(cls)
    optimizer = cls(**{key: value for key, value in _with_clipping(settings, clip).items() if key in parameters})
    return ScheduledOptimizer(optimizer, schedule)


def _upgrade_settings(library: KerasLibrary, settings: dict[str, Any]) -> dict[str, Any]:
    """Rename the settings of older Keras versions to their current names."""
    rate = settings.pop("lr", settings.get("learning_rate"))
    decay = settings.pop("decay", 0.0) or 0.0
    schedules = library.keras.optimizers.schedules
    if isinstance(rate, dict):
        rate = schedules.deserialize(rate)
    elif isinstance(rate, int | float) and decay:
        rate = schedules.InverseTimeDecay(float(rate), decay_steps=1, decay_rate=float(decay))
    upgraded = {key: value for key, value in settings.items() if value is not None and key != "learning_rate"}
    return {**upgraded, "learning_rate": rate} if rate is not None else upgraded


def _optimizer_classes(library: KerasLibrary) -> dict[str, Any]:
    optimizers = library.keras.optimizers
    members = {name: getattr(optimizers, name) for name in dir(optimizers) if name not in _NOT_FOR_USERS}
    return {
        name.lower(): cls
        for name, cls in members.items()
        if isinstance(cls, type) and issubclass(cls, optimizers.Optimizer)
    }


def _parameters(cls: Any) -> frozenset[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    names = {
        parameter.name
        for parameter in parameters
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    has_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset((names | (set(_BASE_PARAMETERS) if has_kwargs else set())) - {"self", "name", "jit_compile"})


def _with_clipping(settings: dict[str, Any], clip: float | None) -> dict[str, Any]:
    if clip is None:
        return settings
    return {**{key: value for key, value in settings.items() if key not in _CLIPS}, "global_clipnorm": float(clip)}
