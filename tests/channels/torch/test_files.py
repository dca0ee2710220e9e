"""Every kind of file that PyTorch writes: programs, checkpoints, modules, scripts, safetensors."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.torch import adapter
from prunectl.errors import UntrustedError, UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.training.finetune import finetune
from prunectl.training.request import parse_request
from tests import forked
from tests.channels import nets
from tests.channels.masked import masked
from tests.channels.nets import nn, torch
from tests.channels.torch import nets as more
from tests.channels.torch.cutting import built, cut, exported, loaded, said, saved
from tests.running import COMMAND, FIXTURES, clean, here

BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


@pytest.mark.parametrize(
    "kind", [nets.Residual, nets.Split, nets.Attention, more.Encoder], ids=lambda kind: kind.__name__
)
def test_a_program_stays_one_and_says_what_it_should(kind: Any, tmp_path: Path) -> None:
    net, output = nets.built(kind), tmp_path / "small.pt2"
    is_open = kind is not more.Encoder  # its token is as often there as the batch was long
    path = exported(net, tmp_path / "net.pt2", torch.randn(3, 3, 16, 16), dynamic_shapes=(BATCH,) if is_open else None)
    found = cut(path, output, inputs=())
    assert found.proof.error_float64 is not None
    assert found.proof.error_float64 < 1e-12
    assert [child.name for child in tmp_path.iterdir() if child.stem == "small"] == ["small.pt2"]
    written = torch.export.load(output)
    images = torch.randn(7 if is_open else 3, 3, 16, 16)
    np.testing.assert_allclose(said(written.module(), images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5)
    if is_open:
        assert [(int(one.lower), int(one.upper)) for one in written.range_constraints.values()] == [(1, 64)]


def test_bounds_that_pytorch_does_not_take_again_are_told_when_they_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nets.built(nets.Residual)
    path = exported(net, tmp_path / "net.pt2", torch.randn(3, 3, 16, 16), dynamic_shapes=(BATCH,))
    assert not cut(path, tmp_path / "kept.pt2", inputs=()).notes
    axes = adapter._open_axes

    def failing(found: Any, bounds: Any) -> Any:
        if bounds:
            raise RuntimeError("no such bounds")
        return axes(found, bounds)

    monkeypatch.setattr(adapter, "_open_axes", failing)
    (note,) = cut(path, tmp_path / "small.pt2", inputs=()).notes
    assert note.startswith("PyTorch chose new bounds for the dynamic sizes of the program: no such")


def test_a_decomposed_program_is_read_as_well(tmp_path: Path) -> None:
    net, output = nets.built(nets.Residual), tmp_path / "small.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.export.export(net, (torch.randn(2, 3, 16, 16),)).run_decompositions()
        torch.export.save(whole, tmp_path / "net.pt2")
    found = cut(tmp_path / "net.pt2", output, inputs=())
    assert (found.channels, found.dropped) == (40, 20)
    images = torch.randn(2, 3, 16, 16)
    small = torch.export.load(output).module()
    np.testing.assert_allclose(said(small, images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5)


def trained(net: Any, kind: Any, **how: Any) -> Any:
    optimizer = kind(net.parameters(), **how)
    net.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    net.eval()
    return optimizer


def test_training_goes_on_from_a_cut_checkpoint(tmp_path: Path) -> None:
    net, path, output = nets.built(nets.Residual), tmp_path / "net.pt", tmp_path / "small.pt"
    optimizer = trained(net, torch.optim.AdamW)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = {f"module.{name}": value for name, value in before.items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "best": 0.5}, path)
    found = cut(path, output, model="tests.channels.nets:Residual")
    checkpoint = torch.load(output, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["best"]) == (3, 0.5)
    assert checkpoint["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    small = built(tmp_path / "small.py", "Residual")
    small.load_state_dict({name.removeprefix("module."): value for name, value in checkpoint["model"].items()})
    kept = torch.tensor([at for at in range(8) if at not in lost(found, "stem.0.weight")])
    old, new = optimizer.state_dict()["state"], checkpoint["optimizer"]["state"]
    assert torch.equal(new[0]["exp_avg"], old[0]["exp_avg"][kept])
    assert torch.equal(new[1]["exp_avg_sq"], old[1]["exp_avg_sq"][kept])
    assert "state = torch.load" in (tmp_path / "small.py").read_text()
    again = torch.optim.AdamW(small.parameters())
    again.load_state_dict(checkpoint["optimizer"])
    small.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    again.step()
    assert all(value.isfinite().all() for value in small.state_dict().values())


def lost(found: Any, name: str) -> list[int]:
    """The numbers of the channels of a maker that went, whatever prefix the file has."""
    return [
        at
        for loss in found.pruned_groups
        for number in loss.dropped
        for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True)
        if place.tensor.endswith(name) and place.axis == 0
        for at in indices
    ]


def test_the_state_of_an_optimizer_with_weights_in_an_order_of_its_own_is_left_out(tmp_path: Path) -> None:
    net, path = nets.built(nets.Residual), tmp_path / "net.pt"
    weights = sorted(net.parameters(), key=lambda weight: -weight.ndim)
    optimizer = torch.optim.Adam([{"params": weights[:4]}, {"params": weights[4:], "lr": 0.1}])
    net.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    found = cut(path, tmp_path / "small.pt", model="tests.channels.nets:Residual")
    assert any("optimizer" in note for note in found.notes)
    written = torch.load(tmp_path / "small.pt", weights_only=True)
    assert written["optimizer"]["state"] == {}
    assert written["optimizer"]["param_groups"][1]["lr"] == 0.1
    left = [torch.zeros(1, requires_grad=True) for _ in weights]
    torch.optim.Adam([{"params": left[:4]}, {"params": left[4:]}]).load_state_dict(written["optimizer"])
    assert written["model"]["stem.0.weight"].shape[0] * 2 == net.stem[0].weight.shape[0]


def test_the_class_beside_a_cut_is_among_what_was_written(tmp_path: Path) -> None:
    path, output = tmp_path / "net.pt", tmp_path / "small.pt"
    torch.save(nets.built(nets.Residual).state_dict(), path)
    words = ("--pattern", "channel", "-s", "0.5", "--builder", "tests.channels.nets:Residual", "--input", "1,3,16,16")
    done = here("prune", path, "-o", output, *words, "--json")
    assert done.json["artifacts"] == [
        {"path": str(file), "bytes": file.stat().st_size} for file in (output, tmp_path / "small.py")
    ]


def test_a_whole_module_becomes_weights_and_a_class(tmp_path: Path) -> None:
    net, path, output = nets.built(nets.Mobile), tmp_path / "net.pt", tmp_path / "small.pt"
    torch.save(net, path)
    with pytest.raises(UntrustedError, match="would run code"):
        cut(path, output)
    found = cut(path, output, is_trusted=True)
    assert "now holds only weights" in found.notes[0]
    images = torch.randn(3, 3, 16, 16)
    np.testing.assert_allclose(
        said(loaded(output, "Mobile"), images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5
    )


def test_a_script_becomes_weights_and_a_class(tmp_path: Path) -> None:
    net, path, output = nets.built(nets.Vgg), tmp_path / "net.pt", tmp_path / "small.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.randn(2, 3, 16, 16)).save(path)
    found = cut(path, output)
    images = torch.randn(5, 3, 16, 16)
    np.testing.assert_allclose(said(loaded(output, "Vgg"), images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5)


def test_safetensors_stay_so_with_what_they_say_of_themselves(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net, path, output = nets.built(nets.Excite), tmp_path / "net.safetensors", tmp_path / "small.safetensors"
    safetensors.save_file(net.state_dict(), path, metadata={"format": "pt", "epoch": "3"})
    found = cut(path, output, model="tests.channels.nets:Excite")
    small = built(tmp_path / "small.py", "Excite")
    small.load_state_dict(safetensors.load_file(output), strict=True)
    images = torch.randn(3, 3, 16, 16)
    np.testing.assert_allclose(said(small, images)[0], masked(net, found, images), rtol=1e-4, atol=1e-5)
    with safetensors.safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "3"}


def test_half_precision_stays_so_in_the_file(tmp_path: Path) -> None:
    net, output = nets.built(nets.Vgg), tmp_path / "small.pt"
    path = saved(net.to(torch.bfloat16), tmp_path / "net.pt")
    cut(path, output, model="tests.channels.nets:Vgg")
    assert {str(tensor.dtype) for tensor in open_model(output).tensors if tensor.is_float} == {"bfloat16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_a_whole_module_stays_so_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    net, path, output = nets.built(nets.Mobile).to(dtype), tmp_path / "net.pt", tmp_path / "small.pt"
    torch.save(net, path)
    cut(path, output, is_trusted=True)
    before, after = net.state_dict(), torch.load(output, weights_only=True)
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}


def test_what_was_cut_is_trained_further(tmp_path: Path) -> None:
    path, small, output = tmp_path / "net.pt", tmp_path / "small.pt", tmp_path / "better.pt"
    cut(saved(nets.built(nets.Mobile), path), small, model="tests.channels.nets:Mobile")
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "train.npz",
        x=random.standard_normal((12, 3, 16, 16)).astype(np.float32),
        y=random.integers(0, 5, 12),
    )
    words = {"data": str(tmp_path / "train.npz"), "epochs": 1, "batch_size": 5, "lr": 0.01, "loss": "cross-entropy"}
    finetune(small, parse_request({**words, "builder": f"{tmp_path / 'small.py'}:Mobile"}), Destination(output))
    assert not np.array_equal(
        torch.load(output, weights_only=True)["head.weight"], torch.load(small, weights_only=True)["head.weight"]
    )


def test_names_in_a_file_never_become_code(tmp_path: Path) -> None:
    net, path, output = nets.built(nets.Squeeze), tmp_path / "net.pt", tmp_path / "small.pt"
    evil = '"""\nraise SystemExit\n"""\\'
    torch.save({evil: net.state_dict()}, path)
    cut(path, output, model="tests.channels.nets:Squeeze")
    small = built(tmp_path / "small.py", "Squeeze")
    small.load_state_dict(torch.load(output, weights_only=True)[evil], strict=True)


def test_code_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    path = saved(nets.built(nets.Vgg), tmp_path / "net.pt")
    (tmp_path / "small.py").write_text("mine = True\n")
    with pytest.raises(UsageError, match="would overwrite it"):
        cut(path, tmp_path / "small.pt", model="tests.channels.nets:Vgg")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["net.pt", "small.py"]


def test_constants_too_long_for_code_are_kept_in_the_file(tmp_path: Path) -> None:
    output = tmp_path / "small.pt"
    cut(saved(Lit().eval(), tmp_path / "net.pt"), output, model=f"{__name__}:Lit")
    small = loaded(output, "Lit")
    torch.testing.assert_close(small.light, Lit().light)


class Lit(nn.Module):
    """An image lit by a pattern that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.register_buffer("light", torch.linspace(0, 1, 256).view(16, 16), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.two(self.one(x * self.light).relu())


def test_a_program_is_cut_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    # In a process of its own: PyTorch takes the one down that lets it write to such a path.
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    shutil.copyfile(FIXTURES / "digits_cnn.pt2", folder / "net.pt2")
    words = ["prune", folder / "net.pt2", "-o", folder / "small.pt2", "-s", "0.5", "--pattern", "channel"]
    done = forked.run([*COMMAND, *map(os.fspath, words)], env=clean())
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == ["net.pt2", "small.pt2"]


def test_a_checkpoint_is_loaded_once_for_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, loads = saved(nets.built(nets.Residual), tmp_path / "net.pt"), []
    load = torch.load

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        loads.append(file)
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", counted)
    cut(path, tmp_path / "small.pt", model="tests.channels.nets:Residual")
    assert [Path(str(file)) for file in loads] == [path]
