"""ONNX: a protobuf with the graph, its tensors in it or in files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats import kernel_names
from prunectl.formats.base import PRUNABLE, Array, ModelFile, Role, Tensor
from prunectl.formats.onnx import decode as onnx_decode
from prunectl.formats.onnx import messages
from prunectl.formats.onnx import scopes as onnx_scopes
from prunectl.formats.onnx.about import about
from prunectl.formats.onnx.constants import constant
from prunectl.formats.onnx.decode import Scattered
from prunectl.formats.onnx.dtypes import STRING
from prunectl.formats.onnx.external import refuse_overlaps
from prunectl.formats.onnx.names import Names, layer_of
from prunectl.formats.onnx.proto import SparseProto, TensorProto
from prunectl.formats.onnx.scopes import Scope
from prunectl.formats.onnx.tensors import Located, Locator
from prunectl.formats.onnx.uses import Purpose, Uses
from prunectl.formats.onnx.wire import reading


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor, and the graph that it stands in."""

    scope: Scope
    name: str
    """Its name in that graph."""
    full_name: str
    """Its name in the model."""
    located: Located
    is_constant: bool


def open_model(path: Path) -> ModelFile:
    """Open an ONNX model: its graph is read, its weights are not."""
    locator = Locator(path)
    with reading(path) as reader:
        model = messages.model(reader)
        scopes = onnx_scopes.read(reader, model)
        found = list(_found(scopes, locator))
        uses = Uses(reader, scopes)
        described = [_described(tensor, uses) for tensor in found]
    kept = [
        (tensor, origin.located)
        for tensor, origin in zip(described, found, strict=True)
        if not origin.is_constant or _is_parameter(tensor)
    ]
    tensors = tuple(tensor for tensor, _ in kept)
    extents = ((tensor.name, tensor.storage.extent) for tensor in tensors)
    refuse_overlaps(path, [(name, extent) for name, extent in extents if extent is not None])
    sources = {tensor.name: located.source for tensor, located in kept}

    def decode(tensor: Tensor) -> Array:
        source = sources[tensor.name]
        if isinstance(source, Scattered):
            return onnx_decode.scattered(source, path)
        return onnx_decode.dense(source, path)

    return ModelFile(
        path=path,
        format="onnx",
        tensors=tensors,
        about=about(model, scopes, tensors),
        files=(path, *locator.neighbours.files),
        decode=decode,
    )


def _found(scopes: tuple[Scope, ...], locator: Locator) -> Iterator[_Found]:
    names = Names()
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
            yield _Found(scope, name, full_name, located, is_constant)


def _protos(scope: Scope) -> Iterator[tuple[str, TensorProto | SparseProto, bool]]:
    """Yield what a graph holds in tensors of numbers: initializers first, then the arrays of Constant nodes."""
    for tensor in scope.graph.initializers:
        if tensor.data_type != STRING:
            yield tensor.name, tensor, False
    for sparse in scope.graph.sparse:
        yield sparse.values.name, sparse, False
    for node in scope.graph.nodes:
        array = constant(node)
        if array is not None and not (isinstance(array, TensorProto) and array.data_type == STRING):
            yield node.outputs[0], array, True


def _described(tensor: _Found, uses: Uses) -> Tensor:
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
    )


def _role(tensor: _Found, purpose: Purpose) -> Role:
    """Return what a tensor is for: a fixed basis is none to prune, although a product takes it."""
    if tensor.scope.is_training:
        return Role.OPTIMIZER
    is_fixed = purpose.role in PRUNABLE and kernel_names.is_constant(tensor.full_name, purpose.layer)
    return Role.STATE if is_fixed else purpose.role


def _is_parameter(tensor: Tensor) -> bool:
    """Whether the array of a Constant node is more than a shape or a list of axes."""
    return tensor.is_float or tensor.role is not Role.OTHER or len(tensor.shape) > 1
