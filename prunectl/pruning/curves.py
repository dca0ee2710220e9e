"""How does sparsity rise between its beginning and its end? Functions of the part that is done, from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Curve = Callable[..., float]
"""From what is done, the initial and the final sparsity to the sparsity; what else it takes are parameters."""


def constant(_done: float, _initial: float, final: float) -> float:
    """Be at the final sparsity from the beginning.

    >>> constant(0.1, 0.0, 0.8)
    0.8
    """
    return final


def polynomial(done: float, initial: float, final: float, *, power: float = 3.0) -> float:
    """Rise by ``final + (initial - final) * (1 - done) ** power``, fast at first (Zhu & Gupta 2017).

    >>> round(polynomial(0.5, 0.0, 0.8), 12)
    0.7
    """
    return final + (initial - final) * math.pow(1.0 - done, power)


def linear(done: float, initial: float, final: float) -> float:
    """Rise evenly.

    >>> linear(0.5, 0.0, 0.8)
    0.4
    """
    return initial + (final - initial) * done


def cosine(done: float, initial: float, final: float) -> float:
    """Rise along half a cosine: slowly at both ends.

    >>> round(cosine(0.5, 0.0, 0.8), 12)
    0.4
    """
    return final + (initial - final) * (1.0 + math.cos(math.pi * done)) / 2.0


def exponential(done: float, initial: float, final: float) -> float:
    """Drop the same share of what is left in every turn: ``1 - (1 - initial) * ((1 - final) / (1 - initial)) ** done``.

    >>> round(exponential(0.5, 0.0, 0.75), 12)
    0.5
    """
    if initial >= 1.0:
        return final
    return 1.0 - (1.0 - initial) * math.pow((1.0 - final) / (1.0 - initial), done)


def step(done: float, initial: float, final: float, *, stairs: int = 4) -> float:
    """Rise in equal stairs, the first at the beginning.

    >>> [step(done, 0.0, 0.8) for done in (0.0, 0.25, 0.5, 0.75)]
    [0.2, 0.4, 0.6000000000000001, 0.8]
    """
    climbed = min(math.floor(done * stairs + 1e-9) + 1, stairs)
    return final if climbed == stairs else initial + (final - initial) * climbed / stairs


def one_cycle(done: float, initial: float, final: float, *, alpha: float = 14.0, beta: float = 5.0) -> float:
    """Rise along a logistic curve: slowly, fast, slowly (one-cycle pruning, Hubens et al. 2021).

    >>> one_cycle(1.0, 0.0, 0.8)
    0.8
    """

    def logistic(at: float) -> float:
        return 1.0 / (1.0 + math.exp(beta - alpha * at))

    # As published it begins a little above the initial sparsity; scaled, it begins at it.
    share = (logistic(done) - logistic(0.0)) / (logistic(1.0) - logistic(0.0))
    return initial + (final - initial) * share


CURVES: Mapping[str, Curve] = {
    "constant": constant,
    "polynomial": polynomial,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
    "one-cycle": one_cycle,
}


def line_of(curve: Curve) -> str:
    """Return what a curve does, in a line."""
    return (curve.__doc__ or "").partition("\n")[0].replace("``", "")
