"""What `inspect --groups` shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunectl.analysis.stats import measure_stats
from prunectl.channels.groups import channel_groups
from prunectl.channels.prune import prune_channels
from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.reporting.inspect import add_channel_groups, inspect_report
from tests.channels.test_prune import FIXTURE


def test_the_report_lists_what_goes_together_and_what_is_locked(tmp_path: Path) -> None:
    model = open_model(FIXTURE)
    report = add_channel_groups(
        inspect_report([measure_stats(model, model.tensors)], [], has_flops=False), [channel_groups(model)]
    )
    (section,) = report.sections
    assert ("channels", "56 of 66 can be removed") in section.facts
    table = section.tables[-1]
    assert table.rows[0] == ("conv1.weight", 8, 3, "conv1.bias[0], conv2.weight[1]", "")
    assert table.rows[-1] == ("fc2.weight", 10, 2, "fc2.bias[0]", "scores is an output of the network")
    (found,) = report.extra_json["groups"]
    assert [family["channels"] for family in found["families"]] == [8, 16, 32, 10]
    assert found["families"][0]["places"][2] == {"tensor": "conv2.weight", "axis": 1, "part": "in"}
    assert report.table.rows[0] == (str(FIXTURE), *table.rows[0])


def test_where_there_are_no_channels_the_operations_that_hide_them_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    nodes = [
        helper.make_node("Mystery", ["x"], ["hidden"], domain="strangers"),
        helper.make_node("MatMul", ["hidden", "weight"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((4, 8), np.float32), "weight")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("strangers", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    model, reason = open_model(path), "its operations are unknown (strangers.Mystery)"
    report = inspect_report([measure_stats(model, model.tensors)], [], has_flops=False)
    tables = report.sections[0].tables
    (section,) = add_channel_groups(report, [channel_groups(model)]).sections
    assert ("channels", f"none: {reason}") in section.facts
    assert section.tables == tables
    with pytest.raises(UsageError) as refused:
        prune_channels(path, PruneRequest(sparsity=0.5, pattern="channel"), Destination(tmp_path / "small.onnx"))
    assert refused.value.message == f"{path} has no channels that can be removed: {reason}"
