"""Training of SavedModels other than Keras models, through their serving signature."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.scratch import temporary_folder, utf8_path
from prunectl.training import user_code
from prunectl.training.backend import (
    GradientStatistic,
    InputCallback,
    LoadOptions,
    ModelSignature,
    TensorSpec,
    TrainableModel,
)
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.keras import backend
from prunectl.training.keras.backend import DevicePlacement, load_keras2
from prunectl.training.keras.load import LoadedModel, error_line
from prunectl.training.keras.model import KerasTrainable
from prunectl.training.keras.model import load_trainable as open_keras
from prunectl.training.quiet import ignore_warnings


def load_trainable(model: ModelFile, origin: LoadOptions) -> TrainableModel:
    """Load a SavedModel for training in TensorFlow."""
    user_code.check(model, origin)
    if origin.model:
        return open_keras(model, origin)
    return SignatureTrainable(partial(load, model))


SIGNATURE = "serving_default"
_RANDOM_OPERATIONS = ("Random", "Multinomial", "TruncatedNormal", "ParameterizedTruncatedNormal")
_Base: Any = load_keras2().keras.Model
_tf = load_keras2().tensorflow


class SignatureModel(_Base):  # type: ignore[misc]
    """A Keras model whose forward pass is a SavedModel's signature."""

    def __init__(self, function: Any, root: Any, notes: tuple[str, ...]) -> None:
        super().__init__()
        self.notes = notes
        # The function holds its variables only by weak references.
        self._root = [lambda: root]
        self._function = function
        # Sorted by name: the inputs of a signature have no other order.
        self._specs: Mapping[str, Any] = dict(sorted(function.structured_input_signature[1].items()))
        self._output_names = tuple(sorted(function.structured_outputs))
        # Keras names the losses and metrics of several outputs after these.
        self.output_names = list(self._output_names)
        self.served_variables = list(function.variables)

    @property
    def fixed_batch_size(self) -> int | None:
        """The batch size of the signature, if it is fixed."""
        sizes = {spec.shape[0] for spec in self._specs.values() if spec.shape.rank}
        return next((int(size) for size in sizes if size is not None), None)

    @property
    def is_random(self) -> bool:
        """Whether an operation of the signature, or of a function that it calls, draws random numbers."""
        graph = self._function.graph.as_graph_def()
        nodes = chain(graph.node, *(function.node_def for function in graph.library.function))
        return any(node.op.startswith(_RANDOM_OPERATIONS) for node in nodes)

    @property
    def ports(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs of the signature."""
        outputs = self._function.structured_outputs
        return (
            tuple(_port(name, spec) for name, spec in self._specs.items()),
            tuple(_port(name, outputs[name]) for name in self._output_names),
        )

    def call(self, inputs: Any) -> Any:
        """The outputs for a batch of any size."""
        tensors = [
            _tf.cast(tensor, spec.dtype) for tensor, spec in zip(_as_list(inputs), self._specs.values(), strict=True)
        ]
        outputs = (
            self._run_signature(tensors)
            if self.fixed_batch_size is None
            else self._run_in_batches(tensors, self.fixed_batch_size)
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def _run_signature(self, tensors: Sequence[Any]) -> list[Any]:
        outputs = self._function(**dict(zip(self._specs, tensors, strict=True)))
        return [outputs[name] for name in self._output_names]

    def _run_in_batches(self, tensors: Sequence[Any], size: int) -> list[Any]:
        """Run in batches of the fixed size; the last is padded with its last example, whose outputs are dropped."""
        count = _tf.shape(tensors[0])[0]
        padded = [_tf.concat([tensor, _tf.repeat(tensor[-1:], -count % size, axis=0)], axis=0) for tensor in tensors]
        batches = [_tf.reshape(tensor, [-1, size, *tensor.shape[1:]]) for tensor in padded]
        dtypes = [self._function.structured_outputs[name].dtype for name in self._output_names]
        outputs = _tf.map_fn(self._run_signature, batches, fn_output_signature=dtypes)
        return [_tf.reshape(output, _tf.concat([[-1], _tf.shape(output)[2:]], axis=0))[:count] for output in outputs]


def load_saved_model(path: Path, hint: str) -> tuple[Any, str]:
    """Load a SavedModel and choose the signature to run; if there is none, `hint` tells the user what to do.

    `serving_default` is preferred, else the first; signatures without variables are skipped if others have some: those
    that return a version or parse input are not the model.
    """
    try:
        with ignore_warnings(), temporary_folder() as folder:
            root = _tf.saved_model.load(str(utf8_path(path, folder / "link")))
    except Exception as error:
        raise InputError(f"TensorFlow cannot load {path}: {error_line(error)}") from error
    names = list(root.signatures)
    if not names:
        raise InputError(f"{path} has variables but no signature that uses them", hint=hint)
    names = [name for name in names if root.signatures[name].variables] or names
    return root, SIGNATURE if SIGNATURE in names else names[0]


def signature_note(path: Path, root: Any, signature: str) -> tuple[str, ...]:
    """A note on which signature is run, if there are several."""
    others = [name for name in root.signatures if name != signature]
    return (f"{path} is run by its signature {signature}, not by {', '.join(others)}.",) if others else ()


def load_signature_model(path: Path) -> SignatureModel:
    """Load the serving signature of a SavedModel as a model."""
    root, signature = load_saved_model(path, "save it again with signatures=, or build the model with --builder mod:fn")
    function = root.signatures[signature]
    if not function.trainable_variables:
        raise InputError(
            f"{path} cannot be trained or run on data: its weights are constants of the graph, or variables in slices",
            hint="train the model that it was made of; to measure it or to prune it with data, export it to ONNX first",
        )
    model = SignatureModel(function, root, signature_note(path, root, signature))
    size = model.fixed_batch_size
    shapes = [spec.shape for spec in function.structured_outputs.values()]
    if size is not None and all(shape.rank is not None and shape[:1] not in ([None], [size]) for shape in shapes):
        raise InputError(
            f"the signature {signature} of {path} takes one example, not a batch: its inputs begin with an axis of "
            f"{size}, its outputs do not",
            hint="save it with a signature that takes and returns batches",
        )
    return model


def _as_list(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def _port(name: str, spec: Any) -> TensorSpec:
    dims = None if spec.shape.rank is None else tuple(None if n is None else int(n) for n in spec.shape)[1:]
    return TensorSpec(name, dims, spec.dtype.name)


class SignatureTrainable(KerasTrainable):
    """Trains a signature like a Keras model; tensors go by the names of the file's variables."""

    _model: SignatureModel

    def _load_model(self) -> None:
        super()._load_model()
        copies = self._loaded.file.duplicates
        # Duplicates of a variable share the name of the first.
        self._variables = {copies.get(name, name): variable for name, variable in self._variables.items()}
        # Retracing would not reseed random operations of a signature.
        self._random.needs_retrace = False
        self._random.has_hidden_state = self._model.is_random
        self._unserved_weights: dict[str, Array] = {}

    @property
    def signature(self) -> ModelSignature:
        """The inputs and outputs that the signature declares."""
        inputs, outputs = self._model.ports
        return self._with_activations(ModelSignature(inputs, outputs, is_channels_first=False))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the model is trained."""
        notes: tuple[str, ...] = (
            *self._model.notes,
            "The model is trained in inference mode: dropout is off and batch normalisation is fixed.",
        )
        size = self._model.fixed_batch_size
        if size is not None:
            notes += (f"The model was saved for {size} examples at a time: batches are split accordingly.",)
        if self._unserved_weights:
            first, count = next(iter(self._unserved_weights)), len(self._unserved_weights)
            which = first if count == 1 else f"{count} tensors, such as {first}"
            notes += (f"Not trained, since the signature does not use it: {which}. --exclude keeps it unpruned.",)
        return (*super().notes, *notes)

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of some weights, also of those that the signature does not use, read from the file."""
        wanted_names = tuple(names)
        served = super().weights(name for name in wanted_names if name in self._variables)
        return {name: served[name] if name in served else self._read(name).copy() for name in wanted_names}

    def _read(self, name: str) -> Array:
        if name not in self._unserved_weights:
            file = self._loaded.file
            self._unserved_weights[name] = np.array(
                file.read(next(tensor for tensor in file.tensors if tensor.name == name))
            )
        return self._unserved_weights[name]

    def tensors(self) -> dict[str, Array]:
        """Copies of all tensors that the signature uses, and of the others that were read."""
        return {**super().tensors(), **{name: value.copy() for name, value in self._unserved_weights.items()}}

    def assign(self, values: Mapping[str, Array]) -> None:
        super().assign({name: value for name, value in values.items() if name in self._variables})
        self._unserved_weights.update(
            {name: np.array(value) for name, value in values.items() if name not in self._variables}
        )

    def mask(self, masks: Mapping[str, Array]) -> None:
        super().mask({name: mask for name, mask in masks.items() if name in self._variables})
        for name, mask in masks.items():
            if name not in self._variables:
                value = self._read(name)
                self._unserved_weights[name] = np.where(mask, value, np.zeros((), value.dtype))

    def track_gradients(self, statistic: GradientStatistic, names: Sequence[str]) -> None:
        self._require_served(names)
        super().track_gradients(statistic, names)

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        self._require_served(names)
        return super().gradients(names, batch)

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        super().observe([name for name in names if name in self._variables], x, callback)

    def _require_served(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._variables:
                raise UsageError(
                    f"{name} has no gradient: the signature of {self._loaded.file.path} does not use it",
                    hint=f"leave it out: --exclude {name}",
                )


def load(model: ModelFile, placement: DevicePlacement) -> LoadedModel:
    """Load a SavedModel's signature on a device."""
    library = load_keras2()
    with placement.scope(library):
        served = load_signature_model(model.path)

    def fill(path: Path) -> None:
        with placement.scope(library):
            source_model = load_signature_model(path)
        for variable, source in zip(served.served_variables, source_model.served_variables, strict=True):
            backend.set_value(variable, backend.get_value(library, source))

    return LoadedModel(served, library, model, {}, fill, has_config=False)
