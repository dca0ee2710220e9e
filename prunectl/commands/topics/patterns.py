"""In what shape weights go."""

from __future__ import annotations

from prunectl.commands.completion_offers import PATTERNS
from prunectl.commands.topics.table import aligned


def text() -> str:
    """Return the text."""
    return f"""
Patterns: in what shape weights go

{aligned(PATTERNS.items())}

unstructured is the default. It keeps the most accuracy, and makes files smaller
once they are compressed; it makes nothing faster by itself.

N:M has at least N zeros in every M weights along the inputs; 2:4 is what the
sparse cores of NVIDIA's GPUs run. It decides the sparsity by itself. What does
not divide is padded, as tfmot does.

block:RxC zeroes R x C blocks, ranked by their mean magnitude (:avg) or by their
largest weight (:max).

channel removes whole channels, filters, units and heads for good, with whatever
depends on them: the network is smaller and faster everywhere. Every cut network
is run beside the original before it is kept.

  prunectl prune model.onnx -o fast.onnx --pattern 2:4
  prunectl inspect fast.onnx --pattern 2:4
  prunectl prune model.onnx -o thin.onnx --pattern channel -s 50%
"""
