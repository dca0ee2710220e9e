from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile, StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.pruning.strip import strip
from prunectl.training.backend import LoadOptions
from prunectl.training.wrap.prune import WrapResult, prune_wrapped
from tests.running import FIXTURES

torch = pytest.importorskip("torch")
torch_prune = pytest.importorskip("torch.nn.utils.prune")
safetensors = pytest.importorskip("safetensors.torch")

MASKS = StripOptions(frozenset({StripPart.MASKS, StripPart.WRAPPERS}))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.second = torch.nn.Linear(8, 4, bias=False)


def wrapped(path: Path, out: Path, **words: Any) -> WrapResult:
    return prune_wrapped(path, PruneRequest(**{"sparsity": 0.5, **words}), None, LoadOptions(), Destination(out))


def numbers(model: ModelFile) -> dict[str, bytes]:
    return {tensor.name: model.read(tensor).tobytes() for tensor in model.tensors}


def assert_strips_to_what_prune_gives(path: Path, out: Path, folder: Path, **words: Any) -> None:
    request = PruneRequest(**{"sparsity": 0.5, **words})
    prune(path, request, Destination(folder / f"plain{path.suffix}"))
    strip(out, MASKS, Destination(folder / f"stripped{path.suffix}"), is_packed=False)
    plain, stripped = open_model(folder / f"plain{path.suffix}"), open_model(folder / f"stripped{path.suffix}")
    assert numbers(stripped) == numbers(plain)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


class TestAStateDict:
    def test_has_what_torch_prune_would_have_put_there(self, net: Path, tmp_path: Path) -> None:
        wrapped(net, tmp_path / "wrapped.pt")
        theirs = Net()
        theirs.load_state_dict(torch.load(net))
        for layer in (theirs.first, theirs.second):
            torch_prune.l1_unstructured(layer, "weight", 0.5)
        ours = torch.load(tmp_path / "wrapped.pt", weights_only=True)
        assert ours.keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours[name], value), name

    def test_goes_on_in_a_module_that_torch_prunes(self, net: Path, tmp_path: Path) -> None:
        wrapped(net, tmp_path / "wrapped.pt")
        module = Net()
        for layer in (module.first, module.second):
            torch_prune.identity(layer, "weight")
        module.load_state_dict(torch.load(tmp_path / "wrapped.pt", weights_only=True))
        optimizer = torch.optim.Adam(module.parameters(), weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module.second(module.first(torch.ones(2, 6))).square().sum().backward()
            optimizer.step()
        module.first(torch.ones(1, 6))
        assert int((module.first.weight == 0).sum()) == 24

    def test_strips_to_what_prune_gives(self, net: Path, tmp_path: Path) -> None:
        wrapped(net, tmp_path / "wrapped.pt", scope="global")
        assert_strips_to_what_prune_gives(net, tmp_path / "wrapped.pt", tmp_path, scope="global")

    def test_keeps_a_pattern(self, net: Path, tmp_path: Path) -> None:
        wrapped(net, tmp_path / "wrapped.pt", sparsity=None, pattern="2:4")
        mask = torch.load(tmp_path / "wrapped.pt")["second.weight_mask"].numpy()
        assert (mask.reshape(4, 2, 4).sum(axis=2) == 2).all()

    def test_may_be_packed(self, net: Path, tmp_path: Path) -> None:
        found = wrapped(net, tmp_path / "wrapped.pt", is_packed=True)
        assert open_model(tmp_path / "wrapped.pt").about.is_compressed
        assert found.pruned.after.bytes.raw == (tmp_path / "wrapped.pt").stat().st_size
        assert_strips_to_what_prune_gives(net, tmp_path / "wrapped.pt", tmp_path)

    def test_cannot_keep_a_schedule(self, net: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot hold a schedule") as caught:
            prune_wrapped(
                net,
                PruneRequest(sparsity=0.5),
                SparsitySchedule("linear", 0.5, 0, 9),
                LoadOptions(),
                Destination(tmp_path / "w.pt"),
            )
        assert "finetune" in caught.value.hint
        assert not (tmp_path / "w.pt").exists()

    def test_with_wrappers_is_not_wrapped_again(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="already") as caught:
            wrapped(FIXTURES / "masks_of_torch_prune.pt", tmp_path / "wrapped.pt")
        assert "strip" in caught.value.hint

    def test_with_names_of_its_own_is_refused(self, tmp_path: Path) -> None:
        torch.save({"a.weight": torch.ones(4, 4), "a.weight_orig": torch.zeros(1)}, tmp_path / "net.pt")
        with pytest.raises(InputError, match=r"already has a tensor a\.weight_orig beside a\.weight"):
            wrapped(tmp_path / "net.pt", tmp_path / "wrapped.pt", only="a.weight")


class TestOtherFilesOfTorch:
    def test_a_checkpoint_is_wrapped_inside_and_keeps_the_rest(self, tmp_path: Path) -> None:
        path = FIXTURES / "checkpoint_with_optimizer.pt"
        wrapped(path, tmp_path / "wrapped.pt")
        found = torch.load(tmp_path / "wrapped.pt", weights_only=True)
        assert found["epoch"] == 12
        assert found["optimizer_state_dict"].keys() == {"state", "param_groups"}
        assert {"fc1.weight_orig", "fc1.weight_mask", "fc1.bias"} <= found["model_state_dict"].keys()
        assert_strips_to_what_prune_gives(path, tmp_path / "wrapped.pt", tmp_path)

    def test_tied_weights_share_weight_and_mask(self, tmp_path: Path) -> None:
        weight = torch.randn(4, 4)
        torch.save({"a.weight": weight, "b.weight": weight, "c.weight": torch.randn(4, 4)}, tmp_path / "net.pt")
        wrapped(tmp_path / "net.pt", tmp_path / "wrapped.pt")
        found = torch.load(tmp_path / "wrapped.pt")
        assert found["a.weight_orig"].data_ptr() == found["b.weight_orig"].data_ptr()
        assert torch.equal(found["a.weight_mask"], found["b.weight_mask"])
        assert_strips_to_what_prune_gives(tmp_path / "net.pt", tmp_path / "wrapped.pt", tmp_path)

    def test_weights_that_share_a_part_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="shares some numbers"):
            wrapped(FIXTURES / "tied_and_views.pt", tmp_path / "wrapped.pt", only="encoder.weight")

    def test_parameters_get_plain_tensors_as_masks(self, tmp_path: Path) -> None:
        torch.save({"a.weight": torch.nn.Parameter(torch.randn(4, 4).T)}, tmp_path / "net.pt")
        wrapped(tmp_path / "net.pt", tmp_path / "wrapped.pt")
        found = torch.load(tmp_path / "wrapped.pt")
        assert isinstance(found["a.weight_orig"], torch.nn.Parameter)
        assert not isinstance(found["a.weight_mask"], torch.nn.Parameter)
        smallest = found["a.weight_orig"].detach().abs().numpy().reshape(-1).argsort()[:8]
        assert set(np.flatnonzero(found["a.weight_mask"].numpy() == 0)) == set(smallest)
        assert_strips_to_what_prune_gives(tmp_path / "net.pt", tmp_path / "wrapped.pt", tmp_path)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_masks_are_of_the_type_of_their_weight(self, dtype: Any, tmp_path: Path) -> None:
        torch.save({"a.weight": torch.randn(4, 6, dtype=dtype)}, tmp_path / "net.pt")
        wrapped(tmp_path / "net.pt", tmp_path / "wrapped.pt")
        mask = torch.load(tmp_path / "wrapped.pt")["a.weight_mask"]
        assert mask.dtype == dtype
        assert mask.sum() == 12

    def test_a_minus_zero_and_a_nan_that_stay_are_still_there_behind_the_mask(self, tmp_path: Path) -> None:
        weight = torch.tensor([[-0.0, 0.1, float("nan"), 5.0]])
        torch.save({"a.weight": weight}, tmp_path / "net.pt")
        wrapped(tmp_path / "net.pt", tmp_path / "wrapped.pt", sparsity=0.25, strategy="random", nan="keep", seed=2)
        assert_strips_to_what_prune_gives(
            tmp_path / "net.pt", tmp_path / "wrapped.pt", tmp_path, sparsity=0.25, strategy="random", nan="keep", seed=2
        )

    @pytest.mark.parametrize("name", ["digits_cnn_torchscript.pt", "whole_module.pt"])
    def test_code_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"state dict|whole Python module") as caught:
            wrapped(FIXTURES / name, tmp_path / "wrapped.pt")
        assert "state_dict()" in caught.value.hint

    @pytest.mark.parametrize("name", ["digits_cnn.onnx", "before_torch_1.6.pt", "digits_cnn.pt2"])
    def test_formats_without_wrappers_are_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot hold pruning wrappers"):
            wrapped(FIXTURES / name, tmp_path / f"wrapped{Path(name).suffix}")


