"""Keras models behind the interface of the training loop; tensors go by their names in the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import Array, ModelFile
from prunectl.training.backend import (
    GradientStatistic,
    InputCallback,
    LoadOptions,
    Logs,
    ModelSignature,
    TrainableModel,
    TrainOptions,
)
from prunectl.training.checkpoint import load_arrays, save_arrays
from prunectl.training.data.source import Arrays, Batch, as_tuple
from prunectl.training.keras import backend, gradients, outputs
from prunectl.training.keras._compat import weights_of
from prunectl.training.keras.backend import DevicePlacement, KerasLibrary, RandomState, resolve_device
from prunectl.training.keras.compile import optimizer_variables
from prunectl.training.keras.layer_inputs import capture_layer_inputs, preserved_state
from prunectl.training.keras.load import LoadedModel, load
from prunectl.training.keras.train_step import CompiledModel, batch_norm_layers
from prunectl.training.keras.variable_names import match_variables
from prunectl.training.quiet import ignore_warnings
from prunectl.training.runtimes import random_state, restore_random_state
from prunectl.training.task import DistilledOutput


def recalibrate_batch_norm(library: KerasLibrary, model: Any, layers: list[Any], batches: Iterable[Batch]) -> None:
    """Recalibrate batch norm: moving mean and variance become averages over batches, weighted by examples."""
    statistics = [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
    others = [
        variable
        for variable in _batch_norm_variables(library, model)
        if not any(variable is other for other in statistics)
    ]
    before = [backend.get_value(library, variable) for variable in others]
    old = [backend.get_value(library, variable) for variable in statistics]
    momenta = [layer.momentum for layer in layers]
    sums: list[Array] = [np.zeros(value.shape, np.float64) for value in old]
    examples = 0
    try:
        for layer in layers:
            layer.momentum = 0.0
        run = _training_forward(library, model)
        for batch in batches:
            for variable, value in zip(statistics, old, strict=True):
                # Keras adds the difference to the old value: starting from zero avoids rounding.
                backend.set_value(variable, np.zeros_like(value))
            count = len(as_tuple(batch.x)[0])
            with ignore_warnings():
                run(outputs.pack_inputs(model, batch.x))
            for index, variable in enumerate(statistics):
                sums[index] += count * backend.get_value(library, variable).astype(np.float64)
            examples += count
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in zip(others, before, strict=True):
            backend.set_value(variable, value)
        new = [total / examples for total in sums] if examples else old
        for variable, value, previous in zip(statistics, new, old, strict=True):
            backend.set_value(variable, value.astype(previous.dtype))


def _batch_norm_variables(library: KerasLibrary, model: Any) -> list[Any]:
    return (
        weights_of(model)
        if library.is_keras2
        else [variable for variable in model.variables if "string" not in str(variable.dtype)]
    )


def _training_forward(library: KerasLibrary, model: Any) -> Any:
    def run(x: Any) -> Any:
        return model(x, training=True)

    if library.is_on_tensorflow:
        # Tracing captures the current momentum of the layers, which is 0.
        return library.tensorflow.function(run, reduce_retracing=True)
    if library.backend == "torch":

        def without_gradients(x: Any) -> Any:
            with library.torch.no_grad():
                return run(x)

        return without_gradients
    return run


_ARRAYS_FILE, _RANDOM_FILE = "keras.npz", "random.json"
_WEIGHT, _OPTIMIZER, _GENERATORS, _STATISTICS, _TORCH = "weight", "optimizer", "chance", "evidence", "torch"


def save_state(
    folder: Path, library: KerasLibrary, training: CompiledModel, random: RandomState, statistics: Mapping[str, Array]
) -> None:
    """Save weights, optimizer, random states and gradient statistics."""
    parts = {
        f"{kind}/{index}": backend.get_value(library, variable)
        for (kind, index), variable in _state_variables(training).items()
    }
    parts.update({f"{_GENERATORS}/{index}": state for index, state in enumerate(random.get_state())})
    parts.update({f"{_STATISTICS}/{name}": total for name, total in statistics.items()})
    parts.update(
        {f"{_TORCH}/{kind}": module.get_rng_state().numpy() for kind, module in _torch_generators(library).items()}
    )
    save_arrays(folder / _ARRAYS_FILE, parts)
    (folder / _RANDOM_FILE).write_text(json.dumps(random_state()), encoding="utf-8")


def restore_state(
    folder: Path, library: KerasLibrary, training: CompiledModel, random: RandomState
) -> dict[str, Array]:
    """Restore what `save_state` wrote; returns the gradient statistics."""
    arrays = load_arrays(folder / _ARRAYS_FILE)
    torch_states = {name: arrays.pop(name) for name in list(arrays) if name.startswith(f"{_TORCH}/")}
    variables = _state_variables(training)
    generators = {name: array for name, array in arrays.items() if name.startswith(f"{_GENERATORS}/")}
    statistics = {
        name.removeprefix(f"{_STATISTICS}/"): array
        for name, array in arrays.items()
        if name.startswith(f"{_STATISTICS}/")
    }
    names = {f"{kind}/{index}" for kind, index in variables}
    if names != arrays.keys() - generators.keys() - {f"{_STATISTICS}/{name}" for name in statistics}:
        raise InputError(
            f"{folder / _ARRAYS_FILE} belongs to another model or optimizer", hint="start again in another folder"
        )
    for (kind, index), variable in variables.items():
        array = arrays[f"{kind}/{index}"]
        if array.shape != backend.shape(variable):
            raise InputError(
                f"{folder / _ARRAYS_FILE} belongs to another model: {kind} {index} has the shape {array.shape}"
            )
        backend.set_value(variable, array)
    try:
        random.set_state([generators[f"{_GENERATORS}/{index}"] for index in range(len(generators))])
    except ValueError as error:
        raise InputError(
            f"{folder / _ARRAYS_FILE} belongs to another model: {error}", hint="start again in another folder"
        ) from error
    for kind, module in _torch_generators(library).items():
        # A run that is resumed on another kind of device cannot be bit-identical.
        if f"{_TORCH}/{kind}" in torch_states:
            module.set_rng_state(library.torch.from_numpy(torch_states[f"{_TORCH}/{kind}"].copy()))
    if (folder / _RANDOM_FILE).is_file():
        restore_random_state(json.loads((folder / _RANDOM_FILE).read_text(encoding="utf-8")))
    training.reset_counters()
    return statistics


def _torch_generators(library: KerasLibrary) -> dict[str, Any]:
    """PyTorch's own random generators: with this backend, dropout draws from them, not from Keras' generators."""
    if library.backend != "torch":
        return {}
    torch = library.torch
    return {"cpu": torch, **({"cuda": torch.cuda} if torch.cuda.is_available() else {})}


def _state_variables(training: CompiledModel) -> dict[tuple[str, int], Any]:
    """All variables of the model and the optimizer, without masks and statistics."""
    model = training.model
    optimizer = [variable for variable in optimizer_variables(model) if not training.masking.is_own_variable(variable)]
    weights = {(_WEIGHT, index): variable for index, variable in enumerate(weights_of(model))}
    return {**weights, **{(_OPTIMIZER, index): variable for index, variable in enumerate(optimizer)}}


class KerasTrainable:
    """A Keras model with its variables by name, and once it is prepared, its compiled training step."""

    def __init__(self, load: Callable[[DevicePlacement], LoadedModel]) -> None:
        self._loader = load
        self._placement = DevicePlacement()
        self._training: CompiledModel | None = None
        self._frozen: frozenset[str] = frozenset()
        self._tracked: tuple[str, ...] = ()
        self._load_model()

    def _load_model(self) -> None:
        loaded = self._loaded = self._loader(self._placement)
        self._library, self._model = loaded.library, loaded.model
        with self._placement.scope(self._library), ignore_warnings():
            self._variables = match_variables(
                loaded.file, loaded.library, weights_of(loaded.model), loaded.load_weights
            )
            self._random = RandomState(loaded.library, loaded.model)
        known = {id(variable) for variable in self._variables.values()}
        unmatched = [
            variable
            for variable in self._model.trainable_weights
            if id(variable) not in known and all(backend.shape(variable))
        ]
        if unmatched:
            name = getattr(unmatched[0], "path", unmatched[0].name)
            raise WorkError(
                f"{loaded.file.path} has no weight that Keras would load as {name}",
                hint="load it in Keras, save it again, and use that file",
            )

    @property
    def signature(self) -> ModelSignature:
        return self._with_activations(outputs.signature(self._model))

    def _with_activations(self, signature: ModelSignature) -> ModelSignature:
        """Add the final activation of each output to a signature, once it is known."""
        training = self._training
        activations = [] if training is None else list(zip(training.activations, training.binary, strict=True))
        if len(activations) != len(signature.outputs):
            return signature
        return replace(
            signature,
            outputs=tuple(
                replace(port, activation=activation, is_binary=is_binary)
                for port, (activation, is_binary) in zip(signature.outputs, activations, strict=True)
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on defaults that were chosen."""
        return self._training.notes if self._training is not None else ()

    @property
    def ranks(self) -> tuple[int, int]:
        """Always a single rank: with several processes, Keras itself splits each batch."""
        return 0, 1

    @property
    def is_chief(self) -> bool:
        return self._placement.processes[0] == 0

    def is_true_everywhere(self, mine: bool) -> bool:
        """The value in this process: every process reads the same batches."""
        return mine

    def prepare(self, options: TrainOptions) -> None:
        if options.precision != "fp32":
            raise UsageError(
                f"--precision {options.precision} cannot be used: the layers of a Keras model set their own precision",
                hint="leave out --precision, or build the model with another dtype policy",
            )
        if options.is_sharded:
            raise UsageError("--shard works only with PyTorch", hint="leave out --shard")
        unknown = sorted(options.frozen - self._variables.keys())
        if unknown:
            raise UsageError(f"{unknown[0]} cannot be frozen: Keras loads no such weight")
        self.place(options.device)
        # Evaluation must not reset the kernels of a program that trains by its own steps: they hold random state.
        keeps_kernels = options.is_evaluated and not self._random.has_hidden_state
        self._random.seed(options.seed, keeps_kernels=keeps_kernels)
        self._frozen = options.frozen
        with self._placement.scope(self._library), ignore_warnings():
            frozen = [self._variables[name] for name in sorted(options.frozen)]
            self._training = CompiledModel(self._loaded, self._placement, options, frozen)

    def place(self, device: str) -> None:
        """Reload the model on a device, if it is on another."""
        resolved = resolve_device(self._library, device)
        if resolved == self._placement.device:
            return
        values = self.tensors()
        self._placement.device = resolved
        self._load_model()
        self.assign(values)

    @property
    def _compiled(self) -> CompiledModel:
        if self._training is None:
            raise ValueError("a network is prepared before it is trained")
        return self._training

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        return {name: backend.get_value(self._library, self._variables[name]) for name in names}

    def tensors(self) -> dict[str, Array]:
        return self.weights(self._variables)

    def assign(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            variable = self._variables[name]
            if backend.shape(variable) != np.shape(value):
                raise ValueError(f"{name} has the shape {backend.shape(variable)}, not {np.shape(value)}")
            backend.set_value(variable, value)

    def mask(self, masks: Mapping[str, Array]) -> None:
        with self._placement.scope(self._library):
            self._compiled.mask((self._variables[name], mask) for name, mask in masks.items())

    def track_gradients(self, statistic: GradientStatistic, names: Sequence[str]) -> None:
        self._tracked = tuple(names)
        with self._placement.scope(self._library):
            self._compiled.track_gradients(statistic, [self._variables[name] for name in names])

    def gradient_statistics(self) -> dict[str, Array]:
        return self._compiled.gradient_statistics({name: self._variables[name] for name in self._tracked})

    def reset_gradient_statistics(self) -> None:
        self._compiled.masking.reset()

    def compare(self, outputs: Sequence[DistilledOutput]) -> None:
        self._compiled.compare(outputs)

    def step(self, batch: Batch, rate: float, teacher_outputs: Arrays | None = None) -> None:
        self._compiled.step(batch, rate, teacher_outputs)

    def logs(self) -> Logs:
        return self._compiled.logs()

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        return self._compiled.evaluate(batches)

    def predict(self, x: Arrays) -> Arrays:
        with self._placement.scope(self._library), ignore_warnings():
            arrays: Arrays = backend.as_arrays(self._model.predict_on_batch(outputs.pack_inputs(self._model, x)))
        return arrays

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        variables = {name: self._variables[name] for name in names}
        with (
            self._placement.scope(self._library),
            ignore_warnings(),
            preserved_state(self._library, self._model, self._random),
        ):
            capture_layer_inputs(self._library, self._model, variables, x, callback)

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        model = self._compiled.model
        x, y = outputs.pack_inputs(model, batch.x), outputs.pack_targets(model, batch.y)
        variables = [self._variables[name] for name in names]
        with (
            self._placement.scope(self._library),
            ignore_warnings(),
            preserved_state(self._library, model, self._random),
        ):
            slopes = gradients.gradients(self._library, model, variables, x, y)
        return dict(zip(names, slopes, strict=True))

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        frozen = {id(self._variables[name]) for name in self._frozen}
        batch_norms = [
            layer
            for layer in batch_norm_layers(self._library, self._model)
            if not {id(layer.moving_mean), id(layer.moving_variance)} & frozen
        ]
        if batch_norms:
            random_states = self._random.get_state()
            with self._placement.scope(self._library):
                recalibrate_batch_norm(self._library, self._model, batch_norms, batches)
            self._random.set_state(random_states)
        return len(batch_norms)

    def reseed(self, number: int) -> None:
        keeps_kernels = self._training is not None and not (
            self._random.has_hidden_state or self._training.runs_user_code
        )
        self._random.seed(number, keeps_kernels=keeps_kernels)
        if self._random.needs_retrace and self._training is not None:
            self._training.retrace()

    def save(self, folder: Path | None) -> None:
        """Save the state of training, in the first process."""
        if folder is not None:
            save_state(folder, self._library, self._compiled, self._random, self.gradient_statistics())

    def restore(self, folder: Path) -> None:
        with self._placement.scope(self._library):
            statistics = restore_state(folder, self._library, self._compiled, self._random)
        for name, total in statistics.items():
            self._compiled.masking.restore_statistic(self._variables[name], total)

    def close(self) -> None:
        """Release the compiled training step."""
        self._training = None


def load_trainable(model: ModelFile, origin: LoadOptions) -> TrainableModel:
    """Load a model in the Keras version that wrote it."""
    return KerasTrainable(partial(load, model, origin))
