"""Where in a Keras model a layer stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prunectl.formats.lengths import Length, Shape

MAX_DEPTH = 40
"""No model is nested deeper."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The models and wrappers around a layer."""

    models: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    times: Shape = ()
    """How often a wrapper applies what it wraps."""
    turn: int = 0
    """Which of two directions a wrapper runs it in."""
    depth: int = 0

    def inside_model(self, name: str) -> Scope:
        """The place of the layers of a model."""
        return replace(self, models=(*self.models, *self.wrappers, name), wrappers=(), depth=self.depth + 1)

    def inside_wrapper(self, *names: str, times: tuple[Length, ...] = (), turn: int = 0) -> Scope:
        """The place of the layer that a wrapper wraps."""
        return replace(
            self,
            wrappers=(*self.wrappers, *names),
            times=(*self.times, *times),
            turn=self.turn + turn,
            depth=self.depth + 1,
        )
