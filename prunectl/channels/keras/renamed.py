"""Weights under other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prunectl.formats.base import Array


class Renamed(Mapping[str, Array]):
    """Weights that are read when they are first looked at, each by a name of its own."""

    def __init__(self, held: Mapping[str, Array], names: Mapping[str, str]) -> None:
        self._held, self._names = held, names

    def __getitem__(self, name: str) -> Array:
        return self._held[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def renamed(weights: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """Return some weights under other names."""
    return {names[name]: array for name, array in weights.items()}
