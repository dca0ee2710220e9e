"""Capture of layer inputs: the calls of known layers are patched for one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.backend import InputCallback, LayerInput, WeightUse
from prunectl.training.data.source import Arrays
from prunectl.training.keras import backend, outputs
from prunectl.training.keras._compat import distinct_layers, flat_layers, layer_statistics, rnn_inputs, takes_training
from prunectl.training.keras.backend import KerasLibrary, RandomState
from prunectl.training.keras.layer_uses import (
    KERNELS,
    LayerHandler,
    LayerUse,
    WeightInput,
    concrete_array,
    handler_for,
    is_custom,
    is_rnn,
    tree_of,
)


@contextmanager
def functions_eagerly(library: KerasLibrary, *, eagerly: bool) -> Iterator[None]:
    """Set whether `tf.function`s run eagerly or as graphs."""
    config = library.tensorflow.config
    was_eager = config.functions_run_eagerly()
    config.run_functions_eagerly(eagerly)
    try:
        yield
    finally:
        config.run_functions_eagerly(was_eager)


@contextmanager
def patched(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute temporarily, bypassing Keras' tracking of attributes."""
    attributes = vars(thing)
    missing = object()
    original = attributes.get(name, missing)
    attributes[name] = value
    try:
        yield
    finally:
        if original is missing:
            attributes.pop(name)
        else:
            attributes[name] = original


@dataclass(frozen=True, slots=True)
class RnnReplay:
    """Step-by-step replay of a recurrent layer."""

    library: KerasLibrary
    layer: Any
    sequences: Any
    states: Any
    mask: Array | None
    """Shape (examples, steps); where it is False, the step is skipped."""

    def run(self) -> Iterator[Array | None]:
        """Run the cell for each step, and yield the mask of the examples that take part; None for all."""
        axis = 0 if getattr(self.layer, "time_major", False) else 1
        order = range(int(self.sequences.shape[axis]))
        states = self.states
        for index in reversed(order) if self.layer.go_backwards else order:
            _, next_states = self.layer.cell(self.sequences[index] if axis == 0 else self.sequences[:, index], states)
            keep = self.mask[:, index] if self.mask is not None else None
            states = self._next_states(states, next_states, keep)
            yield keep

    def _next_states(self, states: Any, next_states: Any, keep: Array | None) -> Any:
        nest = tree_of(self.library)
        old, new = nest.flatten(states), nest.flatten(next_states)
        if keep is not None:
            new = [self._select(keep, *pair) for pair in zip(new, old, strict=True)]
        return nest.pack_sequence_as(states, new)

    def _select(self, mask: Array, new: Any, old: Any) -> Any:
        return self.library.ops.where(mask.reshape(-1, *(1,) * (len(new.shape) - 1)), new, old)


def replay_of(library: KerasLibrary, layer: Any, arguments: Mapping[str, Any]) -> RnnReplay | None:
    """The replay of a recurrent layer's call; None if it cannot be replayed."""
    options = dict(arguments)
    sequences = options.pop(next(iter(options)))
    states, mask, constants = options.get("initial_state"), options.get("mask"), options.get("constants")
    if library.is_keras2:
        sequences, states, constants = rnn_inputs(layer, sequences, states, constants)
    elif states is None:
        states = layer.states if layer.stateful else layer.get_initial_state(batch_size=sequences.shape[0])
    if constants or concrete_array(library, sequences) is None:
        return None
    states = list(states) if isinstance(states, list | tuple) else [states]
    return RnnReplay(library, layer, sequences, _as_tensors(library, states), _mask(library, layer, mask))


def _as_tensors(library: KerasLibrary, states: Any) -> Any:
    """States as tensors; some layers hold them in variables."""
    return tree_of(library).map_structure(library.ops.convert_to_tensor, states)


def _mask(library: KerasLibrary, layer: Any, mask: Any) -> Array | None:
    tensor = tree_of(library).flatten(mask)[0] if mask is not None else None
    array = concrete_array(library, tensor) if tensor is not None else None
    if array is None:
        return None
    return (array.T if getattr(layer, "time_major", False) else array).astype(np.bool_)


