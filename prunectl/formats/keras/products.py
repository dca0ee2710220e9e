"""What a layer multiplies: a weight, and how many times the whole of it is used."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.formats.lengths import Shape


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication by a weight, or by another input where it has no leaf."""

    leaf: str
    """The last of the weight's name, as Keras has it."""
    shape: Shape
    """The shape of the weight."""
    times: Shape
    """Lengths of the axes along which it is used again and again."""
    gates: int = 1
    """Into how many weights Keras 1 splits it."""
    turn: int = 0
    """Its number among weights that only their order tells apart."""
