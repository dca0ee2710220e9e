"""Training steps of a Keras model: compiled once, then batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.training import user_code
from prunectl.training.backend import Array, Ending, Evidence, Means
from prunectl.training.data.source import Arrays, Batch, each
from prunectl.training.keras import backend, distillation
from prunectl.training.keras._compat import count_train_step, flat_layers
from prunectl.training.keras.backend import KerasLibrary, ignore_warnings
from prunectl.training.keras.compile import outputs
from prunectl.training.keras.compile.config import compile_model, resolve_compile_config
from prunectl.training.keras.distillation import DistillationConfig, OutputLoss
from prunectl.training.keras.distribution import DevicePlacement
from prunectl.training.keras.load import LoadedModel, error_line


def freeze(library: KerasLibrary, model: Any, variables: Sequence[Any]) -> list[tuple[Any, Array]]:
    """Keep variables out of training, and return what has to be put back after a step, with its numbers."""
    if not variables:
        return []
    frozen = {id(variable) for variable in variables}
    for layer in flat_layers(model, include_self=False):
        weights = layer.weights
        if weights and all(id(weight) in frozen for weight in weights):
            # All of it: batch normalisation then uses the statistics that it has.
            layer.trainable = False
    if not library.is_keras2:
        for variable in variables:
            variable.trainable = False
    trained = {id(variable) for variable in model.trainable_weights}
    untrained = {
        id(weight)
        for layer in flat_layers(model, include_self=False)
        if not layer.trainable
        for weight in layer.weights
    }
    statistics = [variable for variable in variables if id(variable) not in trained and id(variable) not in untrained]
    return [(variable, backend.get_value(library, variable)) for variable in statistics]


def restore_frozen(library: KerasLibrary, frozen: Iterable[tuple[Any, Array]]) -> None:
    """Undo what a step has done to statistics that are frozen while their layer is not."""
    for variable, value in frozen:
        backend.set_value(library, variable, value)


class MetricAverager:
    """Adds up what each step says of itself."""

    def __init__(self, is_running: Callable[[str, float], bool]) -> None:
        self._is_running_mean = is_running
        """Whether Keras says a number for all batches so far, and not for one."""
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, logs: Mapping[str, Any], examples: int) -> None:
        """Take down what a step said."""
        for name, value in logs.items():
            mean = float(np.asarray(value, np.float64).mean())
            self._last[name] = mean
            self._sums[name] = self._sums.get(name, 0.0) + mean * examples
            self._counts[name] = self._counts.get(name, 0) + examples

    def compute(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {
            name: last if self._is_running_mean(name, last) else self._sums[name] / max(self._counts[name], 1)
            for name, last in self._last.items()
        }
        self._last, self._sums, self._counts = {}, {}, {}
        return means


def current_metrics(model: Any) -> dict[str, float]:
    """What the metrics of a model stand at, those that have begun."""
    metrics: dict[str, float] = {}
    for metric in model.metrics:
        try:
            result = metric.result()
        except ValueError:  # Keras 3 has not built it yet
            continue
        values = result if isinstance(result, Mapping) else {metric.name: result}
        metrics.update({name: float(np.asarray(value, np.float64).mean()) for name, value in values.items()})
    return metrics


class LearningRate:
    """Sets the rate of an optimizer, when it changes."""

    def __init__(self, library: KerasLibrary, optimizer: Any, schedule: Any) -> None:
        self._library, self._optimizer, self._schedule = library, optimizer, schedule
        self._base = self._number(optimizer.learning_rate)
        self._current: float | None = self._base

    def set_scale(self, scale: float) -> None:
        """Set the rate to a share of the base."""
        if self._schedule is not None:
            self._base = self._number(self._schedule(self._optimizer.iterations))
        rate = self._base * scale
        if rate != self._current:
            self._optimizer.learning_rate = rate
            self._current = rate

    def forget(self) -> None:
        """Set it anew at the next step, since something else may have set it."""
        self._current = None

    def _number(self, tensor: Any) -> float:
        if self._library.is_keras2:
            return float(tensor.numpy())
        return float(self._library.keras.ops.convert_to_numpy(tensor))


class CompiledTrainStep:
    """The training step of a model as a graph that takes batches as they are."""

    def __init__(self, library: KerasLibrary, model: Any) -> None:
        self._library, self._model = library, model
        self._traced: Any = None

    @staticmethod
    def supports(library: KerasLibrary, model: Any) -> bool:
        """Whether Keras would do the same: it is asked itself where a model has ways of its own, or runs eagerly."""
        if not library.is_keras2 or model.run_eagerly:
            return False
        plain = library.keras.Model
        return all(
            getattr(type(model), name) is getattr(plain, name) for name in ("make_train_function", "train_on_batch")
        )

    def forget(self) -> None:
        """Trace the step anew when it is next asked for."""
        self._traced = None

    def __call__(self, x: Any, y: Any) -> Mapping[str, Any]:
        """Train on a batch, and return what the step says of itself."""
        if self._traced is None:
            self._traced = self._trace()
        data = self._library.tensorflow.nest.map_structure(self._tensor, (x,) if y is None else (x, y))
        logs = self._traced(data)
        return {name: value.numpy() for name, value in logs.items()}

    def _trace(self) -> Any:
        tensorflow, model = self._library.tensorflow, self._model

        def step(data: Any) -> Any:
            logs = model.train_step(data)
            count_train_step(model)
            return logs

        return tensorflow.function(step, reduce_retracing=True, jit_compile=bool(model.jit_compile) or None)

    def _tensor(self, array: Any) -> Any:
        is_float = np.asarray(array).dtype.kind == "f"
        dtype = self._library.keras.backend.floatx() if is_float else None
        return self._library.tensorflow.convert_to_tensor(array, dtype)


class CompiledModel:
    """A compiled model."""

    def __init__(self, loaded: LoadedModel, place: DevicePlacement, means: Means, frozen: Sequence[Any]) -> None:
        self._library, self.model, self._placement = loaded.library, loaded.model, place
        self._means = means
        self._custom_step = user_code.function(means.custom_step, "--step") if means.custom_step else None
        output_infos = outputs.describe_outputs(self.model, means.example)
        config = resolve_compile_config(loaded, means, output_infos)
        self.notes = config.notes
        self._frozen_statistics = freeze(self._library, self.model, frozen)
        if not self.model.trainable_weights:
            raise UsageError("nothing is left to train: every weight is frozen")
        self.masking = compile_model(
            self._library,
            self.model,
            config,
            frozen,
            is_compiled=means.is_compiled,
        )
        if place.strategy is not None:
            # The metrics of Keras are those of all processes already; added up, they would count double.
            self.model.distribute_reduction_method = "first"
        is_alone = place.strategy is None and CompiledTrainStep.supports(self._library, self.model)
        self._train_step = CompiledTrainStep(self._library, self.model) if is_alone else None
        self._rate = LearningRate(self._library, self.model.optimizer, config.chosen.schedule)
        self._output_losses = [
            OutputLoss(loss.kind.is_classification if loss is not None else info.ending is not Ending.RAW, info.ending)
            for loss, info in zip(config.losses, output_infos, strict=True)
        ]
        self.endings = tuple(info.ending for info in output_infos)
        self._is_distilling = self._has_trained = False
        # Keras 3 forgets what it counted at every batch; here that is done when the numbers are asked for.
        self._reset_metrics: Callable[[], None] = self.model.reset_metrics
        self.model.reset_metrics = lambda: None
        self._reset_distillation: Callable[[], None] = lambda: None
        self._averager = MetricAverager(self._is_running_mean)

    @property
    def _has_custom_step(self) -> bool:
        """Whether the model, or the user, trains by another step than Keras' own."""
        module = type(self.model).train_step.__module__
        return self._custom_step is not None or module.partition(".")[0] not in {"keras", "tf_keras"}

    def _is_running_mean(self, name: str, last: float) -> bool:
        """Whether a step says a number of all batches since they were counted anew, and not of its own alone."""
        if self._custom_step is not None:
            return False
        return not self._has_custom_step or current_metrics(self.model).get(name) == last

    def mask(self, masks: Iterable[tuple[Any, Array]]) -> None:
        """Put masks on."""
        if self.masking.set_masks(masks):
            self.retrace()

    def watch(self, evidence: Evidence, variables: Sequence[Any]) -> None:
        """Gather evidence."""
        self.masking.track(evidence, variables)
        self.retrace()

    def retrace(self) -> None:
        """Let Keras put its training step together again."""
        self.model.train_function = None
        if self._train_step is not None:
            self._train_step.forget()

    def evidence(self, variables: Mapping[str, Any]) -> dict[str, Array]:
        """What was gathered."""
        if variables and self._has_trained and not self.masking.has_seen_gradients:
            raise WorkError(
                f"--step {self._means.custom_step} does not train through model.optimizer, so no gradient was seen",
                hint="let it call model.optimizer, or choose a strategy that looks at weights alone",
            )
        return self.masking.statistics(variables)

    def step(self, batch: Batch, scale: float, teacher_outputs: Arrays | None) -> None:
        """Train on a batch."""
        x, y = outputs.pack_inputs(self.model, batch.x), outputs.pack_targets(self.model, batch.y)
        with self._placement.scope(self._library), ignore_warnings():
            self._rate.set_scale(scale)
            if teacher_outputs is not None:
                self._enable_distillation()
                teacher_targets = {distillation.TEACHER: outputs.pack_targets(self.model, teacher_outputs)}
                y = teacher_targets if y is None else {distillation.TARGETS: y, **teacher_targets}
            logs = self._train_batch(x, y)
            restore_frozen(self._library, self._frozen_statistics)
            if self._has_custom_step:
                # It may move weights without the optimizer, or with another.
                self.masking.apply_masks()
        self._has_trained = True
        self._averager.update(logs, len(each(batch.x)[0]))

    def _train_batch(self, x: Any, y: Any) -> Mapping[str, Any]:
        try:
            if self._custom_step is not None:
                return self._custom_train_step(x, y)
            if self._train_step is not None:
                return self._train_step(x, y)
            return self._on_batch("train", x, y)
        except self._failures as error:
            if self._has_trained:
                raise
            raise _refused("train on the first batch", error) from error

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        """What Keras raises where arrays do not fit together."""
        more = (self._library.tensorflow.errors.InvalidArgumentError,) if self._library.is_on_tensorflow else ()
        return (ValueError, TypeError, *more)

    def _on_batch(self, verb: str, x: Any, y: Any) -> Mapping[str, Any]:
        options = {"reset_metrics": False} if self._library.is_keras2 else {}
        logs: Mapping[str, Any] = getattr(self.model, f"{verb}_on_batch")(x, y, return_dict=True, **options)
        return logs

    def _custom_train_step(self, x: Any, y: Any) -> Mapping[str, Any]:
        assert self._custom_step is not None
        logs = self._custom_step(self.model, x, y)
        if not isinstance(logs, Mapping):
            raise UsageError(
                f"--step {self._means.custom_step} returned a {type(logs).__name__}, not a dictionary of numbers",
                hint="return {'loss': loss}",
            )
        return {
            name: value if self._library.is_keras2 else self._library.keras.ops.convert_to_numpy(value)
            for name, value in logs.items()
        }

    def _enable_distillation(self) -> None:
        if self._is_distilling:
            return
        if self._has_custom_step:
            raise UsageError(
                "a training step of its own cannot be taught: only Keras' own takes a teacher's outputs",
                hint="leave --distill out, or let the step do it",
            )
        means = self._means
        guidance = DistillationConfig(self._library, self._output_losses, means.teacher_share, means.temperature)
        self._reset_distillation = distillation.install_distillation(self.model, guidance)
        self.retrace()
        self._is_distilling = True

    def logs(self) -> dict[str, float]:
        """The means since they were last asked for."""
        found = self._averager.compute()
        self._reset_metrics()
        self._reset_distillation()
        return found

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The means over some batches."""
        held = [
            (one, backend.get_value(self._library, one)) for metric in self.model.metrics for one in metric.variables
        ]
        self._reset_metrics()
        book = MetricAverager(lambda *_: True)
        with self._placement.scope(self._library), ignore_warnings():
            for batch in batches:
                x, y = outputs.pack_inputs(self.model, batch.x), outputs.pack_targets(self.model, batch.y)
                try:
                    said = self._on_batch("test", x, y)
                except self._failures as error:
                    raise _refused("evaluate a batch", error) from error
                book.update(said, len(each(batch.x)[0]))
        self._reset_metrics()
        for one, value in held:
            backend.set_value(self._library, one, value)
        return book.compute()

    def reset_counters(self) -> None:
        """Forget what was counted, and the rate that was set."""
        self.logs()
        self._rate.forget()


def _refused(what: str, error: Exception) -> UsageError:
    hint = "see that --loss, --metric and the targets fit the model"
    return UsageError(f"Keras cannot {what}: {error_line(error)}", hint=hint)
