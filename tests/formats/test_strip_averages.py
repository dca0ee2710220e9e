"""Checkpoints that hold the weights and their average: `--keep` leaves one, which loads strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import prunectl
from prunectl.errors import InputError, UsageError
from tests.running import here

State = dict[str, torch.Tensor]


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 5))


RAW, AVERAGE = net(1), net(2)


def state(made: nn.Module, prefix: str = "") -> State:
    return {f"{prefix}{name}": tensor for name, tensor in made.state_dict().items()}


def timm() -> Any:
    return {
        "epoch": 3,
        "arch": "resnet",
        "state_dict": state(RAW),
        "state_dict_ema": state(AVERAGE),
        "optimizer": {"state": {}},
    }


def timm_of_several_devices() -> Any:
    return {"state_dict": state(RAW, "module."), "state_dict_ema": state(AVERAGE)}


def deit() -> Any:
    return {"model": state(RAW), "model_ema": state(AVERAGE), "epoch": 1, "args": {"lr": 0.1}}


def basicsr() -> Any:
    return {"params": state(RAW), "params_ema": state(AVERAGE)}


def rt_detr() -> Any:
    return {"model": state(RAW), "ema": {"module": state(AVERAGE), "updates": 7}, "last_epoch": 2}


def ema_pytorch() -> Any:
    both = {**state(RAW, "online_model."), **state(AVERAGE, "ema_model.")}
    return {"model": state(RAW), "ema": {"initted": torch.tensor(1), "step": torch.tensor(9), **both}}


def of_torch() -> Any:
    averaged = AveragedModel(RAW)
    averaged.module.load_state_dict(AVERAGE.state_dict())
    return {"model_state_dict": state(RAW), "ema_state_dict": averaged.state_dict()}


def lightning_weight_averaging() -> Any:
    return {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state(AVERAGE),
        "current_model_state": state(RAW),
        "averaging_state": {"n_averaged": torch.tensor(4)},
    }


def mmengine() -> Any:
    return {
        "meta": {},
        "state_dict": state(AVERAGE),
        "ema_state_dict": {"steps": torch.tensor(3), **state(RAW, "module.")},
    }


def lightning_callback() -> Any:
    return {
        "state_dict": state(RAW),
        "callbacks": {"EMACallback": {"ema_state_dict": state(AVERAGE)}, "Other": {"x": 1}},
    }


LAYOUTS: dict[Callable[[], Any], str] = {
    timm: "state_dict",
    timm_of_several_devices: "state_dict",
    deit: "model",
    basicsr: "params",
    rt_detr: "model",
    ema_pytorch: "model",
    of_torch: "model_state_dict",
    lightning_weight_averaging: "state_dict",
    mmengine: "state_dict",
    lightning_callback: "state_dict",
}
"""Each layout, and the entry that the weights are loaded from."""


@pytest.mark.parametrize("keep", ["ema", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_the_copy_that_is_kept_is_loaded_strictly(tmp_path: Path, layout: Any, keep: str, is_zip: bool) -> None:
    torch.save(layout(), tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    done = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "--keep", keep)
    assert done.code == 0, done.err
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    loaded = net(0)
    loaded.load_state_dict(found[LAYOUTS[layout]], strict=True)
    expected = (AVERAGE if keep == "ema" else RAW).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    tensors = sum(tensor.numel() for tensor in RAW.state_dict().values())
    assert (tmp_path / "out.pt").stat().st_size < 4 * tensors + 6000
    assert not [name for name in found if "ema" in name or name == "current_model_state"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_copy_is_meant_is_asked_for(tmp_path: Path, layout: Any) -> None:
    torch.save(layout(), tmp_path / "m.pt")
    done = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt")
    assert done.code == 2
    assert "holds the weights twice" in done.err
    assert "add --keep ema for the average, or --keep raw; --only without training leaves both" in " ".join(
        done.err.split()
    )
    assert not (tmp_path / "out.pt").exists()
    assert here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "--only", "optimizer").code == 0


def test_an_average_of_parameters_alone_takes_the_statistics_of_the_raw_weights(tmp_path: Path) -> None:
    averaged = {name: tensor.data for name, tensor in AVERAGE.named_parameters()}
    torch.save({"model": state(RAW), "ema": averaged}, tmp_path / "m.pt")
    done = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "--keep", "ema")
    assert done.code == 0
    assert "3 tensors, such as 1.running_mean, have no counterpart under ema, and stayed as they were" in done.err
    loaded = net(0)
    loaded.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["model"])
    assert torch.equal(loaded[3].weight, AVERAGE[3].weight)
    assert torch.equal(loaded[1].running_mean, RAW[1].running_mean)


def test_copies_in_one_state_dict_are_told_apart_also_without_dots(tmp_path: Path) -> None:
    averaged = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state(AVERAGE).items()}
    both = {**state(RAW, "model."), **averaged, "model_ema.decay": torch.tensor(0.9), "scale": torch.tensor(2.0)}
    torch.save({"state_dict": both}, tmp_path / "m.ckpt")
    assert here("strip", tmp_path / "m.ckpt", "-o", tmp_path / "out.ckpt", "--keep", "ema").code == 0
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == {*state(RAW, "model."), "scale"}
    assert torch.equal(found["model.3.weight"], AVERAGE[3].weight)


@pytest.mark.parametrize("keep", ["ema", "raw"])
def test_safetensors_keep_one_copy_too(tmp_path: Path, keep: str) -> None:
    save_file(
        {**state(RAW), **state(AVERAGE, "ema_model.module."), "ema_model.n": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    assert here("strip", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors").code == 2
    assert here("strip", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "--keep", keep).code == 0
    loaded = net(0)
    loaded.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    assert torch.equal(loaded[3].weight, (AVERAGE if keep == "ema" else RAW)[3].weight)


@pytest.mark.parametrize("keep", ["ema", "raw"])
def test_whole_modules_take_the_place_of_each_other(tmp_path: Path, keep: str) -> None:
    torch.save({"model": RAW, "ema": AVERAGE, "updates": 5}, tmp_path / "yolo.pt")
    assert here("strip", tmp_path / "yolo.pt", "-o", tmp_path / "out.pt", "--keep", keep).code == 0
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert found.keys() == {"model"}
    assert torch.equal(found["model"][3].weight, (AVERAGE if keep == "ema" else RAW)[3].weight)
    # Its own loader takes the average: nothing is asked.
    assert here("strip", tmp_path / "yolo.pt", "-o", tmp_path / "plain.pt").code == 0


def test_an_average_without_names_is_no_copy(tmp_path: Path) -> None:
    torch.save(
        {"model": state(RAW), "ema": {"shadow_params": [tensor * 2 for tensor in state(RAW).values()]}},
        tmp_path / "m.pt",
    )
    done = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "--keep", "ema")
    assert done.code == 2
    assert "one copy of the weights, or none that is known by its names" in done.err


@pytest.mark.parametrize("change", [{}, {"3.weight": torch.ones(5, 9)}], ids=["lacking", "of another shape"])
def test_an_average_without_a_kernel_of_the_raw_shape_is_refused(tmp_path: Path, change: State) -> None:
    average = {name: tensor for name, tensor in state(AVERAGE).items() if name != "3.weight"}
    torch.save({"model": state(RAW), "ema": average | change}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"3\.weight has no counterpart of its shape under ema") as refusal:
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    assert "keep='raw' keeps the copy that is whole" in refusal.value.hint
    assert not (tmp_path / "out.pt").exists()
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="raw")
    net(0).load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["model"], strict=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_masked_weight_takes_the_average_of_the_plain_one(tmp_path: Path, prefix: str, ending: str) -> None:
    raw = state(RAW, prefix)
    raw[f"{prefix}3.weight_orig"] = raw.pop(f"{prefix}3.weight")
    mask = raw[f"{prefix}3.weight_mask"] = (torch.arange(40).reshape(5, 8) % 2).float()
    source, out = tmp_path / f"m.{ending}", tmp_path / f"out.{ending}"
    if ending == "pt":
        torch.save({"model": raw, "ema": state(AVERAGE)}, source)
    else:
        save_file({f"model.{n}": t for n, t in raw.items()} | state(AVERAGE, "ema."), source)
    prunectl.strip(source, out, keep="ema")
    found = torch.load(out, weights_only=True)["model"] if ending == "pt" else load_file(out)
    found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    assert found.keys() == AVERAGE.state_dict().keys()
    assert torch.equal(found["3.weight"], AVERAGE[3].weight * mask)
    assert torch.equal(found["0.weight"], AVERAGE[0].weight)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


PLAIN = {
    "a gate": {
        "fc.weight": noise(8, 8),
        "fc.bias": noise(8),
        "ema.gate.weight": noise(8, 8),
        "ema.gate.bias": noise(8),
        "head.weight": noise(3, 8),
    },
    "an attention": {
        f"block.{kind}.{name}_proj.weight": noise(4, 4) for kind in ("attn", "swa") for name in ("q", "k", "v")
    },
    "a vector": {"ema.weight": noise(4), "fc.weight": noise(4), "fc.bias": noise(4)},
}


@pytest.mark.parametrize("part", PLAIN)
def test_a_part_of_a_network_that_is_called_so_is_no_average(tmp_path: Path, part: str) -> None:
    save_file(PLAIN[part], tmp_path / "m.safetensors")
    done = here("strip", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    assert load_file(tmp_path / "out.safetensors").keys() == PLAIN[part].keys()


def test_a_part_that_is_called_so_does_not_hide_the_average(tmp_path: Path) -> None:
    inside = PLAIN["a gate"]
    torch.save({"state_dict": inside, "state_dict_ema": {n: t + 1 for n, t in inside.items()}}, tmp_path / "m.pt")
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert found.keys() == inside.keys()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in inside.items())


class Both(nn.Module):
    """A network that trains beside its average."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.ema = net(1), net(2)


