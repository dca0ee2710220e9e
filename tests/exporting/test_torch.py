"""PyTorch: state dicts with code, TorchScript and programs, to ONNX and to each other."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from prunectl import onnx_graph as graphs
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.export import export as run
from prunectl.exporting.job import make_samples
from prunectl.exporting.request import ExportRequest, parse_request
from prunectl.exporting.torch import open_runnable, program_of
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.training.backend import LoadOptions
from prunectl.training.torch.tensors import InnerModule
from tests.contract import Array
from tests.exporting import nets_torch
from tests.exporting.exporting import DIGITS, NET, by_onnxruntime, export, random, zeros
from tests.running import FIXTURES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def shapes_of(name: str) -> list[tuple[int, ...]]:
    return [nets_torch.NETS[name].shape, *([(3,)] if name == "Several" else [])]


def saved(name: str, folder: Path) -> tuple[Path, torch.nn.Module]:
    """Return a state dict of a small network, and the network."""
    net = nets_torch.made(name)
    torch.save(net.state_dict(), folder / f"{name}.pt")
    return folder / f"{name}.pt", net


def words_of(name: str) -> dict[str, object]:
    """What its file does not say."""
    inputs = [f"?,{','.join(map(str, shape))}" for shape in shapes_of(name)]
    return {"builder": f"tests.exporting.nets_torch:{name}", "input": inputs}


def answers(net: torch.nn.Module, inputs: list[Array]) -> list[Array]:
    with torch.no_grad():
        found = net(*map(torch.from_numpy, inputs))
    return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("name", nets_torch.NETS)
def test_networks_of_every_kind_answer_alike_as_onnx_for_every_batch(name: str, tmp_path: Path) -> None:
    place, net = saved(name, tmp_path)
    export(place, tmp_path / "m.onnx", **words_of(name))
    for batch in (1, 5):
        inputs = random(*((batch, *shape) for shape in shapes_of(name)))
        for ours, theirs in zip(by_onnxruntime(tmp_path / "m.onnx", *inputs), answers(net, inputs), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    kernels = [value for value in net.state_dict().values() if value.ndim > 1]
    assert zeros(tmp_path / "m.onnx") >= sum(int((value == 0).sum()) for value in kernels)


@pytest.mark.parametrize("name", ["Several"])
def test_programs_and_scripts_are_written_and_become_onnx_in_turn(name: str, tmp_path: Path) -> None:
    place, net = saved(name, tmp_path)
    words = words_of(name)
    inputs = random(*((4, *shape) for shape in shapes_of(name)))
    expected = answers(net, inputs)
    export(place, tmp_path / "m.pt2", **words)
    export(place, tmp_path / "m.pt", to="torchscript", **words)
    with warnings.catch_warnings():
        # That PyTorch would rather have it exported.
        warnings.simplefilter("ignore")
        loaded = (torch.export.load(tmp_path / "m.pt2").module(), torch.jit.load(str(tmp_path / "m.pt")))
    for module in loaded:
        for ours, theirs in zip(answers(module, inputs), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    export(tmp_path / "m.pt2", tmp_path / "from_program.onnx")
    found = export(tmp_path / "m.pt", tmp_path / "from_script.onnx", input=words["input"])
    assert any("older ONNX exporter was used" in remark for remark in found.notes)
    for result in ("from_program.onnx", "from_script.onnx"):
        for ours, theirs in zip(by_onnxruntime(tmp_path / result, *inputs), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_shape_comes_from_data_as_well(tmp_path: Path) -> None:
    found = export("digits_cnn.pt", tmp_path / "m.onnx", builder=NET, data=DIGITS)
    assert found.comparison is not None
    assert found.comparison.top1_agreement == 1.0
    port = onnx.load(tmp_path / "m.onnx").graph.input[0]
    assert port.name == "x"
    assert port.type.tensor_type.shape.dim[0].dim_param == "batch"
    with pytest.raises(UsageError, match=r"the input x of the model has the shape \?,1,\?,\?"):
        export("digits_cnn.pt", tmp_path / "n.onnx", builder=NET)
    with pytest.raises(UsageError, match="does not accept inputs of"):
        export("digits_cnn.pt", tmp_path / "n.onnx", builder=NET, input=["?,1,9,9"])


class _Wrapped(InnerModule):
    """A network as those of model folders are run, with the names that its weights have in the file."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.inner(inputs[0]) * inputs[1].unsqueeze(-1)


