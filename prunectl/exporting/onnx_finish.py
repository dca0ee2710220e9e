"""The last steps of every ONNX export: opset check, precision, metadata, external data, `onnx.checker`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError, first_line
from prunectl.exporting.job import ExportJob
from prunectl.exporting.onnx_precision import reduce_precision
from prunectl.formats.safe_json import require
from prunectl.graphs.onnx.nodes import all_graphs, opset_of
from prunectl.graphs.onnx.tensors import is_too_large

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
            f"{job.file.path} came out in opset {actual}, and not in {wanted}; nothing was written",
            hint=f"--opset {actual}, and then: prunectl export OUT -o OLDER.onnx --opset {wanted}",
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
            f"{job.file.path} is more than 2 GB as ONNX, and a model in two files is neither packed nor made sparse",
            hint="leave out --pack and --sparse",
        )
    helper = require("onnx.external_data_helper", extra="onnx")
    name = f"{target.name}.data"
    helper.convert_model_to_external_data(proto, location=name, size_threshold=_SMALL_BYTES)
    helper.write_external_data_tensors(proto, str(target.parent))
    return f"It is more than 2 GB: its numbers are in {name} beside it, where the two belong together."


def check_valid(target: Path) -> None:
    """Refuse a model that `onnx.checker` refuses, shape inference included."""
    if reason := checker_error(target):
        raise WorkError(f"what was made is no ONNX: {reason}; nothing was written")


def checker_error(path: Path) -> str:
    """The complaint of `onnx.checker` about a model; empty if it is valid."""
    onnx = require("onnx", extra="onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - it raises what it likes
        return first_line(error)
    return ""
