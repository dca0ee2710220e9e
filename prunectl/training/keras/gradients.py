"""The gradient of a model's mean loss over a batch, in the state in which it predicts.

The loss is the one that Keras' own test step takes: the compiled losses by their weights, and the penalties of the
model's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.training.backend import Array
from prunectl.training.keras import backend
from prunectl.training.keras.backend import Library, dense
from prunectl.training.keras.layer_inputs.recorder import predicted
from prunectl.training.keras.load import first_line

_HALF_SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)


@dataclass(frozen=True, slots=True)
class _Case:
    """A loss to be differentiated."""

    library: Library
    model: Any
    x: Any
    y: Any
    scale: float


def gradients(library: Library, model: Any, variables: Sequence[Any], x: Any, y: Any) -> list[Array]:
    """A gradient for each variable, zeros where the loss does not depend on it."""
    if y is None:
        raise UsageError("the data has no targets, and gradients are those of a loss", hint="use data with targets")
    take = {"tensorflow": _by_tape, "torch": _by_torch, "jax": _by_jax}[library.backend]
    failures = (library.tensorflow.errors.InvalidArgumentError,) if library.is_on_tensorflow else ()
    held = [one for one in variables if backend.is_float(one)]
    try:
        for scale in _scales(model):
            found = [slope / scale for slope in take(_Case(library, model, x, y, scale), held)]
            if all(np.isfinite(one).all() for one in found):
                break
    except (ValueError, TypeError, *failures) as error:
        raise UsageError(
            f"Keras cannot take gradients: {first_line(error)}",
            hint="see that --loss and the targets fit the model",
        ) from error
    by_variable = {id(one): slope for one, slope in zip(held, found, strict=True)}
    return [by_variable.get(id(one), np.zeros(backend.shape(one), np.float32)) for one in variables]


def _scales(model: Any) -> tuple[float, ...]:
    """What to multiply the loss by, at the most: in numbers of 16 bits small gradients would vanish."""
    types = {getattr(layer, "compute_dtype", "") for layer in model._flatten_layers()}  # noqa: SLF001
    return _HALF_SCALES if "float16" in types else (1.0,)


def _loss(case: _Case) -> Any:
    more = {} if case.library.is_two else {"training": False}
    out = predicted(case.model, case.x)
    return case.scale * case.model.compute_loss(x=case.x, y=case.y, y_pred=out, sample_weight=None, **more)


def _by_tape(case: _Case, variables: Sequence[Any]) -> list[Array]:
    tf = case.library.tensorflow
    x, y = (tf.nest.map_structure(tf.convert_to_tensor, one) for one in (case.x, case.y))
    held = [variable if case.library.is_two else variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(held)
        loss = _loss(replace(case, x=x, y=y))
    found = tape.gradient(loss, held)
    return [
        np.zeros(one.shape, np.float32) if slope is None else tf.cast(dense(tf, slope), tf.float32).numpy()
        for one, slope in zip(held, found, strict=True)
    ]


def _by_torch(case: _Case, variables: Sequence[Any]) -> list[Array]:
    torch = case.library.torch
    held = [variable.value for variable in variables]
    frozen = [one for one in held if not one.requires_grad]
    try:
        for one in frozen:
            one.requires_grad_(True)
        with torch.enable_grad():
            loss = _loss(case)
            found = torch.autograd.grad(loss, held, allow_unused=True) if loss.requires_grad else [None] * len(held)
    finally:
        for one in frozen:
            one.requires_grad_(False)
    return [
        np.zeros(tuple(one.shape), np.float32) if slope is None else slope.detach().float().cpu().numpy()
        for one, slope in zip(held, found, strict=True)
    ]


def _by_jax(case: _Case, variables: Sequence[Any]) -> list[Array]:
    built = getattr(case.model, "_compile_loss", None)
    if built is not None and not built.built:
        # Losses make variables at their first use, which they cannot while others are watched.
        _loss(case)

    def loss(values: Sequence[Any]) -> Any:
        mapping = list(zip(variables, values, strict=True))
        with case.library.keras.StatelessScope(mapping, collect_losses=True):
            return _loss(case)

    found = case.library.jax.grad(loss)([variable.value for variable in variables])
    return [np.asarray(slope).astype(np.float32) for slope in found]
