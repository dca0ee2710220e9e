"""What `--repair outputs` gives back: the answers of the dense model, from inputs alone, with every zero in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunectl
from prunectl.calibration import match, match_steps
from prunectl.calibration.match_steps import MatchingSchedule
from prunectl.calibration.prune import prune
from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.errors import UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.prune import prune as prune_file
from prunectl.pruning.request import PruneRequest, parse_request
from prunectl.training.backend import LoadOptions
from prunectl.training.runtimes import load_trainable
from prunectl.training.task import FinalActivation, activation_of_values, are_logits, compare_outputs, distillation_loss
from tests.calibration import nets
from tests.calibration.runs import DIGITS, NETS, TORCH_NETS, build_of, data, examples, numbers, saved
from tests.contract import Array, digest
from tests.networks import keras, tf_keras
from tests.running import FIXTURES, here
from tests.training.torch import nets as torch_nets

RAW, SOFTMAX, SIGMOID = FinalActivation.RAW, FinalActivation.SOFTMAX, FinalActivation.SIGMOID
TRAINED = (
    "digits_cnn.keras",
    "digits_cnn.h5",
    "digits_cnn_savedmodel",
    "digits_cnn.pt",
    "digits_cnn_torchscript.pt",
    "digits_cnn.pt2",
)
SHORT: dict[str, Any] = {
    "is_matched": True,
    "repair_steps": 60,
    "samples": 256,
    "batch_size": 64,
    "data": DIGITS,
    "sparsity": 0.9,
    "scope": "global",
}
CUT: dict[str, Any] = {"pattern": "channel", "sparsity": 0.6, "data": DIGITS, "inputs": ("1,1,8,8",)}


def zeros(array: Array) -> int:
    return int(np.count_nonzero(array == 0))


def matched(file: str, target: Path, **wish: Any) -> Pruned:
    """The digits network, pruned and matched for a few steps."""
    return prune(FIXTURES / file, PruneRequest(**{**SHORT, "model": build_of(file), **wish}), Destination(target))


def answers(path: Path, builder: str, x: Array) -> Array:
    """What the network of a file answers."""
    network = load_trainable(open_model(path), LoadOptions(model=builder, is_trusted=True))
    try:
        return np.asarray(network.predict(x))
    finally:
        network.close()


def shares(logits: Array) -> Array:
    exact = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exact / exact.sum(1, keepdims=True))


def divergence(ours: Array, theirs: Array) -> float:
    """Kullback-Leibler divergence of the probabilities of their logits from those of ours."""
    p, q = shares(theirs.astype("f8")), shares(ours.astype("f8"))
    return float((p * np.log(p / q)).sum(1).mean())


def distance(path: Path, dense: Path, builder: str, x: Array) -> float:
    """The same, of the answers of a file from those of the dense one."""
    return divergence(answers(path, builder, x), answers(dense, builder, x))


def digit_images(file: str) -> Array:
    with np.load(FIXTURES / "digits.npz") as kept:
        x = kept["x"][-400:].astype("f4") / 16
    return np.moveaxis(x, -1, 1) if is_of_torch(file) else x


def is_of_torch(file: str) -> bool:
    return "torch" in file or file.endswith((".pt", ".pt2"))


@dataclass(frozen=True)
class Unmatched:
    """The digits network of a framework: its answers, and what is lost of them where nothing is repaired."""

    x: Array
    dense: Array
    sparse: float
    cut: float
    shapes: list[tuple[int, ...]]


def kernel_shapes(result: ChannelPruneResult) -> list[tuple[int, ...]]:
    """What is left of the kernels, whatever the order of the file."""
    return sorted(layer.shape for layer in result.after.layers if len(layer.shape) > 1)


@pytest.fixture(scope="module")
def unmatched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Unmatched]:
    """What each framework's file of the network answers; its other formats hold the same numbers."""

    @cache
    def measure(file: str) -> Unmatched:
        folder, dense_file, builder, x = (
            tmp_path_factory.mktemp("plain"),
            FIXTURES / file,
            build_of(file),
            digit_images(file),
        )
        sparse, small = folder / f"sparse{dense_file.suffix}", folder / f"small{dense_file.suffix}"
        prune_file(dense_file, PruneRequest(sparsity=0.9, scope="global"), Destination(sparse))
        wish = {**CUT, "model": builder, "inputs": CUT["inputs"] if builder else ()}
        cut = prune_channels(dense_file, PruneRequest(**wish), Destination(small))
        dense = answers(dense_file, builder, x)
        return Unmatched(
            x,
            dense,
            divergence(answers(sparse, builder, x), dense),
            divergence(answers(small, cut.builder, x), dense),
            kernel_shapes(cut),
        )

    return lambda file: measure("digits_cnn.pt" if is_of_torch(file) else "digits_cnn.h5")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("file", TRAINED)
