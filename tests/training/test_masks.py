"""Masks during training: as many zeros as planned, kept, and moved where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.formats.registry import open_model
from prunectl.pruning import engine
from prunectl.pruning import plan as planning
from prunectl.pruning import request as requests
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.pruning.strategies import BlockContext
from prunectl.training.backend import STATISTIC_OF_STRATEGY, GradientStatistic, with_gradient_scores
from prunectl.training.mask_schedule import MaskScheduler, PruningConfig, RigLSchedule, regrow_masks
from tests.pruning import reference
from tests.running import FIXTURES

DIGITS = FIXTURES / "digits_cnn.pt"
Arrays = dict[str, Any]


class Paper:
    """A network on paper: weights that a test changes by hand."""

    def __init__(self, weights: Arrays) -> None:
        self.held = weights
        self.seen: Arrays = {}
        self.watched = GradientStatistic.NONE

    def weights(self, names: Sequence[str]) -> Arrays:
        return {name: self.held[name].copy() for name in names}

    def mask(self, masks: Mapping[str, Any]) -> None:
        for name, mask in masks.items():
            self.held[name] = np.where(mask, self.held[name], 0)

    def track_gradients(self, statistic: GradientStatistic, names: Sequence[str]) -> None:
        self.watched = statistic

    def gradient_statistics(self) -> Arrays:
        return self.seen

    def reset_gradient_statistics(self) -> None:
        self.seen = {}

    def jitter(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.held = {name: one + random.normal(size=one.shape).astype("f4") for name, one in self.held.items()}


def weights() -> Arrays:
    model = open_model(DIGITS)
    return {tensor.name: model.read(tensor).copy() for tensor in model.tensors if tensor.is_prunable}


def rules(**words: Any) -> PruningConfig:
    """Return rules for the digits model, a schedule among them."""
    schedule = words.pop("schedule", None)
    regrowth = words.pop("regrowth", None)
    request = PruneRequest(**{"sparsity": 0.8, **words})
    model = open_model(DIGITS)
    method = requests.resolve_method(request)
    choice = planning.select_tensors(model, method.criteria)
    return PruningConfig(model, choice, method.criteria, method, schedule, regrowth=regrowth)


def zeros(network: Paper) -> dict[str, int]:
    return {name: int((one == 0).sum()) for name, one in network.held.items()}


@pytest.mark.parametrize("scope", ["layer", "global", "erk"])
@pytest.mark.parametrize("strategy", ["magnitude", "lamp", "random"])
def test_masks_in_memory_are_those_that_prune_would_write(scope: str, strategy: str, tmp_path: Path) -> None:
    _, target = reference.prune(DIGITS, tmp_path, sparsity=0.7, scope=scope, strategy=strategy)
    written = reference.arrays(target)
    decided = rules(sparsity=0.7, scope=scope, strategy=strategy)
    plan = planning.make_plan(decided.choice, decided.selection, 0.7)
    masks = engine.keep_masks(decided.model, plan, decided.method, decided.choice, weights())
    for name, mask in masks.items():
        assert np.array_equal(mask, written[name] != 0), name


@pytest.mark.parametrize("pattern", ["2:4", "block:4x1", "block:2x2:max"])
def test_patterns_are_the_same_in_memory_and_in_a_file(pattern: str, tmp_path: Path) -> None:
    amount = None if pattern == "2:4" else 0.5
    _, target = reference.prune(DIGITS, tmp_path, sparsity=amount, pattern=pattern)
    written = reference.arrays(target)
    decided = rules(sparsity=amount, pattern=pattern)
    plan = planning.make_plan(decided.choice, decided.selection, 0.5)
    masks = engine.keep_masks(decided.model, plan, decided.method, decided.choice, weights())
    for name, mask in masks.items():
        assert np.array_equal(mask, written[name] != 0), name


def test_making_masks_leaves_the_weights_as_they_are() -> None:
    held = weights()
    before = {name: one.copy() for name, one in held.items()}
    decided = rules()
    engine.keep_masks(
        decided.model, planning.make_plan(decided.choice, decided.selection, 0.8), decided.method, decided.choice, held
    )
    assert all(np.array_equal(held[name], before[name]) for name in held)


def test_each_turn_has_exactly_the_zeros_of_its_schedule() -> None:
    schedule = SparsitySchedule("polynomial", 0.8, 0, 30, frequency=10)
    keeper, network = MaskScheduler(rules(schedule=schedule)), Paper(weights())
    for step in range(40):
        is_turn = keeper.maybe_update(network, step)
        assert is_turn == (step in {0, 10, 20, 30})
        wanted = schedule.sparsity_at(step // 10 * 10)
        assert zeros(network) == {name: round(wanted * one.size) for name, one in network.held.items()}


def test_a_ramp_that_ends_between_two_turns_still_reaches_its_sparsity() -> None:
    keeper, network = (
        MaskScheduler(rules(schedule=SparsitySchedule("linear", 0.8, 0, 25, frequency=10))),
        Paper(weights()),
    )
    for step in range(26):
        keeper.maybe_update(network, step)
    assert zeros(network) == {name: round(0.8 * one.size) for name, one in network.held.items()}


def test_what_was_zero_in_the_file_stays_zero_whatever_a_schedule_asks_for() -> None:
    held = weights()
    first = {name: np.abs(one) > np.quantile(np.abs(one), 0.5) for name, one in held.items()}
    keeper = MaskScheduler(rules(schedule=SparsitySchedule("linear", 0.9, 0, 20, frequency=5)), dict(first), first)
    network = Paper(held)
    keeper.begin(network)
    for step in range(21):
        network.jitter(step)
        network.mask(keeper.masks)
        keeper.maybe_update(network, step)
        assert all((network.held[name][~mask] == 0).all() for name, mask in first.items())


def test_a_layer_with_a_ratio_of_its_own_gets_there_with_the_others() -> None:
    schedule = SparsitySchedule("linear", 0.8, 0, 20, frequency=10)
    keeper, network = MaskScheduler(rules(schedule=schedule, layers=(("fc1.weight", 0.4),))), Paper(weights())
    for step in range(21):
        keeper.maybe_update(network, step)
        if step in {10, 20}:
            found = zeros(network)
            assert found["fc1.weight"] == round(0.4 * step / 20 * network.held["fc1.weight"].size)
            assert found["fc2.weight"] == round(0.8 * step / 20 * network.held["fc2.weight"].size)


def test_only_layers_with_a_ratio_of_their_own_are_pruned_if_there_is_no_other() -> None:
    decided = replace(
        rules(sparsity=None, layers=(("fc1.weight", 0.4),), schedule=SparsitySchedule("constant", 1.0)),
        has_others=False,
    )
    network = Paper(weights())
    MaskScheduler(decided).maybe_update(network, 0)
    found = zeros(network)
    assert found.pop("fc1.weight") == round(0.4 * 8192)
    assert not any(found.values())


@pytest.mark.parametrize("name", sorted(STATISTIC_OF_STRATEGY))
def test_evidence_decides_what_goes(name: str) -> None:
    decided = rules(schedule=SparsitySchedule("constant", 0.5), strategy=name)
    decided = replace(decided, statistic=STATISTIC_OF_STRATEGY[name])
    network, random = Paper(weights()), np.random.default_rng(0)
    network.seen = {key: random.normal(size=one.shape) for key, one in network.held.items()}
    seen = dict(network.seen)
    keeper = MaskScheduler(decided)
    keeper.maybe_update(network, 0)
    for key, mask in keeper.masks.items():
        order = np.argsort(seen[key].reshape(-1), kind="stable")
        wanted = np.ones(mask.size, bool)
        wanted[order[: round(0.5 * mask.size)]] = False
        assert np.array_equal(mask.reshape(-1), wanted), key


def test_what_is_zero_goes_first_whatever_the_evidence() -> None:
    kept = np.array([False, True, True, False])
    strategy = rules(strategy="movement").method.strategy
    found = with_gradient_scores(strategy, {"w": np.array([9.0, -3.0, 1.0, 2.0])}, {"w": kept})
    scores = found.score(np.zeros(4), BlockContext("w", 0, 0))
    assert list(np.argsort(scores, kind="stable")) == [0, 3, 1, 2]


shares = st.floats(0.0, 1.0)


@given(st.integers(1, 60), shares, shares, st.integers(0, 9))
def test_regrowing_keeps_the_number_of_zeros(size: int, sparsity: float, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = np.ones(size, bool)
    mask[random.permutation(size)[: round(sparsity * size)]] = False
    found = regrow_masks({"w": mask}, {"w": random.normal(size=size)}, {"w": random.normal(size=size)}, share)["w"]
    assert found.sum() == mask.sum()


def test_what_comes_back_has_the_largest_gradients_and_what_goes_the_smallest_weights() -> None:
    mask = np.array([True, True, True, True, False, False, False])
    weights_, gradient = np.array([0.1, 5.0, 0.2, 7.0, 0, 0, 0]), np.array([0, 0, 0, 0, 3.0, 1.0, 2.0])
    found = regrow_masks({"w": mask}, {"w": weights_}, {"w": gradient}, 0.5)["w"]
    assert found.tolist() == [False, True, False, True, True, False, True]


def test_masks_that_move_are_moved_at_their_turns_only() -> None:
    first = {name: np.abs(one) > np.quantile(np.abs(one), 0.5) for name, one in weights().items()}
    keeper = MaskScheduler(rules(regrowth=RigLSchedule(0, 30, 10)), dict(first), first)
    network = Paper(weights())
    keeper.begin(network)
    assert network.watched is GradientStatistic.GRADIENT
    for step in range(40):
        network.seen = {name: np.random.default_rng(step).normal(size=one.shape) for name, one in first.items()}
        before = {name: mask.copy() for name, mask in keeper.masks.items()}
        is_turn = keeper.maybe_update(network, step)
        assert is_turn == (step in {10, 20})
        moved = any(not np.array_equal(before[name], mask) for name, mask in keeper.masks.items())
        assert moved == is_turn
        assert all(mask.sum() == first[name].sum() for name, mask in keeper.masks.items())
