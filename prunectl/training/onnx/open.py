"""From an ONNX file to a model that shows what its weights meet."""

from __future__ import annotations

from prunectl.formats.base import ModelFile
from prunectl.formats.optional import require
from prunectl.training.network import Origin
from prunectl.training.onnx.held import hold
from prunectl.training.onnx.model import OnnxModel
from prunectl.training.sights import Observed


def open_observed(model: ModelFile, origin: Origin) -> Observed:
    """Return a model as onnxruntime runs it; the file says all of it, so that nothing of its origin is asked."""
    del origin
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    return OnnxModel(hold(model))
