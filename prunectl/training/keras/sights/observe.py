"""Shows which inputs the weights of a Keras model meet: each layer that is understood is listened to for one run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from prunectl.training.data.source import Arrays
from prunectl.training.keras import packing
from prunectl.training.keras.library import Library
from prunectl.training.keras.sights import kinds
from prunectl.training.keras.sights.contexts import functions
from prunectl.training.keras.sights.listener import Listener
from prunectl.training.sights import See


def observe(library: Library, model: Any, variables: Mapping[str, Any], x: Arrays, see: See) -> None:
    """Run a batch through, and show what the variables meet."""
    listener = Listener(library, variables, see)
    layers = {id(layer): layer for layer in model._flatten_layers()}.values()  # noqa: SLF001
    with ExitStack() as stack:
        if library.backend == "torch":
            stack.enter_context(library.torch.no_grad())
        if library.is_on_tensorflow and any(map(kinds.has_own_code, layers)):
            # Own code may call its layers from functions that are traced already, where nothing is heard.
            stack.enter_context(functions(library, eagerly=True))
        for layer in layers:
            stack.enter_context(listener.listening(layer))
        try:
            predicted(model, packing.inputs(model, x))
        finally:
            if listener.failure is not None:
                # Keras makes errors of its own from those of others.
                raise listener.failure


def predicted(model: Any, x: Any) -> Any:
    """Return what comes out where nothing is trained."""
    return model(x, training=False) if getattr(model, "_call_has_training_arg", True) else model(x)
