"""The version of ONNX's own operators."""

from __future__ import annotations

from typing import Any


def opset_of(proto: Any) -> int | None:
    """Return the version that a model is of."""
    return next((one.version for one in proto.opset_import if one.domain in {"", "ai.onnx"}), None)
