"""What is needed to see a tensor meet its inputs, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunectl.training.onnx import nodes
from prunectl.training.onnx.cells import recurrent
from prunectl.training.onnx.look import Look
from prunectl.training.onnx.meetings import Meeting
from prunectl.training.onnx.products import gemm, matmul
from prunectl.training.onnx.windows import convolution, transposed

_Rule = Callable[[Meeting], Look | None]

_STANDARD: Mapping[str, _Rule] = {
    "Conv": convolution,
    "ConvTranspose": transposed,
    "Gemm": gemm,
    "MatMul": matmul,
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
}
_MICROSOFT: Mapping[str, _Rule] = {"FusedConv": convolution, "FusedGemm": gemm, "FusedMatMul": gemm}
"""What onnxruntime writes in place of others when it is asked for an optimised model."""


def look(meeting: Meeting) -> Look | None:
    """Return how a meeting can be seen; none if it cannot be told."""
    rules = {**dict.fromkeys(nodes.STANDARD, _STANDARD), nodes.MICROSOFT: _MICROSOFT}
    rule = rules.get(meeting.node.domain, {}).get(meeting.node.op_type)
    return rule(meeting) if rule is not None else None