def test_a_network_answers_nearly_as_before_and_keeps_every_zero(
    file: str, unmatched: Callable[[str], Unmatched], tmp_path: Path
) -> None:
    out = tmp_path / f"out{Path(file).suffix}"
    found = matched(file, out)
    after = numbers(out)
    for name, counts in found.counts.items():
        assert zeros(after[name]) == counts.zeros, name
    sizes = [after[cut.tensor.name].size for cut in found.plan.cuts]
    assert found.plan.drop == round(0.9 * sum(sizes)) == sum(counts.zeros for counts in found.counts.values())
    reference = unmatched(file)
    assert divergence(answers(out, build_of(file), reference.x), reference.dense) < reference.sparse / 3


def test_weights_that_mattered_once_others_were_gone_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_stages, at_once, dense = tmp_path / "stages.pt", tmp_path / "once.pt", FIXTURES / "digits_cnn.pt"
    done = matched(dense.name, in_stages, sparsity=0.97, repair_steps=300)
    assert any(
        note.endswith("Weights were pruned in 27 stages during the first 135 of these steps.") for note in done.notes
    )
    monkeypatch.setattr(match, "RAMP_SHARE", 0.0)
    done = matched(dense.name, at_once, sparsity=0.97, repair_steps=300)
    assert not any("stages" in note for note in done.notes)
    gone, gone_at_once = (numbers(path)["fc1.weight"] == 0 for path in (in_stages, at_once))
    assert not np.array_equal(gone, gone_at_once)
    builder, x = build_of(dense.name), digit_images(dense.name)
    assert distance(in_stages, dense, builder, x) < 0.9 * distance(at_once, dense, builder, x)


