"""A model to learn from: any file that some runtime can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.optional import require
from prunectl.formats.table import open_model
from prunectl.training.data.source import Arrays, each
from prunectl.training.loop import Teacher
from prunectl.training.network import Origin
from prunectl.training.runtimes import open_network


def open_teacher(path: Path, origin: Origin) -> Teacher:
    """Return what answers as a model does."""
    model = open_model(path)
    if model.format == "onnx":
        return _by_onnxruntime(path)
    return open_network(model, origin).predict


def _by_onnxruntime(path: Path) -> Teacher:
    runtime: Any = require("onnxruntime", extra="onnx")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} cannot be run by onnxruntime: {error}") from error
    names = [port.name for port in session.get_inputs()]

    def answer(x: Arrays) -> Arrays:
        found = session.run(None, dict(zip(names, each(x), strict=True)))
        return tuple(map(np.asarray, found)) if len(found) > 1 else np.asarray(found[0])

    return answer
