"""Scores of a whole model at once, for strategies that weigh tensors against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.pruning.execute import Method
from prunectl.pruning.plan import Choice, Skip
from prunectl.pruning.strategies import Array, Place


def scored(model: ModelFile, choice: Choice, method: Method) -> tuple[Method, Choice]:
    """Return a method that knows every score, and the tensors that have some."""
    strategy = method.strategy
    if strategy.score_all is None:
        return method, choice
    found = strategy.score_all({tensor.name: model.read(tensor) for tensor in choice.tensors})
    known: Mapping[str, Array] = {name: scores for name, scores in found.items() if scores is not None}
    if not known:
        raise UsageError(f"{strategy.name} leaves all of {model.path} alone")

    def score(_: Array, place: Place) -> Array:
        return known[place.name]

    left_out = f"left alone by {strategy.name}"
    skips = tuple(Skip(tensor.name, left_out) for tensor in choice.tensors if tensor.name not in known)
    tensors = tuple(tensor for tensor in choice.tensors if tensor.name in known)
    own = {name: sparsity for name, sparsity in choice.own.items() if name in known}
    # In the shape of the tensor, and therefore whole.
    own_method = replace(
        method, strategy=replace(strategy, score=score, score_all=None, is_elementwise=False, is_known=True)
    )
    return own_method, Choice(tensors, (*choice.skips, *skips), own)