@pytest.mark.parametrize("keep", ["ema", "raw"])
def test_copies_inside_one_module_are_refused(tmp_path: Path, keep: str) -> None:
    torch.save(Both(), tmp_path / "m.pt")
    with pytest.raises(InputError, match="lies in objects that only their class can open"):
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep=keep)
    assert not (tmp_path / "out.pt").exists()


class Averager:
    """An object that keeps the average, as many training loops have it."""

    def __init__(self, ema: nn.Module) -> None:
        self.ema, self.decay = ema, 0.9


@pytest.mark.parametrize("keeper", [Averager, AveragedModel])
def test_the_module_in_an_object_takes_the_place_of_the_model(tmp_path: Path, keeper: Any) -> None:
    torch.save({"model": RAW, "ema": keeper(AVERAGE)}, tmp_path / "m.pt")
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert found.keys() == {"model"}
    assert isinstance(found["model"], nn.Sequential)
    assert torch.equal(found["model"][3].weight, AVERAGE[3].weight)


def test_an_object_never_takes_the_place_of_a_state_dict(tmp_path: Path) -> None:
    torch.save({"model": state(RAW), "ema": Averager(AVERAGE)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="lies in objects that only their class can open"):
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")


def test_keep_where_there_is_one_copy_is_a_slip(tmp_path: Path) -> None:
    torch.save(state(RAW), tmp_path / "m.pt")
    assert here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt", "--keep", "ema").code == 2
    with pytest.raises(UsageError, match="keep is ema or raw, not 'mean'"):
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="mean")