class InputRecorder:
    """Patches the calls of layers, and reports the inputs of their weights."""

    def __init__(self, library: KerasLibrary, variables: Mapping[str, Any], callback: InputCallback) -> None:
        self._library, self._on_input = library, callback
        self._names = {id(variable): name for name, variable in variables.items()}
        self._is_paused = False
        self._buffer: list[WeightInput] | None = None
        """Inputs recorded while a recurrent layer is replayed."""
        self.failure: Exception | None = None

    def recording(self, layer: Any) -> Any:
        """A context that records a layer's calls."""
        stack = ExitStack()
        handler = handler_for(layer)
        if handler is not None:
            stack.enter_context(patched(layer, "call", self._wrap_call(layer, handler)))
        elif is_rnn(layer) and any(map(self._has_wanted_kernel, flat_layers(layer))):
            stack.enter_context(patched(layer, "call", self._wrap_rnn_call(layer)))
            if hasattr(layer, "use_cudnn"):
                # Otherwise a bidirectional layer may run both directions as one operation, bypassing its layers.
                stack.enter_context(patched(layer, "use_cudnn", False))
        return stack

    def _has_wanted_kernel(self, layer: Any) -> bool:
        return any(id(getattr(layer, name, None)) in self._names for name in KERNELS)

    def _wrap_call(self, layer: Any, handler: LayerHandler) -> Any:
        original, is_wanted = layer.call, self._has_wanted_kernel(layer)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._run(original, args, kwargs)
            if is_wanted and not self._is_paused:
                bound = inspect.signature(original).bind(*args, **kwargs).arguments
                inputs = self._inputs(list(bound.values())[:2])
                if inputs is not None:
                    first_output = tree_of(self._library).flatten(result)[0]
                    self._emit(handler(LayerUse(self._library, layer, inputs, tuple(map(int, first_output.shape)))))
            return result

        return _with_signature(call, original)

    def _run(self, original: Any, args: Any, kwargs: Any) -> Any:
        if not self._library.is_on_tensorflow:
            return original(*args, **kwargs)
        with functions_eagerly(self._library, eagerly=False):
            # On a CPU, TensorFlow can run some convolutions only in compiled functions.
            return original(*args, **kwargs)

    def _inputs(self, nested: Any) -> tuple[Array, ...] | None:
        tensors = [tensor for tensor in tree_of(self._library).flatten(nested) if hasattr(tensor, "shape")]
        arrays = [concrete_array(self._library, tensor) for tensor in tensors]
        complete = [array for array in arrays if array is not None]
        return tuple(complete) if complete and len(complete) == len(arrays) else None

    def _wrap_rnn_call(self, layer: Any) -> Any:
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._is_paused:
                bound = inspect.signature(original).bind(*args, **kwargs).arguments
                replay = replay_of(self._library, layer, bound)
                if replay is not None:
                    self._replay(replay)
            was_paused, self._is_paused = self._is_paused, True
            try:
                return self._run(original, args, kwargs)
            finally:
                self._is_paused = was_paused

        return _with_signature(call, original)

    def _replay(self, replay: RnnReplay) -> None:
        """Replay all steps, and report their inputs concatenated."""
        outer_buffer, grouped = self._buffer, dict[tuple[int, WeightUse], list[WeightInput]]()
        try:
            self._buffer = []
            for keep in replay.run():
                for weight_input in self._buffer:
                    grouped.setdefault((id(weight_input.variable), weight_input.use), []).append(
                        _select_examples(weight_input, keep)
                    )
                self._buffer = []
        finally:
            self._buffer = outer_buffer
        self._emit(map(_concatenate, grouped.values()))

    def _emit(self, weight_inputs: Iterable[WeightInput]) -> None:
        for weight_input in weight_inputs:
            name = self._names.get(id(weight_input.variable))
            if name is None:
                continue
            if self._buffer is not None:
                self._buffer.append(weight_input)
                continue
            try:
                self._on_input(LayerInput(name, weight_input.inputs, weight_input.use))
            except Exception as error:
                self.failure = error
                raise


def _with_signature(call: Any, original: Any) -> Any:
    """Give a function the signature of another: layers inspect whether their inner layers take a mask."""
    call.__signature__ = inspect.signature(original)
    return call


def _select_examples(weight_input: WeightInput, keep: Array | None) -> WeightInput:
    return (
        weight_input
        if keep is None
        else WeightInput(weight_input.variable, weight_input.inputs[keep], weight_input.use)
    )


def _concatenate(parts: list[WeightInput]) -> WeightInput:
    return WeightInput(parts[0].variable, np.concatenate([part.inputs for part in parts]), parts[0].use)


def capture_layer_inputs(
    library: KerasLibrary, model: Any, variables: Mapping[str, Any], x: Arrays, callback: InputCallback
) -> None:
    """Run a batch, and pass the inputs of each variable to `callback`."""
    recorder = InputRecorder(library, variables, callback)
    layers = distinct_layers(model)
    with ExitStack() as stack:
        if library.backend == "torch":
            stack.enter_context(library.torch.no_grad())
        if library.is_on_tensorflow and any(map(is_custom, layers)):
            # Custom code may call layers from graphs that are already traced, whose inputs could not be recorded.
            stack.enter_context(functions_eagerly(library, eagerly=True))
        for layer in layers:
            stack.enter_context(recorder.recording(layer))
        try:
            predict(model, outputs.pack_inputs(model, x))
        finally:
            if recorder.failure is not None:
                # Keras wraps other exceptions in its own.
                raise recorder.failure


def predict(model: Any, x: Any) -> Any:
    """The outputs in inference mode."""
    return model(x, training=False) if takes_training(model) else model(x)


@contextmanager
def preserved_state(library: KerasLibrary, model: Any, random: RandomState) -> Iterator[None]:
    """Restore statistics, metrics, states of recurrent layers and random states afterwards."""
    random_state = random.get_state()
    saved = [
        (variable, backend.get_value(library, variable))
        for variable in (*_statistics(library, model), *_metric_variables(model))
    ]
    known = {id(variable) for variable, _ in saved}
    try:
        yield
    finally:
        for variable, value in saved:
            backend.set_value(variable, value)
        for variable in _metric_variables(model):
            if id(variable) not in known:
                # The variable was created by the run itself, and has already counted the batch.
                backend.set_value(variable, np.zeros(backend.shape(variable), backend.dtype(variable)))
        random.set_state(random_state)


def _statistics(library: KerasLibrary, model: Any) -> list[Any]:
    # Only variables that layers created as not trainable: weights that a user froze may be large.
    variables: dict[int, Any] = {}
    for layer in flat_layers(model):
        states = layer.states if getattr(layer, "stateful", False) and hasattr(layer, "states") else None
        for variable in (*layer_statistics(layer, is_keras2=library.is_keras2), *tree_of(library).flatten(states)):
            if hasattr(variable, "assign") and "string" not in str(variable.dtype):
                variables[id(variable)] = variable
    return list(variables.values())


def _metric_variables(model: Any) -> list[Any]:
    return [variable for metric in model.metrics for variable in metric.variables]