@pytest.mark.parametrize(
    "wish",
    [{"repair_steps": 8}, {"samples": 9, "repair_steps": 100}, {"sparsity": 0.5, "repair_steps": 400}],
    ids=["few steps", "no examples to hold back", "a loss that is soon won back"],
)
def test_weights_are_pruned_at_once_where_stages_win_nothing(wish: dict[str, Any], tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.pt", tmp_path / "out.pt"
    done = matched("digits_cnn.pt", out, **wish)
    wanted = PruneRequest(sparsity=wish.get("sparsity", SHORT["sparsity"]), scope="global")
    prune_file(FIXTURES / "digits_cnn.pt", wanted, Destination(plain))
    before, after = numbers(plain), numbers(out)
    assert all(np.array_equal(array == 0, after[name] == 0) for name, array in before.items() if array.ndim > 1)
    assert not any("stages" in note for note in done.notes)


def test_blocks_are_pruned_whole_in_stages_too(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    matched("digits_cnn.pt", out, scope="layer", pattern="block:2x2", sparsity=0.75)
    weights = numbers(out)["fc1.weight"]
    blocks = weights.reshape(weights.shape[0] // 2, 2, weights.shape[1] // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    left = np.count_nonzero(blocks, axis=1)
    assert set(left) == {0, 4}
    assert np.count_nonzero(left == 0) == round(0.75 * len(blocks))


def test_a_pattern_of_n_in_m_stays_as_it_is(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.pt", tmp_path / "out.pt"
    wish: dict[str, Any] = {"pattern": "2:4", "sparsity": None}
    prune_file(FIXTURES / "digits_cnn.pt", PruneRequest(**wish), Destination(plain))
    matched("digits_cnn.pt", out, scope="layer", **wish)
    before, after = numbers(plain), numbers(out)
    for name, array in before.items():
        if name.endswith("weight"):
            np.testing.assert_array_equal(array == 0, after[name] == 0)
            assert not np.array_equal(array, after[name])


def test_zeros_of_tensors_that_are_not_pruned_stay_too(tmp_path: Path) -> None:
    first, out = tmp_path / "first.pt", tmp_path / "out.pt"
    prune_file(FIXTURES / "digits_cnn.pt", PruneRequest(sparsity=0.5, only="fc1*"), Destination(first))
    wish = {**SHORT, "model": build_of("digits_cnn.pt"), "only": "fc2*", "sparsity": 0.3, "repair_steps": 20}
    prune(first, PruneRequest(**wish), Destination(out))
    before, after = numbers(first), numbers(out)
    np.testing.assert_array_equal(before["fc1.weight"] == 0, after["fc1.weight"] == 0)
    assert zeros(after["fc2.weight"]) == round(0.3 * after["fc2.weight"].size)
    assert not np.array_equal(before["fc1.weight"], after["fc1.weight"]), "what is not pruned is trained as well"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("file", ["digits_cnn.keras", "digits_cnn_savedmodel", "digits_cnn.pt", "digits_cnn.pt2"])
def test_a_network_that_lost_channels_answers_nearly_as_before(
    file: str, unmatched: Callable[[str], Unmatched], tmp_path: Path
) -> None:
    out = tmp_path / f"out{Path(file).suffix}"
    wish = {**CUT, "model": build_of(file), "inputs": CUT["inputs"] if file.endswith("pt") else ()}
    few = {"samples": 256, "batch_size": 64, "repair_steps": 60, "is_matched": True}
    done = prune_channels(FIXTURES / file, PruneRequest(**wish, **few), Destination(out))
    assert any("trained for 60 steps to match the dense outputs for 256 examples" in note for note in done.notes)
    reference = unmatched(file)
    assert kernel_shapes(done) == reference.shapes
    assert divergence(answers(out, done.builder, reference.x), reference.dense) < reference.cut / 3


def test_zeros_of_a_network_that_loses_channels_stay_and_a_recipe_repeats_it(tmp_path: Path) -> None:
    sparse, plain, out = tmp_path / "sparse.pt", tmp_path / "plain.pt", tmp_path / "out.pt"
    record, again = tmp_path / "run.json", tmp_path / "again" / "out.pt"
    again.parent.mkdir()
    prune_file(FIXTURES / "digits_cnn.pt", PruneRequest(sparsity=0.5), Destination(sparse))
    words = ("--data", DIGITS, "--builder", build_of("digits_cnn.pt"), "--input", "1,1,8,8", "--pattern", "channel")
    few = ("--samples", "128", "--repair", "outputs", "--repair-steps", "5", "--manifest", record)
    assert here("prune", sparse, "-o", plain, *words, "-s", "50%").code == 0
    assert here("prune", sparse, "-o", out, *words, "-s", "50%", *few).code == 0
    before, after = numbers(plain), numbers(out)
    for name, array in before.items():
        assert not after[name][array == 0].any(), name
    assert not np.array_equal(before["fc1.weight"], after["fc1.weight"])
    assert here("prune", sparse, "-o", again, "--recipe", record, "--trust").code == 0
    assert digest(again) == digest(out)


def test_targets_are_never_read_and_the_seed_decides_everything(tmp_path: Path) -> None:
    with np.load(FIXTURES / "digits.npz") as kept:
        x = kept["x"][:256]
    sources = {
        "alone": data(tmp_path / "x.npz", x=x),
        "again": data(tmp_path / "x.npz", x=x),
        "labels": data(tmp_path / "xy.npz", x=x, y=np.arange(256) % 10),
        "wrong": data(tmp_path / "wrong.npz", x=x, y=np.zeros(256, np.int64)),
        "seed": data(tmp_path / "x.npz", x=x),
    }
    found = {}
    for name, source in sources.items():
        out = tmp_path / f"{name}.pt"
        matched("digits_cnn.pt", out, data=f"{source}?norm=/16", seed=int(name == "seed"), repair_steps=12)
        found[name] = digest(out)
    assert found["alone"] == found["again"] == found["labels"] == found["wrong"] != found["seed"]


def test_obs_chooses_and_fits_what_is_then_trained(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.pt", tmp_path / "out.pt"
    # Few examples that are held back say too little of what was fitted to the others.
    wish = {**SHORT, "model": build_of("digits_cnn.pt"), "strategy": "obs", "samples": 1024}
    prune(
        FIXTURES / "digits_cnn.pt",
        PruneRequest(**{**wish, "is_matched": False, "repair_steps": None}),
        Destination(plain),
    )
    matched("digits_cnn.pt", out, strategy="obs", samples=1024)
    before, after = numbers(plain), numbers(out)
    np.testing.assert_array_equal(before["fc1.weight"] == 0, after["fc1.weight"] == 0)
    x, builder = digit_images("digits_cnn.pt"), build_of("digits_cnn.pt")
    dense = FIXTURES / "digits_cnn.pt"
    assert distance(out, dense, builder, x) < distance(plain, dense, builder, x)


def test_statistics_of_normalisations_are_those_of_the_pruned_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, out, x = saved(nets.Windows(), tmp_path / "m.pt"), tmp_path / "out.pt", examples(64, 4, 8, 8)
    wish = {
        **SHORT,
        "data": data(tmp_path / "x.npz", x=x),
        "model": f"{NETS}:Windows",
        "sparsity": 0.5,
        "repair_steps": 30,
    }
    done = prune(path, PruneRequest(**wish), Destination(out))
    assert any("1 batch normalisation layers were recomputed" in note for note in done.notes)
    module = nets.Windows()
    module.load_state_dict(torch.load(out, weights_only=True))
    seen = module.first(torch.from_numpy(x)).detach()
    np.testing.assert_allclose(module.norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_all_outputs_are_matched_by_all_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch_nets.Forked().eval()
    path, plain, out = saved(dense, tmp_path / "m.pt"), tmp_path / "plain.pt", tmp_path / "out.pt"
    arrays = {"x0": examples(200, 6), "x1": examples(200, 6, seed=1)}
    wish = {**SHORT, "data": data(tmp_path / "x.npz", **arrays) + "[x0+x1]", "model": f"{TORCH_NETS}:Forked"}
    wish |= {"sparsity": 0.5, "repair_steps": 200, "loss": "mse"}
    prune_file(path, PruneRequest(sparsity=0.5, scope="global"), Destination(plain))
    prune(path, PruneRequest(**wish), Destination(out))
    x = [torch.from_numpy(array) for array in arrays.values()]
    left = []
    for file in (plain, out):
        net = torch_nets.Forked().eval()
        net.load_state_dict(torch.load(file, weights_only=True))
        left.append([float((a - b).square().mean().detach()) for a, b in zip(net(*x), dense(*x), strict=True)])
    assert all(near < far for far, near in zip(*left, strict=True))


def test_what_lost_little_is_won_back_by_shorter_steps(tmp_path: Path) -> None:
    plain, out, dense = tmp_path / "plain.pt", tmp_path / "out.pt", FIXTURES / "digits_cnn.pt"
    prune_file(dense, PruneRequest(sparsity=0.2, scope="global"), Destination(plain))
    matched(dense.name, out, sparsity=0.2)
    far, near = (distance(path, dense, build_of(dense.name), digit_images(dense.name)) for path in (plain, out))
    assert near < far / 3
    before, after = numbers(plain), numbers(out)
    assert all(np.array_equal(array == 0, after[name] == 0) for name, array in before.items()), "pruned at once"


def test_where_nothing_is_won_it_ends_early_with_what_was_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "RATE", 1e8)
    plain, out = tmp_path / "plain.pt", tmp_path / "out.pt"
    prune_file(FIXTURES / "digits_cnn.pt", PruneRequest(sparsity=0.5), Destination(plain))
    done = matched("digits_cnn.pt", out, scope="layer", sparsity=0.5, repair_steps=80)
    assert any("trained for 20 steps" in note for note in done.notes)
    before, after = numbers(plain), numbers(out)
    assert all(np.array_equal(before[name], array) for name, array in after.items())


@pytest.mark.parametrize("given", [None, 160], ids=["by default", "of as many steps as were asked for"])
def test_what_is_near_the_dense_outputs_early_ends_early_by_default(
    given: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match_steps, "_NEAR", 0.5)
    monkeypatch.setattr(match, "STEPS", 160)
    monkeypatch.setattr(match, "RAMP_SHARE", 0.0)
    out, dense = tmp_path / "out.pt", FIXTURES / "digits_cnn.pt"
    done = matched(dense.name, out, repair_steps=given)
    (steps,) = (int(words[1]) for note in done.notes if (words := re.search(r"trained for (\d+) steps", note)))
    assert (steps < 100) == (given is None)


def test_the_rate_falls_in_a_line_and_in_a_steeper_one_from_where_little_is_left() -> None:
    schedule = MatchingSchedule(300, 1.0, may_end_early=True)
    assert [schedule.rate_at(step) for step in (0, 75, 299)] == pytest.approx([1, 0.75, 1 / 300])
    assert schedule.record(75, 0.01)
    assert [schedule.rate_at(step) for step in (75, 125, 174)] == pytest.approx([0.75, 0.375, 0.0075])
    assert schedule.continues(174)
    assert not schedule.continues(175)


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        ("Gaps", examples(64, 12), "the distance to the dense outputs is NaN or infinite after"),
        ("Roots", examples(64, 12), "the output of the dense model is NaN or infinite for some examples"),
    ],
)
def test_what_is_no_number_ends_it_and_nothing_is_written(net: str, x: Array, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, out = saved(getattr(nets, net)(), tmp_path / "m.pt"), tmp_path / "out.pt"
    words = ("--repair", "outputs", "-s", "50%", "--data", data(tmp_path / "x.npz", x=x), "--builder", f"{NETS}:{net}")
    done = here("prune", path, "-o", out, *words)
    assert done.code == 5
    assert message in done.err
    assert not out.exists()


@pytest.mark.parametrize("file", ["digits_cnn.onnx", "digits_cnn.tflite", "digits_cnn.safetensors"])
def test_a_file_without_gradients_is_refused_with_what_to_do(file: str, tmp_path: Path) -> None:
    done = here("prune", FIXTURES / file, "-o", tmp_path / file, "-s", "50%", "--data", DIGITS, "--repair", "outputs")
    assert done.code in {2, 3}
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) > 1, "what to do instead"
    assert not (tmp_path / file).exists()
    if file.endswith("onnx"):
        assert "--repair layers" in done.err


MODEL = ("prune", FIXTURES / "digits_cnn.onnx", "-s", "50%", "--data", DIGITS, "--samples", "32")


def test_repair_alone_means_layers_wherever_it_stands(tmp_path: Path) -> None:
    outs = [tmp_path / f"{number}.onnx" for number in range(4)]
    words = ("-s", "50%", "--data", DIGITS, "--samples", "32")
    done = [
        here("prune", "--repair", FIXTURES / "digits_cnn.onnx", "-o", outs[0], *words),
        here("prune", FIXTURES / "digits_cnn.onnx", "-o", outs[1], *words, "--repair"),
        here("prune", FIXTURES / "digits_cnn.onnx", "--repair=layers", "-o", outs[2], *words),
        here("prune", FIXTURES / "digits_cnn.onnx", "--repair", "layers", "-o", outs[3], *words),
    ]
    assert [one.code for one in done] == [0] * 4, done
    assert len({digest(out) for out in outs}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--repair=weights",), "'weights' is not one of 'layers', 'outputs'"),
        (("--repair", "--repair-steps", "5"), "--repair-steps needs --repair outputs"),
        (("--repair", "--pattern", "channel"), "--repair layers cannot be used with --pattern channel"),
        (("--repair", "outputs", "--pattern", "channel"), "onnxruntime, which computes no gradients"),
        (("--repair-steps", "5", "--pattern", "channel"), "--repair-steps needs --repair outputs"),
    ],
    ids=str,
)
def test_words_that_make_no_sense_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = here(*MODEL[:4], "-o", tmp_path / "out.onnx", "--data", DIGITS, *words)
    assert done.code == 2
    assert message in done.err


def test_more_examples_are_used_than_to_look_at_layers_unless_it_is_said() -> None:
    plain = PruneRequest(is_repaired=True, scope="global")
    assert parse_request({"repair": True}) == parse_request({"repair": "layers"}) == plain
    found = parse_request({"repair": "outputs", "data": "x.npz"})
    assert (found.samples, found.batch_size, found.is_matched, found.is_repaired) == (4096, None, True, False)
    assert parse_request({"repair": "outputs", "samples": 128, "batch_size": 32}).samples == 128


def test_only_layers_and_outputs_are_repaired() -> None:
    with pytest.raises(UsageError, match="--repair cannot be 'weights'") as caught:
        parse_request({"repair": "weights"})
    assert caught.value.hint == "use --repair layers or --repair outputs"


def test_a_module_in_memory_is_matched_too() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)).eval()
    x = examples(200, 12)
    dense = net(torch.from_numpy(x)).detach()
    plain = prunectl.prune(net, sparsity=0.7)
    found = prunectl.prune(net, sparsity=0.7, data=x, repair="outputs", repair_steps=200, loss="mse")
    far, near = (float((one(torch.from_numpy(x)) - dense).square().mean().detach()) for one in (plain, found))
    assert near < 0.8 * far
    pruned = [sum(zeros(layer.weight.detach().numpy()) for layer in (net[0], net[2])) for net in (plain, found)]
    assert pruned[0] == pruned[1] == round(0.7 * (12 * 24 + 24 * 3))