def test_a_module_that_hides_its_wrapper_becomes_a_program() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(20, 6), torch.nn.Linear(6, 3)).eval()
    samples = SimpleNamespace(batches=[[np.zeros((2, 5), np.int64), np.ones((2, 5), np.int64)]])
    inputs = [SimpleNamespace(name=name, shape=(None, None)) for name in ("ids", "mask")]
    runnable, file = SimpleNamespace(module=_Wrapped(net)), SimpleNamespace(path="m")
    job: Any = SimpleNamespace(runnable=runnable, inputs=inputs, samples=samples, file=file)
    ids, mask = torch.randint(20, (4, 9)), torch.randint(2, (4, 9))
    torch.testing.assert_close(program_of(job).module()(ids, mask), net(ids) * mask.unsqueeze(-1))


class _Tokens(torch.nn.Module):
    """The mean of the words that a mask leaves, times a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(20, 6), torch.nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head((self.words(ids) * mask.unsqueeze(-1)).mean(1))


def test_a_program_takes_the_types_of_numbers_that_it_was_exported_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _Tokens().eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=32)
    axes = ({0: batch, 1: length}, {0: batch, 1: length})
    example = (torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, 5, dtype=torch.bool))
    torch.export.save(torch.export.export(net, example, dynamic_shapes=axes), tmp_path / "tokens.pt2")
    export(tmp_path / "tokens.pt2", tmp_path / "tokens.onnx", input=["?,?", "?,?"])
    ports = onnx.load(tmp_path / "tokens.onnx").graph.input
    assert [port.type.tensor_type.elem_type for port in ports] == [onnx.TensorProto.INT32, onnx.TensorProto.BOOL]
    ids = np.random.default_rng(1).integers(0, 20, (3, 9), np.int32)
    inputs = [ids, ids > 6]
    for ours, theirs in zip(by_onnxruntime(tmp_path / "tokens.onnx", *inputs), answers(net, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(UsageError, match="the input input0 of the model is int32, but input gives int64"):
        export(tmp_path / "tokens.pt2", tmp_path / "other.onnx", input=["?,?:i64", "?,?"])


def bfloat16_program(path: Path) -> torch.nn.Module:
    """Write a program whose input and weights are bfloat16, and return its module."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).bfloat16().eval()
    axes = ({0: torch.export.Dim("batch")},)
    example = torch.ones(2, 4, dtype=torch.bfloat16)
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=axes), path)
    return net


@pytest.mark.parametrize("has_data", [False, True])
def test_a_program_that_takes_bfloat16_is_run_on_it(has_data: bool, tmp_path: Path) -> None:
    net = bfloat16_program(tmp_path / "half.pt2")
    data = random((40, 4))[0]
    np.savez(tmp_path / "data.npz", x=data)
    runnable = open_runnable(open_model(tmp_path / "half.pt2"), LoadOptions())
    request = ExportRequest(data=str(tmp_path / "data.npz") if has_data else "", samples=32)
    (batch,) = make_samples(runnable, runnable.inputs, request).batches
    (x,) = batch
    if has_data:
        np.testing.assert_array_equal(x, data[:32].astype(ml_dtypes.bfloat16))
    with torch.no_grad():
        expected = net(torch.from_numpy(x.astype(np.float32)).bfloat16())
    (answer,) = runnable.run(batch).values()
    np.testing.assert_array_equal(answer.astype(np.float32), expected.float().numpy())
    runnable.prepare(batch)()


