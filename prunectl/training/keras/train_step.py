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
from prunectl.training.keras.backend import Library, quietly
from prunectl.training.keras.compile import outputs
from prunectl.training.keras.compile.config import compiled, recipe
from prunectl.training.keras.distillation import Guidance, Manner
from prunectl.training.keras.distribution import DevicePlacement
from prunectl.training.keras.load import Loaded, first_line


def freeze(library: Library, model: Any, variables: Sequence[Any]) -> list[tuple[Any, Array]]:
    """Keep variables out of training, and return what has to be put back after a step, with its numbers."""
    if not variables:
        return []
    frozen = {id(one) for one in variables}
    for layer in model._flatten_layers(include_self=False):  # noqa: SLF001
        held = layer.weights
        if held and all(id(one) in frozen for one in held):
            # All of it: batch normalisation then uses the statistics that it has.
            layer.trainable = False
    if not library.is_two:
        for one in variables:
            one.trainable = False
    moved = {id(one) for one in model.trainable_weights}
    still = {id(one) for layer in _still(model) for one in layer.weights}
    loose = [one for one in variables if id(one) not in moved and id(one) not in still]
    return [(one, backend.read(library, one)) for one in loose]


def put_back(library: Library, held: Iterable[tuple[Any, Array]]) -> None:
    """Undo what a step has done to statistics that are frozen while their layer is not."""
    for variable, value in held:
        backend.write(library, variable, value)


def _still(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers(include_self=False) if not layer.trainable]  # noqa: SLF001


class Logbook:
    """Adds up what each step says of itself."""

    def __init__(self, is_running: Callable[[str, float], bool]) -> None:
        self._is_running = is_running
        """Whether Keras says a number for all batches so far, and not for one."""
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def note(self, said: Mapping[str, Any], examples: int) -> None:
        """Take down what a step said."""
        for name, value in said.items():
            number = float(np.asarray(value, np.float64).mean())
            self._last[name] = number
            self._sums[name] = self._sums.get(name, 0.0) + number * examples
            self._counts[name] = self._counts.get(name, 0) + examples

    def close(self) -> dict[str, float]:
        """The means, and begin anew."""
        found = {
            name: last if self._is_running(name, last) else self._sums[name] / max(self._counts[name], 1)
            for name, last in self._last.items()
        }
        self._last, self._sums, self._counts = {}, {}, {}
        return found


def measured(model: Any) -> dict[str, float]:
    """What the metrics of a model stand at, those that have begun."""
    found: dict[str, float] = {}
    for metric in model.metrics:
        try:
            result = metric.result()
        except ValueError:  # Keras 3 has not built it yet
            continue
        parts = result if isinstance(result, Mapping) else {metric.name: result}
        found.update({name: float(np.asarray(one, np.float64).mean()) for name, one in parts.items()})
    return found


class Rate:
    """Sets the rate of an optimizer, when it changes."""

    def __init__(self, library: Library, optimizer: Any, schedule: Any) -> None:
        self._library, self._optimizer, self._schedule = library, optimizer, schedule
        self._base = self._number(optimizer.learning_rate)
        self._now: float | None = self._base

    def follow(self, share: float) -> None:
        """Set the rate to a share of the base."""
        if self._schedule is not None:
            self._base = self._number(self._schedule(self._optimizer.iterations))
        wanted = self._base * share
        if wanted != self._now:
            self._optimizer.learning_rate = wanted
            self._now = wanted

    def forget(self) -> None:
        """Set it anew at the next step, since something else may have set it."""
        self._now = None

    def _number(self, found: Any) -> float:
        if self._library.is_two:
            return float(found.numpy())
        return float(self._library.keras.ops.convert_to_numpy(found))


