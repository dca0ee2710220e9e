"""What every ONNX model goes through before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError, first_line
from prunectl.exporting.job import Job
from prunectl.exporting.onnx_order import inner_graphs
from prunectl.exporting.onnx_smaller import smaller
from prunectl.formats.optional import require

MAX_BYTES = (1 << 31) - 1
"""Of a message of protobuf."""


def finish(job: Job, proto: Any, target: Path, kept: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write a model without traces of how it was made, with what was said of it before and by the user."""
    tidy(proto)
    _check_opset(job, proto)
    found, said = smaller(job, proto)
    del found.metadata_props[:]
    for key, value in {**(kept or {}), **dict(job.request.metadata)}.items():
        found.metadata_props.add(key=key, value=value)
    if found.ByteSize() > MAX_BYTES:
        raise WorkError(f"{job.file.path} is more than 2 GB as ONNX, and does not fit in one file; nothing was written")
    target.write_bytes(found.SerializeToString(deterministic=True))
    check(target)
    return said


def opset_of(proto: Any) -> int | None:
    """Return the version of ONNX's own operators."""
    return next((one.version for one in proto.opset_import if one.domain in {"", "ai.onnx"}), None)


def _check_opset(job: Job, proto: Any) -> None:
    """Exporters take the nearest version that they know, without a word."""
    asked, found = job.request.opset, opset_of(proto)
    if asked is not None and asked != found:
        raise WorkError(
            f"{job.file.path} came out in opset {found}, and not in {asked}; nothing was written",
            hint=f"--opset {found}, and then: prunectl export OUT -o OLDER.onnx --opset {asked}",
        )


def tidy(proto: Any) -> None:
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
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(target), full_check=True)
    except Exception as error:
        raise WorkError(f"what was made is no ONNX: {first_line(error)}; nothing was written") from error
