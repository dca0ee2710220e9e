"""What is random in a model, made to depend on a number alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prunectl.formats.safe_json import require
from prunectl.training.backend import Array
from prunectl.training.keras import backend
from prunectl.training.keras.backend import KerasLibrary, quiet_import

_SEED_RANGE = 1 << 32
_INT32_SEEDS = 1 << 31
_GLOBAL_GENERATOR = "global_seed_generator"


class RandomState:
    """Everything in a model that makes random numbers."""

    def __init__(self, library: KerasLibrary, model: Any) -> None:
        self._library = library
        self._model = model
        self._generators: list[Any] = (
            list(_make_stateful(library, model)) if library.is_keras2 else list(_seed_generators(model))
        )
        self.needs_retrace = library.is_keras2 and _has_custom_layers(model)
        """Whether some random numbers are made by operations that begin anew only when they are traced anew."""

    def seed(self, number: int) -> None:
        """Begin anew from a number."""
        shared = self._global_generator()
        with quiet_import():  # it seeds, and for that imports, whatever framework there is
            self._library.keras.utils.set_random_seed(number % _INT32_SEEDS)
        for generator in shared:
            # Keras forgets it when it seeds, but steps that are traced already go on with it.
            self._global_state.set_global_attribute(_GLOBAL_GENERATOR, generator)
        source = np.random.default_rng(number % _SEED_RANGE)
        for generator in [*self._generators, *shared]:
            seed = int(source.integers(1, _INT32_SEEDS))
            if self._library.is_keras2:
                generator.reset_from_seed(seed)
            else:
                backend.set_value(self._library, generator.state, np.array([seed, 0]))

    def get_state(self) -> list[Array]:
        """Where each generator is; the one that Keras 3 shares comes last, once there is one."""
        return [
            backend.get_value(self._library, generator.state)
            for generator in [*self._generators, *self._global_generator()]
        ]

    def set_state(self, states: list[Array]) -> None:
        """Bring each generator to where it was."""
        num_own = len(self._generators)
        if len(states) not in ((num_own,) if self._library.is_keras2 else (num_own, num_own + 1)):
            raise ValueError(f"a model with {num_own} random generators cannot go on from {len(states)} states")
        shared = self._global_generator()
        if len(states) > num_own and not shared:
            shared = [self._library.keras.random.SeedGenerator(1)]
            self._global_state.set_global_attribute(_GLOBAL_GENERATOR, shared[0])
        # One that there was not yet, when the states were taken, goes on from where it is.
        for generator, state in zip([*self._generators, *shared], states, strict=False):
            backend.set_value(self._library, generator.state, state)

    def _global_generator(self) -> list[Any]:
        """The generator of Keras 3 for layers that have none of their own, once there is one."""
        if self._library.is_keras2:
            return []
        generator = self._global_state.get_global_attribute(_GLOBAL_GENERATOR)
        return [generator] if generator is not None else []

    @property
    def _global_state(self) -> Any:
        """Where Keras 3 keeps what belongs to no model."""
        return require("keras.src.backend.common.global_state", extra="tensorflow")


def _seed_generators(model: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for layer in model._flatten_layers():  # noqa: SLF001
        for generator in getattr(layer, "_seed_generators", ()):
            if id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def _make_stateful(library: KerasLibrary, model: Any) -> Iterator[Any]:
    """Give each random layer of Keras 2 a generator whose state can be set, in place of operations that hide theirs."""
    tf = library.tensorflow
    for layer in model._flatten_layers():  # noqa: SLF001
        generator = getattr(layer, "_random_generator", None)
        if generator is None or not hasattr(generator, "RNG_STATEFUL"):
            continue
        generator._rng_type = generator.RNG_STATEFUL  # noqa: SLF001
        generator._generator = tf.random.Generator.from_seed(1)  # noqa: SLF001
        generator._built = True  # noqa: SLF001
        yield generator._generator  # noqa: SLF001


_KNOWN_PACKAGES = frozenset({"tf_keras", "tensorflow_model_optimization"})
"""Whose layers have random generators that can be set, or nothing random."""


def _has_custom_layers(model: Any) -> bool:
    return any(type(layer).__module__.partition(".")[0] not in _KNOWN_PACKAGES for layer in model._flatten_layers())  # noqa: SLF001
