"""What cannot be cut is said in a sentence, and nothing is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from prunectl import api
from prunectl.channels.groups import channel_groups
from prunectl.channels.prune import prune_channels
from prunectl.errors import InputError, UntrustedError, UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LoadOptions
from tests.channels import nets
from tests.channels.nets import F, nn, torch
from tests.channels.torch import nets as more
from tests.channels.torch.cutting import cut, exported, saved
from tests.running import here


@pytest.mark.parametrize(
    ("asked", "said", "hint"),
    [
        ({"model": "tests.channels.nets:Vgg", "inputs": ()}, "the shapes of its inputs", "--input 1,3,224,224"),
        ({"model": "tests.channels.nets:Vgg", "inputs": ("1,3,x",)}, "is not a shape", "1,3,224,224"),
        ({"model": "tests.channels.nets:Vgg", "inputs": ("1,3:f8",)}, "is not a type of numbers", "known: f32"),
        (
            {"model": "tests.channels.nets:Vgg", "inputs": ("1,4,16,16",)},
            "cannot run on inputs of 1x4x16x16",
            "--input",
        ),
        ({}, "holds only weights", "--builder"),
        (
            {"model": "tests.channels.nets:Vgg", "custom_objects": "x:Y"},
            "--custom-objects is for Keras models",
            "leave out",
        ),
    ],
)
def test_what_is_missing_is_asked_for(asked: dict[str, Any], said: str, hint: str, tmp_path: Path) -> None:
    path = saved(nets.built(nets.Vgg), tmp_path / "net.pt")
    with pytest.raises(UsageError, match=said) as error:
        cut(path, tmp_path / "small.pt", **asked)
    assert hint in error.value.hint
    assert [child.name for child in tmp_path.iterdir()] == ["net.pt"]


def test_the_shape_that_is_suggested_has_the_width_of_the_first_layer(tmp_path: Path) -> None:
    words = {"model": f"{more.__name__}:perceptron"}
    path = saved(more.perceptron(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="the shapes of its inputs") as error:
        cut(path, tmp_path / "small.pt", **words, inputs=())
    assert error.value.hint.endswith("--input 1,6")
    assert cut(path, tmp_path / "small.pt", **words, inputs=("1,6",))


def test_steps_that_depend_on_the_numbers_cannot_be_followed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(more.Endless(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"torch\.export cannot trace the model of"):
        cut(path, tmp_path / "small.pt", model=f"{more.__name__}:Endless", inputs=("1,4",))
    assert capfd.readouterr() == ("", "")


def test_weights_are_cut_by_the_way_that_is_shown_where_a_checkpoint_holds_other_objects(tmp_path: Path) -> None:
    path, words = tmp_path / "run.ckpt", {"model": "tests.channels.nets:Vgg", "inputs": ("1,3,16,16",)}
    state = {f"net.{name}": value for name, value in nets.built(nets.Vgg).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UntrustedError, match="holds more than tensors and plain values") as caught:
        cut(path, tmp_path / "small.pt", **words)
    assert f"prunectl export {path} -o weights.safetensors" in caught.value.hint
    api.export(path, tmp_path / "weights.safetensors")
    assert cut(tmp_path / "weights.safetensors", tmp_path / "small.safetensors", **words)


def test_a_program_needs_neither_code_nor_shapes(tmp_path: Path) -> None:
    path = exported(nets.built(nets.Vgg), tmp_path / "net.pt2", torch.randn(2, 3, 16, 16))
    for asked in ({"model": "tests.channels.nets:Vgg", "inputs": ()}, {}):
        with pytest.raises(UsageError, match="holds its own graph"):
            cut(path, tmp_path / "small.pt2", **asked)


class Odd(nn.Module):
    """An operation of which nothing is known stands between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        x = self.two(F.local_response_norm(torch.sort(self.one(x), 1).values, 2))
        return self.head(x.mean((2, 3)))


def test_what_is_not_known_locks_and_is_named(tmp_path: Path) -> None:
    path = saved(Odd(), tmp_path / "net.pt")
    found = channel_groups(open_model(path), LoadOptions(f"{__name__}:Odd", inputs=("1,3,8,8",)))
    locks = {family.name: family.locked_because for family in found.groups}
    assert locks["one.weight"] == "sort sort"
    assert locks["two.weight"] == ""
    assert (found.channels, found.prunable) == (19, 6)


def test_the_command_says_what_it_did_and_where(tmp_path: Path) -> None:
    path, output = saved(nets.built(nets.Vgg), tmp_path / "net.pt"), tmp_path / "small.pt"
    words = ("--builder", "tests.channels.nets:Vgg", "--input", "1,3,16,16")
    done = here("prune", path, "-o", output, "--pattern", "channel", "-s", "50%", *words)
    assert done.code == 0
    assert "class Vgg for these weights is in the file beside it" in done.err
    assert ["head.3.weight", "5x20", "5x10", "100", "50", "0.5"] in done.rows
    no_channels = here("prune", path, "-o", tmp_path / "x.pt", "-s", "50%", "--input", "1,3,16,16")
    assert (no_channels.code, "--input needs --pattern channel" in no_channels.err) == (2, True)
    no_groups = here("inspect", path, "--input", "1,3,16,16")
    assert (no_groups.code, "--input needs --groups" in no_groups.err) == (2, True)


def test_two_files_do_not_fit_through_a_pipe(tmp_path: Path) -> None:
    path = saved(nets.built(nets.Vgg), tmp_path / "net.pt")
    request = PruneRequest(sparsity=0.5, pattern="channel", model="tests.channels.nets:Vgg", inputs=("1,3,16,16",))
    with pytest.raises(UsageError, match="the result consists of several files"):
        prune_channels(path, request, Destination(tmp_path / "standard-output.pt", to_stdout=True))
