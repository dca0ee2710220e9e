"""Shows which inputs the weights of a Keras model meet: each layer that is understood is listened to for one run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.training.backend import Array
from prunectl.training.data.source import Arrays
from prunectl.training.keras import backend
from prunectl.training.keras.backend import Library
from prunectl.training.keras.compile import outputs
from prunectl.training.keras.layer_inputs import layers
from prunectl.training.keras.layer_inputs import layers as layer_inputs_layers
from prunectl.training.keras.layer_inputs.layers import KERNELS, Call, LayerUse, Tell, numbers_in, tree
from prunectl.training.keras.random_state import Chance
from prunectl.training.layer_inputs import See, Sight, Use


@contextmanager
def functions(library: Library, *, eagerly: bool) -> Iterator[None]:
    """Run what TensorFlow traces as it stands, or step by step."""
    config = library.tensorflow.config
    before = config.functions_run_eagerly()
    config.run_functions_eagerly(eagerly)
    try:
        yield
    finally:
        config.run_functions_eagerly(before)


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for a while, past all that keeps count of its attributes."""
    held = vars(thing)
    missing = object()
    before = held.get(name, missing)
    held[name] = value
    try:
        yield
    finally:
        if before is missing:
            held.pop(name)
        else:
            held[name] = before


@dataclass(frozen=True, slots=True)
class Steps:
    """What a recurrent layer goes through."""

    library: Library
    layer: Any
    sequences: Any
    states: Any
    mask: Array | None
    """Examples by steps: where it is False, a step leaves no trace."""

    def run(self) -> Iterator[Array | None]:
        """Run the cell once for each step, and yield for which examples it counts; None for all."""
        axis = 0 if getattr(self.layer, "time_major", False) else 1
        order = range(int(self.sequences.shape[axis]))
        states = self.states
        for at in reversed(order) if self.layer.go_backwards else order:
            _, after = self.layer.cell(self.sequences[at] if axis == 0 else self.sequences[:, at], states)
            keep = self.mask[:, at] if self.mask is not None else None
            states = self._followed(states, after, keep)
            yield keep

    def _followed(self, before: Any, after: Any, keep: Array | None) -> Any:
        nest = tree(self.library)
        old, new = nest.flatten(before), nest.flatten(after)
        if keep is not None:
            new = [self._chosen(keep, *pair) for pair in zip(new, old, strict=True)]
        return nest.pack_sequence_as(before, new)

    def _chosen(self, keep: Array, new: Any, old: Any) -> Any:
        where = self.library.tensorflow.where if self.library.is_two else self.library.keras.ops.where
        return where(keep.reshape(-1, *(1,) * (len(new.shape) - 1)), new, old)


def steps(library: Library, layer: Any, said: Mapping[str, Any]) -> Steps | None:
    """The steps of a layer that is called with arguments; None where they cannot be told."""
    words = dict(said)
    sequences = words.pop(next(iter(words)))
    states, mask, constants = words.get("initial_state"), words.get("mask"), words.get("constants")
    if library.is_two:
        sequences, states, constants = layer._process_inputs(sequences, states, constants)  # noqa: SLF001
    elif states is None:
        states = layer.states if layer.stateful else layer.get_initial_state(batch_size=sequences.shape[0])
    if constants or numbers_in(library, sequences) is None:
        return None
    states = list(states) if isinstance(states, list | tuple) else [states]
    return Steps(library, layer, sequences, _plain(library, states), _mask(library, layer, mask))


def _plain(library: Library, states: Any) -> Any:
    """States as tensors, where a layer keeps some in variables."""
    change = library.tensorflow.convert_to_tensor if library.is_two else library.keras.ops.convert_to_tensor
    return tree(library).map_structure(change, states)


def _mask(library: Library, layer: Any, mask: Any) -> Array | None:
    found = tree(library).flatten(mask)[0] if mask is not None else None
    array = numbers_in(library, found) if found is not None else None
    if array is None:
        return None
    return (array.T if getattr(layer, "time_major", False) else array).astype(np.bool_)


