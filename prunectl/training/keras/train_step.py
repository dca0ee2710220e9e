"""The compiled training step of a Keras model: frozen weights, learning rate, distillation and averaged metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array
from prunectl.training import user_code
from prunectl.training.backend import GradientStatistic, TrainOptions
from prunectl.training.data.source import Arrays, Batch, as_tuple
from prunectl.training.keras import backend, losses, outputs
from prunectl.training.keras._compat import count_step, distinct_layers, flat_layers
from prunectl.training.keras.backend import DevicePlacement, KerasLibrary
from prunectl.training.keras.compile import binary_logits, compile_model, resolve_compile_config
from prunectl.training.keras.load import LoadedModel, error_line
from prunectl.training.keras.losses import CrossEntropy, DistillationConfig
from prunectl.training.monitor import metric_failures
from prunectl.training.quiet import ignore_warnings
from prunectl.training.task import DistilledOutput, FinalActivation


def freeze(library: KerasLibrary, model: Any, variables: Sequence[Any]) -> list[tuple[Any, Array]]:
    """Freeze variables; returns those that steps change anyway (batch-norm statistics), with their values."""
    if not variables:
        return []
    frozen = {id(variable) for variable in variables}
    for layer in flat_layers(model, include_self=False):
        weights = layer.weights
        if weights and all(id(weight) in frozen for weight in weights):
            # Freezing the whole layer makes batch normalisation use its saved statistics.
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


def batch_norm_layers(library: KerasLibrary, model: Any) -> list[Any]:
    """The trainable batch-normalization layers."""
    batch_norm = library.keras.layers.BatchNormalization
    return [layer for layer in distinct_layers(model) if isinstance(layer, batch_norm) and layer.trainable]


def set_inference_mode(library: KerasLibrary, model: Any) -> None:
    """Run all layers in inference mode, without dropout and noise, except for batch normalisation."""
    norms = {id(layer) for layer in batch_norm_layers(library, model)}
    for layer in distinct_layers(model):
        parameters = inspect.signature(layer.call).parameters
        if "training" in parameters and not norms & {id(inner) for inner in flat_layers(layer)}:
            layer.call = _in_inference_mode(layer.call)


def _in_inference_mode(original: Any) -> Any:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return original(*bound.args, **bound.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


class StepAverager:
    """Averages the logs of training steps over examples."""

    def __init__(self, is_running: Callable[[str, float], bool]) -> None:
        self._is_running_mean = is_running
        """Whether a log is a running mean over all batches so far rather than the value of one batch."""
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, logs: Mapping[str, Any], examples: int) -> None:
        """Add the logs of a step."""
        for name, value in logs.items():
            mean = float(np.asarray(value, np.float64).mean())
            self._last[name] = mean
            self._sums[name] = self._sums.get(name, 0.0) + mean * examples
            self._counts[name] = self._counts.get(name, 0) + examples

    def compute(self) -> dict[str, float]:
        """The means since the last call; resets them."""
        means = {
            name: last if self._is_running_mean(name, last) else self._sums[name] / max(self._counts[name], 1)
            for name, last in self._last.items()
        }
        self._last, self._sums, self._counts = {}, {}, {}
        return means


def current_metrics(model: Any) -> dict[str, float]:
    """The current results of those metrics of a model that are built."""
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
    """Sets an optimizer's learning rate to its base rate times a scale."""

    def __init__(self, library: KerasLibrary, optimizer: Any, schedule: Any) -> None:
        self._library, self._optimizer, self._schedule = library, optimizer, schedule
        self._base = self._number(optimizer.learning_rate)
        self._current: float | None = self._base

    def set_scale(self, scale: float) -> None:
        """Set the rate to the base rate times `scale`."""
        if self._schedule is not None:
            self._base = self._number(self._schedule(self._optimizer.iterations))
        rate = self._base * scale
        if rate != self._current:
            self._optimizer.learning_rate = rate
            self._current = rate

    def forget(self) -> None:
        """Set the rate again at the next step, as a restored state may have changed it."""
        self._current = None

    def _number(self, tensor: Any) -> float:
        if self._library.is_keras2:
            return float(tensor.numpy())
        return float(self._library.keras.ops.convert_to_numpy(tensor))


