"""Weights go in, smaller weights and a class that takes them come out."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.prune import ChannelPruneResult
from prunectl.channels.torch.code.expressions import literal
from tests.channels import nets
from tests.channels.masked import masked
from tests.channels.nets import torch
from tests.channels.torch import nets as more
from tests.channels.torch.cutting import cut, loaded, said, saved


def silenced(kind: Any, found: ChannelPruneResult) -> Any:
    """The original with nothing in the places where channels are made."""
    net = nets.built(kind)
    weights = dict(net.named_parameters(remove_duplicate=False))
    for loss in found.pruned_groups:
        for number in loss.dropped:
            for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True):
                if place.role in {"out", "bias", "scale", "shift"}:
                    weights[place.tensor].data.movedim(place.axis, 0)[list(indices)] = 0
    return net


ALL = (*nets.NETS, nets.Attention, nets.Shuffle, more.Functional, more.Encoder)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_class_says_what_the_original_says_with_its_channels_silenced(kind: Any, tmp_path: Path) -> None:
    net, output = nets.built(kind), tmp_path / "small.pt"
    found = cut(saved(net, tmp_path / "net.pt"), output, model=f"{kind.__module__}:{kind.__name__}")
    assert found.dropped
    images = torch.randn(5, 3, 16, 16)
    small = loaded(output, kind.__name__)
    assert small.state_dict().keys() == net.state_dict().keys()
    assert sum(weight.numel() for weight in small.parameters()) < sum(weight.numel() for weight in net.parameters())
    np.testing.assert_allclose(said(small, images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), [(more.Layered, (3, 9, 6)), (more.Tricks, (3, 3, 16, 16))])
def test_what_no_layer_stands_for_is_cut_as_well(kind: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    net, output = nets.built(kind), tmp_path / "small.pt"
    word = ",".join(map(str, (1, *shape[1:])))
    found = cut(saved(net, tmp_path / "net.pt"), output, model=f"{more.__name__}:{kind.__name__}", inputs=(word,))
    assert found.dropped * 2 == found.channels
    inputs = torch.randn(shape)
    expected = said(silenced(kind, found), inputs)[0]
    np.testing.assert_allclose(said(loaded(output, kind.__name__), inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_several_values_go_in_and_come_out_as_they_did(tmp_path: Path) -> None:
    net, output = nets.built(more.Several), tmp_path / "small.pt"
    found = cut(saved(net, tmp_path / "net.pt"), output, model=f"{more.__name__}:Several", inputs=("1,3,16,16", "1,6"))
    small = loaded(output, "Several")
    images, rows = torch.randn(4, 3, 16, 16), torch.randn(4, 6)
    out = small(images, rows)
    assert list(out) == ["scores", "more"]
    assert isinstance(out["more"], list)
    silent = silenced(more.Several, found)
    for one, other in zip(said(small, images, rows), said(silent, images, rows), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_words_and_recurrent_layers_are_cut(tmp_path: Path) -> None:
    net, output = nets.built(more.Words), tmp_path / "small.pt"
    found = cut(saved(net, tmp_path / "net.pt"), output, model=f"{more.__name__}:Words", inputs=("1,9:i64",))
    assert found.dropped == 3 + 4 + 3  # words, units of all layers and directions, units of the last
    small = loaded(output, "Words")
    assert (small.table.embedding_dim, small.inner.hidden_size, small.gated.hidden_size) == (3, 4, 3)
    assert "nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)" in output.with_suffix(".py").read_text()
    assert said(small, torch.randint(0, 7, (3, 11)))[0].shape == (3, 3)


def test_layers_that_share_a_matrix_share_it_after(tmp_path: Path) -> None:
    net, output = nets.built(more.Shared), tmp_path / "small.pt"
    found = cut(saved(net, tmp_path / "net.pt"), output, model=f"{more.__name__}:Shared")
    small = loaded(output, "Shared")
    assert small.one.weight is small.other.weight
    assert small.one.weight.shape == (6, 4)
    assert small.twice.weight.shape == (4, 4, 3, 3)
    images = torch.randn(2, 3, 16, 16)
    silent = silenced(more.Shared, found)
    np.testing.assert_allclose(said(small, images)[0], said(silent, images)[0], rtol=1e-4, atol=1e-5)


def test_a_module_of_torch_itself_becomes_a_class_with_a_name(tmp_path: Path) -> None:
    output = tmp_path / "small.pt"
    cut(saved(more.sequential(), tmp_path / "net.pt"), output, model=f"{more.__name__}:sequential")
    assert said(loaded(output, "Net"), torch.randn(1, 3, 16, 16))[0].shape == (1, 4, 12, 12)


def test_layers_without_names_are_found_by_number(tmp_path: Path) -> None:
    net, output = nets.built(more.Plain), tmp_path / "small.pt"
    cut(saved(net, tmp_path / "net.pt"), output, model=f"{more.__name__}:Plain", inputs=("1,3,16",))
    assert said(loaded(output, "Plain"), torch.randn(3, 3, 16))[0].shape == (3, 5)


def test_the_code_reads_as_people_write_it_and_is_the_same_every_time(tmp_path: Path) -> None:
    net = saved(nets.built(nets.Squeeze), tmp_path / "net.pt")
    texts = []
    for name in ("one", "two"):
        cut(net, tmp_path / f"{name}.pt", model="tests.channels.nets:Squeeze")
        texts.append((tmp_path / f"{name}.py").read_text().replace(f"{name}.pt", "small.pt"))
    assert texts[0] == texts[1]
    assert texts[0] == (
        '"""Squeeze, the network for the weights in the file beside this one, written by prunectl.\n'
        "\n"
        "    model = Squeeze()\n"
        '    model.load_state_dict(torch.load("small.pt", weights_only=True))\n'
        '"""\n'
        "\n"
        "import torch\n"
        "import torch.nn.functional as F\n"
        "from torch import nn\n"
        "\n"
        "\n"
        "class Squeeze(nn.Module):\n"
        "    def __init__(self) -> None:\n"
        "        super().__init__()\n"
        "        self.stem = nn.Conv2d(3, 6, 3, stride=2)\n"
        "        self.squeeze = nn.Conv2d(6, 2, 1)\n"
        "        self.one = nn.Conv2d(2, 4, 1)\n"
        "        self.three = nn.Conv2d(2, 4, 3, padding=1)\n"
        "        self.out = nn.Conv2d(8, 5, 1)\n"
        "\n"
        "    def forward(self, x: torch.Tensor):\n"
        "        x = self.stem(x)\n"
        "        x = F.relu(x)\n"
        "        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)\n"
        "        x = self.squeeze(x)\n"
        "        relu = F.relu(x)\n"
        "        x = self.one(relu)\n"
        "        relu_2 = F.relu(x)\n"
        "        x = self.three(relu)\n"
        "        x = F.relu(x)\n"
        "        x = torch.cat((relu_2, x), 1)\n"
        "        x = self.out(x)\n"
        "        x = F.relu(x)\n"
        "        x = F.adaptive_avg_pool2d(x, 1)\n"
        "        return x.flatten(1)\n"
    )


@pytest.mark.parametrize("name", ["plain", "tab\t and 'quotes'", "über", "\U0001d499", "\ud800"])
def test_every_text_is_written_as_python_reads_it(name: str) -> None:
    assert ast.literal_eval(literal(name)) == name
    literal(name).encode()


@pytest.mark.parametrize("name", ['é"""; print(1); """', '"""', "\\", 'a\\"""b', "é\n", "\U0001d54f'\"", "a", "\u202e"])
def test_a_name_from_a_file_stays_a_name_in_code_and_in_the_text_that_opens_it(name: str) -> None:
    written = literal(name)
    assert ast.literal_eval(written) == name
    (opening,) = ast.parse(f'"""Net.\n\n    model[{written}]\n"""').body
    assert isinstance(opening, ast.Expr)
    assert isinstance(opening.value, ast.Constant)
    assert written.isprintable()
