"""Does the smaller network do what it should? The original, its channels silenced, must say the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunectl.channels import onnx_views
from prunectl.channels.after import After
from prunectl.channels.from_onnx import Opened
from prunectl.channels.graph import Kind
from prunectl.channels.onnx_surgery import Removed, put
from prunectl.channels.trace import Part, Trace
from prunectl.errors import WorkError, first_line
from prunectl.formats.base import Array
from prunectl.formats.optional import require

TOLERANCE = 1e-4
"""How far the two may be apart, relative to the largest number that comes out."""
RUNS = 3
_MAX_MESSAGE_BYTES = (1 << 31) - 1
_FATAL = 4
_SILENT = frozenset({Part.OUT, Part.IN, Part.BIAS, Part.SCALE, Part.SHIFT})
"""What is set to zero; a variance of zero, or a number that others are divided by, would give no numbers."""


def prove(source: Opened, smaller: Any, after: After, removed: Removed, seed: int) -> float:
    """Return how far the two networks are apart at most; WorkError if that is too far."""
    inner = _behind_cuts(source, after)
    one, other = _session(_silenced(source, after.trace, removed), inner), _session(smaller, inner)
    random = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(RUNS):
        feeds = {port.name: _random(port, source, random) for port in one.get_inputs()}
        try:
            pairs = zip(one.run(None, feeds), other.run(None, feeds), strict=True)
            worst = max([worst, *(apart(first, second) for first, second in pairs)])
        except Exception as error:
            raise WorkError(f"the cut network cannot be run: {first_line(error)}; nothing was written") from error
    if not worst <= TOLERANCE:
        raise WorkError(
            f"the cut network differs from the original by {worst:.1e}, more than {TOLERANCE:g}; nothing was written",
            hint="leave out some layers with --exclude",
        )
    return worst


def apart(one: Any, other: Any) -> float:
    """Return the largest difference, relative to the largest number; infinite where shapes or gaps differ."""
    first, second = np.asarray(one), np.asarray(other)
    if first.shape != second.shape:
        return float("inf")
    if first.dtype.kind not in "fiub" or not first.size:
        return 0.0 if np.array_equal(first, second) else float("inf")
    wide, other_wide = first.astype(np.float64), second.astype(np.float64)
    is_number = np.isfinite(wide)
    if not np.array_equal(is_number, np.isfinite(other_wide)):
        return float("inf")
    difference = np.abs(wide - other_wide)[is_number].max(initial=0.0)
    return float(difference / max(np.abs(wide)[is_number].max(initial=0.0), np.finfo(np.float32).tiny))


def _silenced(source: Opened, trace: Trace, removed: Removed) -> Any:
    """Return the original with everything zero that makes or reads what was cut."""
    proto = type(source.proto)()
    proto.CopyFrom(source.proto)
    parts = {(note.tensor, note.axis): note.part for note in trace.notes}
    for name, slot in onnx_views.tensors(proto.graph):
        places = [place for place in removed if place[0] == name and parts[place] in _SILENT]
        if places:
            array = np.array(source.graph.weights[name])
            for _, axis in places:
                np.moveaxis(array, axis, 0)[removed[name, axis]] = 0
            put(slot, array)
    return proto


def _behind_cuts(source: Opened, after: After) -> list[str]:
    """Return what the layers say that lost inputs but no outputs.

    A softmax at the end of a network may hide what is wrong before it.
    """
    return [
        node.outputs[0]
        for node in source.graph.nodes
        if node.kind in {Kind.CONVOLUTION, Kind.LINEAR}
        and after.has_changed(node.inputs[0])
        and not after.has_changed(node.outputs[0])
    ]


def _session(proto: Any, inner: list[str]) -> Any:
    runtime = require("onnxruntime", extra="onnx")
    if proto.ByteSize() > _MAX_MESSAGE_BYTES:
        raise WorkError("a network of more than 2 GB cannot be proved to be the same, and is not cut")
    shown = type(proto)()
    shown.CopyFrom(proto)
    outputs = {port.name for port in proto.graph.output}
    for name in inner:
        if name not in outputs:
            shown.graph.output.add().name = name
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    try:
        return runtime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise WorkError(
            f"the network cannot be loaded by onnxruntime: {first_line(error)}; nothing was written"
        ) from error


def _random(port: Any, source: Opened, random: np.random.Generator) -> Array:
    """Return numbers for an input, as long as the shapes were worked out for."""
    shape = source.known.shapes[port.name]
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}.get(port.type)
    if kind is not None:
        return random.standard_normal(shape).astype(kind)
    if port.type == "tensor(bool)":
        return random.integers(0, 2, shape).astype(np.bool_)
    whole = {f"tensor({name})": name for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")}
    if port.type not in whole:
        raise WorkError(f"the network takes {port.type}, of which nothing random can be made; nothing was written")
    # Small enough for any table of words.
    return random.integers(0, 2, shape).astype(whole[port.type])
