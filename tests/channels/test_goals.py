"""A share of channels is found for what is asked in parameters, operations or bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.channels import verify
from prunectl.channels.config import SizeTarget, TargetKind, parse_target, smallest_ratio
from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.errors import UsageError, WorkError
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import onnx
from tests.channels.nets import NETS, export
from tests.running import here


def cut(path: Path, output: Path | None, limits: dict[str, Any] | None = None, **asked: Any) -> ChannelPruneResult:
    request = PruneRequest(**{"pattern": "channel", **asked})
    return prune_channels(path, request, Destination(output) if output else None, **(limits or {}))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(NETS[1], tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.mark.parametrize(
    ("text", "number", "share"),
    [("-50%", 0, 0.5), ("-12.5%", 0, 0.875), ("1.5M", 1_500_000, None), ("200k", 200_000, None), ("7", 7, None)],
)
def test_a_goal_is_a_share_less_or_a_number(text: str, number: int, share: float | None) -> None:
    assert parse_target(TargetKind.PARAMS, text) == SizeTarget(TargetKind.PARAMS, number, share)


@pytest.mark.parametrize("text", ["50%", "-150%", "half", "-3", "", "1.5MB"])
def test_anything_else_is_no_goal(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number of FLOPs"):
        parse_target(TargetKind.FLOPS, text)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 50))
def test_no_smaller_share_reaches_a_goal(channels: int, number: int, floor: int) -> None:
    before = channels + floor

    def left(ratio: float) -> int:
        return before - round(ratio * channels)

    goal = SizeTarget(TargetKind.PARAMS, number)
    if left(1.0) > number:
        with pytest.raises(WorkError, match="cannot be reached"):
            smallest_ratio(goal, before, channels, left, 40)
        return
    found = smallest_ratio(goal, before, channels, left, 40)
    assert left(found) <= number
    assert found == 0 or left(found - 1 / channels) > number


def test_half_the_parameters_are_counted_in_the_file(net: Path, tmp_path: Path) -> None:
    found = cut(net, tmp_path / "small.onnx", {"params": "-50%"})
    sizes = [
        sum(onnx.numpy_helper.to_array(tensor).size for tensor in onnx.load(path).graph.initializer)
        for path in (net, tmp_path / "small.onnx")
    ]
    assert sizes[1] <= sizes[0] / 2
    assert found.after.params.total <= found.before.params.total / 2
    assert found.after.params.total > 0.4 * found.before.params.total


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_operations_are_halved_by_as_few_channels_as_can_be(net: Path, scope: str, tmp_path: Path) -> None:
    found = cut(net, tmp_path / "small.onnx", {"flops": "-50%"}, scope=scope)
    assert found.before.macs is not None
    assert found.after.macs is not None
    assert 0.35 * found.before.macs < found.after.macs <= 0.5 * found.before.macs


def test_a_size_in_bytes_is_that_of_the_compressed_file(net: Path, tmp_path: Path) -> None:
    whole = len(gzip.compress(net.read_bytes(), 6, mtime=0))
    cut(net, tmp_path / "small.onnx", target_gzip=int(0.6 * whole))
    assert 0.4 * whole < len(gzip.compress((tmp_path / "small.onnx").read_bytes(), 6, mtime=0)) <= 0.6 * whole


def test_what_is_out_of_reach_is_said_and_nothing_written(net: Path, tmp_path: Path) -> None:
    found = here("prune", net, "-o", tmp_path / "small.onnx", "--pattern", "channel", "--target-params", "10")
    assert found.code == 5
    assert "cannot be reached" in found.err
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({"params": "-50%", "flops": "-50%"}, {}),
        ({"params": "-50%"}, {"sparsity": 0.5}),
        ({"dead": True}, {"sparsity": 0.5}),
        ({"dead": True}, {"strategy": "bn-scale"}),
        ({}, {}),
    ],
)
def test_how_much_is_said_once(net: Path, limits: dict[str, Any], asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        cut(net, None, limits, **asked)


def test_both_networks_are_timed_if_that_is_asked_for(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_SECONDS", 0.1)
    words = ("--pattern", "channel", "-s", "0.8", "--latency", "--dry-run")
    seconds = here("prune", net, *words, "--json").json["channels"]["seconds"]
    assert 0 < seconds["before"] < 10
    assert 0 < seconds["after"] < 10
    assert "latency" in here("prune", net, *words, "--format", "human").out.split()
