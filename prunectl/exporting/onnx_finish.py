"""What every ONNX model goes through before it is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.job import ExportJob
from prunectl.exporting.onnx_order import inner_graphs, opset_of, order
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.weights import narrowed
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require

MAX_BYTES = (1 << 31) - 1
"""Of a message of protobuf."""
_SMALL_BYTES = 1024
"""What stays in the file, as shapes do."""


def is_large(proto: Any) -> bool:
    """Whether a model does not fit in one file."""
    numbers = sum(len(one.raw_data) for graph in _all_graphs(proto.graph) for one in graph.initializer)
    # A message beyond the limit cannot be measured as a whole.
    return bool(numbers > MAX_BYTES or proto.ByteSize() > MAX_BYTES)


def put(job: ExportJob, proto: Any, target: Path) -> str:
    """Move the numbers of a model into a file beside it, and return what to say of it."""
    if job.request.is_packed or job.request.is_sparse:
        raise WorkError(
            f"{job.file.path} is more than 2 GB as ONNX, and a model in two files is neither packed nor made sparse",
            hint="leave out --pack and --sparse",
        )
    helper = require("onnx.external_data_helper", extra="onnx")
    name = f"{target.name}.data"
    helper.convert_model_to_external_data(proto, location=name, size_threshold=_SMALL_BYTES)
    helper.write_external_data_tensors(proto, str(target.parent))
    return f"It is more than 2 GB: its numbers are in {name} beside it, where the two belong together."


def _all_graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _all_graphs(inner)


_FIRST_OPSET = 13
"""Since when Cast takes bfloat16."""
_WIDE = frozenset({"float32", "float64"})


def bfloat(proto: Any, request: ExportRequest) -> Any:
    """Return a model whose kernels are held in 16 bits; what has one axis stays as it is."""
    opset = opset_of(proto)
    if opset is not None and opset < _FIRST_OPSET:
        raise UsageError(
            f"--bf16 needs opset {_FIRST_OPSET} of ONNX, and the model is of {opset}", hint=f"--opset {_FIRST_OPSET}"
        )
    _narrow(proto.graph, request)
    return proto


def _narrow(graph: Any, request: ExportRequest) -> None:
    helper = require("onnx.helper", extra="onnx")
    numbers = require("onnx.numpy_helper", extra="onnx")
    fixed = {port.name for port in (*graph.input, *graph.output)}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    names: dict[str, str] = {}
    nodes = []
    for one in graph.initializer:
        array = numbers.to_array(one)
        # Numbers of one axis may say a shape, which is inferred from what they are.
        if array.dtype.name in _WIDE and array.ndim > 1 and one.name not in fixed:
            names[one.name] = _free(f"{one.name}_wide", taken)
            cast = [one.name], [names[one.name]]
            nodes.append(helper.make_node("Cast", *cast, name=f"{names[one.name]}_node", to=one.data_type))
            one.CopyFrom(numbers.from_array(narrowed(request, one.name, array), one.name))
    for node in graph.node:
        for inner in inner_graphs(node):
            _narrow(inner, request)
    _redirect(graph, names)
    nodes += [_copy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _redirect(graph: Any, names: Mapping[str, str]) -> None:
    """Let whatever reads a value read another one, inside of inner graphs as well."""
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
        for inner in inner_graphs(node):
            own = {one.name for one in (*inner.input, *inner.initializer)}
            own |= {name for one in inner.node for name in one.output}
            _redirect(inner, {old: new for old, new in names.items() if old not in own})


def _copy(node: Any) -> Any:
    found = type(node)()
    found.CopyFrom(node)
    return found


_DYNAMIC = ["MatMul", "Gemm", "LSTM", "Gather"]
"""Operators that run on 8-bit weights without knowing how large their inputs are."""


def smaller(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a model with the weights that were asked for, and what the user should know of it."""
    if job.request.is_half:
        return _half(job, proto), ("Its weights are 16-bit floats; what goes in and comes out stays as it was.",)
    if job.request.is_bf16:
        return bfloat(proto, job.request), ("Its kernels are bfloat16, and widened where they are used.",)
    if job.request.is_int8:
        return (_static if job.request.data else _dynamic)(job, proto)
    return proto, ()