def test_a_type_of_input_for_which_there_are_no_numbers_is_refused_without_advice_that_would_not_help(
    tmp_path: Path,
) -> None:
    net, example = torch.nn.Linear(4, 3, dtype=torch.complex64), torch.ones(2, 4, dtype=torch.complex64)
    torch.export.save(torch.export.export(net, (example,)), tmp_path / "complex.pt2")
    with pytest.raises(UsageError, match="inputs of type complex64") as caught:
        export(tmp_path / "complex.pt2", tmp_path / "complex.onnx")
    assert not caught.value.hint


def test_a_program_for_one_example_stays_for_one(tmp_path: Path) -> None:
    export("digits_cnn.pt2", tmp_path / "m.onnx", data=DIGITS, samples=3)
    port = onnx.load(tmp_path / "m.onnx").graph.input[0]
    assert [dim.dim_value for dim in port.type.tensor_type.shape.dim] == [1, 1, 8, 8]


def test_weights_keep_their_names_and_nothing_tells_where_the_code_was(tmp_path: Path) -> None:
    export("digits_cnn.pt", tmp_path / "m.onnx", builder=NET, input=["pixels:?,1,8,8"], metadata=["author=me"])
    whole = (tmp_path / "m.onnx").read_bytes()
    assert not re.search(rb"digits_torch|site-packages|stack_trace|s\d\d", whole)
    proto = onnx.load(tmp_path / "m.onnx")
    state = torch.load(FIXTURES / "digits_cnn.pt", weights_only=True)
    held = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    for name, value in state.items():
        np.testing.assert_array_equal(held[name], value.numpy())
    assert [proto.graph.input[0].name, proto.graph.output[0].name] == ["pixels", "output"]
    assert [(one.key, one.value) for one in proto.metadata_props] == [("author", "me")]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    state, _ = saved("Several", tmp_path)
    for name in ("m.onnx", "m.pt2"):
        for place in (tmp_path / name, tmp_path / "other" / f"x{name}"):
            export(state, place, **words_of("Several"))
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / f"x{name}").read_bytes(), name


def test_masks_are_taken_off_on_the_way(tmp_path: Path) -> None:
    export("masks_of_torch_prune.pt", tmp_path / "m.onnx", builder=NET, input=["?,1,8,8"])
    held = torch.load(FIXTURES / "masks_of_torch_prune.pt", weights_only=True)
    expected = sum(int((value == 0).sum()) for name, value in held.items() if name.endswith("_mask"))
    assert zeros(tmp_path / "m.onnx") >= expected


@pytest.mark.parametrize(
    ("words", "most_bytes"),
    [
        ({"half": True}, 22_000),
        ({"bf16": True}, 23_000),
        ({"int8": True}, 17_000),
        ({"int8": True, "data": DIGITS}, 16_500),
    ],
)
def test_smaller_onnx_answers_nearly_alike(words: dict[str, object], most_bytes: int, tmp_path: Path) -> None:
    found = export("digits_cnn.onnx", tmp_path / "m.onnx", **words)
    assert found.comparison is not None
    assert 0 < found.comparison.largest < 1
    assert found.after.bytes.raw < most_bytes
    assert any(any(word in remark for word in ("16-bit", "8-bit", "bfloat16")) for remark in found.notes)


def test_what_cannot_be_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is TorchScript"):
        export("digits_cnn_torchscript.pt", tmp_path / "m.pt2", input=["?,1,8,8"])
    with pytest.raises(UsageError, match="that of an argument of forward"):
        export("digits_cnn.pt", tmp_path / "m.pt2", builder=NET, input=["pixels:?,1,8,8"])
    with pytest.raises(WorkError, match="opset 18 instead of 11") as caught:
        export("digits_cnn.pt", tmp_path / "m.onnx", builder=NET, input=["?,1,8,8"], opset=11)
    assert "prunectl export" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_code_that_depends_on_its_numbers_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.one = torch.nn.Linear(3, 2)\n\n    def forward(self, x):\n"
        "        return self.one(x) if x.sum() > 0 else self.one(-x)\n"
    )
    torch.save({"one.weight": torch.randn(2, 3), "one.bias": torch.zeros(2)}, tmp_path / "n.pt")
    with pytest.raises(WorkError, match="PyTorch cannot export"):
        export(tmp_path / "n.pt", tmp_path / "m.onnx", builder=f"{tmp_path}/net.py:Net", input=["?,3"])
    assert not (tmp_path / "m.onnx").exists()


