"""Wrappers of tfmot around those layers of a model that are to be pruned; the variables stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunectl.errors import InputError
from prunectl.training.keras.library import quietly
from prunectl.training.tfmot.library import tfmot

Settings = Mapping[str, Any]
"""What `prune_low_magnitude` is to be told beside the layer."""
Chooser = Callable[[Any, Mapping[str, Any]], Settings | None]
"""From a layer, and its weights that can be pruned by their names, to what its wrapper is told; None for no wrapper."""


@dataclass(slots=True)
class Around:
    """A model with wrappers."""

    model: Any
    weights: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What can be pruned in wrapped layers: the weight and its mask, by tensor."""
    wrappers: list[Any] = field(default_factory=list)


def around(keras: Any, model: Any, names: Mapping[int, str], choose: Chooser) -> Around:
    """Return a model that shares all variables with another, with wrappers around the layers that are chosen."""
    if not is_graph(keras, model):
        raise InputError(
            "tfmot wraps sequential and functional models, not those that compute by code of their own",
            hint="prune without --wrap",
        )
    if is_mixed(model):
        raise InputError(
            "tfmot multiplies weights by masks of the same precision, and this model reckons in another than it keeps",
            hint="prune without --wrap",
        )
    sparsity = tfmot()

    def cloned(layer: Any) -> Any:
        if isinstance(layer, keras.Model):
            if not is_graph(keras, layer):
                return layer
            return keras.models.clone_model(layer, clone_function=cloned)
        held = {id(weight) for weight in layer.weights}
        if not any(one in names for one in held):
            return layer
        weights = {names[id(weight)]: weight for weight in prunable(layer) if id(weight) in names}
        settings = choose(layer, weights) if weights else None
        return layer if settings is None else sparsity.prune_low_magnitude(layer, **settings)

    with quietly():
        found = Around(keras.models.clone_model(model, clone_function=cloned))
    for wrapper in wrappers(keras, found.model):
        found.wrappers.append(wrapper)
        for weight, mask, _ in wrapper.pruning_vars:
            if id(weight) in names:
                found.weights[names[id(weight)]] = (weight, mask)
    return found


def prunable(layer: Any) -> list[Any]:
    """Return the weights of a layer that tfmot would prune; none if it has no wrapper for such layers."""
    if not hasattr(layer, "get_prunable_weights"):
        try:
            # A wrapper that is thrown away: making one is how tfmot says which layers it knows, and teaches them which
            # of their weights can be pruned.
            tfmot().prune_low_magnitude(layer)
        except ValueError:
            return []
    found: list[Any] = list(layer.get_prunable_weights())
    return found


def wrappers(keras: Any, model: Any) -> Iterator[Any]:
    """Yield the wrappers in a model and in those inside it."""
    kind = type(tfmot().prune_low_magnitude(keras.layers.Dense(1)))
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from wrappers(keras, layer)
        elif isinstance(layer, kind):
            yield layer


def is_mixed(model: Any) -> bool:
    """Whether any layer reckons in another precision than that of its weights."""
    policies = (getattr(layer, "dtype_policy", None) for layer in model._flatten_layers())  # noqa: SLF001
    return any(one is not None and one.compute_dtype != one.variable_dtype for one in policies)


def is_graph(keras: Any, model: Any) -> bool:
    """Whether a model says which layers follow which, so that it can be cloned."""
    return isinstance(model, keras.Sequential) or bool(getattr(model, "_is_graph_network", False))
