"""Keras 2 models that tensorflow-model-optimization prunes while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.pruning.masks import Mask
from prunectl.training.backend import LoadOptions, Logs, TrainableModel, TrainOptions
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.keras import backend
from prunectl.training.keras.backend import RandomState, load_tfmot
from prunectl.training.keras.load import load
from prunectl.training.keras.model import KerasTrainable
from prunectl.training.native_pruning import NativePruning
from prunectl.training.quiet import ignore_warnings
from prunectl.training.tfmot.schedules import ScheduleAdapter, to_tfmot_schedule
from prunectl.training.tfmot.wrappers import (
    MATRIX_RANK,
    WrappedModel,
    WrapperSettings,
    block_settings,
    is_cloneable,
    is_mixed_precision,
    wrap_layers,
)
from prunectl.training.wrap import tfmot_reaches_end

_NM_RANKS = frozenset({2, 4})


class TfmotTrainable(KerasTrainable):
    """A Keras model whose layers tfmot may wrap and prune."""

    _wrapped: WrappedModel | None = None
    _callbacks: tuple[Any, ...] = ()
    _options: TrainOptions
    _lacks_tensorboard = False
    _has_tensorboard = find_spec("tensorboard") is not None
    _step = 0
    _epoch = 0

    def prepare(self, options: TrainOptions) -> None:
        self._options = options
        super().prepare(options)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the Keras model, and the version of tfmot that prunes it."""
        if self._wrapped is None:
            return super().notes
        version = require("tensorflow_model_optimization", extra="tensorflow").__version__
        note = f"tensorflow-model-optimization {version} pruned the model, layer by layer."
        tensorboard_note = ("TensorBoard is not installed, so --logdir has no summaries from tfmot.",)
        return (*super().notes, note, *(tensorboard_note if self._lacks_tensorboard else ()))

    def prune_by(self, native: NativePruning) -> frozenset[str]:
        """Wrap the layers if tfmot can prune what is asked for, and return the tensors that it prunes; empty if not."""
        library = self._library
        if (
            not library.is_keras2
            or self._placement.strategy is not None
            or not is_cloneable(library.keras, self._model)
        ):
            return frozenset()
        # A model with several outputs finds its losses by the names of layers, and wrappers have other names.
        if is_mixed_precision(self._model) or len(self._model.outputs) > 1:
            return frozenset()
        names = {id(self._variables[name]): name for name in native.schedules if name in self._variables}
        with self._placement.scope(library):
            wrapped = wrap_layers(library.keras, self._model, names, partial(_settings_of_layer, native))
        pruned = frozenset(wrapped.weights)
        if not pruned or (native.is_all and pruned != native.schedules.keys()):
            return frozenset()
        self._wrapped, self._step = wrapped, native.step
        self._model = wrapped.model
        self._loaded = replace(self._loaded, model=wrapped.model)
        self._start_pruning(native)
        return pruned

    def _start_pruning(self, native: NativePruning) -> None:
        library, wrapped = self._library, self._wrapped
        assert wrapped is not None
        with self._placement.scope(library):
            self._random = RandomState(library, self._model)
        for name, keep in native.masks.items():
            if name in wrapped.weights:
                backend.set_value(wrapped.weights[name][1], keep)
        for wrapper in wrapped.wrappers:
            backend.set_value(wrapper.pruning_step, np.array(native.step or -1))
        super().prepare(self._options)
        sparsity = load_tfmot()
        callbacks = [sparsity.UpdatePruningStep()]
        if native.logdir is not None and self.is_chief and self._has_tensorboard:
            callbacks.append(sparsity.PruningSummaries(str(native.logdir), write_graph=False))
        self._lacks_tensorboard = native.logdir is not None and not self._has_tensorboard
        self._callbacks = tuple(callbacks)
        with ignore_warnings():
            for callback in self._callbacks:
                callback.set_model(self._model)
            self._callbacks[0].on_train_begin()
            self._write_summaries()
        self._apply_masks()

    def masks(self) -> dict[str, Mask]:
        weights = self._wrapped.weights if self._wrapped is not None else {}
        return {name: backend.get_value(self._library, mask) != 0 for name, (_, mask) in weights.items()}

    def mask(self, masks: Mapping[str, Array]) -> None:
        """Zero what these masks do not keep, besides what the masks of tfmot do not keep."""
        if self._wrapped is None:
            super().mask(masks)
            return
        for name, keep in masks.items():
            _, mask = self._wrapped.weights[name]
            backend.set_value(mask, (backend.get_value(self._library, mask) != 0) & keep)
        self._apply_masks()

    def _apply_masks(self) -> None:
        """Apply the masks to the weights: tfmot does so before a batch and at the end of an epoch, not after a step."""
        for callback in self._callbacks[:1]:
            callback.on_epoch_end(self._epoch)

    def end_epoch(self) -> None:
        """Apply the masks, and write the sparsity of the weights for TensorBoard."""
        self._epoch += 1
        self._apply_masks()
        self._write_summaries()

    def _write_summaries(self) -> None:
        for callback in self._callbacks[1:]:
            callback.on_epoch_begin(self._epoch)

    def step(self, batch: Batch, rate: float, teacher_outputs: Arrays | None = None) -> None:
        super().step(batch, rate, teacher_outputs)
        if self._wrapped is None:
            return
        self._step += 1
        for wrapper in self._wrapped.wrappers:
            # The wrapper of a layer that is called twice in a model counts every batch twice.
            if int(wrapper.pruning_step) != self._step:
                backend.set_value(wrapper.pruning_step, np.array(self._step))

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        values = super().weights(names)
        for name, keep in self.masks().items():
            if name in values:
                # tfmot multiplies weights by masks, which turns pruned negative weights into -0.0.
                values[name] = np.where(keep, values[name], np.zeros((), values[name].dtype))
        return values

    def assign(self, values: Mapping[str, Array]) -> None:
        super().assign(values)
        self._apply_masks()

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        if self._wrapped is not None:
            self._step = max(int(wrapper.pruning_step) for wrapper in self._wrapped.wrappers)

    def evaluate(self, batches: Iterable[Batch]) -> Logs:
        self._apply_masks()
        return super().evaluate(batches)


def _settings_of_layer(native: NativePruning, layer: Any, weights: Mapping[str, Any]) -> WrapperSettings | None:
    """The settings of the wrapper of a layer; None if tfmot cannot prune it as the plan says."""
    schedules = {native.schedules[name] for name in weights}
    ranks = {len(weight.shape) for weight in weights.values()}
    pattern = native.pattern
    if len(schedules) != 1 or len(weights) != len(layer.get_prunable_weights()):
        return None
    if isinstance(pattern, NMPattern) and not ranks <= _NM_RANKS:
        return None
    if isinstance(pattern, BlockPattern) and ranks != {MATRIX_RANK}:
        return None
    schedule = schedules.pop()
    return {
        "pruning_schedule": to_tfmot_schedule(schedule) if tfmot_reaches_end(schedule) else ScheduleAdapter(schedule),
        **({"sparsity_m_by_n": (pattern.zeros, pattern.group)} if isinstance(pattern, NMPattern) else {}),
        **block_settings(weights, pattern, native.pool),
    }


def load_trainable(model: ModelFile, origin: LoadOptions) -> TrainableModel:
    """Load a Keras model that tfmot can prune."""
    return TfmotTrainable(partial(load, model, origin))