RANDOM = np.random.default_rng(0)
SURE = RANDOM.normal(size=(200, 10)) * 6
SMALL = RANDOM.normal(size=(200, 10)) * 0.5
SHARES = shares(SURE)


@pytest.mark.parametrize(
    ("dense", "pruned", "activation", "loss", "expected"),
    [
        (SURE, SMALL, RAW, "", (True, False, RAW)),
        (SMALL, SMALL, RAW, "", (False, False, RAW)),
        (SURE + 40 * np.eye(10)[0], SMALL, RAW, "", (False, False, RAW)),
        (SURE, SMALL, RAW, "mse", (False, False, RAW)),
        (SMALL, SMALL, RAW, "kl", (True, False, RAW)),
        (SHARES, SHARES, SOFTMAX, "", (True, False, SOFTMAX)),
        (np.log(SHARES), np.log(SHARES), FinalActivation.LOG_SOFTMAX, "", (True, False, FinalActivation.LOG_SOFTMAX)),
        (np.abs(SMALL) / 10, np.abs(SMALL) / 10, SIGMOID, "", (True, True, SIGMOID)),
        (np.abs(SMALL) / 10, SMALL, SIGMOID, "", (False, False, RAW)),
        (SMALL[:, :1], SMALL[:, :1], RAW, "", (False, False, RAW)),
        (SMALL[:, 0], SMALL[:, 0], RAW, "", (False, False, RAW)),
        (SMALL[:, :1], SMALL[:, :1], RAW, "kl", (True, True, RAW)),
        (SMALL[:, 0], SMALL[:, 0], RAW, "kl", (True, True, RAW)),
        (SMALL, SMALL, RAW, "bce", (True, True, RAW)),
        (np.abs(SMALL) / 10, np.abs(SMALL) / 10, SIGMOID, "bce", (True, True, SIGMOID)),
    ],
)
def test_outputs_are_compared_as_what_they_are(
    dense: Array, pruned: Array, activation: FinalActivation, loss: str, expected: tuple[bool, bool, FinalActivation]
) -> None:
    found = compare_outputs(dense, pruned, activation, 1 if dense.ndim > 1 else -1, loss)
    assert (found.is_classification, found.is_binary, found.activation) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("k", [keras, tf_keras])
