"""What ALPS chooses: as many weights as were asked for, and outputs nearer to the dense ones than SparseGPT's."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from prunectl.calibration import alps, sparsegpt
from prunectl.calibration.reconstruct import stage_plans
from prunectl.formats.registry import open_model
from prunectl.pruning.plan import Plan, TensorPlan
from tests.calibration.runs import DIGITS, digits, examples, numbers
from tests.contract import Array
from tests.running import FIXTURES, here


def layer(seed: int, outputs: int = 24, features: int = 32) -> tuple[Array, Array]:
    """Weights, and the Gram matrix of inputs that depend on each other."""
    x = examples(400, features, seed=seed).astype("f8")
    return np.random.default_rng(seed).standard_normal((outputs, features)), x.T @ x


def error(found: Array, rows: Array, gram: Array) -> float:
    return float(np.einsum("rf,fg,rg->", found - rows, gram, found - rows))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_outputs_are_nearer_than_those_of_sparsegpt(seed: int, share: float) -> None:
    rows, gram = layer(seed)
    drop = round(share * rows.size)
    damped = sparsegpt.dampen(gram, 0.01)
    ours, dropped = alps.prune_rows(rows, damped, rows @ damped, alps.lowest(drop))
    parts = sparsegpt.unstructured_blocks(*rows.shape, drop, 128)
    theirs, _ = sparsegpt.prune_rows(rows, gram, parts, 0.01, 128)
    assert np.count_nonzero(dropped) == np.count_nonzero(ours == 0) == drop
    assert error(ours, rows, damped) < 0.9 * error(theirs, rows, damped)


def test_a_single_row_keeps_nearly_the_best_of_all_subsets() -> None:
    better = 0
    for seed in range(20):
        rows, gram = layer(seed, 1, 8)
        damped = sparsegpt.dampen(gram, 0.01)
        _, dropped = alps.prune_rows(rows, damped, rows @ damped, alps.lowest(5))
        costs = []
        for kept in map(list, combinations(range(8), 3)):
            best = np.zeros_like(rows)
            best[0, kept] = np.linalg.solve(damped[np.ix_(kept, kept)], (rows @ damped)[0, kept])
            costs.append(error(best, rows, damped))
        refitted, kept = np.zeros_like(rows), np.flatnonzero(~dropped[0])
        refitted[0, kept] = np.linalg.solve(damped[np.ix_(kept, kept)], (rows @ damped)[0, kept])
        better += error(refitted, rows, damped) <= 1.05 * min(costs)
    assert better >= 12, "of 20"


@pytest.mark.parametrize(("features", "channels"), [(32, 16), (36, 6)])
def test_a_pattern_holds_in_every_group_of_every_row(features: int, channels: int) -> None:
    rows, gram = layer(0, 8, features)
    damped = sparsegpt.dampen(gram, 0.01)
    blocks = sparsegpt.nm_blocks(features, channels, 2, 4)
    found, _ = alps.prune_rows(rows, damped, rows @ damped, alps.lowest_in(blocks))
    for block in blocks:
        assert ((found[:, block.begin : block.end] == 0).sum(axis=1) == block.drop).all()


def test_what_is_zero_already_goes_first() -> None:
    rows, gram = layer(1)
    rows[np.random.default_rng(2).random(rows.shape) < 0.4] = 0
    damped = sparsegpt.dampen(gram, 0.01)
    _, dropped = alps.prune_rows(rows, damped, rows @ damped, alps.lowest(rows.size // 2))
    assert dropped[rows == 0].all()


def answers(path: Path) -> Array:
    with np.load(FIXTURES / "digits.npz") as kept:
        x = kept["x"][-400:].transpose(0, 3, 1, 2).astype("f4") / 16
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def test_a_network_without_gradients_answers_nearer_to_the_dense_one(tmp_path: Path) -> None:
    dense, off = answers(FIXTURES / "digits_cnn.onnx"), {}
    for strategy in ("obs", "alps"):
        out = tmp_path / f"{strategy}.onnx"
        found = digits("digits_cnn.onnx", out, strategy=strategy, sparsity=0.8, scope="global", samples=256)
        assert sum(np.count_nonzero(array == 0) for array in numbers(out).values()) == found.plan.drop
        off[strategy] = float(np.square(answers(out) - dense).mean())
    assert off["alps"] < off["obs"]


@pytest.mark.parametrize("strategy", ["obs", "alps"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_in_stages_as_much_goes_and_the_answers_are_nearer(strategy: str, scope: str, tmp_path: Path) -> None:
    dense, off = answers(FIXTURES / "digits_cnn.onnx"), {}
    for stages in (1, 4):
        out, params = tmp_path / f"{stages}.onnx", (f"stages={stages}",)
        words = {"strategy": strategy, "sparsity": 0.85, "scope": scope, "samples": 256, "params": params}
        found = digits("digits_cnn.onnx", out, **words)
        assert sum(np.count_nonzero(array == 0) for array in numbers(out).values()) == found.plan.drop
        off[stages] = float(np.square(answers(out) - dense).mean())
    assert off[4] < off[1]


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("drop", [100, 1900, 2000])
def test_every_stage_leaves_the_same_share_and_the_last_is_the_plan(drop: int, stages: int) -> None:
    model = open_model(FIXTURES / "digits_cnn.onnx")
    tensors = [tensor for tensor in model.tensors if tensor.is_prunable]
    size = sum(tensor.size for tensor in tensors)
    plan = Plan(tuple(TensorPlan(tensor, tensor.size * drop // 2000) for tensor in tensors), (), size * drop // 2000)
    plans = list(stage_plans(plan, stages))
    assert len(plans) == stages
    assert plans[-1] == plan
    left = np.array([1, *(1 - stage.drop / size for stage in plans)])
    if drop < 2000:
        np.testing.assert_allclose(left[1:] / left[:-1], left[-1] ** (1 / stages), atol=2 / (size * left[-1]))
    for earlier, later in pairwise(plans):
        assert all(
            (before.drop or 0) <= (after.drop or 0) for before, after in zip(earlier.cuts, later.cuts, strict=True)
        )


@pytest.mark.parametrize("stages", ["0", "1.5", "many"])
def test_stages_are_a_number_of_them(stages: str, tmp_path: Path) -> None:
    model, out = FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    words = ("--strategy", "obs", "--data", DIGITS, "--param", f"stages={stages}")
    done = here("prune", model, "-o", out, "-s", "50%", *words)
    assert (done.code, "stages of obs must be a number above zero" in done.err) == (2, True)
    assert not out.exists()


def test_where_nothing_goes_stages_change_nothing_but_roundings(tmp_path: Path) -> None:
    model, out = FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    words = ("--strategy", "obs", "--data", DIGITS, "--samples", "64", "--param", "stages=3")
    done = here("prune", model, "-o", out, "-s", "0%", *words)
    assert done.code == 0, done.err
    np.testing.assert_allclose(answers(out), answers(model), atol=1e-3)


def test_a_pattern_has_no_stages(tmp_path: Path) -> None:
    model, out = FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    words = ("--strategy", "obs", "--data", DIGITS, "--param", "stages=3", "--pattern", "2:4")
    done = here("prune", model, "-o", out, *words)
    assert (done.code, "cannot be used with the pattern 2:4" in done.err) == (2, True)
    assert not out.exists()


@pytest.mark.parametrize("words", [("--strategy", "obs"), ("--strategy", "alps"), ("--repair", "--scope", "layer")])
def test_zeros_of_the_input_stay_where_less_is_to_go_than_there_are(words: tuple[str, ...], tmp_path: Path) -> None:
    sparse, out = tmp_path / "sparse.onnx", tmp_path / "out.onnx"
    assert here("prune", FIXTURES / "digits_cnn.onnx", "-o", sparse, "-s", "80%").code == 0
    done = here("prune", sparse, "-o", out, "-s", "50%", *words, "--data", DIGITS, "--samples", "64")
    assert done.code == 0, done.err
    before, after = numbers(sparse), numbers(out)
    for name in ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"):
        assert not after[name][before[name] == 0].any(), name


@pytest.mark.parametrize("strategy", ["obs", "alps"])
def test_what_is_all_zeros_is_not_called_reconstructed(strategy: str, tmp_path: Path) -> None:
    words = ("--strategy", strategy, "--data", DIGITS, "--samples", "64", "--allow-empty")
    model = FIXTURES / "digits_cnn.onnx"
    done = here("prune", model, "-o", tmp_path / "none.onnx", "-s", "100%", *words)
    assert done.code == 0, done.err
    assert "100.0 % sparse" in done.err
    assert "reconstructed" not in done.err
    done = here(
        "prune", model, "-o", tmp_path / "some.onnx", "-s", "50%", "--scope", "layer", "--layer", "fc1*=100%", *words
    )
    assert done.code == 0, done.err
    assert "Weights of 3 tensors were reconstructed from 64 examples" in done.err


def test_the_command_takes_patterns_and_damping_and_nothing_else(tmp_path: Path) -> None:
    words = ("--strategy", "alps", "--data", DIGITS, "--samples", "64")
    model, out = FIXTURES / "digits_cnn.onnx", tmp_path / "out.onnx"
    done = here("prune", model, "-o", out, *words, "--pattern", "2:4", "--param", "damp=0.1")
    assert done.code == 0, done.err
    assert "Weights of 4 tensors were reconstructed from 64 examples" in done.err
    kernel = numbers(out)["fc1.weight"]
    assert ((kernel.reshape(len(kernel), -1, 4) == 0).sum(axis=2) >= 2).all()
    done = here("prune", model, "-o", out, *words, "-s", "50%", "--param", "blocksize=64")
    assert (done.code, "the strategy alps has no parameter blocksize" in done.err) == (2, True)
