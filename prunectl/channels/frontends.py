"""Which graph language a file speaks: a table, each row imported only when it is used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from prunectl.channels.adapter import GraphAdapter
from prunectl.channels.lengths import DataShapes
from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.safe_json import require
from prunectl.training.backend import LoadOptions


@dataclass(frozen=True, slots=True)
class Frontend:
    """A graph language, and the formats whose files speak it."""

    name: str
    formats: frozenset[str]
    reader: str
    """`module:function` in this package that makes a source of a model, its origin and the shapes of data."""
    needs: str = ""
    """The package that this module imports, which is called as the extra that brings it."""


FRONTENDS = (
    Frontend("ONNX", frozenset({"onnx"}), "onnx.adapter:read_onnx"),
    Frontend("Keras", frozenset({"keras-h5", "keras"}), "keras.adapter:read_keras"),
    Frontend("TensorFlow SavedModel", frozenset({"saved-model"}), "keras.saved_model:read_saved_model"),
    Frontend(
        "PyTorch",
        frozenset({"torch", "torch-legacy", "torch-export", "safetensors"}),
        "torch.adapter:read_torch",
        "torch",
    ),
)


def open_adapter(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> GraphAdapter:
    """The adapter of the graph language that a file is written in.

    What data goes in tells how long the axes are that a file leaves open.
    """
    for frontend in FRONTENDS:
        if model.format in frontend.formats:
            if frontend.needs:
                from prunectl.training import user_code  # noqa: PLC0415 - it knows the code of all formats

                # The others are followed without their framework, and ask before they load it.
                user_code.check(model, origin)
                require(frontend.needs, extra=frontend.needs)
            module, _, name = frontend.reader.partition(":")
            adapter: GraphAdapter = getattr(importlib.import_module(f"prunectl.channels.{module}"), name)(
                model, origin, data
            )
            return adapter
    names = ", ".join(frontend.name for frontend in FRONTENDS)
    raise InputError(
        f"{model.path}: channels are followed in files of {names} only", hint="export the model to ONNX first"
    )
