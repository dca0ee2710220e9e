"""Cutting channels out of a file: what is asked, what is refused, and what is left in the file."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from prunectl.channels.onnx import adapter
from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.onnx_graph import save_network
from prunectl.pruning import destination
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from prunectl.reporting import prune as reporting
from prunectl.reporting.structured import channels_report
from tests.channels.made import helper, model, numpy_helper, onnx, op, saved
from tests.channels.masked import run
from tests.running import here

FIXTURE = Path(__file__).parents[2] / "fixtures" / "digits_cnn.onnx"


def cut(path: Path, output: Path | None, *, limits: dict[str, Any] | None = None, **asked: Any) -> ChannelPruneResult:
    request = PruneRequest(**{"sparsity": 0.5, "pattern": "channel"} | asked)
    return prune_channels(path, request, Destination(output) if output else None, **(limits or {}))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in open_model(path).tensors}


def test_the_digits_network_loses_half_of_its_channels(tmp_path: Path) -> None:
    before, output = FIXTURE.read_bytes(), tmp_path / "small.onnx"
    found = cut(FIXTURE, output)
    onnx.checker.check_model(output, full_check=True)
    assert FIXTURE.read_bytes() == before
    assert (found.channels, found.dropped) == (56, 28)
    assert shapes(output) == {
        "conv1.weight": (4, 1, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (8, 4, 3, 3),
        "conv2.bias": (8,),
        "fc1.weight": (16, 128),
        "fc1.bias": (16,),
        "fc2.weight": (10, 16),
        "fc2.bias": (10,),
    }
    assert found.after.params.total == 40 + 296 + 2064 + 170
    old, new = onnx.load(FIXTURE), onnx.load(output)
    assert [node.SerializeToString() for node in new.graph.node] == [
        node.SerializeToString() for node in old.graph.node
    ]
    assert (new.opset_import, new.metadata_props, new.producer_name, new.graph.input, new.graph.output) == (
        old.opset_import,
        old.metadata_props,
        old.producer_name,
        old.graph.input,
        old.graph.output,
    )


@pytest.mark.parametrize("is_big", [False, True], ids=["small", "big"])
def test_what_is_left_of_a_big_model_is_compressed_as_little_as_the_model(
    is_big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_big:
        # Less than the model, and more than is left of it.
        for module in (destination, reporting):
            monkeypatch.setattr(module, "BIG_BYTES", FIXTURE.stat().st_size - 1)
    found = cut(FIXTURE, tmp_path / "out.onnx")
    assert found.after.bytes.raw < FIXTURE.stat().st_size - 1
    assert [stats.bytes.compressed is None for stats in (found.before, found.after)] == [is_big, is_big]
    report = channels_report(found, str(tmp_path / "out.onnx"))
    assert [table.note for table in report.sections[0].tables] == ["", reporting._UNMEASURED if is_big else ""]
    assert ("gzipped" in report.summary) is not is_big


def test_a_big_model_has_the_gzip_size_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (destination, reporting):
        monkeypatch.setattr(module, "BIG_BYTES", 100)  # less than what is left, too
    output = tmp_path / "out.onnx"
    most = int(0.6 * len(gzip.compress(FIXTURE.read_bytes(), 6, mtime=0)))
    found = cut(FIXTURE, output, sparsity=None, target_gzip=most)
    assert found.after.bytes.compressed == len(gzip.compress(output.read_bytes(), 6, mtime=0)) <= most
    assert [table.note for table in channels_report(found, str(output)).sections[0].tables] == ["", ""]


def test_the_smallest_channels_go_by_hand(tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    cut(FIXTURE, output, only="conv1.weight")
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(FIXTURE).graph.initializer}
    new = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(output).graph.initializer}
    norms = (np.abs(old["conv1.weight"]).mean((1, 2, 3)) + np.abs(old["conv2.weight"]).mean((0, 2, 3))) / 2
    kept = np.sort(np.argsort(norms, kind="stable")[4:])
    np.testing.assert_array_equal(new["conv1.weight"], old["conv1.weight"][kept])
    np.testing.assert_array_equal(new["conv1.bias"], old["conv1.bias"][kept])
    np.testing.assert_array_equal(new["conv2.weight"], old["conv2.weight"][:, kept])
    np.testing.assert_array_equal(new["fc1.weight"], old["fc1.weight"])


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    cut(FIXTURE, one, strategy="random", seed=4)
    cut(FIXTURE, two, strategy="random", seed=4)
    assert one.read_bytes() == two.read_bytes()


def test_limits_and_selectors_hold(tmp_path: Path) -> None:
    def left(**asked: Any) -> list[int]:
        output = tmp_path / "left.onnx"
        output.unlink(missing_ok=True)
        cut(FIXTURE, output, **asked)
        found = shapes(output)
        return [found[name][0] for name in ("conv1.weight", "conv2.weight", "fc1.weight")]

    assert left(sparsity=1.0) == [2, 2, 2]
    assert left(sparsity=1.0, limits={"min_channels": 5}) == [5, 5, 5]
    assert left(sparsity=1.0, limits={"max_ratio": 0.25}) == [6, 12, 24]
    assert left(sparsity=0.6, limits={"round_to": 8}) == [8, 8, 16]
    assert left(exclude=("conv*",)) == [8, 16, 16]
    assert left(only="fc1") == [8, 16, 16]
    assert left(layers=(("conv*", 0.25), ("conv2*", 0.75))) == [6, 4, 16]
    assert left(sparsity=None, layers=(("conv2*", 0.75),)) == [8, 4, 32]
    assert sum(left(sparsity=0.25, scope="global")) == 42


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sparsity": None}, "no share of channels is given"),
        ({"sparsity": 1.5}, "share of channels must be"),
        ({"strategy": "obs"}, "obs is not a known channel strategy"),
        ({"params": ("norm=3",)}, "the strategy channel-norm has no --param norm=3"),
        ({"strategy": "random", "params": ("norm=1",)}, "the strategy random has no --param norm=1"),
        ({"policy": "all"}, "--policy cannot be used with --pattern channel"),
        ({"nan": "zero"}, "--nan cannot be used with --pattern channel"),
        ({"compression": 2.0, "sparsity": None}, "--compression cannot be used with --pattern channel"),
        ({"scope": "erk"}, "the scope erk cannot be used with the pattern channel"),
        ({"scope": "global", "layers": (("conv1", 0.5),)}, "--layer cannot be used with --scope global"),
        ({"limits": {"round_to": 0}}, "--round-to must be at least 1"),
        ({"limits": {"max_ratio": 2.0}}, "share of channels must be"),
        ({"only": "nothing*"}, "no layer of .* matches"),
        ({"only": "fc2.weight"}, "no channels that can be removed"),
        ({"strategy": "bn-scale"}, "no channels that can be removed"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        cut(FIXTURE, tmp_path / "small.onnx", **asked)
    assert not list(tmp_path.iterdir())


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ONNX"):
        cut(FIXTURE.with_suffix(".tflite"), tmp_path / "small.tflite")


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    output.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        cut(FIXTURE, output)
    assert output.read_bytes() == b"mine"


def test_a_dry_run_writes_nothing_and_knows_the_outcome(tmp_path: Path) -> None:
    dry, wet = cut(FIXTURE, None), cut(FIXTURE, tmp_path / "small.onnx")
    assert dry.after.params == wet.after.params
    assert dry.after.bytes == wet.after.bytes


@pytest.mark.parametrize("words", [("-s", "1%"), ("-s", "50%", "--min-channels", "64"), ("--dead",)])
def test_a_cut_that_removes_nothing_is_refused_unless_it_may(words: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    done = here("prune", FIXTURE, "-o", output, "--pattern", "channel", *words)
    assert done.code == 5
    assert "nothing was written" in done.err
    assert "--allow-empty" in done.err
    assert not output.exists()
    done = here("prune", FIXTURE, "-o", output, "--pattern", "channel", *words, "--allow-empty")
    assert done.code == 0
    assert "No channel was removed" in done.err
    assert shapes(output) == shapes(FIXTURE)


def chain(**more: Any) -> Any:
    """Two convolutions with a reshape to a said shape between them."""
    nodes = [
        op("Conv", "x first bias", "a", pads=[1, 1, 1, 1]),
        op("Reshape", "a shape", "b"),
        op("Conv", "b last", "c"),
        op("Reshape", "c shape_of_the_end", "y"),
    ]
    weights = {"first": (6, 3, 3, 3), "bias": (6,), "last": (2, 6, 1, 1)}
    numbers = {"shape": [1, 6, 4, 16], "shape_of_the_end": [1, -1]}
    made = model(nodes, weights, numbers=numbers, inputs={"x": (1, 3, 8, 8)}, **more)
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 128]))
    return made


def check_chain(path: Path, output: Path) -> None:
    """Hold a cut chain against NumPy: the two reshapes change nothing that a convolution of 1x1 would notice."""
    found = cut(path, output)
    onnx.checker.check_model(output, full_check=True)
    assert shapes(output)["first"] == (3, 3, 3, 3)
    images = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    (loss,) = found.pruned_groups
    session_input = onnx.load(path)
    for tensor in session_input.graph.initializer:
        if tensor.name == "last":
            silent = np.array(numpy_helper.to_array(tensor, str(path.parent)))
            silent[:, list(loss.dropped)] = 0
            tensor.CopyFrom(numpy_helper.from_array(silent, "last"))
    silenced = path.with_name("silenced.onnx")
    onnx.save(session_input, silenced)
    np.testing.assert_allclose(run(output, images), run(silenced, images), rtol=1e-4, atol=1e-5)


def test_a_shape_that_names_the_channels_is_said_anew(tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    check_chain(saved(chain(), tmp_path), output)
    held = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in onnx.load(output).graph.initializer}
    assert [1, 3, 4, 16] in held.values()
    assert [1, 6, 4, 16] not in held.values()
    assert held["shape_of_the_end"] == [1, -1]


def test_weights_in_nodes_of_constants_are_cut_as_well(tmp_path: Path) -> None:
    made = chain()
    for tensor in list(made.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        made.graph.initializer.remove(tensor)
        made.graph.node.insert(0, node)
    output = tmp_path / "small.onnx"
    cut(saved(made, tmp_path), output)
    assert shapes(output)["first"] == (3, 3, 3, 3)
    assert [tensor.data_type for tensor in onnx.load(output).graph.initializer] == [onnx.TensorProto.INT64]


def test_weights_that_are_also_inputs_get_their_new_shape_there(tmp_path: Path) -> None:
    made = chain(ir_version=3, opset=8)
    for tensor in made.graph.initializer:
        made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    output = tmp_path / "small.onnx"
    check_chain(saved(made, tmp_path), output)
    ports = {
        port.name: [axis.dim_value for axis in port.type.tensor_type.shape.dim]
        for port in onnx.load(output).graph.input
    }
    assert ports["first"] == [3, 3, 3, 3]


def test_data_beside_the_model_is_named_after_the_output_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "net.onnx"
    onnx.save(chain(), path, save_as_external_data=True, location="net.data", size_threshold=100)
    before = (path.parent / "net.data").read_bytes()
    (tmp_path / "out").mkdir()
    for output in (tmp_path / "out" / "small.onnx", tmp_path / "in" / "small.onnx"):
        check_chain(path, output)
        assert {child.name for child in output.parent.glob("small*")} == {"small.onnx", "small.onnx.data"}
        assert (output.parent / "small.onnx.data").stat().st_size < len(before)
    assert (path.parent / "net.data").read_bytes() == before


def test_data_beside_the_model_keeps_its_name_in_place(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(chain(), path, save_as_external_data=True, location="net.data", size_threshold=100)
    before = onnx.load(path)
    prune_channels(path, PruneRequest(sparsity=0.5, pattern="channel"), Destination(path, is_in_place=True))
    assert sorted(child.name for child in tmp_path.iterdir()) == ["net.data", "net.onnx"]
    assert shapes(path)["first"][0] * 2 == before.graph.initializer[0].dims[0]


def wide(path: Path, **more: Any) -> Path:
    """Two dense layers, the first of which has 64 KB of numbers."""
    nodes = [op("Gemm", "x first bias", "a"), op("Relu", "a", "b"), op("MatMul", "b last", "y")]
    made = model(nodes, {"first": (64, 256), "bias": (256,), "last": (256, 10)}, inputs={"x": ("N", 64)})
    onnx.save(made, path, **more)
    return path


def test_large_numbers_beside_the_model_are_in_no_message_and_are_cut_as_those_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = wide(tmp_path / "inside.onnx")
    beside = wide(tmp_path / "beside.onnx", save_as_external_data=True, location="b.data", size_threshold=100)
    messages: list[int] = []
    session = onnxruntime.InferenceSession

    def record(message: Any, *args: Any, **words: Any) -> Any:
        messages.append(len(message))
        return session(message, *args, **words)

    cut(inside, tmp_path / "one.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", record)
        cut(beside, tmp_path / "two.onnx")
    assert messages
    assert max(messages) < 20_000 < (tmp_path / "two.onnx.data").stat().st_size
    one, two = onnx.load(tmp_path / "one.onnx"), onnx.load(tmp_path / "two.onnx")
    assert [tensor.raw_data for tensor in two.graph.initializer] == [
        tensor.raw_data for tensor in one.graph.initializer
    ]
    assert two.graph.node == one.graph.node
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "two.onnx", x), run(tmp_path / "one.onnx", x), rtol=1e-5)


def test_numbers_that_came_out_wrong_beside_the_model_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    path = wide(tmp_path / "in" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=100)

    def damaged(network: Any, staged: Path, locations: dict[str, str]) -> None:
        save_network(network, staged, locations)
        data = staged.with_name("small.onnx.data")
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])

    monkeypatch.setattr(adapter, "save_network", damaged)
    (tmp_path / "out").mkdir()
    with pytest.raises(WorkError, match="first has different values in the output"):
        cut(path, tmp_path / "out" / "small.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_shapes_of_inner_values_that_no_longer_hold_are_left_out(tmp_path: Path) -> None:
    made = onnx.shape_inference.infer_shapes(chain())
    assert {port.name for port in made.graph.value_info} == {"a", "b", "c"}
    output = tmp_path / "small.onnx"
    check_chain(saved(made, tmp_path), output)
    assert {port.name for port in onnx.load(output).graph.value_info} == {"c"}


def test_one_that_was_packed_comes_out_packed(tmp_path: Path) -> None:
    packed, output = tmp_path / "packed.onnx", tmp_path / "small.onnx"
    prune(FIXTURE, PruneRequest(sparsity=0.9, is_packed=True), Destination(packed))
    cut(packed, output)
    assert shapes(output)["fc1.weight"] == (16, 128)
    assert onnx.load(output).graph.sparse_initializer
    images = np.random.default_rng(2).normal(size=(2, 1, 8, 8)).astype(np.float32)
    assert run(output, images).shape == (2, 10)


def test_the_report_says_what_became_of_each_tensor(tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    report = channels_report(cut(FIXTURE, output), str(output))
    assert ("conv2.weight", "16x8x3x3", "8x4x3x3", 1152, 288, 0.25) in report.table.rows
    assert [row[1] for row in report.sections[0].tables[1].rows] == [9802, 2570]
    assert "scores is an output of the network" in report.sections[0].notes[0]
    assert report.extra_json["channels"]["dropped"] == 28
    dry = channels_report(cut(FIXTURE, None), "")
    assert dry.sections[0].notes[-1] == "This was a dry run: nothing was written."
    assert not dry.artifacts


def test_a_manifest_lists_what_went_and_repeats_the_cut(tmp_path: Path) -> None:
    first, again, record = tmp_path / "first.onnx", tmp_path / "again.onnx", tmp_path / "run.json"
    words = ("--pattern", "channel", "--target-params", "-60%", "--round-to", "2", "--scope", "global")
    assert here("prune", FIXTURE, "-o", first, *words, "--manifest", record).code == 0
    said = json.loads(record.read_text())
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(FIXTURE).graph.initializer}
    for tensor in onnx.load(first).graph.initializer:
        axes = {one["axis"]: one["indices"] for one in said["removed"] if one["tensor"] == tensor.name}
        if axes:
            wanted = weights[tensor.name]
            for axis, indices in axes.items():
                wanted = np.delete(wanted, indices, axis)
            assert np.array_equal(numpy_helper.to_array(tensor), wanted)
    assert said["limits"] == {"params": "-60%", "round_to": 2}
    assert said["output"]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert here("prune", FIXTURE, "-o", again, "--recipe", record).code == 0
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("limits", ["[]", '{"speed": 3}', '{"round_to": []}'])
def test_a_record_that_makes_no_sense_is_refused(limits: str, tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    record.write_text(f'{{"request": {{"pattern": "channel", "sparsity": 0.5}}, "limits": {limits}}}')
    done = here("prune", FIXTURE, "-o", tmp_path / "x.onnx", "--recipe", record)
    assert done.code == 3
    assert "holds invalid limits for channels" in done.err


def test_weights_of_bfloat16_lose_the_channels_that_the_same_numbers_lose_in_float32(tmp_path: Path) -> None:
    narrow, wide = tmp_path / "narrow.onnx", tmp_path / "wide.onnx"
    assert here("export", FIXTURE, "-o", narrow, "--bf16").code == 0
    rounded = onnx.load(FIXTURE)
    for tensor in rounded.graph.initializer:
        if len(tensor.dims) > 1:
            numbers = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    onnx.save(rounded, wide)
    for path in (narrow, wide):
        cut(path, path.with_suffix(".small.onnx"))
    small, reference = narrow.with_suffix(".small.onnx"), wide.with_suffix(".small.onnx")
    assert shapes(small) == shapes(reference) != shapes(narrow)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(small).graph.initializer}
    assert kinds["fc1.weight"] == onnx.TensorProto.BFLOAT16
    x = np.random.default_rng(0).random((8, 1, 8, 8), np.float32)
    answers, expected = (
        onnxruntime.InferenceSession(path).run(None, {onnx.load(path).graph.input[0].name: x})[0]
        for path in (small, reference)
    )
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)
