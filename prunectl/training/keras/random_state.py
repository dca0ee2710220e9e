"""The random generators of a Keras model: seeded, saved and restored."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.keras import backend
from prunectl.training.keras._compat import (
    flat_layers,
    global_generator,
    make_stateful,
    seed_generators,
    set_global_generator,
)
from prunectl.training.keras.backend import KerasLibrary, quiet_import

_SEED_RANGE = 1 << 32
_INT32_SEEDS = 1 << 31


class RandomState:
    """All random generators of a model."""

    def __init__(self, library: KerasLibrary, model: Any) -> None:
        self._library = library
        self._model = model
        self._generators = _generators(library, model)
        self.needs_retrace = library.is_keras2 and _has_custom_layers(model)
        """Whether some random operations take a new seed only when they are retraced."""

    def seed(self, number: int) -> None:
        """Seed all generators from a number."""
        shared = self._global_generator()
        with quiet_import():  # it seeds, and for that imports, whatever framework there is
            self._library.keras.utils.set_random_seed(number % _INT32_SEEDS)
        for generator in shared:
            # Keras forgets it when it seeds, but steps that are traced already go on with it.
            set_global_generator(generator)
        source = np.random.default_rng(number % _SEED_RANGE)
        for generator in [*self._generators, *shared]:
            seed = int(source.integers(1, _INT32_SEEDS))
            if self._library.is_keras2:
                generator.reset_from_seed(seed)
            else:
                backend.set_value(self._library, generator.state, np.array([seed, 0]))

    def get_state(self) -> list[Array]:
        """The state of each generator, the global one of Keras 3 last."""
        return [
            backend.get_value(self._library, generator.state)
            for generator in [*self._generators, *self._global_generator()]
        ]

    def set_state(self, states: list[Array]) -> None:
        """Restore the states of `get_state`."""
        num_own = len(self._generators)
        if len(states) not in ((num_own,) if self._library.is_keras2 else (num_own, num_own + 1)):
            raise ValueError(f"a model with {num_own} random generators cannot go on from {len(states)} states")
        shared = self._global_generator()
        if len(states) > num_own and not shared:
            shared = [self._library.keras.random.SeedGenerator(1)]
            set_global_generator(shared[0])
        # One that there was not yet, when the states were taken, goes on from where it is.
        for generator, state in zip([*self._generators, *shared], states, strict=False):
            backend.set_value(self._library, generator.state, state)

    def _global_generator(self) -> list[Any]:
        """The generator of Keras 3 for layers that have none of their own, once there is one."""
        if self._library.is_keras2:
            return []
        generator = global_generator()
        return [generator] if generator is not None else []


def _generators(library: KerasLibrary, model: Any) -> list[Any]:
    if library.is_keras2:
        return [generator for layer in flat_layers(model) for generator in make_stateful(library.tensorflow, layer)]
    by_id = {id(generator): generator for layer in flat_layers(model) for generator in seed_generators(layer)}
    return list(by_id.values())


_KNOWN_PACKAGES = frozenset({"tf_keras", "tensorflow_model_optimization"})
"""Whose layers have random generators that can be set, or nothing random."""


def _has_custom_layers(model: Any) -> bool:
    return any(type(layer).__module__.partition(".")[0] not in _KNOWN_PACKAGES for layer in flat_layers(model))
