"""ONNX models that are too large for one file: their numbers lie beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.exporting.job import Job
from prunectl.exporting.onnx_order import inner_graphs
from prunectl.formats.optional import require

MAX_BYTES = (1 << 31) - 1
"""Of a message of protobuf."""
_SMALL_BYTES = 1024
"""What stays in the file, as shapes do."""


def is_large(proto: Any) -> bool:
    """Whether a model does not fit in one file."""
    numbers = sum(len(one.raw_data) for graph in _graphs(proto.graph) for one in graph.initializer)
    # A message beyond the limit cannot be measured as a whole.
    return bool(numbers > MAX_BYTES or proto.ByteSize() > MAX_BYTES)


def put(job: Job, proto: Any, target: Path) -> str:
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


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _graphs(inner)
