"""Measures of channels that somebody else wrote: plain functions, made to fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from prunectl.channels.scores import Measure, Scores, rows_of
from prunectl.channels.trace import Part
from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.base import Array
from prunectl.pruning.plugged import typed

KIND = "channel strategy"
"""What `plugins.find` calls them; their entry points are `prunectl.channels`."""


def as_measure(found: object, name: str, params: tuple[str, ...]) -> Measure:
    """Return a measure made of a function from rows of weights, one for each channel, to a number for each."""
    if not callable(found):
        raise UsageError(f"{name} is not a function from rows of weights to scores")
    function: Callable[..., Any] = found
    words = typed(params, function)

    def of(weights: Array, axis: int) -> Scores:
        rows = rows_of(weights, axis)
        try:
            given = np.asarray(function(rows.copy(), **words), np.float64)
        except PrunectlError:
            raise
        except Exception as error:
            raise WorkError(f"{name} fails: {type(error).__name__}: {error}") from error
        if given.shape != (len(rows),) or not np.isfinite(given).all():
            raise WorkError(
                f"{name} must give a finite number for each of {len(rows)} channels, and gave {given.shape}",
                hint="it gets an array with a row of weights for each channel",
            )
        return given

    return Measure(name, frozenset({Part.OUT}), of, inspect.getdoc(function) or "")
