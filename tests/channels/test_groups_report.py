"""What `inspect --groups` shows."""

from __future__ import annotations

from pathlib import Path

from prunectl.analysis.stats import measure_stats
from prunectl.channels.groups import channel_groups
from prunectl.formats.registry import open_model
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