class TestSafetensors:
    def test_get_a_mask_beside_each_weight(self, tmp_path: Path) -> None:
        path = FIXTURES / "digits_cnn.safetensors"
        wrapped(path, tmp_path / "wrapped.safetensors")
        plain, found = safetensors.load_file(path), safetensors.load_file(tmp_path / "wrapped.safetensors")
        assert torch.equal(found["fc1.weight_orig"], plain["fc1.weight"])
        assert found["fc1.weight_mask"].sum() == plain["fc1.weight"].numel() / 2
        assert torch.equal(found["fc1.bias"], plain["fc1.bias"])
        assert_strips_to_what_prune_gives(path, tmp_path / "wrapped.safetensors", tmp_path)

    def test_keep_their_metadata_and_their_alignment(self, tmp_path: Path) -> None:
        held = {
            "a.weight": torch.randn(3, 3, dtype=torch.bfloat16),
            "b.weight": torch.randn(4, 4),
            "c": torch.ones(3, dtype=torch.int8),
        }
        safetensors.save_file(held, tmp_path / "net.safetensors", metadata={"format": "pt", "by": "me"})
        wrapped(tmp_path / "net.safetensors", tmp_path / "wrapped.safetensors")
        with safetensors.safe_open(tmp_path / "wrapped.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "by": "me"}
            assert set(file.keys()) == {"a.weight_orig", "a.weight_mask", "b.weight_orig", "b.weight_mask", "c"}
        assert_strips_to_what_prune_gives(tmp_path / "net.safetensors", tmp_path / "wrapped.safetensors", tmp_path)
