"""Tensors that stand in Constant nodes rather than among the initializers."""

from __future__ import annotations

from dataclasses import replace

from prunectl.formats.onnx.proto import FLOATS, Node, SparseProto, TensorProto

_FLOAT = 1


def constant(node: Node) -> TensorProto | SparseProto | None:
    """Return the array that a Constant node makes, named like its output; none for a scalar.

    Lists of whole numbers are left out too: they are shapes, axes and pads.
    """
    if node.op != "Constant" or not node.outputs:
        return None
    for name, attribute in node.attributes.items():
        if name == "value" and attribute.tensor is not None and attribute.tensor.dims:
            return replace(attribute.tensor, name=node.outputs[0])
        if name == "sparse_value" and attribute.sparse is not None:
            return replace(attribute.sparse, values=replace(attribute.sparse.values, name=node.outputs[0]))
        if name == "value_floats":
            nbytes = sum(end - begin for begin, end in attribute.floats)
            return TensorProto(node.outputs[0], (nbytes // 4,), _FLOAT, {FLOATS: attribute.floats})
    return None
