"""ONNX models: a protobuf with the graph, and tensors in it or in external data files beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats import state_dict
from prunectl.formats.base import PRUNABLE, Array, ModelFile, ModelInfo, NameAllocator, Role, Tensor
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.messages import Model, NodeProto, SparseProto, TensorProto, parsing
from prunectl.formats.onnx.tensors import (
    STRING,
    Located,
    SparseSource,
    TensorLocator,
    constant,
    decode_dense,
    decode_sparse,
    refuse_overlaps,
)
from prunectl.formats.onnx.usage import GraphScope, OnnxTensorPurpose, UsageIndex, read_scopes

_CLASSICAL = "ai.onnx.ml"
_TRAINING = "ai.onnx.preview.training"
_STANDARD = ("", "ai.onnx", _CLASSICAL, "ai.onnx.training", "ai.onnx.preview", _TRAINING)
_STOCK_RUNTIME = "com.microsoft"
"""The domain of the operators that onnxruntime includes."""


def about(model: Model, scopes: Sequence[GraphScope], tensors: Sequence[Tensor]) -> ModelInfo:
    """The facts about a model beside its tensors."""
    nodes = [node for scope in scopes for node in scope.graph.nodes]
    optimizers = [node.op for scope in scopes if scope.is_training for node in scope.graph.nodes if _optimises(node)]
    return ModelInfo(
        producer=_producer(model),
        optimizer=next(iter(optimizers), ""),
        training=tuple(dict.fromkeys(f"loss {node.op}" for node in nodes if node.op.endswith("Loss"))),
        code=_foreign(nodes, frozenset(scope.definition.operator for scope in scopes if scope.definition)),
        notes=(*_notes(nodes), *_tensor_notes(tensors)),
        is_compressed=any(scope.graph.sparse for scope in scopes)
        or any("sparse_value" in node.attributes for node in nodes),
    )


def _producer(model: Model) -> str:
    opset = model.opsets.get("", model.opsets.get("ai.onnx", 0))
    versions = (f"opset {opset}" if opset else "", f"IR version {model.ir_version}" if model.ir_version else "")
    return ", ".join(filter(None, (model.producer, *versions)))


def _optimises(node: NodeProto) -> bool:
    return node.domain == _TRAINING and node.op != "Gradient"


def _foreign(nodes: Sequence[NodeProto], defined: frozenset[str]) -> tuple[str, ...]:
    """The operators that need code from elsewhere: not of ONNX or onnxruntime, nor defined as functions in the file."""
    foreign = {
        node.operator
        for node in nodes
        if node.domain not in _STANDARD and node.domain.split(".nchwc")[0] != _STOCK_RUNTIME
    }
    return tuple(f"operator {name}" for name in sorted(foreign - defined))


def _notes(nodes: Sequence[NodeProto]) -> Iterator[str]:
    if classical := sum(node.domain == _CLASSICAL for node in nodes):
        yield f"Parameters of {classical} classical operators ({_CLASSICAL}) are not tensors and are not listed."


def _tensor_notes(tensors: Sequence[Tensor]) -> Iterator[str]:
    kernels = [tensor for tensor in tensors if tensor.role in PRUNABLE]
    quantised = Counter(tensor.dtype.name for tensor in kernels if tensor.dtype.itemsize == 1)
    for dtype, count in sorted(quantised.items()):
        yield f"{count} of {len(kernels)} kernels are quantised to {dtype}."
    if unused := sum(not tensor.kind for tensor in tensors):
        yield f"{unused} of {len(tensors)} tensors are not used by any operation."


_LEAVES = ("weight", "bias", "running_", "num_batches_tracked", "gamma", "beta", "kernel", "in_proj_", "alpha")
"""How the last part of a parameter's name begins in PyTorch and Keras."""


def layer_of(name: str, user: str) -> str:
    """The layer of a tensor: the prefix of its name, if the rest is a parameter's, else the node that uses it."""
    layer, _, leaf = name.rpartition(".")
    if layer and leaf.startswith(_LEAVES):
        return layer
    return user or layer or name