def test_python_keeps_a_copy_as_well(tmp_path: Path) -> None:
    torch.save(deit(), tmp_path / "m.pt")
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["model"]["3.weight"], AVERAGE[3].weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_many_ranks_becomes_no_folder_that_is_named_as_a_checkpoint(tmp_path: Path) -> None:
    dcp.save({"model": state(RAW)}, checkpoint_id=tmp_path / "ranks", no_dist=True)
    done = here("strip", tmp_path / "ranks", "-o", tmp_path / "out.ckpt")
    assert done.code == 2
    assert "out.pt" in done.err
    assert not (tmp_path / "out.ckpt").exists()


def test_of_several_averages_the_first_is_kept_or_goes(tmp_path: Path) -> None:
    averages = {"ema": state(AVERAGE), "ema_slow": state(net(3)), "ema_slower": state(net(4))}
    torch.save({"model": state(RAW), **averages}, tmp_path / "m.pt")
    assert here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt").code == 2
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["model"]["3.weight"], AVERAGE[3].weight)
    assert "ema" not in found


CRITIC = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 1))
GAN = state(RAW, "generator.") | state(CRITIC, "discriminator.")
OF_GENERATORS = {
    "a dict beside it": {"state_dict": GAN, "ema_state_dict": state(AVERAGE, "generator."), "step": 3},
    "without its name": {"model": GAN, "model_ema": state(AVERAGE)},
    "in a dict of its own": {"net": GAN, "ema": {"step": torch.tensor(1), **state(AVERAGE, "ema_model.generator.")}},
}


@pytest.mark.parametrize("layout", OF_GENERATORS)
def test_an_average_of_the_generator_alone_is_not_dropped_in_silence(layout: str, tmp_path: Path) -> None:
    saved: Any = OF_GENERATORS[layout]
    home = next(iter(saved))
    torch.save(saved, tmp_path / "m.pt")
    done = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt")
    assert done.code == 2
    for word in ("holds some of the weights twice", "--keep ema", "--keep raw"):
        assert word in done.err
    for keep, generator in (("ema", AVERAGE), ("raw", RAW)):
        assert here("strip", tmp_path / "m.pt", "-o", tmp_path / f"{keep}.pt", "--keep", keep).code == 0
        found = torch.load(tmp_path / f"{keep}.pt", weights_only=True)
        assert found.keys() == {home}
        assert found[home].keys() == GAN.keys()
        for name, tensor in (GAN | state(generator, "generator.")).items():
            assert torch.equal(found[home][name], tensor), name


