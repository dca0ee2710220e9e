"""Shape inference and constant folding of an ONNX graph.

The shape inference of onnx does not know onnxruntime's fused operators: `replace_fused` puts stand-ins in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prunectl.channels.lengths import TRIED_LENGTHS, UNKNOWN_LENGTHS, AxisLengths
from prunectl.errors import InputError, first_line
from prunectl.formats import budgets
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import STANDARD_DOMAINS, get_attribute, inner_graphs, input_of, output_of
from prunectl.training.backend import ModelSignature
from prunectl.training.onnx.session import port_spec

_SMALL = 64
"""The most elements of a float tensor that may be a list of scales or sizes, not a weight."""
_FOLDED = 4096
"""The most elements of other constants, and of the results of constant folding, that are used."""
_FLOAT = 1
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""The exceptions that onnx raises for operators or arrays that it does not support; others are no fault of a model."""
_RANDOM_OPS = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})
_GROWING_OPS = frozenset(
    {
        *("AffineGrid", "BlackmanWindow", "CenterCropPad", "Col2Im", "ConstantOfShape", "DFT", "Expand"),
        *("HammingWindow", "HannWindow", "MaxUnpool", "MelWeightMatrix", "OneHot", "Pad", "Range", "Resize"),
        *("Tile", "Upsample"),
    }
)
"""The operators whose outputs may be much larger than their inputs, as they take their size from input values."""
MICROSOFT = "com.microsoft"
_LIKE_FIRST = frozenset(
    {
        *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "RotaryEmbedding", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    }
)
"""The fused operators whose output has the shape of the first input."""
_NEEDED = {"MultiHeadAttention": (0, 1, 2), "EmbedLayerNormalization": (0, 2)}
"""The positions of the inputs that determine the output shape, if not only the first."""
_ACTIVATION = frozenset({"activation", "activation_params"})
_SUM = 3
"""The output of SkipLayerNormalization that holds the sum of input and skip connection."""


