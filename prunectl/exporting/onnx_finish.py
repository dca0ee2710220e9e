"""The last steps of every ONNX export: canonical names and order, opset check, precision, metadata, `onnx.checker`.

Names and the order of nodes follow from the source, not from the converter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.job import ExportJob
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.weights import cast_down
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.graphs.onnx import (
    all_graphs,
    copy_message,
    inner_graphs,
    is_too_large,
    load_message,
    names_defined,
    names_read,
    opset_of,
)
from prunectl.training.quiet import quiet_logging

BATCH = "batch"
_FOLDED_BIAS = "_bias"
"""Suffix that PyTorch's exporter gives the bias of a layer that had none before batch-norm folding."""
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_NUMBERED_NAME = "onnx::"
_ORDERS: tuple[tuple[int, ...], ...] = ((1, 0), (3, 2, 0, 1), (2, 1, 0), (4, 3, 0, 1, 2), (2, 3, 0, 1))
"""Axis orders into which converters transpose kernels."""


def canonical_names(
    proto: Any,
    file: ModelFile,
    inputs: Sequence[str],
    outputs: Sequence[str],
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Name weights as the source does, inputs and outputs as specified, and everything else by its operator.

    Weights are matched by fingerprint; where a converter has changed them, as it folds a batch normalisation into a
    convolution, by `parameters`, which maps the names that the converter kept to those of the file.
    """
    graph = proto.graph
    known_names, parameter_names = known_weights(file), _parameter_names(graph, parameters or {})
    to_array = require("onnx.numpy_helper", extra="onnx").to_array

    def weight(initializer: Any) -> str:
        return known_names.get(fingerprint(to_array(initializer))) or parameter_names.get(initializer.name, "constant")

    canonical_order(graph)
    names = {port.name: name for port, name in zip(graph.input, inputs, strict=True)}
    for port, name in zip(graph.output, outputs, strict=True):
        if port.name in names:
            # An output is also an input, or another output: it is handed on under a name of its own.
            port.name = _add_identity(graph, port.name, name)
        names[port.name] = name
    _rename_values(graph, names, _UnusedNames([*inputs, *outputs]), weight)
    graph.name = file.path.stem
    _name_axes(graph)


def known_weights(file: ModelFile) -> dict[str, str]:
    """Weight names by fingerprint, for every axis order; ambiguous fingerprints are left out."""
    names: dict[str, str] = {}
    duplicates: set[str] = set()
    for tensor in file.tensors:
        if tensor.size < 2 or tensor.name in file.duplicates or not tensor.is_float:
            continue
        array = file.read(tensor)
        orders = [order for order in _ORDERS if len(order) == array.ndim]
        for digest in {fingerprint(array), *(fingerprint(array.transpose(order)) for order in orders)}:
            if digest in names:
                duplicates.add(digest)
            names[digest] = tensor.name
    return {digest: name for digest, name in names.items() if digest not in duplicates}


def fingerprint(array: Array) -> str:
    """SHA-256 of an array's bytes, shape and dtype."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.name)).encode())
    return digest.hexdigest()


def _parameter_names(graph: Any, parameters: Mapping[str, str]) -> dict[str, str]:
    """Canonical names for initializers that the converter has named after parameters."""
    names: dict[str, str] = {}
    for initializer in (each for inner in all_graphs(graph) for each in inner.initializer):
        # What a convolution without a bias gets from the normalisation behind it is its bias now.
        weight = initializer.name.removesuffix(_FOLDED_BIAS)
        if initializer.name in parameters:
            names[initializer.name] = parameters[initializer.name]
        elif initializer.name.endswith(_FOLDED_BIAS) and weight in parameters:
            names[initializer.name] = f"{parameters[weight].removesuffix('weight')}bias"
    for node in graph.node:
        # The older exporter names nodes after their modules, and what it has folded by numbers.
        scope = ".".join(node.name.strip("/").split("/")[:-1])
        for name, leaf in zip(node.input[1:], ("weight", "bias"), strict=False):
            parameter = parameters.get(f"{scope}.weight") if node.op_type in _CONVOLUTIONS else None
            if parameter is not None and name.startswith(_NUMBERED_NAME) and name not in names:
                names[name] = parameter if leaf == "weight" else f"{parameter.removesuffix('weight')}bias"
    return names


def _add_identity(graph: Any, old: str, name: str) -> str:
    helper = require("onnx.helper", extra="onnx")
    node_output = f"{old}/{name}"
    graph.node.append(helper.make_node("Identity", [old], [node_output]))
    return node_output


def _rename_values(graph: Any, outer: Mapping[str, str], unused: _UnusedNames, weight: Callable[[Any], str]) -> None:
    names = dict(outer)
    for initializer in graph.initializer:
        if initializer.name not in names:
            names[initializer.name] = unused.free(weight(initializer))
    for port in graph.input:
        if port.name not in names:
            names[port.name] = unused.free("inner")
    for node in graph.node:
        kind = node.op_type.lower()
        for value in node.output:
            if value and value not in names:
                names[value] = unused.free(kind)
        node.name = unused.free(f"{kind}_node")
        for _, inner in inner_graphs(node):
            # A name inside may be that of a value around it, which it hides.
            hidden = names_defined(inner)
            _rename_values(inner, {old: new for old, new in names.items() if old not in hidden}, unused, weight)
            inner.name = unused.free("body")
    _apply_names(graph, names)
    del graph.value_info[:]


class _UnusedNames:
    """Generator of unused names."""

    def __init__(self, taken: Sequence[str]) -> None:
        self._taken = set(taken)
        self._counts: Counter[str] = Counter()

    def free(self, name: str) -> str:
        """The name itself, or with the first free number appended."""
        unused = name
        while unused in self._taken:
            self._counts[name] += 1
            unused = f"{name}_{self._counts[name]}"
        self._taken.add(unused)
        return unused


def _apply_names(graph: Any, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)


def _name_axes(graph: Any) -> None:
    """Name the symbolic batch axis `batch`, and others after the first port that has them, not by a counter."""
    names: dict[str, str] = {}
    for port in (*graph.input, *graph.output):
        for index, axis in enumerate(port.type.tensor_type.shape.dim):
            if axis.dim_param:
                axis.dim_param = names.setdefault(axis.dim_param, BATCH if index == 0 else f"{port.name}_{index}")


def canonical_order(graph: Any) -> None:
    """Topological sort, depth first from the first output on; nodes and initializers that nothing needs are dropped."""
    for node in graph.node:
        for _, inner in inner_graphs(node):
            canonical_order(inner)
    nodes = [copy_message(node) for node in graph.node]
    producers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    ordered = _topological_order(nodes, producers, [port.name for port in graph.output])
    del graph.node[:]
    graph.node.extend(nodes[index] for index in ordered)
    used = dict.fromkeys(name for node in graph.node for name in names_read(node))
    used |= dict.fromkeys(port.name for port in graph.output)
    initializers = {initializer.name: copy_message(initializer) for initializer in graph.initializer}
    del graph.initializer[:]
    graph.initializer.extend(initializers[name] for name in used if name in initializers)


def _topological_order(nodes: list[Any], producers: dict[str, int], wanted: Iterable[str]) -> list[int]:
    ordered: dict[int, None] = {}
    visited: set[int] = set()
    pending = [producers[name] for name in reversed(list(wanted)) if name in producers]
    while pending:
        index = pending[-1]
        if index in ordered:
            pending.pop()
            continue
        missing = [
            producers[name] for name in names_read(nodes[index]) if name in producers and producers[name] not in ordered
        ]
        if not missing or index in visited:
            ordered[index] = None
            pending.pop()
            continue
        visited.add(index)
        pending.extend(reversed(missing))
    return list(ordered)


OPSET = 18
"""What exporters write unless `--opset` says otherwise."""
_SMALL_BYTES = 1024
"""Initializers below this size stay in the file, as shapes do."""


def finalize(job: ExportJob, proto: Any, target: Path, metadata: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Reduce the precision, set the metadata, write and check a model; returns notes for the user."""
    clear_metadata(proto)
    _check_opset(job, proto)
    reduced, notes = reduce_precision(job, proto)
    del reduced.metadata_props[:]
    for key, value in {**(metadata or {}), **dict(job.request.metadata)}.items():
        reduced.metadata_props.add(key=key, value=value)
    if is_too_large(reduced):
        notes += (save_external(job, reduced, target),)
    target.write_bytes(reduced.SerializeToString(deterministic=True))
    check_valid(target)
    return notes


def _check_opset(job: ExportJob, proto: Any) -> None:
    """Refuse another opset than requested: exporters silently take the nearest that they know."""
    wanted, actual = job.request.opset, opset_of(proto)
    if wanted is not None and wanted != actual:
        raise WorkError(
            f"the export of {job.file.path} has opset {actual} instead of {wanted}; nothing was written",
            hint=f"export with --opset {actual}, then run: prunectl export OUT -o OLDER.onnx --opset {wanted}",
        )


def clear_metadata(proto: Any) -> None:
    """Remove metadata and doc strings, in which exporters leave stack traces with paths."""
    entries = [proto, *proto.functions, *(node for function in proto.functions for node in function.node)]
    for graph in all_graphs(proto.graph):
        entries += [graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info]
    for entry in entries:
        del entry.metadata_props[:]
        entry.doc_string = ""


def save_external(job: ExportJob, proto: Any, target: Path) -> str:
    """Move the weights into an external data file; returns a note for the user."""
    if job.request.pack or job.request.sparse:
        raise WorkError(
            f"{job.file.path} needs two files as ONNX (more than 2 GB), which --pack and --sparse cannot write",
            hint="leave out --pack and --sparse",
        )
    helper = require("onnx.external_data_helper", extra="onnx")
    name = f"{target.name}.data"
    helper.convert_model_to_external_data(proto, location=name, size_threshold=_SMALL_BYTES)
    helper.write_external_data_tensors(proto, str(target.parent))
    return f"The model is larger than 2 GB, so its weights are in {name}: keep the two files together."


def check_valid(target: Path) -> None:
    """Refuse a model that `onnx.checker` refuses, shape inference included."""
    if reason := checker_error(target):
        raise WorkError(f"the result is not valid ONNX: {reason}; nothing was written")


def checker_error(path: Path) -> str:
    """The complaint of `onnx.checker` about a model; empty if it is valid."""
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - it raises what it likes
        return first_line(error)
    return ""


_DYNAMIC_OPERATORS = ["MatMul", "Gemm", "LSTM", "Gather"]
"""Operators with a dynamically quantized form, whose input ranges need no calibration."""
_FIRST_OPSET = 13
"""Since when Cast takes bfloat16, and each channel of a quantised kernel has a scale of its own."""
_WIDE = frozenset({"float32", "float64"})


def reduce_precision(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    """Apply --half, --bf16 or --int8; returns the model and notes for the user."""
    request = job.request
    if not (request.half or request.bf16 or request.int8):
        return proto, ()
    fixed = _fix_default_inputs(proto)
    if request.int8:
        result, notes = (_quantize_static if request.data else _quantize_dynamic)(job, proto)
        return result, (*fixed, *notes)
    if request.half:
        note = "The weights are 16-bit floats; inputs and outputs keep their types."
        return _to_float16(job, proto), (*fixed, note)
    note = "The kernels are bfloat16 and are converted to float32 where they are used."
    return to_bfloat16(proto, request), (*fixed, note)


_CONSTANT_IR = 4
"""Since when an initializer need not be an input too."""


def _fix_default_inputs(proto: Any) -> tuple[str, ...]:
    """Make constants of weights that are inputs with a default, which would keep their type; returns notes."""
    names = {tensor.name for tensor in proto.graph.initializer}
    inputs = [port for port in proto.graph.input if port.name not in names]
    fixed = len(proto.graph.input) - len(inputs)
    if not fixed:
        return ()
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.ir_version = max(proto.ir_version, _CONSTANT_IR)
    return (f"Weights that the source also lists as inputs ({fixed}) can no longer be fed to the model.",)


def _to_float16(job: ExportJob, proto: Any) -> Any:
    converter = require("onnxruntime.transformers.float16", extra="onnx")
    try:
        converted = converter.convert_float_to_float16(proto, keep_io_types=True)
    except Exception as error:
        raise _failed(job, "--half", error) from error
    # It puts its casts behind what they are for.
    canonical_order(converted.graph)
    return converted


def to_bfloat16(proto: Any, request: ExportRequest) -> Any:
    """Store kernels as bfloat16 with a Cast in front of their readers; vectors keep their type."""
    _require_opset(proto, "--bf16")
    _narrow_kernels(proto.graph, request)
    return proto


def _require_opset(proto: Any, option: str) -> None:
    opset = opset_of(proto)
    if opset is not None and opset < _FIRST_OPSET:
        raise UsageError(
            f"{option} needs ONNX opset {_FIRST_OPSET}, but the model has {opset}", hint=f"add --opset {_FIRST_OPSET}"
        )


def _narrow_kernels(graph: Any, request: ExportRequest) -> None:
    helper = require("onnx.helper", extra="onnx")
    numbers = require("onnx.numpy_helper", extra="onnx")
    ports = {port.name for port in (*graph.input, *graph.output)}
    used_names = {name for node in graph.node for name in (*node.input, *node.output)}
    widened: dict[str, str] = {}
    nodes = []
    for initializer in graph.initializer:
        array = numbers.to_array(initializer)
        # Numbers of one axis may say a shape, which is inferred from what they are.
        if array.dtype.name in _WIDE and array.ndim > 1 and initializer.name not in ports:
            widened[initializer.name] = _free(f"{initializer.name}_wide", used_names)
            cast = [initializer.name], [widened[initializer.name]]
            nodes.append(
                helper.make_node("Cast", *cast, name=f"{widened[initializer.name]}_node", to=initializer.data_type)
            )
            initializer.CopyFrom(numbers.from_array(cast_down(request, initializer.name, array), initializer.name))
    for node in graph.node:
        for _, inner in inner_graphs(node):
            _narrow_kernels(inner, request)
    _redirect_reads(graph, widened)
    nodes += [copy_message(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _free(name: str, used_names: set[str]) -> str:
    while name in used_names:
        name += "_"
    used_names.add(name)
    return name


def _redirect_reads(graph: Any, names: Mapping[str, str]) -> None:
    """Make the readers of some values read others, in inner graphs too."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for _, inner in inner_graphs(node):
            hidden = names_defined(inner)
            _redirect_reads(inner, {old: new for old, new in names.items() if old not in hidden})


# Two products of eight bits overflow the sixteen in which x86 processors without VNNI add them up.
_SEVEN_BITS = "Weights use 7 of the 8 bits, so that sums cannot overflow on any processor."


def _quantize_dynamic(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    quantization = require("onnxruntime.quantization", extra="onnx")
    # It infers every shape anew, and exporters leave some between that no longer hold, which it would stumble over.
    del proto.graph.value_info[:]

    def quantize(before: str, after: str, has_external_data: bool) -> None:
        quantization.quantize_dynamic(
            before,
            after,
            op_types_to_quantize=_DYNAMIC_OPERATORS,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=has_external_data,
            reduce_range=True,
            extra_options={"WeightSymmetric": True},
        )

    return _through_files(job, proto, quantize), (
        "Weights of dense and recurrent layers are 8-bit integers; those of convolutions need --data.",
        _SEVEN_BITS,
    )


def _quantize_static(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    _require_opset(proto, "--int8 with --data")
    quantization = require("onnxruntime.quantization", extra="onnx")
    feeds = [
        {port.name: array for port, array in zip(proto.graph.input, batch, strict=True)}
        for batch in job.samples.batches
    ]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self._left: Iterator[dict[str, Array]] = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    def quantize(before: str, after: str, has_external_data: bool) -> None:
        quantization.quantize_static(
            before,
            after,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=has_external_data,
            per_channel=True,
            reduce_range=True,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )

    return _through_files(job, proto, quantize), (
        f"Weights and activations are 8-bit integers, calibrated on {job.samples.examples} examples.",
        _SEVEN_BITS,
    )


def _through_files(job: ExportJob, proto: Any, quantize: Callable[[str, str, bool], None]) -> Any:
    before, after = job.scratch / "floats.onnx", job.scratch / "integers.onnx"
    has_external_data = is_too_large(proto)
    require("onnx", extra="onnx").save(proto, before, save_as_external_data=has_external_data, location="floats.data")
    try:
        with quiet_logging():
            quantize(str(before), str(after), has_external_data)
    except Exception as error:
        raise _failed(job, "--int8", error) from error
    return load_message(after)


def _failed(job: ExportJob, option: str, error: Exception) -> WorkError:
    return WorkError(f"onnxruntime cannot apply {option} to {job.file.path}: {first_line(error)}")
