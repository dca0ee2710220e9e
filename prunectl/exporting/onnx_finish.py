"""The last steps of every ONNX export: canonical order, opset check, precision, metadata, `onnx.checker`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.job import ExportJob
from prunectl.exporting.onnx_inline import inline_functions
from prunectl.exporting.onnx_names import canonical_order
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.weights import cast_down
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import (
    all_graphs,
    all_tensors,
    copy_message,
    dense_slot,
    inner_graphs,
    is_too_large,
    load_message,
    names_defined,
    opset_of,
    remove_sources,
)
from prunectl.training.quiet import quiet_logging
from prunectl.units import listed

OPSET = 18
"""Opset that exporters write without `--opset`."""
_SMALL_BYTES = 1024
"""Initializers below this size, such as shapes, stay in the file."""


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
    """Refuse an opset other than the requested one: exporters silently use the nearest that they support."""
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
    """The error of `onnx.checker` for a model; empty if it is valid."""
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises errors of many types
        return first_line(error)
    return ""


_DYNAMIC_OPERATORS = ["MatMul", "Gemm", "LSTM", "Gather"]
"""Operators with a dynamically quantized form, whose input ranges need no calibration."""
_FIRST_OPSET = 13
"""First opset in which Cast takes bfloat16, and a quantised kernel has a scale for each channel."""
_WIDE = frozenset({"float32", "float64"})


def reduce_precision(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    """Apply --half, --bf16 or --int8; returns the model and notes for the user."""
    request = job.request
    if not (request.half or request.bf16 or request.int8):
        return proto, ()
    fixed = _fix_default_inputs(proto)
    try:
        proto = inline_functions(proto, saving=4 if request.int8 else 2)
    except Exception as error:
        raise _conversion_error(job, _option(request), error) from error
    _store_constants(proto)
    wide = _wide_tensors(proto)
    result, notes = proto, tuple[str, ...]()
    if wide and request.int8:
        result, notes = (_quantize_static if request.data else _quantize_dynamic)(job, proto)
    elif wide and request.half:
        notes = ("The weights are 16-bit floats; inputs and outputs keep their types.",)
        result = _to_float16(job, proto)
    elif wide:
        notes = ("The kernels are bfloat16 and are converted to float32 where they are used.",)
        result = to_bfloat16(proto, request)
    left = wide.keys() & _wide_tensors(result).keys()
    kept = [f"{name} ({tensor.kind})" for name, tensor in wide.items() if name in left and tensor.is_matrix]
    if len(left) == len(wide):
        named = kept or [f"{name} ({tensor.kind})" for name, tensor in wide.items()]
        raise _unchanged(job, named, has_functions=bool(result.functions))
    return result, (*fixed, *notes, *([f"Not converted: {listed(kept, _SHOWN, 'others')}."] if kept else []))


def _store_constants(proto: Any) -> None:
    """Make initializers of the float arrays of Constant nodes, which the converters leave as they are."""
    outputs = {port.name for port in proto.graph.output}
    tensors = [tensor for _, tensor in all_tensors(proto) if tensor.is_main and tensor.node is not None]
    constants = [tensor for tensor in tensors if tensor.dense is not None and tensor.data_type in _KINDS]
    # The converter to 16 bits fails on an initializer that is an output.
    constants = [tensor for tensor in constants if tensor.name not in outputs]
    for tensor in constants:
        slot = dense_slot(tensor)
        slot.CopyFrom(tensor.dense)
        slot.name = tensor.name
    remove_sources(constants)
    proto.ir_version = max(proto.ir_version, _CONSTANT_IR)


_SHOWN = 5
_KINDS = {1: "float32", 11: "float64"}


@dataclass(frozen=True, slots=True)
class _WideTensor:
    kind: str
    is_matrix: bool
    """Whether more than one axis is longer than 1, so that leaving the tensor as it is matters."""


def _wide_tensors(proto: Any) -> dict[str, _WideTensor]:
    """The tensors of 32 or 64 bits of a model."""
    found = {}
    for name, tensor in all_tensors(proto):
        # A list of floats, which a Constant node may hold instead, is converted by nothing.
        stored = tensor.dense or tensor.sparse
        if tensor.data_type in _KINDS and stored is not None:
            is_matrix = sum(length > 1 for length in stored.dims) > 1
            found[name] = _WideTensor(_KINDS[tensor.data_type], is_matrix)
    return found


def _option(request: ExportRequest) -> str:
    return "--int8" if request.int8 else "--half" if request.half else "--bf16"


def _unchanged(job: ExportJob, kept: Sequence[str], *, has_functions: bool) -> UsageError:
    """The refusal of an option that would change no weight."""
    request = job.request
    option = _option(request)
    if not kept:
        return UsageError(
            f"{option} changes nothing: {job.file.path} has no weights of 32-bit floats", hint=f"leave out {option}"
        )
    needs_data = request.int8 and not request.data and not has_functions
    return UsageError(
        f"{option} changes nothing: onnxruntime converts none of the weights of {job.file.path}, which are "
        f"{listed(kept, _SHOWN, 'others')}",
        hint="add --data SPEC: convolutions are quantised only with it" if needs_data else f"leave out {option}",
    )


_CONSTANT_IR = 4
"""First IR version in which an initializer need not be listed as an input."""


def _fix_default_inputs(proto: Any) -> tuple[str, ...]:
    """Unlist weights as inputs (which makes them constants), as listed ones keep their dtype; returns notes."""
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
        # What is inside a function keeps its types, so calls of it keep those of their inputs.
        blocked = [*converter.DEFAULT_OP_BLOCK_LIST, *(function.name for function in proto.functions)]
        converted = converter.convert_float_to_float16(proto, keep_io_types=True, op_block_list=blocked)
    except Exception as error:
        raise _conversion_error(job, "--half", error) from error
    # The converter puts its Cast nodes after the nodes that read them.
    canonical_order(converted.graph)
    return converted


def to_bfloat16(proto: Any, request: ExportRequest) -> Any:
    """Store kernels as bfloat16 with a Cast before the nodes that read them; vectors keep their dtype."""
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
    numpy_helper = require("onnx.numpy_helper", extra="onnx")
    ports = {port.name for port in (*graph.input, *graph.output)}
    used_names = {name for node in graph.node for name in (*node.input, *node.output)}
    widened: dict[str, str] = {}
    nodes = []
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        # A vector may be a shape that shape inference reads: it stays as it is.
        if array.dtype.name in _WIDE and array.ndim > 1 and initializer.name not in ports:
            widened[initializer.name] = _unused_name(f"{initializer.name}_wide", used_names)
            cast = [initializer.name], [widened[initializer.name]]
            nodes.append(
                helper.make_node("Cast", *cast, name=f"{widened[initializer.name]}_node", to=initializer.data_type)
            )
            initializer.CopyFrom(numpy_helper.from_array(cast_down(request, initializer.name, array), initializer.name))
    for node in graph.node:
        for _, inner in inner_graphs(node):
            _narrow_kernels(inner, request)
    _redirect_reads(graph, widened)
    nodes += [copy_message(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _unused_name(name: str, used_names: set[str]) -> str:
    while name in used_names:
        name += "_"
    used_names.add(name)
    return name


def _redirect_reads(graph: Any, names: Mapping[str, str]) -> None:
    """Redirect the inputs of nodes, also in subgraphs; `names` maps old to new value names."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for _, inner in inner_graphs(node):
            hidden = names_defined(inner)
            _redirect_reads(inner, {old: new for old, new in names.items() if old not in hidden})


# x86 processors without VNNI add two 8-bit products in 16 bits, which can overflow.
_SEVEN_BITS = "Weights use 7 of the 8 bits, so that sums cannot overflow on any processor."


def _quantize_dynamic(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    quantization = require("onnxruntime.quantization", extra="onnx")
    # The quantizer infers all shapes itself, and would fail on stale ones that exporters leave in value_info.
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
        """Yields the calibration batches."""

        def __init__(self) -> None:
            self._remaining: Iterator[dict[str, Array]] = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._remaining, None)

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
        raise _conversion_error(job, "--int8", error) from error
    converted = load_message(after)
    # It sorts nodes without a look at what their inner graphs read.
    canonical_order(converted.graph)
    return converted


def _conversion_error(job: ExportJob, option: str, error: Exception) -> WorkError:
    return WorkError(f"onnxruntime cannot apply {option} to {job.file.path}: {first_line(error)}")
