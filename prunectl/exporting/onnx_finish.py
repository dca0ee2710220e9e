"""What every ONNX model goes through before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError, first_line
from prunectl.exporting import onnx_beside
from prunectl.exporting.job import Job
from prunectl.exporting.onnx_opset import opset_of
from prunectl.exporting.onnx_order import inner_graphs
from prunectl.exporting.onnx_smaller import smaller
from prunectl.formats.optional import require


def finish(job: Job, proto: Any, target: Path, kept: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write a model without traces of how it was made, with what was said of it before and by the user."""
    tidy(proto)
    _check_opset(job, proto)
    found, said = smaller(job, proto)
    del found.metadata_props[:]
    for key, value in {**(kept or {}), **dict(job.request.metadata)}.items():
        found.metadata_props.add(key=key, value=value)
    if onnx_beside.is_large(found):
        said += (onnx_beside.put(job, found, target),)
    target.write_bytes(found.SerializeToString(deterministic=True))
    check(target)
    return said


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
    if found := flaw(target):
        raise WorkError(f"what was made is no ONNX: {found}; nothing was written")


def flaw(path: Path) -> str:
    """Return what ONNX finds wrong with a model, if anything."""
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - it raises what it likes
        return first_line(error)
    return ""
