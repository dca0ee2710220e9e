"""Training steps of a Keras model: compiled once, then batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prunectl.errors import UsageError, WorkError
from prunectl.training import custom
from prunectl.training.data.source import Arrays, Batch, each
from prunectl.training.ending import Ending
from prunectl.training.evidence import Evidence
from prunectl.training.keras import answers, frozen, guide, numbers, packing
from prunectl.training.keras.compiling import compiled
from prunectl.training.keras.guide import Guidance, Manner
from prunectl.training.keras.library import quietly
from prunectl.training.keras.loading import Loaded, first_line
from prunectl.training.keras.logbook import Logbook, measured
from prunectl.training.keras.place import Place
from prunectl.training.keras.rate import Rate
from prunectl.training.keras.recipe import recipe
from prunectl.training.keras.steps_two import StepsTwo
from prunectl.training.network import Array, Means


class Training:
    """A compiled model."""

    def __init__(self, loaded: Loaded, place: Place, means: Means, held: Sequence[Any]) -> None:
        self._library, self.model, self._place = loaded.library, loaded.model, place
        self._means = means
        self._own_step = custom.function(means.custom_step, "--step") if means.custom_step else None
        found = answers.answers(self.model, means.example)
        said = recipe(loaded, means, found)
        self.notes = said.notes
        self._loose = frozen.freeze(self._library, self.model, held)
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
        """Return what was gathered."""
        if variables and self._is_begun and not self.grip.has_seen_gradients:
            raise WorkError(
                f"--step {self._means.custom_step} does not train through model.optimizer, so no gradient was seen",
                hint="let it call model.optimizer, or choose a strategy that looks at weights alone",
            )
        return self.grip.evidence(variables)

    def step(self, batch: Batch, rate: float, teaching: Arrays | None) -> None:
        """Train on a batch."""
        x, y = packing.inputs(self.model, batch.x), packing.targets(self.model, batch.y)
        with self._place.scope(self._library), quietly():
            self._rate.follow(rate)
            if teaching is not None:
                self._be_guided()
                taught = {guide.GUIDE: packing.targets(self.model, teaching)}
                y = taught if y is None else {guide.TARGETS: y, **taught}
            said = self._trained(x, y)
            frozen.put_back(self._library, self._loose)
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
        self._forget_guided = guide.install(self.model, guidance)
        self.trace_anew()
        self._is_guided = True

    def logs(self) -> dict[str, float]:
        """Return the means since they were last asked for."""
        found = self._book.close()
        self._reset_metrics()
        self._forget_guided()
        return found

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the means over some batches."""
        held = [(one, numbers.read(self._library, one)) for metric in self.model.metrics for one in metric.variables]
        self._reset_metrics()
        book = Logbook(lambda *_: True)
        with self._place.scope(self._library), quietly():
            for batch in batches:
                x, y = packing.inputs(self.model, batch.x), packing.targets(self.model, batch.y)
                try:
                    said = self._on_batch("test", x, y)
                except self._failures as error:
                    raise _refused("evaluate a batch", error) from error
                book.note(said, len(each(batch.x)[0]))
        self._reset_metrics()
        for one, value in held:
            numbers.write(self._library, one, value)
        return book.close()

    def begin_anew(self) -> None:
        """Forget what was counted, and the rate that was set."""
        self.logs()
        self._rate.forget()


def _refused(what: str, error: Exception) -> UsageError:
    hint = "see that --loss, --metric and the targets fit the model"
    return UsageError(f"Keras cannot {what}: {first_line(error)}", hint=hint)
