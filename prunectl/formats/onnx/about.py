"""Facts around the tensors of an ONNX model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prunectl.formats.base import PRUNABLE, About, Tensor
from prunectl.formats.onnx.proto import Model, Node
from prunectl.formats.onnx.scopes import Scope

_CLASSICAL = "ai.onnx.ml"
_TRAINING = "ai.onnx.preview.training"
_STANDARD = ("", "ai.onnx", _CLASSICAL, "ai.onnx.training", "ai.onnx.preview", _TRAINING)
_STOCK_RUNTIME = "com.microsoft"
"""Operators that onnxruntime brings along."""


def about(model: Model, scopes: Sequence[Scope], tensors: Sequence[Tensor]) -> About:
    """Return what the model says of itself beside its tensors."""
    nodes = [node for scope in scopes for node in scope.graph.nodes]
    optimizers = [node.op for scope in scopes if scope.is_training for node in scope.graph.nodes if _optimises(node)]
    return About(
        producer=_producer(model),
        optimizer=next(iter(optimizers), ""),
        training=tuple(dict.fromkeys(f"loss {node.op}" for node in nodes if node.op.endswith("Loss"))),
        code=_foreign(nodes, frozenset(scope.defines for scope in scopes)),
        notes=(*_notes(nodes), *_tensor_notes(tensors)),
        is_compressed=any(scope.graph.sparse for scope in scopes),
    )


def _producer(model: Model) -> str:
    opset = model.opsets.get("", model.opsets.get("ai.onnx", 0))
    versions = (f"opset {opset}" if opset else "", f"IR version {model.ir_version}" if model.ir_version else "")
    return ", ".join(filter(None, (model.producer, *versions)))


def _optimises(node: Node) -> bool:
    return node.domain == _TRAINING and node.op != "Gradient"


def _foreign(nodes: Sequence[Node], defined: frozenset[str]) -> tuple[str, ...]:
    """Return the operators that run code from elsewhere: neither ONNX, nor stock, nor defined in the file."""
    foreign = {
        f"{node.domain}.{node.op}"
        for node in nodes
        if node.domain not in _STANDARD and node.domain.split(".nchwc")[0] != _STOCK_RUNTIME
    }
    return tuple(f"operator {name}" for name in sorted(foreign - defined))


def _notes(nodes: Sequence[Node]) -> Iterator[str]:
    if classical := sum(node.domain == _CLASSICAL for node in nodes):
        yield f"Parameters of {classical} classical operators ({_CLASSICAL}) are no tensors and are not listed."


def _tensor_notes(tensors: Sequence[Tensor]) -> Iterator[str]:
    kernels = [tensor for tensor in tensors if tensor.role in PRUNABLE]
    quantised = Counter(tensor.dtype.name for tensor in kernels if tensor.dtype.itemsize == 1)
    for dtype, count in sorted(quantised.items()):
        yield f"{count} of {len(kernels)} kernels are quantised to {dtype}."
    if unused := sum(not tensor.kind for tensor in tensors):
        yield f"{unused} of {len(tensors)} tensors are used by no operation."
