"""The user's data, as a network that is cut takes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunectl.calibrating.whole import first_inputs, rows_of_batches
from prunectl.channels.lengths import Shapes
from prunectl.channels.scores import Measure, Needs
from prunectl.channels.source import Feeds, Source
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.pruning.request import Request
from prunectl.training.data.source import Order
from prunectl.training.signature import Port, Signature

_MADE_UP = "random:"
_BATCHES = 4
"""Enough to see what random numbers do not show; each costs two runs of a network."""


def given(
    model: ModelFile, source: Source, request: Request, measure: Measure | None
) -> tuple[tuple[Feeds, ...], tuple[str, ...]]:
    """Return a few batches, as many examples in each as the network was followed with, and what is to be said of them.

    Data that a strategy looks at may be of another length than the network was followed with; data that are given for
    nothing but the proof may not.
    """
    if not request.data:
        return (), ()
    try:
        return _batches(source, request, is_channels_first=model.about.keras is None)
    except UsageError as error:
        if measure is None or measure.needs is Needs.NOTHING:
            raise
        return (), (f"The cut network was tried on random inputs alone: {error.message}.",)


def shapes_of_data(request: Request) -> Shapes | None:
    """Return what looks up the shapes of data, for models that leave axes open."""
    if not request.data or (request.data.startswith(_MADE_UP) and "shape=" not in request.data):
        # What is made up has the shapes of the model.
        return None

    def shapes(signature: Signature) -> Sequence[tuple[int, ...]]:
        whole, _ = first_inputs(request.data, signature, 1, Order(1, request.seed, is_shuffled=False))
        return [array.shape[1:] for array in whole]

    return shapes


def _batches(source: Source, request: Request, *, is_channels_first: bool) -> tuple[tuple[Feeds, ...], tuple[str, ...]]:
    example = source.feeds(np.random.default_rng(request.seed))
    names = source.graph.inputs
    ports = tuple(Port(name, example[name].shape[1:], str(example[name].dtype)) for name in names)
    signature = Signature(ports, (), is_channels_first=is_channels_first)
    size = len(example[names[0]])
    order = Order(request.batch_size, request.seed, is_shuffled=True)
    whole, notes = first_inputs(request.data, signature, min(request.samples, size * _BATCHES), order)
    rows = rows_of_batches(len(whole[0]), size)
    feeds = tuple(dict(zip(names, (array[row] for array in whole), strict=True)) for row in rows)
    return feeds, notes
