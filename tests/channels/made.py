"""Made-up ONNX graphs: nodes in a row, weights of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.groups import ChannelGroups, channel_groups
from prunectl.formats.registry import open_model

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
Shape = Sequence[int | str]


def op(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node, named like its first output; inputs and outputs are words in a row, `-` is left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    results = outputs.split()
    return helper.make_node(kind, names, results, name=f"to_{results[0]}", **attributes)


def model(
    nodes: Sequence[Any],
    weights: dict[str, tuple[int, ...]],
    *,
    inputs: dict[str, Shape] | None = None,
    outputs: Sequence[str] = ("y",),
    numbers: dict[str, Sequence[int]] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> Any:
    """A model of float weights of these shapes, and of lists of whole numbers."""
    random = np.random.default_rng(3)
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (inputs or {"x": ("N", 3, 8, 8)}).items()
    ]
    held = [
        numpy_helper.from_array(random.uniform(0.1, 1, shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    held += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in (numbers or {}).items()]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "made", ports, results, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def saved(made: Any, folder: Path) -> Path:
    """Write a model into a folder."""
    path = folder / "made.onnx"
    onnx.save(made, path)
    return path


def seen(made: Any, folder: Path) -> ChannelGroups:
    """The channels of a model."""
    return channel_groups(open_model(saved(made, folder)))


def places(found: ChannelGroups, name: str) -> set[str]:
    """Where the channels of a weight live, as `tensor[axis]`."""
    (family,) = [family for family in found.groups if family.name == name]
    return {f"{place.tensor}[{place.axis}]" for place in family.axes}


def locks(found: ChannelGroups) -> dict[str, str]:
    """Why channels are locked, by the weight that makes them."""
    return {family.name: family.locked_because for family in found.groups if family.locked_because}