class CompiledStep:
    """A Keras step on TensorFlow as one `tf.function`, instead of `train_on_batch` or `test_on_batch`.

    Those trace a step for the size of the first batch, and again if the last one is smaller.
    """

    def __init__(self, library: KerasLibrary, model: Any, verb: str, *, takes_any_size: bool) -> None:
        self._library, self._model, self._verb = library, model, verb
        self._takes_any_size = takes_any_size
        self._traced: Any = None

    @staticmethod
    def supports(library: KerasLibrary, model: Any, verb: str) -> bool:
        """Whether Keras' own step is equivalent: not if the model overrides it or runs eagerly."""
        if not library.is_on_tensorflow or model.run_eagerly:
            return False
        plain = library.keras.Model
        return all(
            getattr(type(model), name) is getattr(plain, name) for name in (f"make_{verb}_function", f"{verb}_on_batch")
        )

    def forget(self) -> None:
        """Retrace at the next step."""
        self._traced = None

    def __call__(self, x: Any, y: Any) -> Mapping[str, Any]:
        """Take a step on a batch; returns its logs."""
        data = self._library.tensorflow.nest.map_structure(self._tensor, (x,) if y is None else (x, y))
        if self._traced is None:
            self._traced = self._trace(data)
        logs = self._traced(data)
        return {name: value.numpy() for name, value in logs.items()}

    def _trace(self, data: Any) -> Any:
        tensorflow, model, verb = self._library.tensorflow, self._model, self._verb

        def step(data: Any) -> Any:
            logs = getattr(model, f"{verb}_step")(data)
            if self._library.is_keras2:
                count_step(model, verb)
            return logs

        traced = tensorflow.function(
            step,
            reduce_retracing=True,
            jit_compile=bool(model.jit_compile) or None,
            # In Keras 2, but not in Keras 3, a user's step may branch on a tensor (AutoGraph).
            autograph=self._library.is_keras2,
        )
        if self._takes_any_size:
            # A trace without a fixed batch size, as in `fit`, serves batches of every size.
            traced.get_concrete_function(
                tensorflow.nest.map_structure(
                    lambda tensor: tensorflow.TensorSpec([None, *tensor.shape[1:]], tensor.dtype), data
                )
            )
        return traced

    def _tensor(self, array: Any) -> Any:
        is_converted = self._library.is_keras2 and np.asarray(array).dtype.kind == "f"
        dtype = self._library.keras.backend.floatx() if is_converted else None
        return self._library.tensorflow.convert_to_tensor(array, dtype)


