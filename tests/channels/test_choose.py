"""How channels are scored, and how many go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from prunectl.channels.config import ChannelConfig
from prunectl.channels.groups import ChannelGroup, ChannelSlices, TensorAxis
from prunectl.channels.importance import (
    MEASURES,
    absolute,
    channel_rows,
    group_importance,
    random_importance,
    squared,
)
from prunectl.channels.labels import AxisRole
from prunectl.channels.plan import Candidate, choose, prunable_count, removed_indices
from prunectl.pruning.plan import Scope

MAKER, READER = TensorAxis("maker", 0, AxisRole.OUT), TensorAxis("reader", 1, AxisRole.IN)
RANDOM = np.random.default_rng(5)
WEIGHTS = {"maker": RANDOM.normal(size=(4, 3, 3, 3)), "reader": RANDOM.normal(size=(2, 8))}
BY_NAME = {measure.name: measure for measure in MEASURES}


def slices(count: int, each: int = 1) -> ChannelSlices:
    """So many channels, each on so many indices, one behind the other."""
    return ChannelSlices(np.arange(count * each), np.full(count, each))


def family(count: int = 4, each: int = 2, name: str = "maker") -> ChannelGroup:
    """Channels that are one output of one weight, and some inputs of another."""
    maker = TensorAxis(name, 0, AxisRole.OUT)
    return ChannelGroup(name, (maker, READER), np.arange(1, count + 1), (slices(count), slices(count, each)))


def ranked(*scores: Sequence[float], ratio: float = 0.5) -> list[Candidate]:
    return [
        Candidate(family(len(line), name=f"maker{number}"), np.array(line, np.float64), ratio)
        for number, line in enumerate(scores)
    ]


def cutting(ratio: float = 0.5, **more: object) -> ChannelConfig:
    return ChannelConfig(ratio, None, **({"min_channels": 1} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["1", "2"])
def test_the_norm_is_the_mean_over_all_that_makes_or_reads_a_channel(norm: str) -> None:
    measure = BY_NAME["channel-norm"].choices[norm]
    power = {"1": np.abs, "2": np.square}[norm]
    wanted = [
        (power(WEIGHTS["maker"][at]).mean() + power(WEIGHTS["reader"][:, 2 * at : 2 * at + 2]).mean()) / 2
        for at in range(4)
    ]
    line = measure(WEIGHTS["maker"], 0), measure(WEIGHTS["reader"], 1)
    np.testing.assert_allclose((line[0] + line[1].reshape(4, 2).mean(1)) / 2, wanted)
    if norm == "1":
        np.testing.assert_allclose(group_importance(family(), WEIGHTS, BY_NAME["channel-norm"]), wanted)


def test_the_geometric_median_is_nearest_to_all_others() -> None:
    rows = WEIGHTS["maker"].reshape(4, -1)
    wanted = [sum(np.linalg.norm(one - other) for other in rows) for one in rows]
    np.testing.assert_allclose(group_importance(family(), WEIGHTS, BY_NAME["geometric-median"]), wanted)


def test_a_family_without_normalisation_has_no_scale_to_look_at() -> None:
    assert group_importance(family(), WEIGHTS, BY_NAME["bn-scale"]) is None
    scaled = ChannelGroup(
        "maker",
        (MAKER, TensorAxis("scale", 0, AxisRole.SCALE)),
        np.arange(1, 5),
        (slices(4), slices(4)),
    )
    weights = {"scale": np.array([-3.0, 1.0, 2.0, -0.5])}
    np.testing.assert_allclose(group_importance(scaled, weights, BY_NAME["bn-scale"]), [3, 1, 2, 0.5])


def test_chance_is_the_same_for_the_same_seed_alone() -> None:
    assert random_importance(family(50), 1).tolist() == random_importance(family(50), 1).tolist()
    assert random_importance(family(50), 1).tolist() != random_importance(family(50), 2).tolist()
    assert random_importance(family(50), 1).tolist() != random_importance(family(50, name="other"), 1).tolist()
    assert abs(random_importance(family(2000), 3).mean() - 0.5) < 0.03


def test_each_family_loses_its_share_of_the_lowest() -> None:
    losses = choose(ranked([4, 1, 3, 2], [1, 2, 3, 4, 5, 6]), cutting())
    assert [loss.dropped for loss in losses] == [(1, 3), (0, 1, 2)]


def test_of_equals_the_first_go() -> None:
    assert choose(ranked([1, 1, 1, 1]), cutting())[0].dropped == (0, 1)


def test_all_together_lose_exactly_the_share_by_scores_over_the_mean_of_their_family() -> None:
    losses = choose(ranked([10, 20, 30, 40], [1, 1, 1, 1]), cutting(0.25, scope=Scope.GLOBAL))
    assert [loss.dropped for loss in losses] == [(0, 1), ()]
    for ratio in (0.1, 0.3, 0.7):
        candidates = ranked(RANDOM.random(37), RANDOM.random(50), RANDOM.random(13))
        losses = choose(candidates, cutting(ratio, scope=Scope.GLOBAL))
        assert sum(len(loss.dropped) for loss in losses) == round(ratio * 100)


def test_no_family_loses_all_however_low_its_scores() -> None:
    candidates = ranked([0, 0, 0, 0], [5, 5, 5, 5])
    losses = choose(candidates, cutting(0.5, scope=Scope.GLOBAL, min_channels=2))
    assert [len(loss.dropped) for loss in losses] == [2, 2]


@pytest.mark.parametrize(
    ("count", "asked", "limits", "dropped"),
    [
        (16, 8, {}, 8),
        (16, 16, {}, 15),
        (16, 16, {"min_channels": 4}, 12),
        (3, 3, {"min_channels": 4}, 0),
        (16, 8, {"max_ratio": 0.3}, 4),
        (20, 10, {"round_to": 8}, 4),
        (20, 3, {"round_to": 8}, 0),
        (24, 12, {"round_to": 8}, 8),
        (10, 9, {"round_to": 4, "min_channels": 5}, 2),
    ],
)
def test_what_stays_is_rounded_up_and_never_too_little(
    count: int, asked: int, limits: dict[str, float], dropped: int
) -> None:
    assert prunable_count(count, asked, cutting(**limits)) == dropped


def test_a_channel_goes_wherever_it_is() -> None:
    losses = choose(ranked([4, 1, 3, 2]), cutting())
    gone = removed_indices(losses)
    assert gone["maker0", 0].tolist() == [1, 3]
    assert gone["reader", 1].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("shape", [(1, 500_000), (500_000, 1), (2, 300_000), (3, 200_001), (1031, 517), (64, 96, 7, 7)])
@pytest.mark.parametrize("axis", [0, 1])
def test_means_of_a_few_channels_at_a_time_are_those_of_all_at_once(shape: tuple[int, ...], axis: int) -> None:
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    rows = channel_rows(weights, axis)
    assert absolute(weights, axis).tobytes() == np.abs(rows).mean(axis=1).tobytes()
    assert squared(weights, axis).tobytes() == np.square(rows).mean(axis=1).tobytes()