class Listener:
    """Listens to layers one by one, and shows what their variables meet."""

    def __init__(self, library: Library, variables: Mapping[str, Any], see: See) -> None:
        self._library, self._see = library, see
        self._names = {id(variable): name for name, variable in variables.items()}
        self._is_deaf = False
        self._kept: list[LayerUse] | None = None
        """What is heard while a recurrent layer is gone through."""
        self.failure: Exception | None = None

    def listening(self, layer: Any) -> Any:
        """The context in which a layer is heard."""
        stack = ExitStack()
        tell = layers.tell(layer)
        if tell is not None:
            stack.enter_context(replaced(layer, "call", self._heard(layer, tell)))
        elif layers.is_stepping(layer) and any(map(self._is_wanted, layer._flatten_layers())):  # noqa: SLF001
            stack.enter_context(replaced(layer, "call", self._stepped(layer)))
            if hasattr(layer, "use_cudnn"):
                # Else two directions may run as one operation, past their layers.
                stack.enter_context(replaced(layer, "use_cudnn", False))
        return stack

    def _is_wanted(self, layer: Any) -> bool:
        return any(id(getattr(layer, name, None)) in self._names for name in KERNELS)

    def _heard(self, layer: Any, tell: Tell) -> Any:
        plain, is_wanted = layer.call, self._is_wanted(layer)

        def call(*words: Any, **more: Any) -> Any:
            found = self._run(plain, words, more)
            if is_wanted and not self._is_deaf:
                said = inspect.signature(plain).bind(*words, **more).arguments
                inputs = self._inputs(list(said.values())[:2])
                if inputs is not None:
                    out = tree(self._library).flatten(found)[0]
                    self._tell(tell(Call(self._library, layer, inputs, tuple(map(int, out.shape)))))
            return found

        return _signed(call, plain)

    def _run(self, plain: Any, words: Any, more: Any) -> Any:
        if not self._library.is_on_tensorflow:
            return plain(*words, **more)
        with functions(self._library, eagerly=False):
            # On a processor, TensorFlow has some convolutions in compiled functions alone.
            return plain(*words, **more)

    def _inputs(self, said: Any) -> tuple[Array, ...] | None:
        tensors = [one for one in tree(self._library).flatten(said) if hasattr(one, "shape")]
        found = [numbers_in(self._library, one) for one in tensors]
        complete = [one for one in found if one is not None]
        return tuple(complete) if complete and len(complete) == len(found) else None

    def _stepped(self, layer: Any) -> Any:
        plain = layer.call

        def call(*words: Any, **more: Any) -> Any:
            if not self._is_deaf:
                said = inspect.signature(plain).bind(*words, **more).arguments
                path = steps(self._library, layer, said)
                if path is not None:
                    self._walk(path)
            before, self._is_deaf = self._is_deaf, True
            try:
                return self._run(plain, words, more)
            finally:
                self._is_deaf = before

        return _signed(call, plain)

    def _walk(self, path: Steps) -> None:
        """Go through the steps, and tell all of them at once."""
        outer, found = self._kept, dict[tuple[int, Use], list[LayerUse]]()
        try:
            self._kept = []
            for keep in path.run():
                for one in self._kept:
                    found.setdefault((id(one.variable), one.use), []).append(_counted(one, keep))
                self._kept = []
        finally:
            self._kept = outer
        self._tell(map(_joined, found.values()))

    def _tell(self, meetings: Iterable[LayerUse]) -> None:
        for one in meetings:
            name = self._names.get(id(one.variable))
            if name is None:
                continue
            if self._kept is not None:
                self._kept.append(one)
                continue
            try:
                self._see(Sight(name, one.inputs, one.use))
            except Exception as error:
                self.failure = error
                raise


def _signed(call: Any, plain: Any) -> Any:
    """Let a function look like another, since layers look whether those within them take a mask."""
    call.__signature__ = inspect.signature(plain)
    return call


def _counted(meeting: LayerUse, keep: Array | None) -> LayerUse:
    return meeting if keep is None else LayerUse(meeting.variable, meeting.inputs[keep], meeting.use)


def _joined(parts: list[LayerUse]) -> LayerUse:
    return LayerUse(parts[0].variable, np.concatenate([one.inputs for one in parts]), parts[0].use)


def observe(library: Library, model: Any, variables: Mapping[str, Any], x: Arrays, see: See) -> None:
    """Run a batch through, and show what the variables meet."""
    listener = Listener(library, variables, see)
    layers = {id(layer): layer for layer in model._flatten_layers()}.values()  # noqa: SLF001
    with ExitStack() as stack:
        if library.backend == "torch":
            stack.enter_context(library.torch.no_grad())
        if library.is_on_tensorflow and any(map(layer_inputs_layers.has_own_code, layers)):
            # Own code may call its layers from functions that are traced already, where nothing is heard.
            stack.enter_context(functions(library, eagerly=True))
        for layer in layers:
            stack.enter_context(listener.listening(layer))
        try:
            predicted(model, outputs.inputs(model, x))
        finally:
            if listener.failure is not None:
                # Keras makes errors of its own from those of others.
                raise listener.failure


def predicted(model: Any, x: Any) -> Any:
    """What comes out where nothing is trained."""
    return model(x, training=False) if getattr(model, "_call_has_training_arg", True) else model(x)


@contextmanager
def untouched(library: Library, model: Any, chance: Chance) -> Iterator[None]:
    """Leave statistics, metrics, the states of recurrent layers and what is random as they were."""
    random = chance.states()
    held = [(one, backend.read(library, one)) for one in (*_statistics(library, model), *_counts(model))]
    known = {id(one) for one, _ in held}
    try:
        yield
    finally:
        for one, value in held:
            backend.write(library, one, value)
        for one in _counts(model):
            if id(one) not in known:
                # It was made by the run itself, and counted already.
                backend.write(library, one, np.zeros(backend.shape(one), backend.dtype(one)))
        chance.resume(random)


def _statistics(library: Library, model: Any) -> list[Any]:
    # Those that a layer made as such: what a user froze is not among them, and may be large.
    kept = "_non_trainable_weights" if library.is_two else "_non_trainable_variables"
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():  # noqa: SLF001
        states = layer.states if getattr(layer, "stateful", False) and hasattr(layer, "states") else None
        for one in (*getattr(layer, kept, ()), *tree(library).flatten(states)):
            if hasattr(one, "assign") and "string" not in str(one.dtype):
                found[id(one)] = one
    return list(found.values())


def _counts(model: Any) -> list[Any]:
    return [variable for metric in model.metrics for variable in metric.variables]
