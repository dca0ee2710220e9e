"""Scores and shares, beside their formulas."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.formats.base import Role, Storage, Tensor
from prunectl.pruning.strategies import (
    BIASES,
    BlockContext,
    depth_biased,
    erk,
    lamp,
    proportional_counts,
    random,
    sample_depth_bias,
)
from tests.contract import Array
from tests.pruning import reference
from tests.pruning.reference import arrays, prune
from tests.running import FIXTURES, here

DIGITS = FIXTURES / "digits_cnn.pt"
PLACE = BlockContext("w", 0, 0)


def tensor_of(shape: tuple[int, ...], name: str = "w") -> Tensor:
    return Tensor(name, name, shape, np.dtype(np.float32), Role.KERNEL, Storage(name, 0, None, 0))


def lamp_by_its_formula(weights: Array) -> Array:
    """Score by w(u)^2 over the sum of w(v)^2 for all v >= u in rising order (Lee et al. 2021, equation 3)."""
    squares = weights.astype(np.float64).ravel() ** 2
    order = sorted(range(squares.size), key=lambda place: squares[place])
    scores = np.zeros_like(squares)
    for rank, place in enumerate(order):
        rest = sum(squares[other] for other in order[rank:])
        scores[place] = squares[place] / rest if rest else 0.0
    return scores.reshape(weights.shape)


def test_lamp_is_that_of_the_paper() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 7)).astype(np.float32)
    np.testing.assert_allclose(lamp(weights, PLACE), lamp_by_its_formula(weights), rtol=1e-12)
    assert lamp(weights, PLACE).max() == 1.0


def test_lamp_of_nothing_but_zeros_is_zero() -> None:
    assert not lamp(np.zeros((3, 4), np.float32), PLACE).any()


def test_global_lamp_cuts_where_its_formula_does(tmp_path: Path) -> None:
    found, written = prune(DIGITS, tmp_path / "out", sparsity=0.9, scope="global", strategy="lamp", exclude=("fc1",))
    before, after = arrays(DIGITS), arrays(written)
    names = [cut.tensor.name for cut in found.plan.cuts]
    scores = np.concatenate([lamp_by_its_formula(before[name]).ravel() for name in names])
    mark = reference.lowest(scores, round(0.9 * scores.size))
    np.testing.assert_array_equal(np.concatenate([after[name].ravel() for name in names]) == 0, mark)


def test_lamp_keeps_a_weight_in_every_layer(tmp_path: Path) -> None:
    found, written = prune(DIGITS, tmp_path / "out", sparsity=0.999, scope="global", strategy="lamp")
    assert all(np.count_nonzero(arrays(written)[cut.tensor.name]) for cut in found.plan.cuts)


def test_chance_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    words: dict[str, Any] = {"sparsity": 0.5, "strategy": "random"}
    first, again, other = (
        prune(DIGITS, tmp_path / name, **words, seed=seed)[1].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other


def test_chance_does_not_depend_on_blocks() -> None:
    whole = random(np.zeros(1000, np.float32), BlockContext("w", 0, 3))
    parts = [random(np.zeros(100, np.float32), BlockContext("w", begin, 3)) for begin in range(0, 1000, 100)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_chance_is_even() -> None:
    scores = random(np.zeros((100, 1000), np.float32), PLACE) / 2**24
    assert 0 <= scores.min() < scores.max() < 1
    # Four standard errors of the mean of so many evenly spread numbers.
    assert scores.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / scores.size) ** 0.5)
    for axis in (0, 1):
        lines = scores.mean(axis=axis)
        assert np.abs(lines - 0.5).max() < 6 * (1 / 12 / scores.shape[axis]) ** 0.5
    neighbours = np.corrcoef(scores.ravel()[:-1], scores.ravel()[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_tensors_of_one_shape_lose_different_weights() -> None:
    zeros = np.zeros(1000, np.float32)
    one, other = (random(zeros, BlockContext(name, 0, 0)) for name in ("a", "b"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 100)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_shares_add_up_and_stay_within_their_sizes(layers: list[tuple[int, float]], part: float) -> None:
    sizes, rates = [size for size, _ in layers], [rate for _, rate in layers]
    total = round(part * sum(sizes))
    counts = proportional_counts(sizes, rates, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    shares = sorted(zip(rates, counts, sizes, strict=True))
    for (_, low, low_size), (_, high, high_size) in itertools.pairwise(shares):
        assert low / low_size <= (high + 1) / high_size + 1 / low_size


shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


@given(shapes, st.floats(0, 1))
def test_erk_drops_exactly_as_many_as_asked(found: list[tuple[int, ...]], sparsity: float) -> None:
    tensors = [tensor_of(shape) for shape in found]
    drop = round(sparsity * sum(tensor.size for tensor in tensors))
    counts = erk(tensors, drop)
    assert sum(counts) == drop
    assert all(0 <= count <= tensor.size for count, tensor in zip(counts, tensors, strict=True))


def test_erk_densities_go_with_the_sum_of_the_sides_over_their_product() -> None:
    tensors = [tensor_of((64, 32, 3, 3)), tensor_of((128, 64, 3, 3)), tensor_of((256, 128))]
    drop = round(0.9 * sum(tensor.size for tensor in tensors))
    density = [1 - count / tensor.size for count, tensor in zip(erk(tensors, drop), tensors, strict=True)]
    expected = [sum(tensor.shape) / tensor.size for tensor in tensors]
    np.testing.assert_allclose(np.array(density) / density[0], np.array(expected) / expected[0], rtol=1e-3)


def test_erk_keeps_whole_what_would_be_denser_than_dense() -> None:
    tensors = [tensor_of((2, 3)), tensor_of((300, 300))]
    assert erk(tensors, 45_000) == [0, 45_000]


def test_the_zeros_of_erk_are_the_smallest_of_each_layer(tmp_path: Path) -> None:
    found, written = prune(DIGITS, tmp_path / "out", sparsity=0.8, scope="erk")
    before, after = arrays(DIGITS), arrays(written)
    assert found.plan.drop == round(0.8 * found.plan.size)
    for cut in found.plan.cuts:
        assert cut.drop is not None
        mark = reference.lowest(reference.magnitudes(before[cut.tensor.name]), cut.drop)
        np.testing.assert_array_equal(after[cut.tensor.name], np.where(mark, 0, before[cut.tensor.name]))


@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_takes_more_of_late_or_of_early_layers(bias: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"sparsity": 0.4, "strategy": "random-weighted", "params": (f"bias={bias}",)}
    found, written = prune(DIGITS, tmp_path / "out", **words)
    after = arrays(written)
    zeros = {cut.tensor.name: int((after[cut.tensor.name] == 0).sum()) for cut in found.plan.cuts}
    assert sum(zeros.values()) == found.plan.drop == round(0.4 * found.plan.size)
    assert zeros == {cut.tensor.name: cut.drop for cut in found.plan.cuts}
    shares = [zeros[cut.tensor.name] / cut.tensor.size for cut in found.plan.cuts]
    if bias == "uniform":
        assert max(shares) - min(shares) < 0.01
    else:
        assert shares == sorted(shares, reverse=bias == "early")
        assert max(shares) > 1.5 * min(shares)


def test_tensors_of_one_layer_have_one_bias() -> None:
    tensors = [tensor_of((10, 10), "first"), tensor_of((10, 10), "second"), tensor_of((10, 10), "second")]
    assert depth_biased(tensors, 50, seed=0, bias="late") == [10, 20, 20]
    assert depth_biased(tensors, 40, seed=0, bias="early") == [20, 10, 10]


def test_seeds_draw_biases_with_the_odds_that_are_said() -> None:
    drawn = [sample_depth_bias(seed) for seed in range(4000)]
    for bias, odds in zip(BIASES, (0.3, 0.3, 0.4), strict=True):
        assert drawn.count(bias) / len(drawn) == pytest.approx(odds, abs=0.03)
    assert drawn == [sample_depth_bias(seed) for seed in range(4000)]


def test_a_drawn_bias_is_said(tmp_path: Path) -> None:
    words = ("-s", "0.5", "--strategy", "random-weighted", "--seed", "3")
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", *words)
    assert done.code == 0, done.err
    assert f"The bias towards early or late layers, drawn with --seed, is {sample_depth_bias(3)}." in done.err


@pytest.mark.parametrize("strategy", ["magnitude", "random", "random-weighted", "lamp"])
@pytest.mark.parametrize("name", ["digits_cnn.h5", "digits_cnn.onnx", "tied_and_views.pt", "deflated.keras"])
def test_every_strategy_drops_exactly_what_was_planned(strategy: str, name: str, tmp_path: Path) -> None:
    found, written = prune(FIXTURES / name, tmp_path / "out", sparsity=0.37, strategy=strategy)
    after = arrays(written)
    assert sum(int((after[cut.tensor.name] == 0).sum()) for cut in found.plan.cuts) == found.plan.drop
