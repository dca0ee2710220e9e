"""PyTorch files without masks and training state, held against what PyTorch itself makes of them."""

from __future__ import annotations

import argparse
import collections
import copy
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from prunectl.errors import InputError
from prunectl.formats.base import Capability, RemovedItem, StripOptions, StripPart
from prunectl.formats.registry import by_name, load, open_model
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

EVERYTHING = StripOptions()
LAYOUTS = ["zip", "legacy"]


def save(value: object, path: Path, layout: str = "zip") -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    return path


def strip(path: Path, wish: StripOptions = EVERYTHING) -> tuple[Path, tuple[RemovedItem, ...]]:
    model = open_model(path)
    target = path.with_name("out.pt")
    removed = load(by_name(model.format).stripper)(model, wish, {path: target})
    return target, removed


def stripped(value: object, tmp_path: Path, layout: str = "zip", wish: StripOptions = EVERYTHING) -> Any:
    target, _ = strip(save(value, tmp_path / "m.pt", layout), wish)
    return torch.load(target, weights_only=True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def pruned() -> nn.Sequential:
    made = net()
    prune.l1_unstructured(made[0], "weight", 0.5)
    prune.random_unstructured(made[0], "bias", 0.4)
    prune.ln_structured(made[3], "weight", 0.4, 2, 0)
    return made


def removed_by_torch(made: nn.Sequential) -> dict[str, torch.Tensor]:
    for layer, name in [(0, "weight"), (0, "bias"), (3, "weight")]:
        prune.remove(made[layer], name)
    return dict(made.state_dict())


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found == expected


def optimized(made: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(made.parameters())
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pruned_state_dict_comes_out_as_prune_remove_leaves_it(tmp_path: Path, layout: str) -> None:
    made = pruned()
    found = stripped(made.state_dict(), tmp_path, layout)
    assert_same(dict(found), removed_by_torch(made))
    assert set(found._metadata) == set(net().state_dict()._metadata)
    net().load_state_dict(found)


def test_no_minus_zero_and_no_nan_stays_where_a_mask_is_zero(tmp_path: Path) -> None:
    weights = torch.tensor([-1.0, float("nan"), float("inf"), -2.0])
    found = stripped({"w_orig": weights, "w_mask": torch.tensor([0.0, 0.0, 0.0, 1.0])}, tmp_path)
    assert found["w"].numpy().tobytes() == np.array([0, 0, 0, -2], np.float32).tobytes()


def test_what_went_is_listed_with_the_bytes_that_it_took(tmp_path: Path) -> None:
    path = save(pruned().state_dict(), tmp_path / "m.pt")
    target, removed = strip(path)
    assert {(row.name, row.bytes) for row in removed if row.part is StripPart.MASKS} == {
        ("0.weight_mask", 8 * 3 * 9 * 4),
        ("0.bias_mask", 8 * 4),
        ("3.weight_mask", 40 * 4),
    }
    assert {row.name for row in removed if row.part is StripPart.WRAPPERS} == {
        "0.weight_orig",
        "0.bias_orig",
        "3.weight_orig",
    }
    assert sum(row.bytes for row in removed if row.part is StripPart.WRAPPERS) == 0
    assert target.stat().st_size < path.stat().st_size


@pytest.mark.parametrize("part", [StripPart.MASKS, StripPart.WRAPPERS])
def test_masks_and_wrappers_go_together(tmp_path: Path, part: StripPart) -> None:
    made = pruned()
    found = stripped(made.state_dict(), tmp_path, wish=StripOptions(frozenset({part})))
    assert_same(dict(found), removed_by_torch(made))


def test_masks_stay_when_only_the_optimizer_is_to_go(tmp_path: Path) -> None:
    made = pruned()
    value = {"state_dict": made.state_dict(), "optimizer": optimized(made).state_dict()}
    found = stripped(value, tmp_path, wish=StripOptions(frozenset({StripPart.OPTIMIZER})))
    assert_same(found, {"state_dict": made.state_dict()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masks_of_every_float_type_are_applied(tmp_path: Path, dtype: torch.dtype) -> None:
    made = pruned().to(dtype)
    assert_same(dict(stripped(made.state_dict(), tmp_path)), removed_by_torch(made))


class Masked(nn.Module):
    """A parametrization whose mask is saved, as torchao and many others have it."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def test_masked_parametrizations_come_out_as_torch_leaves_them(tmp_path: Path) -> None:
    made = net()
    parametrize.register_parametrization(made[3], "weight", Masked((torch.rand(5, 8) > 0.5).float()))
    parametrize.register_parametrization(made[3], "weight", Masked(torch.rand(5, 8) > 0.5))
    parametrize.register_parametrization(made[3], "bias", Masked(torch.rand(5) > 0.5))
    found = stripped(made.state_dict(), tmp_path)
    parametrize.remove_parametrizations(made[3], "weight", leave_parametrized=True)
    parametrize.remove_parametrizations(made[3], "bias", leave_parametrized=True)
    assert_same(dict(found), dict(made.state_dict()))
    assert set(found._metadata) == set(made.state_dict()._metadata)
    net().load_state_dict(found)


def test_masks_that_a_sparsifier_keeps_are_squashed_as_it_would(tmp_path: Path) -> None:
    pytest.importorskip("torch.ao.pruning")
    made = net()
    sparsifier = torch.ao.pruning.WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(made, [{"tensor_fqn": "3.weight"}])
    sparsifier.step()
    kept = {"model": made.state_dict(), "sparsifier": sparsifier.state_dict(), "names": ["cat"]}
    # Its groups hold a plain list, its states a defaultdict.
    found = stripped(copy.deepcopy(kept), tmp_path)
    sparsifier.squash_mask()
    assert_same(found, {"model": made.state_dict(), "names": ["cat"]})


def test_other_parametrizations_stay_as_they_are(tmp_path: Path) -> None:
    made = net()
    parametrizations.weight_norm(made[3])
    parametrizations.spectral_norm(made[0])
    target, removed = strip(save(made.state_dict(), tmp_path / "m.pt"))
    assert removed == ()
    assert target.read_bytes() == (tmp_path / "m.pt").read_bytes()


def test_the_wrappers_of_nni_go_with_their_names(tmp_path: Path) -> None:
    plain = net().state_dict()
    mask, bias_mask = torch.rand(5, 8) > 0.5, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    wrapped = collections.OrderedDict((name.replace("3.", "3.module."), tensor) for name, tensor in plain.items())
    wrapped |= {"3.weight_mask": mask, "3.bias_mask": bias_mask}
    plain["3.weight"], plain["3.bias"] = plain["3.weight"] * mask, plain["3.bias"] * bias_mask
    assert_same(dict(stripped(wrapped, tmp_path)), dict(plain))


def test_attention_masks_are_no_masks_of_pruning(tmp_path: Path) -> None:
    value = {"attn.causal_mask": torch.ones(3, 3), "attn.weight": torch.ones(3, 3)}
    assert_same(stripped(value, tmp_path), value)


def test_a_weight_without_dense_order_keeps_its_order(tmp_path: Path) -> None:
    made = pruned().to(memory_format=torch.channels_last)
    found = stripped(made.state_dict(), tmp_path)
    assert_same(dict(found), removed_by_torch(made))
    assert found["0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_part_of_a_shared_storage_gets_its_own(tmp_path: Path, layout: str) -> None:
    base = torch.arange(12.0)
    value = {"a.weight_orig": base[4:8].view(2, 2), "a.weight_mask": torch.eye(2), "b": base}
    found = stripped(value, tmp_path, layout)
    assert_same(found, {"a.weight": torch.tensor([[4.0, 0.0], [0.0, 7.0]]), "b": base})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_weights_stay_tied_under_one_mask_and_part_under_two(tmp_path: Path, layout: str) -> None:
    weight, mask = torch.rand(3, 3) + 1, torch.eye(3)
    one = {"a_orig": weight, "a_mask": mask, "b_orig": weight, "b_mask": mask.clone()}
    found = stripped(one, tmp_path, layout)
    assert torch.equal(found["a"], weight * mask)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    (tmp_path / "out.pt").unlink()
    found = stripped(one | {"b_mask": 1 - mask}, tmp_path, layout)
    assert_same(found, {"a": weight * mask, "b": weight * (1 - mask)})


def test_views_stay_views_when_a_part_goes(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    value = {"model": {"part": base[2:4], "whole": base}, "optimizer": {"state": base[1:3]}}
    target, removed = strip(save(value, tmp_path / "m.pt"))
    found = torch.load(target, weights_only=True)["model"]
    assert found["part"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()
    assert removed == (RemovedItem("optimizer", StripPart.OPTIMIZER, 0),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_keeps_its_model_and_its_settings(tmp_path: Path, layout: str) -> None:
    made = net()
    value = {
        "epoch": 3,
        "best_acc1": 0.9,
        "arch": "resnet",
        "args": {"lr": 0.1},
        "state_dict": made.state_dict(),
        "optimizer": optimized(made).state_dict(),
        "scheduler": {"last_epoch": 3},
        "scaler": {"growth_factor": 2.0, "scale": 1.0},
        "rng_state": torch.get_rng_state(),
        "model_ema": net().state_dict(),
        "normalizer": {"mean": torch.ones(1)},
    }
    path = save(value, tmp_path / "m.pt", layout)
    target, removed = strip(path)
    found = torch.load(target, weights_only=True)
    assert_same(found, {name: value[name] for name in ("arch", "args", "state_dict", "normalizer")})
    of = {row.name: row for row in removed}
    assert of["optimizer"].part is StripPart.OPTIMIZER
    assert of["optimizer"].bytes == sum(4 + 8 * p.numel() for p in made.parameters())
    assert {name for name, row in of.items() if row.part is StripPart.TRAINING} == (
        {"epoch", "best_acc1", "scheduler", "scaler", "rng_state", "model_ema"}
    )


def test_a_checkpoint_of_lightning_keeps_what_its_loader_asks_for(tmp_path: Path) -> None:
    made = net()
    kept = {
        "epoch": 2,
        "global_step": 40,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": made.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 8},
    }
    training = {
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [optimized(made).state_dict()],
        "lr_schedulers": [{"last_epoch": 1}],
    }
    target, removed = strip(save(kept | training, tmp_path / "m.pt"))
    assert_same(torch.load(target, weights_only=True), kept)
    assert {row.name: row.part for row in removed} == {
        "loops": StripPart.TRAINING,
        "callbacks": StripPart.TRAINING,
        "optimizer_states": StripPart.OPTIMIZER,
        "lr_schedulers": StripPart.TRAINING,
    }


@pytest.mark.parametrize("has_both", [True, False])
def test_a_checkpoint_of_yolo_keeps_the_model_that_its_loader_takes(tmp_path: Path, has_both: bool) -> None:
    average = net().half()
    value = {
        "date": "2024-01-01",
        "version": "8.3",
        "epoch": 9,
        "best_fitness": 0.5,
        "model": net() if has_both else None,
        "ema": average,
        "updates": 100,
        "optimizer": optimized(net()).state_dict(),
        "train_args": {"imgsz": 320},
        "train_metrics": {"map": 0.5},
        "train_results": {"epoch": [1]},
    }
    target, removed = strip(save(value, tmp_path / "m.pt"))
    found = torch.load(target, weights_only=False)
    assert set(found) == {"version", "model", "ema", "train_args"}
    assert found["model"] is None
    assert_same(dict(found["ema"].state_dict()), dict(average.state_dict()))
    assert ("model" in {row.name for row in removed}) is has_both


@pytest.mark.parametrize(
    "value",
    [
        {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
        {"optimizer": {"state": torch.ones(2)}, "epoch": 1},
        {"epoch": torch.ones(1), "loss": torch.ones(2), "weight": torch.ones(3)},
        {"model": {"w": torch.ones(2)}, "scaler": {"mean": torch.ones(2)}, "optimizer": "adam"},
    ],
    ids=["an optimizer alone", "no model", "tensors of these names", "a scaler of data"],
)
def test_what_is_not_surely_left_over_stays(tmp_path: Path, value: Any) -> None:
    target, removed = strip(save(value, tmp_path / "m.pt"))
    assert removed == ()
    assert target.read_bytes() == (tmp_path / "m.pt").read_bytes()


def test_gradients_go_beside_their_weights_and_inside_of_parameters(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.main_grad = torch.ones(4)
    value = {"w": torch.ones(3), "w.grad": torch.ones(3), "p": parameter, "odd.grad": torch.ones(2)}
    target, removed = strip(save(value, tmp_path / "m.pt"))
    found = torch.load(target, weights_only=True)
    assert set(found) == {"w", "p", "odd.grad"}
    assert not hasattr(found["p"], "main_grad")
    assert {(row.name, row.part, row.bytes) for row in removed} == {
        ("w.grad", StripPart.GRADIENTS, 12),
        ("main_grad", StripPart.GRADIENTS, 16),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_is_what_torch_makes_of_every_float(tmp_path: Path, layout: str) -> None:
    made = net().double()
    state = {
        **made.state_dict(),
        "single": torch.rand(3),
        "brain": torch.rand(3).bfloat16(),
        "part": torch.rand(9)[2:5],
    }
    expected = {
        name: tensor.half() if tensor.dtype in {torch.float32, torch.float64} else tensor
        for name, tensor in state.items()
    }
    assert_same(stripped(state, tmp_path, layout, StripOptions(to_half=True)), expected)


def test_half_and_masks_go_in_one_step(tmp_path: Path) -> None:
    made = pruned()
    found = stripped(made.state_dict(), tmp_path, wish=StripOptions(to_half=True))
    expected = {name: t.half() if t.is_floating_point() else t for name, t in removed_by_torch(made).items()}
    assert_same(dict(found), expected)


def test_half_of_a_pickled_module_is_module_half(tmp_path: Path) -> None:
    made = net().eval()
    target, _ = strip(save(made, tmp_path / "m.pt"), StripOptions(to_half=True))
    found = torch.load(target, weights_only=False)
    assert_same(dict(found.state_dict()), dict(made.half().state_dict()))


def test_a_number_too_big_for_half_is_refused_by_name(tmp_path: Path) -> None:
    path = save({"fine": torch.tensor([float("inf")]), "wide": torch.tensor([1.0, -70000.0])}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt holds 70000 in wide"):
        strip(path, StripOptions(to_half=True))


def test_scales_of_quantized_weights_keep_their_width(tmp_path: Path) -> None:
    scales, zeros = torch.rand(2).double() + 0.1, torch.zeros(2, dtype=torch.int64)
    weight = torch.quantize_per_channel(torch.rand(2, 3), scales, zeros, 0, torch.qint8)
    found = stripped({"q": weight, "w": torch.ones(2)}, tmp_path, wish=StripOptions(to_half=True))
    assert torch.equal(found["q"].int_repr(), weight.int_repr())
    assert found["q"].q_per_channel_scales().dtype == torch.float64
    assert found["w"].dtype == torch.float16


def test_a_wrapped_pickled_module_is_refused_and_the_rest_of_it_can_go(tmp_path: Path) -> None:
    made = pruned().eval()
    path = save({"model": made, "optimizer": optimized(made).state_dict()}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt holds the mask model\.\S+_mask, which code in the file"):
        strip(path)
    target, removed = strip(path, StripOptions(frozenset({StripPart.OPTIMIZER})))
    assert [row.name for row in removed] == ["optimizer"]
    found = torch.load(target, weights_only=False)["model"]
    assert torch.equal(found(torch.ones(1, 3, 3, 3)), made(torch.ones(1, 3, 3, 3)))


def test_torchscript_comes_out_as_it_was(tmp_path: Path) -> None:
    torch.jit.script(net()).save(str(tmp_path / "m.pt"))
    target, removed = strip(tmp_path / "m.pt")
    assert removed == ()
    assert target.read_bytes() == (tmp_path / "m.pt").read_bytes()
    with pytest.raises(InputError, match=r"m\.pt is a TorchScript program"):
        strip(tmp_path / "m.pt", StripOptions(to_half=True))


class TestTheZip:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save({"model": pruned().state_dict(), "optimizer": {"state": torch.ones(1000)}}, tmp_path / "m.pt")

    def test_entries_keep_names_order_method_and_alignment(self, path: Path) -> None:
        target, _ = strip(path)
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(target) as new:
            assert new.testzip() is None
            names = new.namelist()
            assert names == [name for name in old.namelist() if name in names]
            assert {"m/.data/serialization_id", "m/byteorder", "m/version"} <= set(names)
            for info in new.infolist():
                content = target.read_bytes()
                extra = int.from_bytes(content[info.header_offset + 28 : info.header_offset + 30], "little")
                assert (info.header_offset + 30 + len(info.filename) + extra) % 64 == 0
                assert info.compress_type == zipfile.ZIP_STORED
                if info.filename in {"m/version", "m/byteorder", "m/.data/serialization_id"}:
                    assert new.read(info) == old.read(info.filename)

    @pytest.mark.parametrize("options", [{"mmap": True}, {"map_location": "meta"}], ids=["mmap", "meta"])
    def test_it_opens_in_every_way(self, path: Path, options: dict[str, Any]) -> None:
        target, _ = strip(path)
        found = torch.load(target, weights_only=True, **options)["model"]
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in net().state_dict().items()
        }

    def test_a_compressed_file_stays_compressed(self, path: Path, tmp_path: Path) -> None:
        packed = tmp_path / "packed.pt"
        load(by_name("torch").packer)(open_model(path), packed, lambda _: None)
        target, removed = strip(packed)
        assert {row.name for row in removed} >= {"optimizer", "model.0.weight_mask"}
        with zipfile.ZipFile(target) as archive:
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        assert_same(dict(torch.load(target, weights_only=True)["model"]), removed_by_torch(pruned()))

    def test_the_same_input_gives_the_same_bytes(self, path: Path) -> None:
        first = strip(path)[0].read_bytes()
        path.with_name("out.pt").unlink()
        assert strip(path)[0].read_bytes() == first

    def test_stripping_twice_changes_nothing_more(self, path: Path) -> None:
        once = strip(path)[0].rename(path.with_name("once.pt"))
        twice, removed = strip(once)
        assert removed == ()
        assert twice.read_bytes() == once.read_bytes()


def test_big_endian_numbers_stay_big_endian(tmp_path: Path) -> None:
    path = save({"w_orig": torch.tensor([1.5, 2.5]), "w_mask": torch.tensor([1.0, 0.0])}, tmp_path / "m.pt")
    big = tmp_path / "big.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(big, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name.startswith("m/data/"):
                raw = np.frombuffer(raw, "<f4").astype(">f4").tobytes()
            new.writestr(name, b"big" if name.endswith("byteorder") else raw)
    target, _ = strip(big, StripOptions(to_half=True))
    with zipfile.ZipFile(target) as archive:
        assert np.frombuffer(archive.read("m/data/0"), ">f2").tolist() == [1.5, 0.0]
    assert torch.load(target, weights_only=True)["w"].tolist() == [1.5, 0.0]


def test_what_no_one_has_heard_of_is_kept(tmp_path: Path) -> None:
    made = net()
    value = {
        "model": made.state_dict(),
        "optimizer": optimized(made),
        "args": argparse.Namespace(depth=3, names=("a", "b")),
        "when": np.float64(3.5),
        "table": np.arange(3000.0),
    }
    target, _ = strip(save(value, tmp_path / "m.pt"))
    found = torch.load(target, weights_only=False)
    assert set(found) == {"model", "args", "when", "table"}
    assert found["args"] == value["args"]
    assert np.array_equal(found["table"], np.arange(3000.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("checkpoint_with_optimizer.pt", StripPart.OPTIMIZER), ("masks_of_torch_prune.pt", StripPart.MASKS)],
)
def test_the_fixtures_come_out_smaller(tmp_path: Path, name: str, expected: StripPart) -> None:
    path = tmp_path / name
    path.write_bytes((FIXTURES / name).read_bytes())
    assert Capability.STRIP in by_name("torch").can
    target, removed = strip(path)
    assert expected in {row.part for row in removed}
    assert not open_model(target).about.wrappers
    torch.load(target, weights_only=True)