@dataclass(slots=True)
class StaticValues:
    """Shapes and constants, by the name of the value."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    length_hint: str = ""
    """A hint on how to give the lengths of open axes; empty if none were assumed."""


def infer_static(proto: Any, name: str, lengths: AxisLengths = UNKNOWN_LENGTHS) -> StaticValues:
    """Infer the shapes and constants of the main graph; an open batch axis counts as 1."""
    error_line = ""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [port for port in proto.graph.input if port.name not in initializers]
    given_shapes = lengths.resolve(ModelSignature(tuple(map(port_spec, inputs)), (), is_channels_first=True))
    is_open = any(None in (port.shape or ()) for port in map(port_spec, inputs))
    hint = f"give the lengths of open axes with --input {_example(inputs)}, or with --data SPEC" if is_open else ""
    inference_error = require("onnx.shape_inference", extra="onnx").InferenceError
    for length in TRIED_LENGTHS[: 1 if given_shapes else None]:
        skeleton = _without_large_weights(proto, length, given_shapes)
        try:
            return replace(_inferred(skeleton, _constants(proto)), length_hint="" if given_shapes else hint)
        except (inference_error, *_MISFITS) as error:
            error_line = first_line(error)
    raise InputError(f"the shapes in {name} cannot be inferred: {error_line}", hint=hint)


def _example(ports: Iterable[Any]) -> str:
    return " --input ".join(
        f"{port.name}:{','.join(map(str, map(_example_length, range(len(axes)), axes))) or 1}"
        for port in ports
        for axes in [port.type.tensor_type.shape.dim]
    )


def _example_length(number: int, axis: Any) -> int:
    is_batch = number == 0 or "batch" in axis.dim_param.casefold()
    return int(axis.dim_value) or (1 if is_batch else TRIED_LENGTHS[-1] * 2)


def shape_of(port: Any) -> tuple[int, ...] | None:
    """The shape of a graph input, output or value; None if not every length is known."""
    tensor_type = port.type.tensor_type
    if not tensor_type.HasField("shape") or any(not axis.HasField("dim_value") for axis in tensor_type.shape.dim):
        return None
    return tuple(axis.dim_value for axis in tensor_type.shape.dim)


def _constants(proto: Any) -> dict[str, Array]:
    to_array = require("onnx.numpy_helper", extra="onnx").to_array
    constants = {tensor.name: to_array(tensor) for tensor in proto.graph.initializer if _is_constant(tensor)}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
            for attribute in node.attribute:
                if attribute.name != "value" or _is_constant(attribute.t):
                    constants |= _run(proto, node, {})
    return constants


def _is_constant(tensor: Any) -> bool:
    """Whether a tensor may hold a shape, sizes, axes or scales, or an initial state of zeros."""
    size = math.prod(tensor.dims)
    return size <= _SMALL or (size <= _FOLDED and (tensor.data_type != _FLOAT or _is_zero(tensor)))


def _is_zero(tensor: Any) -> bool:
    return not tensor.external_data and not any(tensor.raw_data) and not any(tensor.float_data)


def _without_large_weights(proto: Any, length: int, given_shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A copy of the model without the values of large weights, and with a length for every open axis of its inputs."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    skeleton = type(proto)(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    graph = skeleton.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    batches = {""}
    for port in graph.input:
        if port.name in initializers:
            continue
        for number, axis in enumerate(port.type.tensor_type.shape.dim):
            if axis.HasField("dim_value") and axis.dim_value > 0:
                continue
            if number == 0:
                batches.add(axis.dim_param)
            is_batch = number == 0 or (axis.dim_param and axis.dim_param in batches)
            given_shape = given_shapes.get(port.name, ())
            axis.dim_value = given_shape[number - 1] if number and given_shape else 1 if is_batch else length
    for port in graph.output:
        port.type.tensor_type.ClearField("shape")
    make_port = require("onnx.helper", extra="onnx").make_tensor_value_info
    listed = {port.name for port in graph.input}
    for tensor in proto.graph.initializer:
        if _is_constant(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(make_port(tensor.name, tensor.data_type, list(tensor.dims)))
    replace_fused(graph, {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer})
    return skeleton


def _inferred(skeleton: Any, constants: dict[str, Array]) -> StaticValues:
    """Infer shapes and fold constants in turns, until no further node can be folded."""
    inference = require("onnx.shape_inference", extra="onnx")
    helper = require("onnx.numpy_helper", extra="onnx")
    while True:
        inferred = inference.infer_shapes(skeleton, data_prop=True).graph
        ports = (*inferred.input, *inferred.value_info, *inferred.output)
        shapes = {port.name: shape for port in ports if (shape := shape_of(port)) is not None}
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in skeleton.graph.initializer}
        state = StaticValues(shapes, constants)
        folded = dict(_folded(skeleton, state))
        if any(length < 0 for shape in shapes.values() for length in shape):
            raise ValueError("a length below zero")
        if not folded:
            return state
        constants |= folded
        kept = [node for node in skeleton.graph.node if not set(node.output) <= folded.keys()]
        del skeleton.graph.node[:]
        skeleton.graph.node.extend(kept)
        outputs = {port.name for port in skeleton.graph.output}
        skeleton.graph.initializer.extend(
            helper.from_array(value, name) for name, value in folded.items() if name not in outputs
        )


def _folded(skeleton: Any, state: StaticValues) -> Iterator[tuple[str, Array]]:
    """Yield the outputs of nodes whose inputs are all constant, and of Shape nodes with a known shape."""
    folded: dict[str, Array] = {}
    remaining = budgets.MAX_ONNX_FOLDED
    for node in skeleton.graph.node:
        if node.domain not in STANDARD_DOMAINS or node.op_type in _RANDOM_OPS or any(inner_graphs(node)):
            continue
        inputs: Mapping[str, Array] = {
            name: value for name in node.input if (value := _value(name, state, folded)) is not None
        }
        if node.op_type == "Shape" and node.input[0] in state.shapes:
            placeholder = np.broadcast_to(np.zeros((), np.float32), state.shapes[node.input[0]])
            folded |= _run(skeleton, node, {node.input[0]: placeholder})
        elif node.input and all(name in inputs for name in node.input if name):
            most = _most(node, inputs, state)
            if most is not None and most <= remaining:
                results = _run(skeleton, node, inputs)
                remaining -= sum(value.size for value in results.values())
                folded |= results
    yield from ((name, value) for name, value in folded.items() if value.size <= _FOLDED)


def _most(node: Any, inputs: Mapping[str, Array], state: StaticValues) -> int | None:
    """The largest number of output elements of a node; None if it may grow and its shapes are not inferred yet."""
    shapes = [state.shapes.get(name) for name in node.output if name]
    if None not in shapes:
        return sum(math.prod(shape) for shape in shapes if shape is not None)
    return None if node.op_type in _GROWING_OPS else math.prod(max(value.size, 1) for value in inputs.values())


def _value(name: str, state: StaticValues, folded: Mapping[str, Array]) -> Array | None:
    return folded[name] if name in folded else state.constants.get(name)


def _run(proto: Any, node: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a node by name; empty if the reference implementation of onnx does not support it."""
    onnx = require("onnx", extra="onnx")
    reference = require("onnx.reference", extra="onnx")
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=list(proto.opset_import))
    try:
        results = reference.ReferenceEvaluator(model).run(None, dict(feeds))
    except _MISFITS:
        return {}
    names = [name for name in node.output if name]
    return {name: value for name, value in zip(names, results, strict=True) if hasattr(value, "dtype")}


