"""What is random in a model, made to depend on a number alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prunectl.formats.safe_json import require
from prunectl.training.backend import Array
from prunectl.training.keras import backend
from prunectl.training.keras.backend import Library, hushed

_WORDS = 1 << 32
_PLAIN_SEEDS = 1 << 31
_SHARED = "global_seed_generator"


class Chance:
    """Everything in a model that makes random numbers."""

    def __init__(self, library: Library, model: Any) -> None:
        self._library = library
        self._model = model
        self._generators: list[Any] = list(_stateful(library, model)) if library.is_two else list(_seeded(model))
        self.is_traced = library.is_two and _has_own_code(model)
        """Whether some random numbers are made by operations that begin anew only when they are traced anew."""

    def reseed(self, number: int) -> None:
        """Begin anew from a number."""
        shared = self._shared()
        with hushed():  # it seeds, and for that imports, whatever framework there is
            self._library.keras.utils.set_random_seed(number % _PLAIN_SEEDS)
        for generator in shared:
            # Keras forgets it when it seeds, but steps that are traced already go on with it.
            self._global_state.set_global_attribute(_SHARED, generator)
        source = np.random.default_rng(number % _WORDS)
        for generator in [*self._generators, *shared]:
            seed = int(source.integers(1, _PLAIN_SEEDS))
            if self._library.is_two:
                generator.reset_from_seed(seed)
            else:
                backend.write(self._library, generator.state, np.array([seed, 0]))

    def states(self) -> list[Array]:
        """Where each generator is; the one that Keras 3 shares comes last, once there is one."""
        return [backend.read(self._library, generator.state) for generator in [*self._generators, *self._shared()]]

    def resume(self, states: list[Array]) -> None:
        """Bring each generator to where it was."""
        own = len(self._generators)
        if len(states) not in ((own,) if self._library.is_two else (own, own + 1)):
            raise ValueError(f"a model with {own} random generators cannot go on from {len(states)} states")
        shared = self._shared()
        if len(states) > own and not shared:
            shared = [self._library.keras.random.SeedGenerator(1)]
            self._global_state.set_global_attribute(_SHARED, shared[0])
        # One that there was not yet, when the states were taken, goes on from where it is.
        for generator, state in zip([*self._generators, *shared], states, strict=False):
            backend.write(self._library, generator.state, state)

    def _shared(self) -> list[Any]:
        """The generator of Keras 3 for layers that have none of their own, once there is one."""
        if self._library.is_two:
            return []
        found = self._global_state.get_global_attribute(_SHARED)
        return [found] if found is not None else []

    @property
    def _global_state(self) -> Any:
        """Where Keras 3 keeps what belongs to no model."""
        return require("keras.src.backend.common.global_state", extra="tensorflow")


def _seeded(model: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for layer in model._flatten_layers():  # noqa: SLF001
        for generator in getattr(layer, "_seed_generators", ()):
            if id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def _stateful(library: Library, model: Any) -> Iterator[Any]:
    """Give each random layer of Keras 2 a generator whose state can be set, in place of operations that hide theirs."""
    tf = library.tensorflow
    for layer in model._flatten_layers():  # noqa: SLF001
        random = getattr(layer, "_random_generator", None)
        if random is None or not hasattr(random, "RNG_STATEFUL"):
            continue
        random._rng_type = random.RNG_STATEFUL  # noqa: SLF001
        random._generator = tf.random.Generator.from_seed(1)  # noqa: SLF001
        random._built = True  # noqa: SLF001
        yield random._generator  # noqa: SLF001


_KNOWN = frozenset({"tf_keras", "tensorflow_model_optimization"})
"""Whose layers have random generators that can be set, or nothing random."""


def _has_own_code(model: Any) -> bool:
    return any(type(layer).__module__.partition(".")[0] not in _KNOWN for layer in model._flatten_layers())  # noqa: SLF001