def _half(job: ExportJob, proto: Any) -> Any:
    tools = require("onnxruntime.transformers.float16", extra="onnx")
    try:
        found = tools.convert_float_to_float16(proto, keep_io_types=True)
    except Exception as error:
        raise _failed(job, "--half", error) from error
    # It puts its casts behind what they are for.
    order(found.graph)
    return found


def _dynamic(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    tools = require("onnxruntime.quantization", extra="onnx")
    # It infers every shape anew, and exporters leave some between that no longer hold, which it would stumble over.
    del proto.graph.value_info[:]

    def quantize(before: Path, after: Path) -> None:
        tools.quantize_dynamic(
            str(before),
            str(after),
            op_types_to_quantize=_DYNAMIC,
            weight_type=tools.QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )

    return _through_files(job, proto, quantize), (
        "Weights of dense and recurrent layers are 8-bit integers; those of convolutions stay floats without --data.",
    )


def _static(job: ExportJob, proto: Any) -> tuple[Any, tuple[str, ...]]:
    tools = require("onnxruntime.quantization", extra="onnx")
    feeds = [
        {port.name: one for port, one in zip(proto.graph.input, batch, strict=True)} for batch in job.inputs.batches
    ]

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self._left: Iterator[dict[str, Array]] = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    def quantize(before: Path, after: Path) -> None:
        tools.quantize_static(
            str(before),
            str(after),
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            # Of eight bits, products of two overflow the sixteen that x86 processors without VNNI add them up in.
            reduce_range=True,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )

    return _through_files(job, proto, quantize), (
        f"Weights and activations are 8-bit integers, their ranges by {job.inputs.examples} examples.",
        "Weights use 7 of the 8 bits, so that sums overflow on no processor.",
    )


def _through_files(job: ExportJob, proto: Any, quantize: Any) -> Any:
    onnx = require("onnx", extra="onnx")
    before, after = job.scratch / "floats.onnx", job.scratch / "integers.onnx"
    onnx.save(proto, str(before))
    before_disabled = logging.root.manager.disable
    logging.disable(max(logging.WARNING, before_disabled))
    try:
        quantize(before, after)
    except Exception as error:
        raise _failed(job, "--int8", error) from error
    finally:
        logging.disable(before_disabled)
    return onnx.load(str(after))


def _failed(job: ExportJob, option: str, error: Exception) -> WorkError:
    return WorkError(f"onnxruntime cannot do {option} for {job.file.path}: {first_line(error)}")


def finish(job: ExportJob, proto: Any, target: Path, kept: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write a model without traces of how it was made, with what was said of it before and by the user."""
    clear_metadata(proto)
    _check_opset(job, proto)
    found, said = smaller(job, proto)
    del found.metadata_props[:]
    for key, value in {**(kept or {}), **dict(job.request.metadata)}.items():
        found.metadata_props.add(key=key, value=value)
    if is_large(found):
        said += (put(job, found, target),)
    target.write_bytes(found.SerializeToString(deterministic=True))
    check(target)
    return said


def _check_opset(job: ExportJob, proto: Any) -> None:
    """Exporters take the nearest version that they know, without a word."""
    asked, found = job.request.opset, opset_of(proto)
    if asked is not None and asked != found:
        raise WorkError(
            f"{job.file.path} came out in opset {found}, and not in {asked}; nothing was written",
            hint=f"--opset {found}, and then: prunectl export OUT -o OLDER.onnx --opset {asked}",
        )


def clear_metadata(proto: Any) -> None:
    """Leave out where the code of the model stands, which exporters note beside each node."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    for graph in _graphs(proto.graph):
        del graph.metadata_props[:]
        graph.doc_string = ""
        for one in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
            del one.metadata_props[:]
            one.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
        function.doc_string = ""
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _graphs(inner)


def check(target: Path) -> None:
    """Hold a model against what ONNX says of its operators, types and shapes."""
    if found := checker_error(target):
        raise WorkError(f"what was made is no ONNX: {found}; nothing was written")


def checker_error(path: Path) -> str:
    """Return what ONNX finds wrong with a model, if anything."""
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - it raises what it likes
        return first_line(error)
    return ""
