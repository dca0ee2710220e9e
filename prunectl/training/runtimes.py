"""The table of frameworks that load model files, imported only when used, and seeding of Python and NumPy."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Family, ModelFile
from prunectl.formats.registry import by_name
from prunectl.formats.safe_json import require
from prunectl.training import user_code
from prunectl.training.backend import BlockwiseModel, InspectableModel, LoadOptions, PredictingModel, TrainableModel
from prunectl.training.data.registry import array_names
from prunectl.training.host import before_seeding


@dataclass(frozen=True, slots=True)
class Backend:
    """A framework, and the model files that it can train."""

    trains: Callable[[ModelFile], bool]
    opener: str
    """`module:function` in this package that loads a model as a network."""
    imports: str = ""
    """The package that the module imports, which is also the name of its extra."""


def _is_keras(model: ModelFile) -> bool:
    return model.family is Family.KERAS or (model.family is Family.SAVED_MODEL and model.about.keras is not None)


def _is_keras_2(model: ModelFile) -> bool:
    return _is_keras(model) and model.about.keras is not None and "keras 3" not in model.about.producer


BACKENDS = (
    Backend(_is_keras_2, "tfmot.model:load_trainable"),
    Backend(_is_keras, "keras.model:load_trainable"),
    Backend(lambda model: model.family is Family.SAVED_MODEL, "tensorflow:load_trainable"),
    Backend(
        lambda model: model.family in {Family.TORCH, Family.TORCH_PROGRAM, Family.SAFETENSORS},
        "torch.model:load_trainable",
        imports="torch",
    ),
)


def load_trainable(model: ModelFile, origin: LoadOptions) -> TrainableModel:
    """Load a model in the framework that can train it; raise if there is none."""
    for backend in BACKENDS:
        if backend.trains(model):
            user_code.check(model, origin)
            user_code.require_network(model, origin)
            if backend.imports:
                require(backend.imports, extra=backend.imports)
            seed_everything(origin.seed)
            module, _, name = backend.opener.partition(":")
            load = getattr(importlib.import_module(f"prunectl.training.{module}"), name)
            trainable: TrainableModel = load(model, origin)
            return trainable
    title = by_name(model.format).title
    raise InputError(
        f"{model.path} ({title}) cannot be trained, and its layer inputs cannot be captured: no framework opens its "
        "layers",
        hint="use the Keras or PyTorch model that it was exported from, then export that again",
    )


def with_arrays(origin: LoadOptions, model: ModelFile, data: str, *names: str) -> LoadOptions:
    """Load options with the names of the input arrays, which `transformers` models in folders need."""
    if model.folder is None or origin.model:
        return origin
    return replace(origin, arrays=(*names, *(array_names(data) if data else ())))


def load_blockwise(model: ModelFile, origin: LoadOptions) -> BlockwiseModel | None:
    """Open a model folder to load one block at a time; None for any other model, or if that is not possible."""
    if model.folder is None or origin.model or model.family not in {Family.TORCH, Family.SAFETENSORS}:
        return None
    user_code.check(model, origin)
    require("torch", extra="torch")
    load: Callable[[ModelFile, LoadOptions], BlockwiseModel | None] = importlib.import_module(
        "prunectl.training.torch.blockwise"
    ).open_blockwise
    return load(model, origin)


def load_onnx_model(model: ModelFile) -> InspectableModel:
    """Load an ONNX model in onnxruntime, which runs models but cannot train them."""
    for name in ("onnx", "onnxruntime"):
        require(name, extra="onnx")
    load: Callable[[ModelFile], InspectableModel] = importlib.import_module("prunectl.training.onnx.model").OnnxModel
    return load(model)


def load_predictor(model: ModelFile, origin: LoadOptions) -> PredictingModel | None:
    """Load a model that can only be run, in its runtime; None for models that can be trained."""
    if model.family is Family.ONNX:
        return load_onnx_model(model)
    if model.family is Family.LITE:
        load: Callable[[ModelFile, LoadOptions], PredictingModel]
        load = importlib.import_module("prunectl.training.lite").LiteModel
        return load(model, origin)
    return None


_LEGACY_SEEDS = 1 << 32


def seed_everything(number: int) -> None:
    """Seed Python's generator and NumPy's global one, which users' code may draw from."""
    before_seeding("python", "numpy")
    random.seed(number)
    np.random.seed(number % _LEGACY_SEEDS)  # noqa: NPY002 - the global generator is meant


def random_state() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, for JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, python_state, gauss = random.getstate()
    return {"numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, list(python_state), gauss]}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state), gauss))