@dataclass(frozen=True, slots=True)
class _GraphTensor:
    """A tensor, and the graph that contains it."""

    scope: GraphScope
    name: str
    """Its name in that graph."""
    full_name: str
    """Its name in the model."""
    located: Located
    is_constant: bool


def open_model(path: Path) -> ModelFile:
    """Open an ONNX model: its graph is parsed, and its weights are not read."""
    locator = TensorLocator(path)
    with parsing(path) as reader:
        model = messages.model(reader)
        scopes = read_scopes(reader, model)
        declared = list(_graph_tensors(scopes, locator))
        uses = UsageIndex(reader, scopes)
        described = [_described(tensor, uses) for tensor in declared]
    kept = [
        (tensor, origin.located)
        for tensor, origin in zip(described, declared, strict=True)
        if not origin.is_constant or _is_parameter(tensor)
    ]
    tensors = tuple(tensor for tensor, _ in kept)
    extents = ((tensor.name, tensor.storage.extent) for tensor in tensors)
    refuse_overlaps(path, [(name, extent) for name, extent in extents if extent is not None])
    sources = {tensor.name: located.source for tensor, located in kept}

    def decode(tensor: Tensor) -> Array:
        source = sources[tensor.name]
        if isinstance(source, SparseSource):
            return decode_sparse(source, path)
        return decode_dense(source, path)

    return ModelFile(
        path=path,
        format="onnx",
        tensors=tensors,
        about=about(model, scopes, tensors),
        files=(path, *locator.neighbours.files),
        decode=decode,
    )


def _graph_tensors(scopes: tuple[GraphScope, ...], locator: TensorLocator) -> Iterator[_GraphTensor]:
    names = NameAllocator()
    for scope in scopes:
        seen: set[str] = set()
        for name, proto, is_constant in _protos(scope):
            full_name = names.unique(scope.prefix + name)
            if not name:
                raise InputError(f"{locator.path} is damaged: it holds a tensor without a name")
            if name in seen:
                raise InputError(f"{locator.path} is damaged: it holds two tensors named {abbreviated(name)}")
            seen.add(name)
            located = locator.locate(proto, full_name)
            yield _GraphTensor(scope, name, full_name, located, is_constant)


def _protos(scope: GraphScope) -> Iterator[tuple[str, TensorProto | SparseProto, bool]]:
    """Yield the numeric tensors of a graph: first its initializers, then the arrays of Constant nodes."""
    for tensor in scope.graph.initializers:
        if tensor.data_type != STRING:
            yield tensor.name, tensor, False
    for sparse in scope.graph.sparse:
        yield sparse.values.name, sparse, False
    for node in scope.graph.nodes:
        array = constant(node)
        if array is not None and not (isinstance(array, TensorProto) and array.data_type == STRING):
            yield node.outputs[0], array, True


def _described(tensor: _GraphTensor, uses: UsageIndex) -> Tensor:
    located = tensor.located
    purpose = uses.purpose(tensor.scope, tensor.name, located.shape, located.dtype)
    return Tensor(
        name=tensor.full_name,
        layer=layer_of(tensor.full_name, purpose.layer),
        shape=located.shape,
        dtype=located.dtype,
        role=_role(tensor, purpose),
        storage=located.storage,
        kind=purpose.kind,
        out_axis=purpose.out_axis,
        in_axis=purpose.in_axis,
    )


def _role(tensor: _GraphTensor, purpose: OnnxTensorPurpose) -> Role:
    """The role of a tensor; a fixed basis, such as that of a Fourier transform, is not a kernel, but a state."""
    if tensor.scope.is_training:
        return Role.OPTIMIZER
    is_fixed = purpose.role in PRUNABLE and state_dict.is_constant(tensor.full_name, purpose.layer)
    return Role.STATE if is_fixed else purpose.role


def _is_parameter(tensor: Tensor) -> bool:
    """Whether the array of a Constant node is more than a shape or a list of axes."""
    return tensor.is_float or tensor.role is not Role.OTHER or len(tensor.shape) > 1
