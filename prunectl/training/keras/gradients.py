"""Gradients of a model's mean loss over a batch, in inference mode.

The loss is that of Keras' own test step: the weighted sum of the compiled losses, and the penalties of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.training.keras import backend
from prunectl.training.keras._compat import flat_layers, is_loss_built
from prunectl.training.keras.backend import KerasLibrary, densify
from prunectl.training.keras.layer_inputs import predict
from prunectl.training.keras.load import error_line

_HALF_SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)


@dataclass(frozen=True, slots=True)
class _LossInputs:
    """The arguments of the loss."""

    library: KerasLibrary
    model: Any
    x: Any
    y: Any
    scale: float


def gradients(library: KerasLibrary, model: Any, variables: Sequence[Any], x: Any, y: Any) -> list[Array]:
    """The gradient of each variable; zeros if the loss does not depend on it."""
    if y is None:
        raise UsageError(
            "the data has no targets, which are needed for the gradients of the loss", hint="use data with targets"
        )
    differentiate = {"tensorflow": _by_tape, "torch": _by_torch, "jax": _by_jax}[library.backend]
    trainable = [variable for variable in variables if backend.is_float(variable)]
    try:
        for scale in _loss_scales(model):
            slopes = [slope / scale for slope in differentiate(_LossInputs(library, model, x, y, scale), trainable)]
            if all(np.isfinite(slope).all() for slope in slopes):
                break
    except library.mismatch_errors as error:
        raise UsageError(
            f"Keras cannot compute gradients: {error_line(error)}",
            hint="check that --loss and the targets fit the model",
        ) from error
    by_variable = {id(variable): slope for variable, slope in zip(trainable, slopes, strict=True)}
    return [by_variable.get(id(variable), np.zeros(backend.shape(variable), np.float32)) for variable in variables]


def _loss_scales(model: Any) -> tuple[float, ...]:
    """Loss scales to try, largest first: in float16, small gradients would underflow."""
    types = {getattr(layer, "compute_dtype", "") for layer in flat_layers(model)}
    return _HALF_SCALES if "float16" in types else (1.0,)


def _loss(args: _LossInputs) -> Any:
    options = {} if args.library.is_keras2 else {"training": False}
    y_pred = predict(args.model, args.x)
    return args.scale * args.model.compute_loss(x=args.x, y=args.y, y_pred=y_pred, sample_weight=None, **options)


def _by_tape(args: _LossInputs, variables: Sequence[Any]) -> list[Array]:
    tf = args.library.tensorflow
    x, y = (tf.nest.map_structure(tf.convert_to_tensor, array) for array in (args.x, args.y))
    watched = [variable if args.library.is_keras2 else variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        loss = _loss(replace(args, x=x, y=y))
    slopes = tape.gradient(loss, watched)
    return [
        np.zeros(variable.shape, np.float32) if slope is None else tf.cast(densify(tf, slope), tf.float32).numpy()
        for variable, slope in zip(watched, slopes, strict=True)
    ]


def _by_torch(args: _LossInputs, variables: Sequence[Any]) -> list[Array]:
    torch = args.library.torch
    parameters = [variable.value for variable in variables]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = _loss(args)
            slopes = (
                torch.autograd.grad(loss, parameters, allow_unused=True)
                if loss.requires_grad
                else [None] * len(parameters)
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return [
        np.zeros(tuple(parameter.shape), np.float32) if slope is None else slope.detach().float().cpu().numpy()
        for parameter, slope in zip(parameters, slopes, strict=True)
    ]


def _by_jax(args: _LossInputs, variables: Sequence[Any]) -> list[Array]:
    if not is_loss_built(args.model):
        # Losses create their variables on first use, which is impossible during differentiation.
        _loss(args)

    def loss(values: Sequence[Any]) -> Any:
        mapping = list(zip(variables, values, strict=True))
        with args.library.keras.StatelessScope(mapping, collect_losses=True):
            return _loss(args)

    slopes = args.library.jax.grad(loss)([variable.value for variable in variables])
    return [np.asarray(slope).astype(np.float32) for slope in slopes]
