"""A Keras model that is trained by our loop, each tensor called what its file calls it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.evidence import Evidence
from prunectl.training.keras import gradients, normalisation, numbers, packing, ports, state
from prunectl.training.keras.chance import Chance
from prunectl.training.keras.library import quietly
from prunectl.training.keras.loading import Loaded
from prunectl.training.keras.names import named
from prunectl.training.keras.place import Place, check
from prunectl.training.keras.sights.observe import observe
from prunectl.training.keras.sights.untouched import untouched
from prunectl.training.keras.training import Training
from prunectl.training.network import Array, Logs, Means
from prunectl.training.sights import See
from prunectl.training.signature import Signature


class KerasNetwork:
    """A model with the names of its variables; prepared, also with what trains it."""

    def __init__(self, load: Callable[[Place], Loaded]) -> None:
        self._load = load
        self._place = Place()
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
        lost = [one for one in self._model.trainable_weights if id(one) not in known and all(numbers.shape(one))]
        if lost:
            raise WorkError(
                f"{loaded.file.path} holds nothing that Keras would load as {getattr(lost[0], 'path', lost[0].name)}",
                hint="load it in Keras and save it once, then work on that file",
            )

    @property
    def signature(self) -> Signature:
        """What goes in and comes out, as far as it is known."""
        return self._ended(ports.signature(self._model))

    def _ended(self, found: Signature) -> Signature:
        """Return a signature with what each output ends in, once that is known."""
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
        """Return copies of some weights."""
        return {name: numbers.read(self._library, self._variables[name]) for name in names}

    def tensors(self) -> dict[str, Array]:
        """Return copies of all weights and statistics."""
        return self.weights(self._variables)

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""
        for name, value in values.items():
            variable = self._variables[name]
            if numbers.shape(variable) != np.shape(value):
                raise ValueError(f"{name} has the shape {numbers.shape(variable)}, not {np.shape(value)}")
            numbers.write(self._library, variable, value)

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
        """Return what was gathered, the same in every process."""
        return self._trained.evidence({name: self._variables[name] for name in self._watched})

    def forget(self) -> None:
        """Begin to gather anew."""
        self._trained.grip.forget()

    def step(self, batch: Batch, rate: float, guide: Arrays | None = None) -> None:
        """Train on a batch with a share of the learning rate, also towards what a teacher makes of it."""
        self._trained.step(batch, rate, guide)

    def logs(self) -> Logs:
        """Return the means of loss and metrics over the examples since the last call."""
        return self._trained.logs()

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        """Return the means of loss and metrics, without a change to the model."""
        return self._trained.evaluate(batches)

    def predict(self, x: Arrays) -> Arrays:
        """Return what comes out, for one batch."""
        with self._place.scope(self._library), quietly():
            found: Arrays = numbers.as_arrays(self._model.predict_on_batch(packing.inputs(self._model, x)))
        return found

    def observe(self, names: Collection[str], x: Arrays, see: See) -> None:
        """Run one batch through, and show every time that one of these tensors meets inputs."""
        wanted = {name: self._variables[name] for name in names}
        with self._place.scope(self._library), quietly(), untouched(self._library, self._model, self._chance):
            observe(self._library, self._model, wanted, x, see)

    def gradients(self, names: Collection[str], batch: Batch) -> dict[str, Array]:
        """Return the gradient of the mean loss over a batch, in the state in which it predicts."""
        model = self._trained.model
        x, y = packing.inputs(model, batch.x), packing.targets(model, batch.y)
        wanted = [self._variables[name] for name in names]
        with self._place.scope(self._library), quietly(), untouched(self._library, model, self._chance):
            found = gradients.gradients(self._library, model, wanted, x, y)
        return dict(zip(names, found, strict=True))

    def recalibrate(self, batches: Iterable[Batch]) -> int:
        """Take the statistics of batch normalisation anew, and return how many layers have some."""
        held = {id(self._variables[name]) for name in self._frozen}
        found = [
            layer
            for layer in normalisation.layers(self._library, self._model)
            if not {id(layer.moving_mean), id(layer.moving_variance)} & held
        ]
        if found:
            states = self._chance.states()
            with self._place.scope(self._library):
                normalisation.recalibrate(self._library, self._model, found, batches)
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
        state.save(folder, self._library, self._trained, self._chance, self.evidence())

    def restore(self, folder: Path) -> None:
        """Take up what `save` kept."""
        with self._place.scope(self._library):
            evidence = state.restore(folder, self._library, self._trained, self._chance)
        for name, total in evidence.items():
            self._trained.grip.remember(self._variables[name], total)

    def close(self) -> None:
        """Let go of what trains it."""
        self._training = None
