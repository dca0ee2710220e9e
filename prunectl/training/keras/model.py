"""A Keras model that is trained by our loop, each tensor called what its file calls it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import ModelFile
from prunectl.training import random_state
from prunectl.training.backend import Array, Evidence, Logs, Means, ModelOrigin, Network, Signature
from prunectl.training.checkpoint import keep, take
from prunectl.training.data.source import Arrays, Batch, each
from prunectl.training.keras import backend, gradients
from prunectl.training.keras.backend import Library, quietly
from prunectl.training.keras.compile import outputs
from prunectl.training.keras.compile.config import optimizer_variables
from prunectl.training.keras.distribution import DevicePlacement, check
from prunectl.training.keras.layer_inputs.recorder import observe, untouched
from prunectl.training.keras.load import Loaded, load
from prunectl.training.keras.random_state import Chance
from prunectl.training.keras.train_step import Training
from prunectl.training.keras.variable_names import named
from prunectl.training.layer_inputs import See


def layers(library: Library, model: Any) -> list[Any]:
    """The layers that normalise by batches, but for those that are frozen."""
    kind = library.keras.layers.BatchNormalization
    found = {id(layer): layer for layer in model._flatten_layers() if isinstance(layer, kind)}  # noqa: SLF001
    return [layer for layer in found.values() if layer.trainable]


def recalibrate(library: Library, model: Any, found: list[Any], batches: Iterable[Batch]) -> None:
    """Replace mean and variance of each layer by the averages over batches, weighted by their examples."""
    statistics = [variable for layer in found for variable in (layer.moving_mean, layer.moving_variance)]
    others = [one for one in _batch_norm_variables(library, model) if not any(one is other for other in statistics)]
    before = [backend.read(library, one) for one in others]
    old = [backend.read(library, one) for one in statistics]
    momenta = [layer.momentum for layer in found]
    sums: list[Array] = [np.zeros(one.shape, np.float64) for one in old]
    examples = 0
    try:
        for layer in found:
            layer.momentum = 0.0
        run = _runner(library, model)
        for batch in batches:
            for variable, value in zip(statistics, old, strict=True):
                # From zero, what is added to it comes out unrounded.
                backend.write(library, variable, np.zeros_like(value))
            count = len(each(batch.x)[0])
            with quietly():
                run(outputs.inputs(model, batch.x))
            for at, variable in enumerate(statistics):
                sums[at] += count * backend.read(library, variable).astype(np.float64)
            examples += count
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in zip(others, before, strict=True):
            backend.write(library, variable, value)
        new = [total / examples for total in sums] if examples else old
        for variable, value, known in zip(statistics, new, old, strict=True):
            backend.write(library, variable, value.astype(known.dtype))


def _batch_norm_variables(library: Library, model: Any) -> list[Any]:
    return list(model.weights) if library.is_two else [one for one in model.variables if _is_number(one)]


def _is_number(variable: Any) -> bool:
    return "string" not in str(variable.dtype)


def _runner(library: Library, model: Any) -> Any:
    def run(x: Any) -> Any:
        return model(x, training=True)

    if library.is_on_tensorflow:
        # The layers' momentum is what it is while this is traced.
        return library.tensorflow.function(run, reduce_retracing=True)
    if library.backend == "torch":

        def without_gradients(x: Any) -> Any:
            with library.torch.no_grad():
                return run(x)

        return without_gradients
    return run


_FILE, _RANDOM = "keras.npz", "random.json"
_WEIGHT, _OPTIMIZER, _CHANCE, _EVIDENCE, _TORCH = "weight", "optimizer", "chance", "evidence", "torch"


def save(folder: Path, library: Library, training: Training, chance: Chance, evidence: Mapping[str, Array]) -> None:
    """Keep everything in a folder."""
    parts = {f"{kind}/{at}": backend.read(library, one) for (kind, at), one in _variables(training).items()}
    parts.update({f"{_CHANCE}/{at}": one for at, one in enumerate(chance.states())})
    parts.update({f"{_EVIDENCE}/{name}": total for name, total in evidence.items()})
    parts.update({f"{_TORCH}/{kind}": module.get_rng_state().numpy() for kind, module in _of_torch(library).items()})
    keep(folder / _FILE, parts)
    (folder / _RANDOM).write_text(json.dumps(random_state.state()), encoding="utf-8")


def restore(folder: Path, library: Library, training: Training, chance: Chance) -> dict[str, Array]:
    """Take everything up again, and return the evidence that there was."""
    held = take(folder / _FILE)
    of_torch = {name: held.pop(name) for name in list(held) if name.startswith(f"{_TORCH}/")}
    wanted = _variables(training)
    generators = {name: array for name, array in held.items() if name.startswith(f"{_CHANCE}/")}
    evidence = {
        name.removeprefix(f"{_EVIDENCE}/"): array for name, array in held.items() if name.startswith(f"{_EVIDENCE}/")
    }
    names = {f"{kind}/{at}" for kind, at in wanted}
    if names != held.keys() - generators.keys() - {f"{_EVIDENCE}/{name}" for name in evidence}:
        raise InputError(
            f"{folder / _FILE} is of another model or another optimizer", hint="start again in another folder"
        )
    for (kind, at), variable in wanted.items():
        array = held[f"{kind}/{at}"]
        if array.shape != backend.shape(variable):
            raise InputError(f"{folder / _FILE} is of another model: {kind} {at} has the shape {array.shape}")
        backend.write(library, variable, array)
    try:
        chance.resume([generators[f"{_CHANCE}/{at}"] for at in range(len(generators))])
    except ValueError as error:
        raise InputError(
            f"{folder / _FILE} is of another model: {error}", hint="start again in another folder"
        ) from error
    for kind, module in _of_torch(library).items():
        # A run that goes on upon another kind of device cannot be the same to the bit.
        if f"{_TORCH}/{kind}" in of_torch:
            module.set_rng_state(library.torch.from_numpy(of_torch[f"{_TORCH}/{kind}"].copy()))
    if (folder / _RANDOM).is_file():
        random_state.restore(json.loads((folder / _RANDOM).read_text(encoding="utf-8")))
    training.begin_anew()
    return evidence


def _of_torch(library: Library) -> dict[str, Any]:
    """What of PyTorch has a random state: as a backend it drops out by that, and by no generator of Keras."""
    if library.backend != "torch":
        return {}
    torch = library.torch
    return {"cpu": torch, **({"cuda": torch.cuda} if torch.cuda.is_available() else {})}


def _variables(training: Training) -> dict[tuple[str, int], Any]:
    """All variables by what they are for, without masks and evidence."""
    model = training.model
    optimizer = [one for one in optimizer_variables(model) if not training.grip.owns(one)]
    weights = {(_WEIGHT, at): one for at, one in enumerate(model.weights)}
    return {**weights, **{(_OPTIMIZER, at): one for at, one in enumerate(optimizer)}}


class KerasNetwork:
    """A model with the names of its variables; prepared, also with what trains it."""

    def __init__(self, load: Callable[[DevicePlacement], Loaded]) -> None:
        self._load = load
        self._place = DevicePlacement()
        self._training: Training | None = None
        self._frozen: frozenset[str] = frozenset()
        self._watched: tuple[str, ...] = ()
        self._begin()

    def _begin(self) -> None:
        loaded = self._loaded = self._load(self._place)
        self._library, self._model = loaded.library, loaded.model
        with self._place.scope(self._library), quietly():
            self._variables = named(loaded.file, loaded.library, loaded.model.weights, loaded.fill)
            self._chance = Chance(loaded.library, loaded.model)
        known = {id(one) for one in self._variables.values()}
        lost = [one for one in self._model.trainable_weights if id(one) not in known and all(backend.shape(one))]
        if lost:
            raise WorkError(
                f"{loaded.file.path} holds nothing that Keras would load as {getattr(lost[0], 'path', lost[0].name)}",
                hint="load it in Keras and save it once, then work on that file",
            )

    @property
    def signature(self) -> Signature:
        """What goes in and comes out, as far as it is known."""
        return self._ended(outputs.signature(self._model))

    def _ended(self, found: Signature) -> Signature:
        """A signature with what each output ends in, once that is known."""
        endings = self._training.endings if self._training is not None else ()
        if len(endings) != len(found.outputs):
            return found
        return replace(
            found,
            outputs=tuple(replace(port, ending=one) for port, one in zip(found.outputs, endings, strict=True)),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen for want of a word."""
        return self._training.notes if self._training is not None else ()

    @property
    def ranks(self) -> tuple[int, int]:
        """The one of one: in several processes Keras divides the same batches by itself."""
        return 0, 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and speaks."""
        return self._place.processes[0] == 0

    def is_true_everywhere(self, mine: bool) -> bool:
        """What is true here: every process goes through the same batches."""
        return mine

    def prepare(self, means: Means) -> None:
        """Compile the model."""
        if means.precision != "fp32":
            raise UsageError(
                f"--precision {means.precision}: the precision of a Keras model is part of its layers",
                hint="build it with another dtype policy, and leave --precision out",
            )
        if means.is_sharded:
            raise UsageError(
                "--shard is for PyTorch: Keras keeps the whole model in each process", hint="leave out --shard"
            )
        unknown = sorted(means.frozen - self._variables.keys())
        if unknown:
            raise UsageError(f"{unknown[0]} cannot be frozen: Keras loads no such weight")
        self.place(means.device)
        self._chance.reseed(means.seed)
        self._frozen = means.frozen
        with self._place.scope(self._library), quietly():
            held = [self._variables[name] for name in sorted(means.frozen)]
            self._training = Training(self._loaded, self._place, means, held)

    def place(self, device: str) -> None:
        """Load the model anew where it is to run, if that is elsewhere."""
        wanted = check(self._library, device)
        if wanted == self._place.device:
            return
        values = self.tensors()
        self._place.device = wanted
        self._begin()
        self.assign(values)

    @property
    def _trained(self) -> Training:
        if self._training is None:
            raise ValueError("a network is prepared before it is trained")
        return self._training

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of some weights."""
        return {name: backend.read(self._library, self._variables[name]) for name in names}

    def tensors(self) -> dict[str, Array]:
        """Copies of all weights and statistics."""
        return self.weights(self._variables)

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""
        for name, value in values.items():
            variable = self._variables[name]
            if backend.shape(variable) != np.shape(value):
                raise ValueError(f"{name} has the shape {backend.shape(variable)}, not {np.shape(value)}")
            backend.write(self._library, variable, value)

    def mask(self, masks: Mapping[str, Array]) -> None:
        """Zero what the masks do not keep, now and after every step; the optimizer's momentum of it too."""
        with self._place.scope(self._library):
            self._trained.mask((self._variables[name], mask) for name, mask in masks.items())

    def watch(self, evidence: Evidence, names: Sequence[str]) -> None:
        """Gather evidence about some weights from the next step on."""
        self._watched = tuple(names)
        with self._place.scope(self._library):
            self._trained.watch(evidence, [self._variables[name] for name in names])

    def evidence(self) -> dict[str, Array]:
        """What was gathered, the same in every process."""
        return self._trained.evidence({name: self._variables[name] for name in self._watched})

    def forget(self) -> None:
        """Begin to gather anew."""
        self._trained.grip.forget()

    def step(self, batch: Batch, rate: float, guide: Arrays | None = None) -> None:
        """Train on a batch with a share of the learning rate, also towards what a teacher makes of it."""
        self._trained.step(batch, rate, guide)

    def logs(self) -> Logs:
        """The means of loss and metrics over the examples since the last call."""
        return self._trained.logs()

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        """The means of loss and metrics, without a change to the model."""
        return self._trained.evaluate(batches)

    def predict(self, x: Arrays) -> Arrays:
        """What comes out, for one batch."""
        with self._place.scope(self._library), quietly():
            found: Arrays = backend.as_arrays(self._model.predict_on_batch(outputs.inputs(self._model, x)))
        return found

    def observe(self, names: Collection[str], x: Arrays, see: See) -> None:
        """Run one batch through, and show every time that one of these tensors meets inputs."""
        wanted = {name: self._variables[name] for name in names}
        with self._place.scope(self._library), quietly(), untouched(self._library, self._model, self._chance):
            observe(self._library, self._model, wanted, x, see)

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        """The gradient of the mean loss over a batch, in the state in which it predicts."""
        model = self._trained.model
        x, y = outputs.inputs(model, batch.x), outputs.targets(model, batch.y)
        wanted = [self._variables[name] for name in names]
        with self._place.scope(self._library), quietly(), untouched(self._library, model, self._chance):
            found = gradients.gradients(self._library, model, wanted, x, y)
        return dict(zip(names, found, strict=True))

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        """Take the statistics of batch normalisation anew, and return how many layers have some."""
        held = {id(self._variables[name]) for name in self._frozen}
        found = [
            layer
            for layer in layers(self._library, self._model)
            if not {id(layer.moving_mean), id(layer.moving_variance)} & held
        ]
        if found:
            states = self._chance.states()
            with self._place.scope(self._library):
                recalibrate(self._library, self._model, found, batches)
            self._chance.resume(states)
        return len(found)

    def reseed(self, number: int) -> None:
        """Make what is random from here on depend on a number alone."""
        self._chance.reseed(number)
        if self._chance.is_traced and self._training is not None:
            self._training.trace_anew()

    def save(self, folder: Path | None) -> None:
        """Keep what training needs to go on, in the first process."""
        if folder is None:
            return
        save(folder, self._library, self._trained, self._chance, self.evidence())

    def restore(self, folder: Path) -> None:
        """Take up what `save` kept."""
        with self._place.scope(self._library):
            evidence = restore(folder, self._library, self._trained, self._chance)
        for name, total in evidence.items():
            self._trained.grip.remember(self._variables[name], total)

    def close(self) -> None:
        """Let go of what trains it."""
        self._training = None


def open_network(model: ModelFile, origin: ModelOrigin) -> Network:
    """The model of a file as a network of the Keras that wrote it."""
    return KerasNetwork(partial(load, model, origin))
