"""Mistakes that users make are told as theirs, with the way to mend them, and never as bugs of prunectl."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.errors import WorkError, translate
from tests.running import FIXTURES, here

pytestmark = pytest.mark.filterwarnings("ignore")
NET = """
import torch


class Block(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.line = torch.nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.line(x)


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(Block(4, 8), Block(8, 2))


def unset():
    raise ValueError("please set NUM_CLASSES")


number = 3
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Weights, and beside them the code that builds the network."""
    (tmp_path / "own_net.py").write_text(NET)
    lines = {"0.line": torch.nn.Linear(4, 8), "1.line": torch.nn.Linear(8, 2)}
    state = {f"{name}.{leaf}": value for name, line in lines.items() for leaf, value in line.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    return tmp_path / "net.pt"


EXPORT = ("export", "net.pt", "-o", "out.onnx", "--input", "1,4")
PRUNE = ("prune", "net.pt", "-o", "out.pt", "--pattern", "channel", "-s", "50%", "--input", "1,4")


@pytest.mark.parametrize("words", [EXPORT, PRUNE])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own_net.py:Block", "cannot be called without arguments: missing a required argument: 'inputs'"),
        ("own_net.py:unset", "raised ValueError: please set NUM_CLASSES"),
        ("own_net.py:number", "is of type int, not a function"),
        ("own_net.py", "names no function; the file has Block, Net, unset"),
        ("no_net.py", "no_net.py is not a Python file"),
    ],
)
def test_a_builder_that_builds_nothing_is_the_users_to_mend(
    words: tuple[str, ...], model: str, said: str, net: Path
) -> None:
    done = here(*words, "--builder", model, cwd=net.parent)
    assert done.code == 2
    assert said in done.err
    assert "a bug in" not in done.err
    if model == "own_net.py":
        assert "own_net.py:Block" in done.err


STEPS = """
def loss(out, y):
    return out.foo


def step(model, x):
    return 0


def nothing(model, x, y):
    pass
"""


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ("--loss", "./own_steps.py:loss"),
            "own_steps.py:loss raised AttributeError: 'Tensor' object has no attribute",
        ),
        (("--train-step", "./own_steps.py:step"), "own_steps.py:step raised TypeError: step() takes 2 positional"),
        (("--train-step", "./own_steps.py:nothing"), "own_steps.py:nothing returned None, not a tensor"),
    ],
)
def test_a_function_that_raises_in_training_is_the_users_to_mend(option: tuple[str, str], said: str, net: Path) -> None:
    (net.parent / "own_steps.py").write_text(STEPS)
    np.savez(net.parent / "xy.npz", x=np.ones((8, 4), "f4"), y=np.zeros(8, "i8"))
    words = ("finetune", "net.pt", "-o", "out.pt", "--builder", "own_net.py:Net", "--data", "xy.npz", "--epochs", "1")
    done = here(*words, *option, cwd=net.parent)
    assert done.code == 5
    assert said in done.err
    unknown = here(*words[:5], "Net", *words[6:], cwd=net.parent)
    assert "Net is not a known model\n  name a function: package.module:name" in unknown.err


def test_a_keras_builder_that_raises_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text("def unset():\n    raise ValueError('please set NUM_CLASSES')\n")
    words = ("finetune", FIXTURES / "weights_only.h5", "-o", "out.h5", "--data", FIXTURES / "digits.npz")
    done = here(*words, "--builder", "own_net.py:unset", cwd=tmp_path)
    assert done.code == 2
    assert "raised ValueError: please set NUM_CLASSES" in done.err


@pytest.mark.parametrize(
    "words", [PRUNE, ("inspect", "net.pt", "--groups", "--input", "1,4")], ids=["prune", "inspect"]
)
def test_channels_without_torch_say_what_brings_it(
    words: tuple[str, ...], net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = here(*words, "--builder", "own_net.py:Net", cwd=net.parent)
    assert done.code == 4
    assert "pip install torch" in done.err


def save_whole(module: str, folder: Path) -> None:
    """Save a network with its class, which a file in that folder defines."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        torch.save(importlib.import_module(module).Net(), folder / "whole.pt")
    del sys.modules[module]


def test_code_to_import_first_may_be_a_file_under_whose_name_a_pickle_finds_it(net: Path) -> None:
    save_whole("own_net", net.parent)
    words = ("export", "whole.pt", "-o", "out.onnx", "--trust", "--input", "1,4")
    done = here(*words, "--import", "./own_net.py", cwd=net.parent)
    assert done.code == 0, done.err
    assert (net.parent / "out.onnx").is_file()


@pytest.mark.parametrize("command", [("prune", "-s", "0.5"), ("strip", "--half"), ("export", "--to", "safetensors")])
def test_the_root_is_no_file_to_write_to(command: tuple[str, ...], net: Path) -> None:
    done = here(command[0], net, "-o", "/", *command[1:])
    assert done.code == 2
    assert "a bug in" not in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--data", "https://x.org/train.npz?limit=3"),
            "https://x.org/train.npz?limit=3 is a URL, where a file is needed: download",
        ),
        (
            ("--data", "d.npz", "--val", "s3://bucket/val.csv"),
            "s3://bucket/val.csv is a URL, where a file is needed: download",
        ),
        (("--data", "d.npz", "--distill", "hf://org/big"), "hf://org/big is a URL, where a file is needed: download"),
        (("--data", "d.npz", "--builder", "https://x.org/net.py:Net"), "https://x.org/net.py is a URL, where a file"),
        (
            ("--data", "d.npz", "--import", "https://x.org/net.py"),
            "https://x.org/net.py is a URL, where a file is needed: download",
        ),
        (
            ("--data", "d.npz", "-o", "gs://bucket/out.h5"),
            "gs://bucket/out.h5 is a URL, where a file is needed",
        ),
    ],
    ids=["data", "val", "distill", "model", "import", "output"],
)
def test_no_option_fetches_what_a_url_names(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    output = () if "-o" in words else ("-o", "out.h5")
    done = here("finetune", FIXTURES / "digits_cnn.h5", *output, *words, cwd=tmp_path)
    assert done.code == 3
    assert said in done.err


def test_a_whole_module_says_which_file_its_class_is_in(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "net_beside.py").write_text(NET)
    save_whole("net_beside", folder)
    np.savez(tmp_path / "d.npz", x=np.ones((8, 4), "f4"), y=np.zeros(8, "i8"))
    words = ("-o", "out.pt", "--data", "d.npz", "--epochs", "1")
    beside = f"--import {Path('models', 'net_beside.py')}"
    refused = here("finetune", "models/whole.pt", *words, cwd=tmp_path)
    assert refused.code == 3
    assert f"--trust {beside}" in refused.err
    missing = here("finetune", "models/whole.pt", *words, "--trust", cwd=tmp_path)
    assert f"import it first: {beside}" in missing.err
    done = here("finetune", "models/whole.pt", *words, "--trust", *beside.split(), cwd=tmp_path)
    assert done.code == 0, done.err
    (folder / "net_beside.py").rename(tmp_path / "net_beside.py")
    here_now = here("finetune", "models/whole.pt", *words, "--force", cwd=tmp_path)
    assert "--trust --import ./net_beside.py" in here_now.err


def test_a_folder_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path("model.onnx").absolute()
    found = translate(caught.value)
    assert type(found) is WorkError
    assert found.message == "the current folder was removed; nothing was written"