def test_a_single_logit_is_yes_or_no_where_the_file_was_compiled_so(k: Any, tmp_path: Path) -> None:
    k().utils.set_random_seed(0)
    layers, x = k().layers, examples(64, 6)
    for loss, told in (
        (k().losses.BinaryCrossentropy(from_logits=True), "yes or no (binary cross-entropy)"),
        ("mse", "numbers (squared error)"),
    ):
        model = k().Sequential([layers.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(1)])
        model.compile("adam", loss)
        model.save(tmp_path / "model.keras")
        wish = {**SHORT, "data": data(tmp_path / "x.npz", x=x), "sparsity": 0.5, "repair_steps": 10}
        done = prune(
            tmp_path / "model.keras", PruneRequest(**wish), Destination(tmp_path / "out.keras", is_forced=True)
        )
        assert any(note.startswith(f"Outputs were compared as {told}.") for note in done.notes), done.notes


def test_the_distance_of_logits_of_yes_or_no_is_that_of_their_probabilities() -> None:
    dense, pruned = SMALL[:, 0], SMALL[:, 1]
    p, q = (1 / (1 + np.exp(-logits)) for logits in (dense, pruned))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    how = compare_outputs(dense, pruned, RAW, -1, "bce")
    assert distillation_loss(match_steps._OPS, how, dense, pruned, 1.0) == pytest.approx(expected)