def test_onnx_becomes_onnx_of_another_version_and_keeps_what_is_said_of_it(tmp_path: Path) -> None:
    proto = onnx.load(FIXTURES / "digits_cnn.onnx")
    proto.metadata_props.add(key="license", value="MIT")
    onnx.save(proto, tmp_path / "old.onnx")
    export(tmp_path / "old.onnx", tmp_path / "new.onnx", opset=20, metadata=["author=me"])
    found = onnx.load(tmp_path / "new.onnx")
    assert found.opset_import[0].version == 20
    assert {one.key: one.value for one in found.metadata_props} == {"license": "MIT", "author": "me"}
    export("external_data/model.onnx", tmp_path / "whole.onnx")
    assert len(open_model(tmp_path / "whole.onnx").files) == 1


def test_what_is_too_large_for_one_file_has_its_numbers_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_MESSAGE_BYTES", 10_000)
    found = export("digits_cnn.pt", tmp_path / "m.onnx", builder=NET, input=["?,1,8,8"])
    assert any("its weights are in m.onnx.data" in remark for remark in found.notes)
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    assert [file.name for file in open_model(tmp_path / "m.onnx").files] == ["m.onnx", "m.onnx.data"]
    by_onnxruntime(tmp_path / "m.onnx", *random((2, 1, 8, 8)))
    assert found.after.params.prunable == found.before.params.prunable
    with pytest.raises(WorkError, match="needs two files as ONNX"):
        export("digits_cnn.onnx", tmp_path / "n.onnx", sparse=True)
    with pytest.raises(WorkError, match="consists of several files"):
        run(FIXTURES / "digits_cnn.onnx", parse_request({"to": "onnx"}), Destination(tmp_path / "out", to_stdout=True))
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    save, sizes = onnx.save, dict[str, int]()

    def measured(proto: object, path: str | Path, **words: object) -> None:
        save(proto, path, **words)
        sizes[Path(path).name] = Path(path).stat().st_size

    monkeypatch.setattr(onnx, "save", measured)
    for name, data in (("dynamic", ""), ("static", DIGITS)):
        export("digits_cnn.onnx", tmp_path / f"{name}.onnx", int8=True, data=data)
        assert (tmp_path / f"{name}.onnx").stat().st_size < 10_000
        assert sizes.pop("floats.onnx") < 10_000


def test_an_onnx_model_that_gives_what_each_class_is_worth_by_its_name_is_compared(tmp_path: Path) -> None:
    helper, floats, words = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.STRING
    nodes = [
        helper.make_node("LinearClassifier", ["x"], ["label", "worth"], "one", domain="ai.onnx.ml", **LINEAR),
        helper.make_node(
            "ZipMap",
            ["worth"],
            ["named"],
            "two",
            domain="ai.onnx.ml",
            classlabels_strings=LINEAR["classlabels_strings"],
        ),
    ]
    named = helper.make_sequence_type_proto(
        helper.make_map_type_proto(words, helper.make_tensor_type_proto(floats, []))
    )
    outputs = [helper.make_tensor_value_info("label", words, [None]), helper.make_value_info("named", named)]
    inputs = [helper.make_tensor_value_info("x", floats, [None, 3])]
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=versions, ir_version=8),
        tmp_path / "m.onnx",
    )
    found = export(tmp_path / "m.onnx", tmp_path / "again.onnx", metadata=["author=me"])
    assert found.comparison is not None
    assert [one.name for one in found.comparison.outputs] == ["label", "named"]


