"""Training steps of Keras 2, without the pipeline that `train_on_batch` builds anew for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prunectl.training.keras.library import Library


class StepsTwo:
    """The training step of a model as a graph that takes batches as they are."""

    def __init__(self, library: Library, model: Any) -> None:
        self._library, self._model = library, model
        self._traced: Any = None

    @staticmethod
    def fits(library: Library, model: Any) -> bool:
        """Whether Keras would do the same: it is asked itself where a model has ways of its own, or runs eagerly."""
        if not library.is_two or model.run_eagerly:
            return False
        plain = library.keras.Model
        return all(
            getattr(type(model), name) is getattr(plain, name) for name in ("make_train_function", "train_on_batch")
        )

    def forget(self) -> None:
        """Trace the step anew when it is next asked for."""
        self._traced = None

    def __call__(self, x: Any, y: Any) -> Mapping[str, Any]:
        """Train on a batch, and return what the step says of itself."""
        if self._traced is None:
            self._traced = self._trace()
        taken = self._library.tensorflow.nest.map_structure(self._tensor, (x,) if y is None else (x, y))
        said = self._traced(taken)
        return {name: one.numpy() for name, one in said.items()}

    def _trace(self) -> Any:
        tensorflow, model = self._library.tensorflow, self._model

        def step(data: Any) -> Any:
            found = model.train_step(data)
            model._train_counter.assign_add(1)  # noqa: SLF001 - as Keras' own function does
            return found

        return tensorflow.function(step, reduce_retracing=True, jit_compile=bool(model.jit_compile) or None)

    def _tensor(self, array: Any) -> Any:
        is_float = np.asarray(array).dtype.kind == "f"
        kind = self._library.keras.backend.floatx() if is_float else None
        return self._library.tensorflow.convert_to_tensor(array, kind)