def test_an_unknown_way_to_compare_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be compared by the loss hinge"):
        compare_outputs(SURE, SURE, RAW, 1, "hinge")


def test_a_single_example_tells_nothing_of_classes() -> None:
    assert not are_logits(SURE[:1], 1)
    assert activation_of_values(SHARES, 1) is SOFTMAX


@pytest.mark.parametrize(
    ("net", "x", "expected"),
    [
        ("Reader", np.random.default_rng(0).integers(0, 20, (128, 5)), 32),
        ("Plain", examples(128, 12), 64),
        ("Plain", np.random.default_rng(0).integers(0, 255, (128, 12), "uint8"), 64),
    ],
    ids=["tokens", "rows", "pixels"],
)
def test_a_batch_is_of_64_examples_by_default_and_of_32_sequences_of_tokens(
    net: str, x: Array, expected: int, tmp_path: Path
) -> None:
    model = saved(getattr(torch_nets, net)(), tmp_path / "m.pt")
    wish = {**SHORT, "repair_steps": 4, "model": f"{TORCH_NETS}:{net}", "data": data(tmp_path / "x.npz", x=x)}
    outs = {size: tmp_path / f"{size}.pt" for size in (None, 32, 64)}
    for size, out in outs.items():
        prune(model, PruneRequest(**{**wish, "batch_size": size}), Destination(out))
    assert [size for size in (32, 64) if digest(outs[size]) == digest(outs[None])] == [expected]


def test_a_run_can_be_repeated_from_its_manifest(tmp_path: Path) -> None:
    outs = [tmp_path / "one.pt", tmp_path / "two.pt"]
    words = ("-s", "80%", "--data", DIGITS, "--builder", build_of("digits_cnn.pt"), "--repair", "outputs")
    steps = ("--repair-steps", "5", "--samples", "64", "--batch-size", "32")
    manifest = tmp_path / "run.json"
    first = here("prune", FIXTURES / "digits_cnn.pt", "-o", outs[0], *words, *steps, "--manifest", manifest)
    again = here("prune", FIXTURES / "digits_cnn.pt", "-o", outs[1], "--recipe", manifest, "--trust")
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert digest(outs[0]) == digest(outs[1])
    assert '"is_matched": true' in manifest.read_text()


def test_work_errors_of_matching_are_exit_code_five() -> None:
    with pytest.raises(WorkError, match="after 3 steps"):
        match_steps._check_finite(float("nan"), 3)