LINEAR = {
    "coefficients": [1.0, 0.0, 2.0, 0.0, 1.0, -1.0],
    "intercepts": [0.1, -0.1],
    "classlabels_strings": ["cat", "dog"],
}


def test_a_source_that_is_no_valid_onnx_is_told_so(tmp_path: Path) -> None:
    proto = onnx.load(FIXTURES / "digits_cnn.onnx")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(InputError, match=r"is not valid ONNX: .*shape") as caught:
        export(tmp_path / "odd.onnx", tmp_path / "m.onnx")
    assert caught.value.exit_code == 3


class Sum(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + 2 * right


class Twice(torch.nn.Module):
    def forward(self, left: torch.Tensor) -> torch.Tensor:
        return left * 2


@pytest.mark.parametrize("kind", [Sum, Twice])
def test_a_script_without_weights_becomes_onnx_as_well(kind: type[torch.nn.Module], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # That PyTorch would rather have it exported.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(kind()), str(tmp_path / "script.pt"))
    with pytest.raises(UsageError, match="does not give the shape of its input left"):
        export(tmp_path / "script.pt", tmp_path / "m.onnx")
    inputs = random(*[(2, 3)] * (2 if kind is Sum else 1))
    export(tmp_path / "script.pt", tmp_path / "m.onnx", input=["2,3:f32"] * len(inputs))
    found = by_onnxruntime(tmp_path / "m.onnx", *inputs)
    np.testing.assert_allclose(found[0], answers(kind(), inputs)[0], atol=1e-6)


class Block(torch.nn.Module):
    """Convolutions with and without a bias, each in front of a batch normalisation, and a sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.down = torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 1), torch.nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn1(self.conv1(x))) + self.down(x)


class Folded(torch.nn.Module):
    """What exporters fold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.fc = Block(1, 4), Block(4, 8), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
        return found


def folded(folder: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    net = Folded()
    net.train()(torch.randn(8, 1, 8, 8))
    torch.save(net.eval().state_dict(), folder / "folded.pt")
    return folder / "folded.pt", net


@pytest.mark.parametrize("way", ["weights", "program", "script"])
def test_weights_that_a_batch_normalisation_is_folded_into_keep_their_names(way: str, tmp_path: Path) -> None:
    place, net = folded(tmp_path)
    words: dict[str, object] = {"builder": "tests.exporting.test_torch:Folded", "input": ["1,1,8,8"]}
    if way != "weights":
        other = tmp_path / ("other.pt2" if way == "program" else "other.pt")
        export(place, other, **words, **({"to": "torchscript"} if way == "script" else {}))
        place, words = other, {"input": ["1,1,8,8"]} if way == "script" else {}
    export(place, tmp_path / "m.onnx", **words)
    held = {tensor.name: tensor.shape for tensor in open_model(tmp_path / "m.onnx").tensors}
    named = {f"layer{number}.{name}" for number in (1, 2) for name in ("conv1", "down.0")}
    assert {f"{name}.{leaf}" for name in named for leaf in ("weight", "bias")} | {"fc.weight", "fc.bias"} <= held.keys()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert all(shape == shapes.get(name, shape) for name, shape in held.items())


def test_stock_onnx_of_pytorch_becomes_8_bit_whatever_its_shapes_between_say(tmp_path: Path) -> None:
    _, net = folded(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(1, 1, 8, 8),), str(tmp_path / "stock.onnx"), dynamo=True, verbose=False)
    stock = onnx.load(tmp_path / "stock.onnx")
    stock.graph.value_info.append(onnx.helper.make_tensor_value_info("fc.weight", onnx.TensorProto.FLOAT, [64, 8]))
    onnx.save(stock, tmp_path / "stale.onnx")
    for name in ("stock", "stale"):
        found = export(tmp_path / f"{name}.onnx", tmp_path / f"{name}8.onnx", int8=True)
        assert any("8-bit" in remark for remark in found.notes)
        kinds = {one.data_type for one in onnx.load(tmp_path / f"{name}8.onnx").graph.initializer}
        assert onnx.TensorProto.INT8 in kinds
