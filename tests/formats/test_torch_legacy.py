"""The files of PyTorch before 1.6, which torch.save still writes when it is asked to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def save(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


class TestTorchLegacy(FormatContract):
    format = "torch-legacy"
    name = "model.pth"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


def test_a_pickled_module_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save(net, tmp_path / "m.pt")
    model = open_model(tmp_path / "m.pt")
    expected = net.state_dict()
    assert {tensor.name for tensor in model.tensors} == set(expected)
    for tensor in model.tensors:
        assert np.array_equal(model.read(tensor), expected[tensor.name].numpy())
    assert "class torch.nn.modules.linear.Linear" in model.about.code


def test_views_keep_their_start_and_share_their_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    save({"part": base[4:8], "turned": base.view(3, 4).t()}, tmp_path / "m.pt")
    model = open_model(tmp_path / "m.pt")
    part, turned = model.tensors
    assert part.storage.key == turned.storage.key
    assert model.read(part).tolist() == [4, 5, 6, 7]
    assert np.array_equal(model.read(turned), base.view(3, 4).t().numpy())


def spoilt(tmp_path: Path, old: bytes, new: bytes) -> Path:
    path = tmp_path / "m.pt"
    save({"w": torch.tensor([1.0, 2.0])}, path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ((2).to_bytes(8, "little") + bytes.fromhex("0000803f"), (9).to_bytes(8, "little"), "has 9 elements"),
        (b"K\x00K\x02\x85", b"K\x01K\x02\x85", "reaches element 2"),
        (b"M\xe9\x03", b"M\xe8\x03", "not of the protocol"),
        (b"FloatStorage", b"FloatStrange", "does not read"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path: Path, old: bytes, new: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_model(spoilt(tmp_path, old, new))
