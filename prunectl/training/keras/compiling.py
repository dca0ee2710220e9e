"""Telling Keras how a model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunectl.training.keras import packing
from prunectl.training.keras.grip import Grip
from prunectl.training.keras.grip_three import GripThree
from prunectl.training.keras.grip_two import GripTwo
from prunectl.training.keras.library import Library
from prunectl.training.keras.recipe import Recipe


def compiled(library: Library, model: Any, recipe: Recipe, frozen: Sequence[Any], *, is_compiled: bool) -> Grip:
    """Compile a model, and return the grip on its weights."""
    words: dict[str, Any] = {
        "optimizer": _scaled(library, model, recipe.chosen.optimizer),
        "loss": packing.for_outputs(model, [loss.what if loss is not None else None for loss in recipe.losses]),
        "metrics": packing.for_outputs(model, recipe.metrics),
        "loss_weights": packing.for_outputs(model, recipe.loss_weights) if recipe.loss_weights else None,
    }
    if is_compiled:
        words["jit_compile"] = True
    model.compile(**words)
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if library.is_two:
        moved = [one for one in model.trainable_variables if not any(one is other for other in frozen)]
        grip: Grip = GripTwo(library, inner, moved)
        model.optimizer.build(moved)
        return grip
    model.optimizer.build(model.trainable_variables)
    return GripThree(library, inner)


def _scaled(library: Library, model: Any, optimizer: Any) -> Any:
    """Return an optimizer that scales the loss, where gradients are of 16 bits and would vanish."""
    policies = (getattr(layer, "dtype_policy", None) for layer in model._flatten_layers())  # noqa: SLF001
    if "mixed_float16" not in {getattr(policy, "name", "") for policy in policies}:
        return optimizer
    home = library.keras.mixed_precision if library.is_two else library.keras.optimizers
    return home.LossScaleOptimizer(optimizer)


def optimizer_variables(model: Any) -> list[Any]:
    """Return all that the optimizer keeps, also what wraps it."""
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    found = {id(one): one for held in (model.optimizer, inner) for one in held.variables}
    return list(found.values())
