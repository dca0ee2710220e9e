"""PyTorch's zip files, written by torch.save and torch.jit.save."""

from __future__ import annotations

import argparse
import collections
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize, prune

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract, raw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class TestTorchZip(FormatContract):
    format = "torch"
    name = "model.pt"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


class Net(torch.nn.Module):
    """A small network with every kind of member."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.up = torch.nn.ConvTranspose2d(4, 2, 2)
        self.fc = torch.nn.Linear(4, 4)
        self.tied = self.fc
        self.words = torch.nn.Embedding(5, 4)
        self.rnn = torch.nn.LSTM(4, 3)
        self.register_buffer("window", torch.ones(2, 2))
        self.register_buffer("scratch", torch.ones(9), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.bn(self.conv(x))) + self.window[0]


def saved(tmp_path: Path, value: object, **options: Any) -> ModelFile:
    path = tmp_path / "m.pt"
    torch.save(value, path, **options)
    return open_model(path)


def by_name(model: ModelFile) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


def assert_equals(model: ModelFile, expected: dict[str, torch.Tensor]) -> None:
    assert {tensor.name for tensor in model.tensors} == set(expected)
    for tensor in model.tensors:
        assert raw(model.read(tensor)) == raw(expected[tensor.name].detach().numpy())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (torch.float16, np.float16),
        (torch.float64, np.float64),
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2),
        (torch.bool, np.bool_),
        (torch.int8, np.int8),
        (torch.uint16, np.uint16),
        (torch.int64, np.int64),
        (torch.complex64, np.complex64),
    ],
)
def test_every_type_of_number_is_read_as_it_is(tmp_path: Path, kind: torch.dtype, dtype: type) -> None:
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(kind)
    model = saved(tmp_path, {"w": values})
    assert model.tensors[0].dtype == dtype
    assert raw(model.read(model.tensors[0])) == bytes(values.view(torch.uint8).flatten().tolist())


def test_views_keep_their_start_and_strides(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    views = {
        "turned": base.view(4, 6).t(),
        "part": base[6:12],
        "every_second": base[::2],
        "repeated": base[:3].expand(5, 3),
        "scalar": base[7],
        "none": base[:0],
    }
    model = saved(tmp_path, views)
    found = by_name(model)
    assert found["turned"].strides == (1, 6)
    assert found["part"].start == 6
    assert found["part"].strides is None
    assert found["every_second"].strides == (2,)
    assert found["repeated"].strides == (0, 1)
    assert len({tensor.storage.key for tensor in model.tensors}) == 1
    for name, tensor in found.items():
        assert np.array_equal(model.read(tensor), views[name].numpy())


class Holder(torch.nn.Module):
    """A module that holds a tensor, which can be scripted."""

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("a", held)

    def forward(self) -> torch.Tensor:
        return self.a


def save_scripted(tensor: torch.Tensor, path: Path) -> None:
    torch.jit.script(Holder(tensor)).save(path)


def save_state(tensor: torch.Tensor, path: Path) -> None:
    torch.save({"a": tensor, "b": torch.ones(2, 2)}, path)


@pytest.mark.parametrize("save", [save_state, save_scripted])
@pytest.mark.parametrize("flag", ["conj", "neg"])
def test_a_view_whose_numbers_pytorch_would_still_change_is_refused(
    tmp_path: Path, flag: str, save: Callable[[torch.Tensor, Path], None]
) -> None:
    numbers = torch.tensor([[1 + 2j, 3 - 4j]])
    lazy = {"conj": numbers.conj(), "neg": numbers.conj().imag}[flag]
    assert {"conj": lazy.is_conj(), "neg": lazy.is_neg()}[flag]
    save(lazy, tmp_path / "lazy.pt")
    with pytest.raises(InputError, match=f"stores a as a view that {flag}.*") as caught:
        open_model(tmp_path / "lazy.pt")
    assert f"resolve_{flag}()" in caught.value.hint
    resolved = {"conj": lazy.resolve_conj(), "neg": lazy.resolve_neg()}[flag]
    save(resolved, tmp_path / "resolved.pt")
    model = open_model(tmp_path / "resolved.pt")
    np.testing.assert_array_equal(model.read(model.tensors[0]), lazy.numpy(force=True))


class OddMetadata:
    """A tensor whose pickle holds a text where PyTorch puts a dictionary."""

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = torch.ones(2, 2).__reduce_ex__(2)
        return rebuild, (*arguments[:6], "neg")


def test_metadata_of_a_tensor_that_is_no_dictionary_is_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged: the metadata of a is not a dictionary"):
        saved(tmp_path, {"a": OddMetadata()})


def test_tied_tensors_share_a_storage(tmp_path: Path) -> None:
    model = saved(tmp_path, Net().state_dict())
    found = by_name(model)
    assert found["fc.weight"].storage == found["tied.weight"].storage


def test_a_pickled_module_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    net = Net()
    model = saved(tmp_path, net)
    assert_equals(model, net.state_dict())
    assert f"class {Net.__module__}.Net" in model.about.code
    found = by_name(model)
    assert (found["conv.weight"].kind, found["conv.weight"].out_axis) == ("Conv2d", 0)
    assert found["up.weight"].out_axis == 1
    assert found["words.weight"].role is Role.EMBEDDING
    assert found["rnn.weight_hh_l0"].role is Role.RECURRENT
    assert found["window"].role is Role.STATE
    assert found["bn.weight"].role is Role.NORM


def test_a_checkpoint_tells_its_optimizer_and_its_progress(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model = saved(tmp_path, {"epoch": 12, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict()})
    found = by_name(model)
    assert found["state_dict.0.weight"].layer == "0"
    assert found["state_dict.0.weight"].role is Role.KERNEL
    assert found["optimizer.state.0.exp_avg"].role is Role.OPTIMIZER
    assert model.about.optimizer == "Adam"
    assert model.about.training == ("epoch 12",)
    assert model.about.code == ()


@pytest.mark.parametrize(
    "kind",
    ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "LBFGS"],
)
def test_an_optimizer_is_known_by_its_settings(tmp_path: Path, kind: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = getattr(torch.optim, kind)([weight], lr=0.1).state_dict()
    assert saved(tmp_path, {"model": {"w": weight}, "optim": state}).about.optimizer == kind


def test_a_bare_optimizer_state_is_all_optimizer(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model = saved(tmp_path, optimizer.state_dict())
    assert {tensor.role for tensor in model.tensors} == {Role.OPTIMIZER}
    assert model.about.optimizer == "SGD"


def test_an_average_of_the_weights_is_noted_and_both_layers_keep_their_prefix(tmp_path: Path) -> None:
    weights = torch.nn.Linear(3, 2).state_dict()
    model = saved(tmp_path, {"model": {"fc": weights}, "ema": {"fc": weights}})
    assert model.about.notes == ("The file holds a second copy of the weights under ema, averaged over the training.",)
    assert {tensor.layer for tensor in model.tensors} == {"model.fc", "ema.fc"}


def test_lightning_tells_its_version(tmp_path: Path) -> None:
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2)).state_dict()
    model = saved(tmp_path, {"pytorch-lightning_version": "2.1.0", "state_dict": weights, "global_step": 7})
    assert model.about.training == ("pytorch-lightning 2.1.0", "global_step 7")


def test_pruning_wrappers_are_found(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    parametrize.register_parametrization(net[1], "weight", torch.nn.Softplus(), unsafe=True)
    model = saved(tmp_path, net.state_dict())
    assert [(wrapper.kind, wrapper.layer) for wrapper in model.about.wrappers] == [
        ("torch.nn.utils.prune", "0"),
        ("parametrization", "1"),
    ]
    found = by_name(model)
    assert found["0.weight_mask"].role is Role.MASK
    assert found["0.weight_orig"].role is Role.KERNEL
    assert found["1.parametrizations.weight.original"].layer == "1"


def test_fake_sparsity_is_found(tmp_path: Path) -> None:
    weights = {
        "fc.parametrizations.weight.original": torch.ones(2, 3),
        "fc.parametrizations.weight.0.mask": torch.ones(2, 3),
    }
    model = saved(tmp_path, weights)
    assert [(wrapper.kind, wrapper.layer) for wrapper in model.about.wrappers] == [("torch.ao.pruning", "fc")]
    assert by_name(model)["fc.parametrizations.weight.0.mask"].role is Role.MASK


def test_a_mask_that_belongs_to_nothing_is_no_wrapper(tmp_path: Path) -> None:
    assert saved(tmp_path, {"block.attention_mask": torch.ones(3)}).about.wrappers == ()


def test_torchscript_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(net), path)
    model = open_model(path)
    assert_equals(model, torch.jit.load(path).state_dict())
    assert model.about.code == ("TorchScript code",)
    with zipfile.ZipFile(path) as archive:
        assert model.about.code_bytes == sum(e.compress_size for e in archive.infolist() if "/code/" in e.filename)
    assert by_name(model)["0.weight"].kind == "Linear"
    assert by_name(model)["1.running_mean"].role is Role.STATE


def test_the_weights_of_a_frozen_torchscript_are_its_constants(tmp_path: Path) -> None:
    net = torch.jit.freeze(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()))
    torch.jit.save(net, tmp_path / "m.pt")
    model = open_model(tmp_path / "m.pt")
    assert {tensor.name.split(".")[0] for tensor in model.tensors} == {"CONSTANTS"}
    assert (2, 3) in {tensor.shape for tensor in model.tensors}


def test_sparse_and_quantized_tensors_are_their_parts(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    quantized = torch.quantize_per_channel(dense, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8)
    model = saved(tmp_path, {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr(), "q": quantized})
    assert set(by_name(model)) == {
        *("coo.indices", "coo.values", "csr.compressed_indices", "csr.plain_indices", "csr.values"),
        *("q", "q.scales", "q.zero_points"),
    }
    assert np.array_equal(model.read(by_name(model)["q"]), quantized.int_repr().numpy())
    assert model.read(by_name(model)["coo.values"]).tolist() == [2.0, 3.0]


class Tagged(torch.nn.Parameter):
    """A parameter with attributes of its own."""


def test_parameters_of_every_sort_are_tensors(tmp_path: Path) -> None:
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept"  # type: ignore[attr-defined]
    tagged = Tagged(torch.ones(3))
    model = saved(tmp_path, {"plain": torch.nn.Parameter(torch.ones(1)), "marked": marked, "tagged": tagged})
    assert {name: tensor.shape for name, tensor in by_name(model).items()} == {
        "plain": (1,),
        "marked": (2,),
        "tagged": (3,),
    }


def test_plain_data_is_not_called_code(tmp_path: Path) -> None:
    extras = {
        "args": argparse.Namespace(lr=0.1),
        "sizes": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "type": torch.float32,
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"x": [1]}),
        "set": {1, 2},
        "ordered": collections.OrderedDict(a=1),
        "number": np.float64(3),
        "path": Path("x"),
    }
    assert saved(tmp_path, {"w": torch.ones(2), **extras}).about.code == ()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_pickle_is_followed(tmp_path: Path, protocol: int) -> None:
    net = Net()
    assert_equals(saved(tmp_path, net, pickle_protocol=protocol), net.state_dict())


def test_numpy_arrays_are_read_where_their_bytes_lie_flat(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = {"w": torch.ones(2), "c": array, "f": np.asfortranarray(array), "big": array.astype(">f4")}
    model = saved(tmp_path, values, pickle_protocol=4)
    for name in ("c", "f", "big"):
        assert np.array_equal(model.read(by_name(model)[name]), array)
    older = saved(tmp_path, values, pickle_protocol=2)
    assert set(by_name(older)) == {"w"}
    assert older.about.notes == (
        "The file also holds 3 NumPy arrays inside its pickle, which prunectl does not change.",
    )


def repacked(path: Path, method: int, changes: dict[str, bytes] | None = None) -> Path:
    target = path.with_name("repacked.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.namelist():
            leaf = entry.partition("/")[2]
            new.writestr(entry, (changes or {}).get(leaf, old.read(entry)))
    return target


def test_deflated_entries_are_inflated_one_at_a_time(tmp_path: Path) -> None:
    state = Net().state_dict()
    saved(tmp_path, state)
    model = open_model(repacked(tmp_path / "m.pt", zipfile.ZIP_DEFLATED))
    assert model.about.is_compressed
    assert all(tensor.storage.extent is None for tensor in model.tensors)
    assert_equals(model, state)


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0], [1 + 2j, 3 - 4j]])
def test_big_endian_numbers_are_turned_round(tmp_path: Path, values: list[complex]) -> None:
    tensor = torch.tensor(values)
    saved(tmp_path, {"w": tensor})
    turned = tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")).tobytes()
    model = open_model(repacked(tmp_path / "m.pt", zipfile.ZIP_STORED, {"byteorder": b"big", "data/0": turned}))
    assert model.tensors[0].storage.big_endian
    assert model.read(model.tensors[0]).tolist() == values


def test_a_bare_tensor_is_called_tensor(tmp_path: Path) -> None:
    assert by_name(saved(tmp_path, torch.ones(2))).keys() == {"tensor"}


def test_two_paths_with_one_name_stay_two_tensors(tmp_path: Path) -> None:
    model = saved(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}})
    assert [(tensor.name, tensor.shape) for tensor in model.tensors] == [("a.b", (1,)), ("a.b#2", (2,))]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data/0": b"123"}, "has 3 bytes, but its pickle has 8"),
        ({"data.pkl": b"\x80\x02}."}, "holds no tensors"),
        ({"data.pkl": b""}, "ends early"),
        ({"data.pkl": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."}, "nested more than"),
        ({"data.pkl": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R."}, "would call posix.system"),
    ],
)
def test_an_archive_that_lies_is_refused(tmp_path: Path, changes: dict[str, bytes], complaint: str) -> None:
    saved(tmp_path, {"w": torch.tensor([1.0, 2.0])})
    with pytest.raises(InputError, match=complaint):
        open_model(repacked(tmp_path / "m.pt", zipfile.ZIP_STORED, changes))


def test_a_strange_call_beside_tensors_is_told_and_not_made(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "made",)

    model = saved(tmp_path, {"w": torch.ones(2), "x": Evil()})
    assert not (tmp_path / "made").exists()
    assert any("mkdir" in fact or "getattr" in fact for fact in model.about.code)