class StepsTwo:
    """The training step of a model as a graph that takes batches as they are."""

    def __init__(self, library: Library, model: Any) -> None:
        self._library, self._model = library, model
        self._traced: Any = None

    @staticmethod
    def fits(library: Library, model: Any) -> bool:
        """Whether Keras would do the same: it is asked itself where a model has ways of its own, or runs eagerly."""
        if not library.is_two or model.run_eagerly:
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
        taken = self._library.tensorflow.nest.map_structure(self._tensor, (x,) if y is None else (x, y))
        said = self._traced(taken)
        return {name: one.numpy() for name, one in said.items()}

    def _trace(self) -> Any:
        tensorflow, model = self._library.tensorflow, self._model

        def step(data: Any) -> Any:
            found = model.train_step(data)
            model._train_counter.assign_add(1)  # noqa: SLF001 - as Keras' own function does
            return found

        return tensorflow.function(step, reduce_retracing=True, jit_compile=bool(model.jit_compile) or None)

    def _tensor(self, array: Any) -> Any:
        is_float = np.asarray(array).dtype.kind == "f"
        kind = self._library.keras.backend.floatx() if is_float else None
        return self._library.tensorflow.convert_to_tensor(array, kind)


class Training:
    """A compiled model."""

    def __init__(self, loaded: Loaded, place: DevicePlacement, means: Means, held: Sequence[Any]) -> None:
        self._library, self.model, self._place = loaded.library, loaded.model, place
        self._means = means
        self._own_step = user_code.function(means.custom_step, "--step") if means.custom_step else None
        found = outputs.answers(self.model, means.example)
        said = recipe(loaded, means, found)
        self.notes = said.notes
        self._loose = freeze(self._library, self.model, held)
        if not self.model.trainable_weights:
            raise UsageError("nothing is left to train: every weight is frozen")
        self.grip = compiled(
            self._library,
            self.model,
            said,
            held,
            is_compiled=means.is_compiled,
        )
        if place.strategy is not None:
            # The metrics of Keras are those of all processes already; added up, they would count double.
            self.model.distribute_reduction_method = "first"
        is_alone = place.strategy is None and StepsTwo.fits(self._library, self.model)
        self._steps_two = StepsTwo(self._library, self.model) if is_alone else None
        self._rate = Rate(self._library, self.model.optimizer, said.chosen.schedule)
        self._manners = [
            Manner(loss.kind.is_classification if loss is not None else answer.ending is not Ending.RAW, answer.ending)
            for loss, answer in zip(said.losses, found, strict=True)
        ]
        self.endings = tuple(answer.ending for answer in found)
        self._is_guided = self._is_begun = False
        # Keras 3 forgets what it counted at every batch; here that is done when the numbers are asked for.
        self._reset_metrics: Callable[[], None] = self.model.reset_metrics
        self.model.reset_metrics = lambda: None
        self._forget_guided: Callable[[], None] = lambda: None
        self._book = Logbook(self._is_running)

    @property
    def _has_own_code(self) -> bool:
        """Whether the model, or the user, trains by another step than Keras' own."""
        module = type(self.model).train_step.__module__
        return self._own_step is not None or module.partition(".")[0] not in {"keras", "tf_keras"}

    def _is_running(self, name: str, last: float) -> bool:
        """Whether a step says a number of all batches since they were counted anew, and not of its own alone."""
        if self._own_step is not None:
            return False
        return not self._has_own_code or measured(self.model).get(name) == last

    def mask(self, masks: Iterable[tuple[Any, Array]]) -> None:
        """Put masks on."""
        if self.grip.hold(masks):
            self.trace_anew()

    def watch(self, evidence: Evidence, variables: Sequence[Any]) -> None:
        """Gather evidence."""
        self.grip.watch(evidence, variables)
        self.trace_anew()

    def trace_anew(self) -> None:
        """Let Keras put its training step together again."""
        self.model.train_function = None
        if self._steps_two is not None:
            self._steps_two.forget()

    def evidence(self, variables: Mapping[str, Any]) -> dict[str, Array]:
        """What was gathered."""
        if variables and self._is_begun and not self.grip.has_seen_gradients:
            raise WorkError(
                f"--step {self._means.custom_step} does not train through model.optimizer, so no gradient was seen",
                hint="let it call model.optimizer, or choose a strategy that looks at weights alone",
            )
        return self.grip.evidence(variables)

    def step(self, batch: Batch, rate: float, teaching: Arrays | None) -> None:
        """Train on a batch."""
        x, y = outputs.inputs(self.model, batch.x), outputs.targets(self.model, batch.y)
        with self._place.scope(self._library), quietly():
            self._rate.follow(rate)
            if teaching is not None:
                self._be_guided()
                taught = {distillation.GUIDE: outputs.targets(self.model, teaching)}
                y = taught if y is None else {distillation.TARGETS: y, **taught}
            said = self._trained(x, y)
            put_back(self._library, self._loose)
            if self._has_own_code:
                # It may move weights without the optimizer, or with another.
                self.grip.enforce()
        self._is_begun = True
        self._book.note(said, len(each(batch.x)[0]))

    def _trained(self, x: Any, y: Any) -> Mapping[str, Any]:
        try:
            if self._own_step is not None:
                return self._by_own_step(x, y)
            if self._steps_two is not None:
                return self._steps_two(x, y)
            return self._on_batch("train", x, y)
        except self._failures as error:
            if self._is_begun:
                raise
            raise _refused("train on the first batch", error) from error

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        """What Keras raises where arrays do not fit together."""
        more = (self._library.tensorflow.errors.InvalidArgumentError,) if self._library.is_on_tensorflow else ()
        return (ValueError, TypeError, *more)

    def _on_batch(self, verb: str, x: Any, y: Any) -> Mapping[str, Any]:
        more = {"reset_metrics": False} if self._library.is_two else {}
        said: Mapping[str, Any] = getattr(self.model, f"{verb}_on_batch")(x, y, return_dict=True, **more)
        return said

    def _by_own_step(self, x: Any, y: Any) -> Mapping[str, Any]:
        assert self._own_step is not None
        said = self._own_step(self.model, x, y)
        if not isinstance(said, Mapping):
            raise UsageError(
                f"--step {self._means.custom_step} returned a {type(said).__name__}, not a dictionary of numbers",
                hint="return {'loss': loss}",
            )
        return {
            name: one if self._library.is_two else self._library.keras.ops.convert_to_numpy(one)
            for name, one in said.items()
        }

    def _be_guided(self) -> None:
        if self._is_guided:
            return
        if self._has_own_code:
            raise UsageError(
                "a training step of its own cannot be taught: only Keras' own takes a teacher's outputs",
                hint="leave --distill out, or let the step do it",
            )
        means = self._means
        guidance = Guidance(self._library, self._manners, means.teacher_share, means.temperature)
        self._forget_guided = distillation.install(self.model, guidance)
        self.trace_anew()
        self._is_guided = True

    def logs(self) -> dict[str, float]:
        """The means since they were last asked for."""
        found = self._book.close()
        self._reset_metrics()
        self._forget_guided()
        return found

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The means over some batches."""
        held = [(one, backend.read(self._library, one)) for metric in self.model.metrics for one in metric.variables]
        self._reset_metrics()
        book = Logbook(lambda *_: True)
        with self._place.scope(self._library), quietly():
            for batch in batches:
                x, y = outputs.inputs(self.model, batch.x), outputs.targets(self.model, batch.y)
                try:
                    said = self._on_batch("test", x, y)
                except self._failures as error:
                    raise _refused("evaluate a batch", error) from error
                book.note(said, len(each(batch.x)[0]))
        self._reset_metrics()
        for one, value in held:
            backend.write(self._library, one, value)
        return book.close()

    def begin_anew(self) -> None:
        """Forget what was counted, and the rate that was set."""
        self.logs()
        self._rate.forget()


def _refused(what: str, error: Exception) -> UsageError:
    hint = "see that --loss, --metric and the targets fit the model"
    return UsageError(f"Keras cannot {what}: {first_line(error)}", hint=hint)