def test_in_safetensors_neither(tmp_path: Path) -> None:
    save_file(GAN | state(AVERAGE, "ema.generator."), tmp_path / "m.safetensors")
    assert here("strip", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors").code == 2
    assert here("strip", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "--keep", "ema").code == 0
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == GAN.keys()
    assert torch.equal(found["generator.3.weight"], AVERAGE[3].weight)
    assert torch.equal(found["discriminator.0.weight"], CRITIC[0].weight)


def test_an_average_of_the_generator_without_one_of_its_kernels_is_refused(tmp_path: Path) -> None:
    average = {name: tensor for name, tensor in state(AVERAGE, "generator.").items() if "3.weight" not in name}
    torch.save({"model": GAN, "ema": average}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"generator\.3\.weight has no counterpart of its shape under ema"):
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")


def layers(value: float, *parts: str, count: int = 3) -> State:
    return {f"{part}l{i}.weight": torch.full((8, 8), float(value)) for part in parts for i in range(count)}


TRAINED = layers(10, "gen.", "disc.", "enc.")
NOT_TO_KEEP: dict[str, tuple[Any, str]] = {
    "fits two parts": ({"model": layers(1, "disc.", "gen."), "ema": layers(2, "")}, "ema fits disc and gen alike"),
    "some layers": ({"model": layers(1, "", count=6), "ema": layers(2, "", count=2)}, "l2.weight has no counterpart"),
    "one layer": ({"model": layers(1, "", count=6), "ema": layers(2, "", count=1)}, "l1.weight has no counterpart"),
    "another shape": (
        {"model": layers(1, "", count=6), "ema": layers(2, "") | {f"l{i}.weight": torch.ones(4, 8) for i in (3, 4, 5)}},
        "ema have other names or shapes",
    ),
    "two parts": (
        {"model": TRAINED, "ema": layers(2, "gen."), "swa_model": layers(3, "disc.")},
        "ema and swa_model are averages of parts",
    ),
}


@pytest.mark.parametrize("case", NOT_TO_KEEP)
def test_an_average_of_no_single_part_is_neither_kept_nor_offered(case: str, tmp_path: Path) -> None:
    saved, reason = NOT_TO_KEEP[case]
    torch.save(saved, tmp_path / "m.pt")
    asked = here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt")
    assert asked.code == 2
    question = " ".join(asked.err.split())
    assert reason in question
    assert "twice: model as they were trained" in question
    assert "add --keep raw" in question
    assert "--keep ema" not in question
    with pytest.raises(InputError, match=reason):
        prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    assert not (tmp_path / "out.pt").exists()
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="raw")
    left = torch.load(tmp_path / "out.pt", weights_only=True)
    assert left.keys() == {"model"}
    assert all(torch.equal(left["model"][name], tensor) for name, tensor in saved["model"].items())


def test_averages_of_two_parts_leave_safetensors_together(tmp_path: Path) -> None:
    save_file(TRAINED | layers(2, "ema.gen.") | layers(3, "swa_model.disc."), tmp_path / "m.safetensors")
    prunectl.strip(tmp_path / "m.safetensors", tmp_path / "out.safetensors", keep="raw")
    assert load_file(tmp_path / "out.safetensors").keys() == TRAINED.keys()


@pytest.mark.parametrize("home", ["net.", "", "module.net."])
def test_an_average_of_a_part_deeper_down_takes_its_place(home: str, tmp_path: Path) -> None:
    trained = layers(1, *(f"{home}{part}." for part in ("gen", "disc", "enc")))
    torch.save({"model": trained, "ema": layers(2, f"{home}gen.")}, tmp_path / "m.pt")
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    left = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert {name: float(tensor.mean()) for name, tensor in left.items()} == {
        name.removeprefix("module."): 2.0 if "gen" in name else 1.0 for name in trained
    }


def test_of_two_parts_the_one_with_the_shapes_of_the_average_takes_it(tmp_path: Path) -> None:
    other = {f"disc.l{i}.weight": torch.ones(4, 4) for i in range(3)}
    torch.save({"model": other | layers(1, "gen."), "ema": layers(2, "")}, tmp_path / "m.pt")
    assert here("strip", tmp_path / "m.pt", "-o", tmp_path / "out.pt").code == 2
    prunectl.strip(tmp_path / "m.pt", tmp_path / "out.pt", keep="ema")
    left = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert float(left["gen.l0.weight"].mean()) == 2.0
    assert float(left["disc.l0.weight"].mean()) == 1.0
