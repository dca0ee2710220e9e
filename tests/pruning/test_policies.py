"""Which tensors are pruned, and what is said of those that are not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning import plan as planning
from prunectl.pruning.request import PruneRequest, resolve_method
from tests.networks import keras, tf_keras
from tests.pruning.reference import MODELS, arrays, prune
from tests.running import FIXTURES, at_terminal, here

pytestmark = pytest.mark.filterwarnings("ignore")

DIGITS = FIXTURES / "digits_cnn.pt"


def chosen(path: Path, **words: Any) -> tuple[list[str], dict[str, str]]:
    """The tensors that a request is about, and why the others are not."""
    choice = planning.select_tensors(open_model(path), resolve_method(PruneRequest(**words)).criteria)
    return [tensor.name for tensor in choice.tensors], {skip.name: skip.reason for skip in choice.skips}


def test_by_default_kernels_are_pruned_and_each_other_tensor_has_a_reason() -> None:
    names, reasons = chosen(DIGITS)
    assert names == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert set(reasons) == {tensor.name for tensor in open_model(DIGITS).tensors} - set(names)
    assert reasons["conv1.bias"] == "a bias"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["default", "all", "min-size:10", "min-size:2"])
def test_every_tensor_is_either_pruned_or_has_a_reason(name: str, policy: str) -> None:
    names, reasons = chosen(MODELS[name], policy=policy)
    assert not set(names) & set(reasons)
    assert set(names) | set(reasons) == {tensor.name for tensor in open_model(MODELS[name]).tensors}
    assert all(reasons.values())


def test_all_takes_biases_too_but_no_optimizer_state() -> None:
    names, reasons = chosen(FIXTURES / "checkpoint_with_optimizer.pt", policy="all")
    assert any(name.endswith("bias") for name in names)
    assert "optimizer state" in reasons.values()
    assert not any("exp_avg" in name for name in names)


def test_first_last_and_classifier_are_skipped_by_their_names() -> None:
    names, reasons = chosen(DIGITS, policy="skip-first-last")
    assert names == ["conv2.weight", "fc1.weight"]
    assert (reasons["conv1.weight"], reasons["fc2.weight"]) == ("the first layer", "the last layer")
    names, reasons = chosen(DIGITS, policy="skip-classifier")
    assert names == ["conv1.weight", "conv2.weight", "fc1.weight"]
    assert reasons["fc2.weight"] == "the classifier"


def test_tensors_below_a_size_are_left_alone() -> None:
    names, reasons = chosen(DIGITS, policy="min-size:1000")
    assert names == ["conv2.weight", "fc1.weight"]
    assert reasons["conv1.weight"] == "fewer than 1,000 weights"
    with pytest.raises(UsageError, match="min-size:many"):
        chosen(DIGITS, policy="min-size:many")


def test_only_means_what_it_names_even_if_it_is_no_kernel() -> None:
    names, reasons = chosen(DIGITS, only="re:bias$")
    assert names == ["conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias"]
    assert reasons["fc1.weight"] == "not selected by --layers"
    assert chosen(DIGITS, only="conv1.bias")[0] == ["conv1.bias"]


@pytest.mark.parametrize("selector", ["conv*", "conv?.*", "re:conv"])
def test_the_layers_of_a_pattern_are_pruned_without_their_biases(selector: str) -> None:
    names, reasons = chosen(DIGITS, only=selector)
    assert names == ["conv1.weight", "conv2.weight"]
    assert (reasons["conv1.bias"], reasons["fc1.bias"]) == ("a bias", "not selected by --layers")
    everything, _ = chosen(DIGITS, only=selector, policy="all")
    assert everything == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]


def test_of_the_layers_of_a_pattern_the_policy_chooses_unless_it_allows_none() -> None:
    assert chosen(DIGITS, only="conv*", policy="skip-first-last")[0] == ["conv2.weight"]
    assert chosen(DIGITS, only="conv1", policy="skip-first-last")[0] == ["conv1.weight"]
    assert chosen(DIGITS, only="*", policy="min-size:1000")[0] == ["conv2.weight", "fc1.weight"]


def test_excluded_beats_all_else() -> None:
    names, reasons = chosen(DIGITS, only="fc*", exclude=("fc2",), layers=(("fc2", 0.9),))
    assert names == ["fc1.weight"]
    assert reasons["fc2.weight"] == "excluded"


def test_of_two_ratios_for_a_layer_the_last_counts(tmp_path: Path) -> None:
    layers = (("*", 0.1), ("fc*.weight", 0.5), ("fc2.weight", 0.25))
    found, written = prune(DIGITS, tmp_path / "out", sparsity=0.9, layers=layers)
    ratios = {name: float((array == 0).mean()) for name, array in arrays(written).items()}
    assert ratios["fc1.weight"] == pytest.approx(0.5, abs=1e-3)
    assert ratios["fc2.weight"] == pytest.approx(0.25, abs=1e-2)
    assert ratios["conv2.weight"] == pytest.approx(0.1, abs=1e-2)
    assert ratios["conv1.bias"] == 0
    assert found.plan.drop == sum(tally.dropped for tally in found.counts.values())


def test_without_an_amount_only_layers_with_their_own_lose_weights(tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "--layer", "fc1=50%")
    assert done.code == 0, done.err
    zeros = {name: int((array == 0).sum()) for name, array in arrays(tmp_path / "out.pt").items()}
    assert zeros["fc1.weight"] == 8192 // 2
    assert not zeros["conv2.weight"]


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("--policy", "defualt"), "default"),
        (("--policy", "minsize"), "min-size:N"),
        (("--strategy", "magnitud"), "magnitude"),
        (("--layers", "fcl"), "fc1"),
        (("--exclude", "conv3"), "conv"),
        (("--layer", "fcc1=0.5"), "fc1"),
        (("--strategy", "random-weighted", "--param", "bias=erly"), "early"),
        (("--strategy", "random-weighted", "--param", "bais=early"), "bias"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(words: tuple[str, ...], nearest: str, tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "0.5", *words, "--json")
    assert done.code == 2
    assert any(nearest in word for word in done.json["error"]["did_you_mean"])
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("word", ["80", "-0.1", "1.2", "120%", "nan", "half", "fc1=80"])
def test_a_ratio_out_of_range_is_refused(word: str, tmp_path: Path) -> None:
    option = "--layer" if "=" in word else "--sparsity"
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", f"{option}={word}")
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_what_is_left_alone_is_said_with_the_reason(tmp_path: Path) -> None:
    done = here("prune", FIXTURES / "checkpoint_with_optimizer.pt", "-o", tmp_path / "out.pt", "-s", "0.5")
    assert "Not pruned (policy default): " in done.err
    assert "4 biases" in done.err
    assert "The optimizer's state was not changed" in done.err


def quantised(folder: Path) -> Path:
    tf = importlib.import_module("tensorflow")
    k = tf_keras()
    model = k.Sequential([k.layers.Input((4,)), k.layers.Dense(64), k.layers.Dense(32)])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([np.ones((1, 4), np.float32)] for _ in range(2))
    path = folder / "quantised.tflite"
    path.write_bytes(converter.convert())
    return path


def test_a_quantised_model_is_told_to_be_pruned_before(tmp_path: Path) -> None:
    done = here("prune", quantised(tmp_path), "-o", tmp_path / "out.tflite", "-s", "0.5")
    assert done.code == 2
    assert "has nothing to prune" in done.err
    assert "quantised to int8: prune before quantising" in done.err


@pytest.mark.parametrize("arrays", [{}, {"ids": np.ones((3, 4), np.int64)}], ids=["no tensor", "integers"])
def test_a_file_without_floats_is_not_told_to_name_layers(arrays: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(arrays, path)
    done = here("prune", path, "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert done.code == 2
    assert "only floating-point weights are pruned" in done.err
    assert "--layers" not in done.err


@pytest.mark.parametrize(
    ("weight", "scale", "dtype"),
    [("qweight", "scales", np.int32), ("weight", "SCB", np.int8), ("weight_packed", "weight_scale", np.int32)],
    ids=["gptq", "bitsandbytes", "compressed-tensors"],
)
def test_a_language_model_that_was_quantised_keeps_its_scales(
    weight: str, scale: str, dtype: type[np.integer[Any]], tmp_path: Path
) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    arrays = {weight: np.ones((8, 64), dtype), scale: np.ones((2, 64), np.float16), "bias": np.ones(64, np.float16)}
    save_file({f"{layer}.{name}": array for name, array in arrays.items()}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "-s", "0.5")
    assert done.code == 2
    assert f"1 tensor (quantised to {np.dtype(dtype).name}: prune before quantising)" in done.err
    assert "prune the model that was quantised" in done.err


def test_where_kernels_are_excluded_a_table_of_integers_is_not_called_the_reason(tmp_path: Path) -> None:
    arrays = {"fc.weight": np.ones((8, 8), np.float32), "ids.weight": np.ones((2, 8), np.int64)}
    save_file(arrays, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "o.safetensors", "-s", "0.5", "--exclude", "fc*")
    assert (done.code, "quantised" in done.err, "select tensors with --layers" in done.err) == (2, False, True)


def test_what_is_quantised_is_said_wherever_its_kernels_are_counted(tmp_path: Path) -> None:
    path = quantised(tmp_path)
    (model,) = here("inspect", path, "--json").json["models"]
    assert model["params"]["prunable"] == 4 * 64 + 64 * 32
    refused = [word for word in model["advice"] if "cannot be pruned: prune before quantising" in word]
    assert refused == ["Its kernels are quantised to int8 and cannot be pruned: prune before quantising."]
    assert refused[0] in here("size", path).err
    assert "in quantised kernels" in at_terminal("inspect", path).out


def test_to_prune_everything_is_refused_as_a_slip(tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "1")
    assert done.code == 2
    assert "a sparsity of 1 would set every weight to zero" in done.err
    assert "for 1 percent write 1%" in done.err
    assert "add --allow-empty" in done.err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "words",
    [(), ("--scope", "global"), ("--scope", "erk"), ("--strategy", "random"), ("--pattern", "block:1x4")],
)
def test_everything_is_pruned_where_that_is_allowed(words: tuple[str, ...], tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "100%", "--allow-empty", *words)
    assert done.code == 0, done.err
    assert "Nothing is left of" in done.err
    (model,) = here("inspect", tmp_path / "out.pt", "--json").json["models"]
    assert model["params"]["prunable_zero"] == model["params"]["prunable"] > 0


def test_the_sparsity_after_is_that_of_the_prunable_weights_as_size_says(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    shown = at_terminal("prune", DIGITS, "-o", out, "-s", "80%", columns=200).out
    (model,) = here("size", out, "--json").json["models"]
    (row,) = [line for line in shown.splitlines() if line.lstrip().startswith("after")]
    assert row.split()[1] == f"{100 * model['prunable_sparsity']:.1f}"
    assert model["sparsity"] < model["prunable_sparsity"]


def test_rows_cut_the_list_of_tensors_and_not_what_sums_it_up(tmp_path: Path) -> None:
    shown = at_terminal("prune", DIGITS, "-o", tmp_path / "out.pt", "-s", "80%", "-n", "1", columns=200).out
    assert "more rows: -n 0 shows all" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.lstrip().startswith(("before", "after"))] == [
        "before",
        "after",
    ]


def mobile(k: Any, *, stride: int = 2, has_pooling: bool = True, extra: str = "") -> Any:
    """A network as XNNPACK runs it sparsely, or nearly."""
    x = inputs = k.layers.Input((16, 16, 3))
    x = k.layers.ZeroPadding2D(1, name="pad")(x)
    x = k.layers.Conv2D(8, 3, strides=stride, padding="valid", name="stem")(x)
    x = k.layers.BatchNormalization(name="bn")(x)
    x = k.layers.ReLU(6.0, name="relu")(x)
    x = k.layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = shortcut = k.layers.Conv2D(12, 1, name="pointwise")(x)
    x = k.layers.Conv2D(12, 1, activation="relu", name="second")(x)
    x = k.layers.Add(name="add")([x, shortcut])
    if extra == "wide":
        x = k.layers.Conv2D(12, 3, name="wide")(x)
    if extra == "softmax":
        x = k.layers.Activation("softmax", name="softmax")(x)
    x = k.layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x) if has_pooling else x
    return k.Model(inputs, k.layers.Conv2D(5, 1, name="head")(x))


VARIANTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, ""),
    ({"stride": 1}, "strides 2"),
    ({"has_pooling": False}, "GlobalAveragePooling2D"),
    ({"extra": "wide"}, "another layer than wide (Conv2D)"),
    ({"extra": "softmax"}, "another layer than softmax (Activation)"),
)


@pytest.mark.parametrize(("words", "says"), VARIANTS, ids=str)
def test_xnnpack_refuses_what_tfmot_refuses(words: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = mobile(tf_keras(), **words)
    policy = importlib.import_module("tensorflow_model_optimization").sparsity.keras.PruneForLatencyOnXNNPack()
    model.save(tmp_path / "m.h5")
    if not says:
        policy.ensure_model_supports_pruning(model)
        allowed = [layer.name for layer in model.layers if policy.allow_pruning(layer)]
        names, _ = chosen(tmp_path / "m.h5", policy="xnnpack")
        assert [name.partition("/")[0] for name in names] == allowed
        return
    with pytest.raises(ValueError, match=r"find|supported"):
        policy.ensure_model_supports_pruning(model)
    with pytest.raises(UsageError) as caught:
        chosen(tmp_path / "m.h5", policy="xnnpack")
    assert says in caught.value.message


def test_xnnpack_reads_a_sequence_and_keras_3_as_well(tmp_path: Path) -> None:
    for k, name in ((tf_keras(), "two.h5"), (keras(), "three.keras")):
        layers = [
            k.layers.Input((16, 16, 3)),
            k.layers.ZeroPadding2D(1),
            k.layers.Conv2D(8, 3, strides=2),
            k.layers.Conv2D(12, 1, name="pointwise"),
            k.layers.GlobalAveragePooling2D(keepdims=True),
            k.layers.Dense(4),
        ]
        k.Sequential(layers).save(tmp_path / name)
        names, reasons = chosen(tmp_path / name, policy="xnnpack")
        assert len(names) == 1
        assert "pointwise" in open_model(tmp_path / name).tensors[2].layer
        assert "not a 1x1 convolution" in reasons.values()
    mobile(keras()).save(tmp_path / "graph.keras")
    assert len(chosen(tmp_path / "graph.keras", policy="xnnpack")[0]) == 3


def test_xnnpack_takes_what_has_no_configuration_at_its_word(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"4 tensors \(not a 1x1 convolution\)"):
        chosen(DIGITS, policy="xnnpack")


def test_xnnpack_says_on_which_processors_it_pays(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.randn(8, 4, 1, 1), "conv.bias": torch.zeros(8)}, tmp_path / "m.pt")
    for policy, is_told in (("xnnpack", True), ("default", False)):
        done = here("prune", tmp_path / "m.pt", "--dry-run", "-s", "0.5", "--policy", policy)
        assert done.code == 0
        assert ("faster on ARM, in WebAssembly and on RISC-V; on x86 with AVX" in done.err) is is_told


def test_a_model_whose_graph_is_not_that_of_xnnpack_is_refused_on_the_command_line(tmp_path: Path) -> None:
    words = ("-s", "0.5", "--policy", "xnnpack")
    done = here("prune", FIXTURES / "digits_cnn.h5", "-o", tmp_path / "out.h5", *words)
    assert done.code == 2
    assert "XNNPACK would not run" in done.err


def test_what_shares_the_numbers_of_a_pruned_tensor_is_said_to_be_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    torch.save({"emb.weight": weight, "out.weight": weight, "out.bias": torch.zeros(6)}, tmp_path / "tied.pt")
    found, _ = prune(tmp_path / "tied.pt", tmp_path / "out", sparsity=0.5, only="out.weight")
    assert {skip.name: skip.reason for skip in found.plan.skips}["emb.weight"] == "tied to out.weight, which is pruned"


@pytest.mark.parametrize(
    ("words", "are_pruned"),
    [
        ({}, False),
        ({"only": "*"}, False),
        ({"only": "lm_head"}, True),
        ({"layers": (("lm_head", 0.5),)}, True),
        ({"policy": "all"}, True),
        ({"policy": "all", "exclude": ("embed",)}, False),
        ({"layers": (("lm_head", 0.5),), "exclude": ("embed",)}, False),
        ({"policy": "min-size:10"}, False),
    ],
    ids=str,
)
def test_an_output_layer_stays_with_the_embedding_that_it_is_tied_to_unless_it_is_named(
    words: dict[str, Any], are_pruned: bool, tmp_path: Path
) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    state = {"embed.weight": weight, "fc.weight": torch.randn(8, 4), "lm_head.weight": weight}
    torch.save(state, tmp_path / "tied.pt")
    _, out = prune(tmp_path / "tied.pt", tmp_path / "out", sparsity=0.5, **words)
    written = torch.load(out, weights_only=True)
    assert torch.equal(written["embed.weight"], written["lm_head.weight"])
    assert torch.equal(written["embed.weight"], weight) is not are_pruned


@pytest.mark.parametrize("beside", ["experts.0.up_proj.weight", "experts.gate_up_proj", "input_linear.weight"])
@pytest.mark.parametrize("router", ["gate.weight", "router.weight", "router.layer.weight", "shared_expert_gate.weight"])
def test_what_chooses_experts_is_pruned_only_if_it_is_named(router: str, beside: str, tmp_path: Path) -> None:
    stack = torch.randn(8, 4) if beside.endswith("up_proj.weight") else torch.randn(4, 8, 4)
    # Without experts beside it, a gate is a layer as any other.
    names = {f"h.0.mlp.{beside}": stack, f"h.0.mlp.{router}": torch.randn(4, 4), f"h.1.{router}": torch.randn(4, 4)}
    save_torch_file(names, tmp_path / "moe.safetensors")
    pruned, reasons = chosen(tmp_path / "moe.safetensors")
    assert set(pruned) == {f"h.0.mlp.{beside}", f"h.1.{router}"}
    assert reasons == {f"h.0.mlp.{router}": "a router"}
    assert chosen(tmp_path / "moe.safetensors", only=f"h.0.mlp.{router}", pattern="2:4")[0] == [f"h.0.mlp.{router}"]


def test_what_is_too_narrow_for_a_pattern_is_named(tmp_path: Path) -> None:
    words = ("prune", FIXTURES / "digits_cnn.onnx", "--dry-run")
    done = here(*words, "--pattern", "2:4", "--exclude", "fc2")
    assert "note: conv1.weight has fewer than 4 inputs, so 2:4 prunes none of it." in done.err
    assert "fewer than" not in here(*words, "--pattern", "2:4", "--exclude", "conv1").err
    assert "fewer than" not in here(*words, "-s", "0").err


def test_what_lies_beside_weights_and_is_not_copied_is_named(tmp_path: Path) -> None:
    folder, output = tmp_path / "llama", tmp_path / "small"
    for path in (folder, output):
        path.mkdir()
    (folder / "model.safetensors").write_bytes((FIXTURES / "digits_cnn.safetensors").read_bytes())
    for name in ("config.json", "tokenizer.json", ".gitattributes"):
        (folder / name).write_text("{}")
    words = ("prune", "llama", "-s", "50%", "-o")
    done = here(*words, "small/model.safetensors", cwd=tmp_path)
    assert "Only the weights were written, without config.json, tokenizer.json of llama: a folder" in done.err
    (output / "config.json").write_text("{}")
    (output / "tokenizer.json").write_text("{}")
    assert "Only the weights" not in here(*words, "small/model.safetensors", "--force", cwd=tmp_path).err
    assert "Only the weights" not in here("prune", "llama", "-s", "50%", "--in-place", cwd=tmp_path).err