def replace_fused(graph: Any, dims: Mapping[str, tuple[int, ...]]) -> None:
    """Replace onnxruntime's fused operators, unknown to shape inference, with ONNX operators of the same output shape.

    The graph must be a copy that is never run; ``dims`` are the shapes of the weights.
    """
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        is_fused = node.domain == MICROSOFT or (
            node.domain in STANDARD_DOMAINS and node.op_type == "SimplifiedLayerNormalization"
        )
        graph.node.extend((is_fused and list(_stand_ins(graph, node, dims))) or [node])


def _stand_ins(graph: Any, node: Any, dims: Mapping[str, tuple[int, ...]]) -> Iterator[Any]:
    """Yield ONNX nodes with the same output shapes; none if the node lacks an input, or its operator is not known."""
    helper = require("onnx.helper", extra="onnx")
    result = output_of(node, 0)
    if not result or not all(input_of(node, position) for position in _NEEDED.get(node.op_type, (0,))):
        return
    if node.op_type in _LIKE_FIRST:
        # Not Identity, which would be folded if its input is constant.
        for name in filter(None, (result, output_of(node, _SUM))):
            yield helper.make_node("RandomNormalLike", [node.input[0]], [name])
    elif node.op_type == "MultiHeadAttention":
        query, key, value = node.input[:3]
        yield helper.make_node("Transpose", [key], [f"{result}/key"], perm=[0, 2, 1])
        yield helper.make_node("MatMul", [query, f"{result}/key"], [f"{result}/scores"])
        yield helper.make_node("MatMul", [f"{result}/scores", value], [result])
    elif node.op_type == "EmbedLayerNormalization":
        yield helper.make_node("Gather", [node.input[2], node.input[0]], [result])
    elif node.op_type == "FusedConv" and input_of(node, 1):
        convolution = helper.make_node("Conv", node.input[:2], [result])
        convolution.attribute.extend(item for item in node.attribute if item.name not in _ACTIVATION)
        yield convolution
    elif (shape := _weight_shape(node, dims.get(input_of(node, 1), ()))) is not None:
        weight = f"{result}/weight"
        graph.input.append(helper.make_tensor_value_info(weight, _FLOAT, shape))
        yield helper.make_node("MatMul", [node.input[0], weight], [result])


def _weight_shape(node: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shape of a matrix that gives the same output shape in a MatMul with the first input; None if not known."""
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if node.op_type == "MatMulNBits":
        rows, columns = get_attribute(node, "K", 0), get_attribute(node, "N", 0)
    elif node.op_type == "Attention":
        sizes = get_attribute(node, "qkv_hidden_sizes", (columns // 3,) * 3)
        columns = sizes[2] if isinstance(sizes, tuple) and len(sizes) == 3 else 0
    elif node.op_type in {"FusedMatMul", "FusedGemm"}:
        if any(get_attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return None
        if get_attribute(node, "transB", 0):
            rows, columns = columns, rows
    else:
        return None
    return (
        (rows, columns)
        if all(isinstance(size, int) and 0 < size <= budgets.MAX_ELEMENTS for size in (rows, columns))
        else None
    )