class CompiledModel:
    """A compiled model with its masks, and its training and test steps."""

    def __init__(
        self, loaded: LoadedModel, placement: DevicePlacement, options: TrainOptions, frozen: Sequence[Any]
    ) -> None:
        self._library, self.model, self._placement = loaded.library, loaded.model, placement
        self._has_custom_objects = bool(loaded.objects)
        self._options = options
        self._custom_step = (
            user_code.resolve_function(options.custom_step, "--train-step") if options.custom_step else None
        )
        infos = outputs.describe_outputs(self.model, options.example)
        config = resolve_compile_config(loaded, options, infos)
        self.notes = config.notes
        self._user_functions, self._user_metrics = config.user_functions, config.user_metrics
        self._frozen_statistics = freeze(self._library, self.model, frozen)
        if options.is_matching:
            set_inference_mode(self._library, self.model)
        if not self.model.trainable_weights:
            raise UsageError(
                "there is nothing to train: every weight is frozen", hint="leave out --freeze, or name less"
            )
        self.masking = compile_model(self._library, self.model, config, frozen, is_compiled=options.is_compiled)
        if placement.strategy is not None:
            # Keras' metrics already cover all processes; summing them would count everything twice.
            self.model.distribute_reduction_method = "first"
        self._train_step, self._test_step = self._compiled_step("train"), self._compiled_step("test")
        self._rate = LearningRate(self._library, self.model.optimizer, config.scheduled_optimizer.schedule)
        self._output_losses = [
            DistilledOutput(
                loss.kind.is_classification if loss is not None else info.activation is not FinalActivation.RAW,
                loss is not None and loss.kind is CrossEntropy.BINARY,
                info.activation,
            )
            for loss, info in zip(config.losses, infos, strict=True)
        ]
        self.activations = tuple(info.activation for info in infos)
        self.binary = binary_logits(loaded, infos)
        """For each output, whether the file says that its numbers are logits of binary classification."""
        self._is_distilling = self._has_trained = False
        # Keras 3 resets its metrics at every batch; here they are reset when the logs are read.
        self._reset_metrics: Callable[[], None] = self.model.reset_metrics
        self.model.reset_metrics = lambda: None
        self._reset_distillation: Callable[[], None] = lambda: None
        self._averager = StepAverager(self._is_running_mean)

    def _compiled_step(self, verb: str) -> CompiledStep | None:
        """A step that is traced here, if it is equivalent to Keras' own."""
        if self._placement.strategy is not None or not CompiledStep.supports(self._library, self.model, verb):
            return None
        # Keras' own layers have been traced for any batch size; other code may read the size while it is traced.
        is_of_others = self.runs_user_code or self._has_custom_objects or backend.has_foreign_code(self.model)
        inputs = () if is_of_others else getattr(self.model, "inputs", None) or ()
        takes_any_size = bool(inputs) and all(tensor.shape[0] is None for tensor in inputs)
        return CompiledStep(self._library, self.model, verb, takes_any_size=takes_any_size)

    @property
    def _has_custom_step(self) -> bool:
        """Whether the model or the user has a training step other than Keras' own."""
        module = type(self.model).train_step.__module__
        return self._custom_step is not None or module.partition(".")[0] not in {"keras", "tf_keras"}

    @property
    def runs_user_code(self) -> bool:
        """Whether a step runs code from outside Keras and prunectl."""
        return bool(self._has_custom_step or self._user_functions or self._user_metrics)

    def _is_running_mean(self, name: str, last: float) -> bool:
        """Whether a log is a running mean since the metrics were reset rather than the value of one batch."""
        if self._custom_step is not None:
            return False
        return not self._has_custom_step or current_metrics(self.model).get(name) == last

    def mask(self, masks: Iterable[tuple[Any, Array]]) -> None:
        """Set masks."""
        if self.masking.set_masks(masks):
            self.retrace()

    def track_gradients(self, statistic: GradientStatistic, variables: Sequence[Any]) -> None:
        """Accumulate a gradient statistic of some variables."""
        self.masking.track(statistic, variables)
        self.retrace()

    def retrace(self) -> None:
        """Drop the traced training step."""
        self.model.train_function = None
        if self._train_step is not None:
            self._train_step.forget()

    def gradient_statistics(self, variables: Mapping[str, Any]) -> dict[str, Array]:
        """The accumulated gradient statistics."""
        if variables and self._has_trained and not self.masking.has_seen_gradients:
            raise WorkError(
                f"--train-step {self._options.custom_step} does not use model.optimizer, "
                "so prunectl cannot see its gradients",
                hint="use model.optimizer in it, or a --strategy that needs no gradients",
            )
        return self.masking.statistics(variables)

    def compare(self, compared: Sequence[DistilledOutput]) -> None:
        """Choose how each output is compared with the teacher's, before the first distillation step."""
        self._output_losses = list(compared)

    def step(self, batch: Batch, scale: float, teacher_outputs: Arrays | None) -> None:
        """Train on a batch."""
        x, y = outputs.pack_inputs(self.model, batch.x), outputs.pack_targets(self.model, batch.y)
        with self._placement.scope(self._library), ignore_warnings():
            self._rate.set_scale(scale)
            if teacher_outputs is not None:
                self._enable_distillation()
                teacher_targets = {losses.TEACHER: outputs.pack_targets(self.model, teacher_outputs)}
                y = teacher_targets if y is None else {losses.TARGETS: y, **teacher_targets}
            logs = self._train_batch(x, y)
            for variable, value in self._frozen_statistics:
                backend.set_value(variable, value)
            if self._has_custom_step:
                # A custom step may change weights without the optimizer, or with another.
                self.masking.apply_masks()
        self._has_trained = True
        self._averager.update(logs, len(as_tuple(batch.x)[0]))

    def _train_batch(self, x: Any, y: Any) -> Mapping[str, Any]:
        try:
            if self._custom_step is not None:
                return self._custom_train_step(x, y)
            return self._on_batch("train", self._train_step, x, y)
        except self._library.mismatch_errors as error:
            if self._has_trained:
                raise
            raise _user_error("train on the first batch", error) from error

    def _on_batch(self, verb: str, step: CompiledStep | None, x: Any, y: Any) -> Mapping[str, Any]:
        if step is not None:
            return step(x, y)
        options = {"reset_metrics": False} if self._library.is_keras2 else {}
        logs: Mapping[str, Any] = getattr(self.model, f"{verb}_on_batch")(x, y, return_dict=True, **options)
        return logs

    def _custom_train_step(self, x: Any, y: Any) -> Mapping[str, Any]:
        assert self._custom_step is not None
        logs = self._custom_step(self.model, x, y)
        if not isinstance(logs, Mapping):
            raise UsageError(
                f"--train-step {self._options.custom_step} returned a value of type {type(logs).__name__}, "
                "not a dictionary of numbers",
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
                "--distill cannot be used with a custom training step",
                hint="leave out --distill, or distil in the training step",
            )
        options = self._options
        share, temperature = options.teacher_share, options.temperature
        distillation = DistillationConfig(
            self._library, self._output_losses, share, temperature, has_penalties=not options.is_matching
        )
        self._reset_distillation = losses.install_distillation(self.model, distillation)
        self.retrace()
        self._is_distilling = True

    def logs(self) -> dict[str, float]:
        """The mean logs since the last call."""
        means = self._averager.compute()
        self._reset_metrics()
        self._reset_distillation()
        return means

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean loss and metrics over some batches."""
        saved = [
            (variable, backend.get_value(self._library, variable))
            for metric in self.model.metrics
            for variable in metric.variables
        ]
        self._reset_metrics()
        averager = StepAverager(lambda *_: True)
        user_metrics = {name: create() for name, create in self._user_metrics.items()}
        gathered: list[tuple[tuple[Array, ...], tuple[Array, ...]]] = []
        with self._placement.scope(self._library), ignore_warnings():
            for batch in batches:
                x, y = outputs.pack_inputs(self.model, batch.x), outputs.pack_targets(self.model, batch.y)
                try:
                    logs = self._on_batch("test", self._test_step, x, y)
                except self._library.mismatch_errors as error:
                    raise _user_error("evaluate a batch", error) from error
                averager.update(logs, len(as_tuple(batch.x)[0]))
                if (user_metrics or self._user_functions) and batch.y is not None:
                    arrays = as_tuple(backend.as_arrays(self.model.predict_on_batch(x)))
                    targets = as_tuple(batch.y)
                    for name, metric in user_metrics.items():
                        with metric_failures(name, arrays[0].shape, targets[0].shape):
                            metric.update(arrays[0], targets[0])
                    gathered += [(targets, arrays)] if self._user_functions else []
            logs = averager.compute()
            if gathered:
                logs |= self._of_all_examples(logs, gathered)
        self._reset_metrics()
        for variable, value in saved:
            backend.set_value(variable, value)
        return {**logs, **{name: float(metric.compute()) for name, metric in user_metrics.items()}}

    def _of_all_examples(
        self, logs: Mapping[str, float], gathered: Sequence[tuple[tuple[Array, ...], tuple[Array, ...]]]
    ) -> dict[str, float]:
        """The user's metric functions on all outputs and targets at once: F1 and Dice are not means over batches."""
        convert = self._library.ops.convert_to_tensor
        y, y_pred = (
            outputs.per_output(self.model, [convert(np.concatenate(parts)) for parts in zip(*arrays, strict=True)])
            for arrays in zip(*gathered, strict=True)
        )
        self._reset_metrics()
        # With several processes, each has its own metric variables.
        strategy = self._placement.strategy
        arguments = (None, y, y_pred, None)
        values = (
            self.model.compute_metrics(*arguments)
            if strategy is None
            else strategy.run(self.model.compute_metrics, arguments)
        )
        names = [name for name in logs if any(f"_{name}".endswith(f"_{own}") for own in self._user_functions)]
        return {name: float(np.mean(np.asarray(values[name], np.float64))) for name in names}

    def reset_counters(self) -> None:
        """Reset the averaged logs and the cached learning rate."""
        self.logs()
        self._rate.forget()


def _user_error(what: str, error: Exception) -> UsageError:
    hint = "check that --loss, --metric and the targets fit the model"
    return UsageError(f"Keras cannot {what}: {error_line(error)}", hint=hint)
