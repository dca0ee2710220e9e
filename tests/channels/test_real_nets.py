"""Networks of the usual kinds, half of whose channels go: they say what PyTorch says without these channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.groups import channel_groups as groups_of
from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from tests.channels.made import onnx
from tests.channels.masked import masked, run
from tests.channels.nets import NETS, Attention, Groups, Recurrent, Shuffle, built, export, torch

SHAPES = {
    "Vgg": {"body.0.0.weight": (4, 3, 3, 3), "head.0.weight": (10, 6 * 16)},
    "Residual": {"stem.0.weight": (4, 3, 3, 3), "one.0.0.weight": (3, 4, 3, 3), "down.0.weight": (8, 4, 1, 1)},
    "Mobile": {"block.0.weight": (12, 4, 1, 1), "block.3.0.weight": (12, 1, 3, 3), "block.4.weight": (4, 12, 1, 1)},
    "Dense": {"three.0.weight": (5, 7, 3, 3), "norm.running_var": (12,), "head.weight": (5, 12)},
    "Unet": {"up.weight": (8, 6, 2, 2), "last.0.weight": (4, 9, 3, 3), "out.weight": (2, 4, 1, 1)},
    "Excite": {"down.weight": (3, 8, 1, 1), "slope.weight": (8,), "last.weight": (8, 2, 3, 3)},
    "Squeeze": {"squeeze.weight": (2, 6, 1, 1), "out.weight": (5, 8, 1, 1)},
    "Split": {"stem.0.weight": (8, 3, 3, 3), "side.0.weight": (4, 4, 3, 3), "last.0.weight": (4, 12, 3, 3)},
}


def cut(path: Path, output: Path, **asked: Any) -> ChannelPruneResult:
    return prune_channels(path, PruneRequest(**{"sparsity": 0.5, "pattern": "channel"} | asked), Destination(output))


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "fixed"])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_half_of_the_channels_go_and_the_rest_say_the_same(kind: Any, is_open: bool, tmp_path: Path) -> None:
    path, output = export(kind, tmp_path / "net.onnx", is_open=is_open), tmp_path / "small.onnx"
    found = cut(path, output)
    onnx.checker.check_model(output, full_check=True)
    shapes = {tensor.name: tensor.shape for tensor in open_model(output).tensors}
    assert {name: shapes[name] for name in SHAPES[kind.__name__]} == SHAPES[kind.__name__]
    net = built(kind)
    images = torch.randn(3 if is_open else 1, 3, 16, 16)
    wanted, said = masked(net, found, images), run(output, images)
    assert np.ptp(wanted) > 1e-3
    np.testing.assert_allclose(said, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert found.after.params.total < 0.55 * found.before.params.total
    assert found.before.macs is not None
    assert found.after.macs is not None
    assert found.after.macs < 0.5 * found.before.macs


@pytest.mark.parametrize("strategy", ["channel-norm", "bn-scale", "geometric-median", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whatever_is_chosen_can_be_cut(strategy: str, scope: str, tmp_path: Path) -> None:
    path, output = export(NETS[1], tmp_path / "net.onnx"), tmp_path / "small.onnx"
    found = cut(path, output, sparsity=0.4, strategy=strategy, scope=scope)
    net, images = built(NETS[1]), torch.randn(2, 3, 16, 16)
    wanted = masked(net, found, images)
    np.testing.assert_allclose(run(output, images), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_parts_of_a_split_may_lose_different_numbers(tmp_path: Path) -> None:
    path, output = export(NETS[-1], tmp_path / "net.onnx"), tmp_path / "small.onnx"
    found = cut(path, output, scope="global", sparsity=0.3)
    net, images = built(NETS[-1]), torch.randn(2, 3, 16, 16)
    wanted = masked(net, found, images)
    np.testing.assert_allclose(run(output, images), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_any_opset_will_do(opset: int, tmp_path: Path) -> None:
    for kind in (NETS[4], NETS[7]):
        path, output = (
            export(kind, tmp_path / f"{kind.__name__}.onnx", opset=opset),
            tmp_path / f"{kind.__name__}s.onnx",
        )
        found = cut(path, output)
        assert found.dropped * 2 == found.channels
        assert onnx.load(output).opset_import[0].version == opset


def check_like(kind: Any, path: Path, output: Path, **asked: Any) -> ChannelPruneResult:
    """Hold a cut network against PyTorch's, whose channels are silent."""
    found = cut(path, output, **asked)
    onnx.checker.check_model(output, full_check=True)
    images = torch.randn(2, 3, 16, 16)
    wanted = masked(built(kind), found, images)
    assert np.ptp(wanted) > 1e-3
    np.testing.assert_allclose(run(output, images), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    return found


def test_an_attention_loses_whole_heads_and_the_inside_of_its_dense_layers(tmp_path: Path) -> None:
    path, output = export(Attention, tmp_path / "net.onnx"), tmp_path / "small.onnx"
    found = check_like(Attention, path, output)
    assert {loss.group.name: (len(loss.dropped), len(loss.group)) for loss in found.pruned_groups} == {
        "mix.weight": (2, 4),
        "inside.0.weight": (16, 32),
    }
    (heads,) = [loss.group for loss in found.pruned_groups if loss.group.name == "mix.weight"]
    queries, keys, values = np.split(np.arange(48).reshape(12, 4), 3)
    first = heads.channel(0)[0]
    assert list(first) == [*queries[0], *keys[0], *values[0]]
    families = groups_of(open_model(path)).groups
    assert [family for family in families if "spans several channels" in family.locked_because]


def test_shuffled_channels_go_from_every_group_alike(tmp_path: Path) -> None:
    path, output = export(Shuffle, tmp_path / "net.onnx"), tmp_path / "small.onnx"
    found = check_like(Shuffle, path, output)
    (stem,) = [loss.group for loss in found.pruned_groups if loss.group.name == "stem.0.weight"]
    assert stem.channel(1)[0] == (1, 3, 5, 7)


def test_channels_that_are_normalised_in_groups_go_by_groups(tmp_path: Path) -> None:
    path, output = export(Groups, tmp_path / "net.onnx"), tmp_path / "small.onnx"
    (loss,) = cut(path, output).pruned_groups
    assert [loss.group.channel(number)[0] for number in range(len(loss.group))] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    net, images = built(Groups), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for number in loss.dropped:
            net.head.weight[:, loss.group.channel(number)[0]] = 0
        wanted = net(images).numpy()
    np.testing.assert_allclose(run(output, images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_both", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_unit_goes_from_every_gate(kind: str, is_both: bool, tmp_path: Path) -> None:
    def make() -> Any:
        return Recurrent(kind, is_both=is_both)

    path, output = export(make, tmp_path / "net.onnx", is_folded=True), tmp_path / "small.onnx"
    found = cut(path, output)
    onnx.checker.check_model(output, full_check=True)
    (units,) = [loss for loss in found.pruned_groups if len(loss.group) == 8]
    net = built(make)
    with torch.no_grad():
        # A unit that sees nothing and says nothing to the next step stays at zero.
        for number in units.dropped:
            for weight in net.cell.parameters():
                weight[number::8] = 0
        for loss in found.pruned_groups:
            if loss is not units:
                net.first.weight[list(loss.dropped)] = 0
                net.first.bias[list(loss.dropped)] = 0
        images = torch.randn(2, 3, 16, 16)
        wanted = net(images).numpy()
    np.testing.assert_allclose(run(output, images), wanted, rtol=1e-4, atol=1e-5)
    assert onnx.load(output).opset_import[0].version == 17
    assert found.dropped == 3 + 4


def test_many_zeros_that_a_layer_begins_with_go_as_a_whole(tmp_path: Path) -> None:
    path = export(lambda: Recurrent(units=80), tmp_path / "net.onnx", is_open=False, is_folded=True)
    found = cut(path, tmp_path / "small.onnx")
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=True)
    assert sorted(len(loss.dropped) for loss in found.pruned_groups) == [3, 40]
