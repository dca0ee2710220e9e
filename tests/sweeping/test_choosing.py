"""Which points are made, which of them is best: told by numbers, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prunectl.errors import UsageError
from prunectl.sweeping.grid import check as check_choices
from prunectl.sweeping.grid import check_limit, drop, grid, make_bracket, next_trials
from prunectl.sweeping.requests import pruning_of, training_of
from prunectl.sweeping.sweep import compare_schedules, pareto_front
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.training.data.source import Batch
from prunectl.training.evaluate import evaluate_predictions
from prunectl.training.max_drop import MaxDrop

WAY = Variant("magnitude", "global")
ONE_WAY = SweepConfig(data="d.npz")


def worth(value: float, gzip: int = 100, metric: str = "accuracy") -> TrialResult:
    return TrialResult(metric, value, {metric: value}, 0.0, gzip, gzip, "")


def searched(falls_at: float, *sparsities: float, max_drop: float = 0.01) -> tuple[float, list[float]]:
    """Search where a model breaks, and return what is found and what was tried."""
    choices = replace(ONE_WAY, sparsities=sparsities)
    done = {BASELINE: worth(0.9)}
    tried: list[float] = []
    while points := next_trials(choices, done, (), max_drop):
        done[points[0]] = worth(0.9 if points[0].sparsity <= falls_at else 0.5)
        tried.append(points[0].sparsity)
    return make_bracket(WAY, done, max_drop).passing, tried


def test_the_grid_is_every_way_at_every_sparsity_after_the_model_as_it_is() -> None:
    choices = SweepConfig(
        data="d.npz",
        strategies=("magnitude", "lamp"),
        scopes=("layer", "global"),
        sparsities=(0.5, 0.8, 0.9),
        schedules=("constant", "polynomial"),
        epochs=1,
    )
    points = grid(choices)
    assert points[0] == BASELINE
    assert len(points) == len(set(points)) == 1 + 2 * 2 * 2 * 3
    assert len({point.name for point in points}) == len(points)
    assert len(grid(replace(choices, epochs=0, schedules=("constant",)))) == 1 + 2 * 2 * 3


@pytest.mark.parametrize("falls_at", [0.0, 0.01, 0.3, 0.5, 0.734, 0.98, 0.99])
def test_the_largest_sparsity_that_holds_is_found_to_a_hundredth(falls_at: float) -> None:
    found, tried = searched(falls_at)
    assert found == pytest.approx(int(100 * falls_at + 1e-9) / 100)
    assert len(tried) <= 7


def test_points_of_the_grid_are_remembered_by_the_search() -> None:
    found, tried = searched(0.83, 0.5, 0.8, 0.9)
    assert found == pytest.approx(0.83)
    assert tried[:3] == [0.5, 0.8, 0.9]
    assert all(0.8 < sparsity < 0.9 for sparsity in tried[3:])


def test_a_point_that_failed_is_not_asked_for_again() -> None:
    choices = replace(ONE_WAY, sparsities=(0.5, 0.8))
    failed = [WAY.trial(0.5)]
    assert next_trials(choices, {BASELINE: worth(0.9)}, failed, 0.01) == [WAY.trial(0.8)]
    assert next_trials(choices, {BASELINE: worth(0.9), WAY.trial(0.8): worth(0.9)}, failed, 0.01) == []


def test_a_drop_of_just_so_much_is_within_the_limit() -> None:
    assert drop(worth(0.975), worth(0.98)) == 0.005
    assert drop(worth(2.5, metric="loss"), worth(2.0, metric="loss")) == 0.5
    assert drop(worth(0.99), worth(0.98)) == -0.01


def test_a_limit_says_its_unit() -> None:
    check_limit(MaxDrop(0.005, is_points=True), worth(0.98))
    check_limit(MaxDrop(0.5, is_points=False), worth(3.0, metric="loss"))
    with pytest.raises(UsageError, match="has no unit"):
        check_limit(MaxDrop(0.5, is_points=False), worth(0.98))
    with pytest.raises(UsageError, match="needs a metric from 0 to 1"):
        check_limit(MaxDrop(0.005, is_points=True), worth(3.0, metric="loss"))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_front_is_what_no_other_beats_in_both(metric: str) -> None:
    random = np.random.default_rng(0)
    sign = 1 if metric == "accuracy" else -1
    outcomes = {BASELINE: worth(0.5, 90, metric)}
    for at in range(60):
        outcomes[Trial(*WAY, at / 100)] = worth(random.integers(20) / 20, int(random.integers(20, 60)), metric)
    for point, found in outcomes.items():
        is_beaten = any(
            sign * (other.value - found.value) >= 0
            and other.gzip <= found.gzip
            and (other.value, other.gzip) != (found.value, found.gzip)
            for other in outcomes.values()
        )
        if point in pareto_front(outcomes):
            assert not is_beaten
        elif not is_beaten:
            assert any(outcomes[best] == found for best in pareto_front(outcomes))


def test_schedules_are_compared_by_points_that_differ_in_nothing_else() -> None:
    choices = SweepConfig(data="d", epochs=1, schedules=("constant", "polynomial"), sparsities=(0.5, 0.8))
    outcomes = {
        BASELINE: worth(1.0),
        Trial("magnitude", "layer", "constant", 0.5): worth(0.9),
        Trial("magnitude", "layer", "polynomial", 0.5): worth(0.95),
        Trial("magnitude", "layer", "constant", 0.8): worth(0.7),
        Trial("magnitude", "layer", "polynomial", 0.8): worth(0.69),
        Trial("magnitude", "layer", "constant", 0.9): worth(0.1),
    }
    (found,) = compare_schedules(choices, outcomes)
    assert (found.left, found.right, found.gains) == ("constant", "polynomial", (0.05, -0.01))
    assert found.mean == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"val": "v.npz", "val_split": 0.2}, "cannot be used together"),
        ({"schedules": ("polynomial",)}, "--schedules needs training"),
        ({"sparsities": (1.0,)}, "from 0 to below 1, not 1"),
        ({"strategies": ("magnitud",)}, "magnitud is not a known strategy"),
        ({"strategies": ("movement",)}, "needs training"),
        ({"strategies": ("obs",), "epochs": 1, "schedules": ("polynomial",)}, "prunes before training"),
        ({"strategies": ("movement",), "epochs": 1}, "prunes before training"),
        ({"epochs": 1, "schedules": ("polynomal",)}, "not a known schedule"),
        ({"scopes": ("everywhere",)}, "not a known scope"),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_file_is_opened(words: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_choices(replace(ONE_WAY, **words))  # type: ignore[arg-type]


def test_what_watches_training_is_ranked_by_gradients_where_there_is_none_yet() -> None:
    choices = SweepConfig(data="d.npz", epochs=1, sparsities=(0.5,))
    at_once, on_the_way = (Trial("magnitude-gradient", "layer", name, 0.5) for name in ("constant", "polynomial"))
    assert pruning_of(choices, at_once).data == "d.npz"
    assert not training_of(choices, at_once).prunes
    assert pruning_of(choices, on_the_way).data == ""
    assert training_of(choices, on_the_way).prunes
    assert training_of(choices, on_the_way).ramping.name == "polynomial"


def test_answers_are_scored_as_by_hand() -> None:
    random = np.random.default_rng(0)
    outputs, labels = random.normal(size=(30, 4)), random.integers(4, size=30)
    hot = np.eye(4)[labels]
    right = float(np.mean(outputs.argmax(1) == labels))

    def score(found: np.ndarray, targets: np.ndarray, metric: str = "") -> tuple[str, float]:
        batches = [Batch(found[at : at + 7], targets[at : at + 7]) for at in range(0, 30, 7)]
        return evaluate_predictions(lambda x: x, batches, metric, "d")

    assert score(outputs, labels) == ("accuracy", pytest.approx(right))
    assert score(outputs, labels[:, None]) == ("accuracy", pytest.approx(right))
    assert score(outputs, hot) == ("accuracy", pytest.approx(right))
    assert score(outputs, outputs + 2.0) == ("mae", pytest.approx(2.0))
    assert score(outputs, outputs - 2.0, "mse") == ("mse", pytest.approx(4.0))
    share = random.uniform(size=(30, 1))
    assert score(share, labels % 2) == ("accuracy", pytest.approx(np.mean((share[:, 0] > 0.5) == labels % 2)))
    logit = np.log(share / (1 - share))
    assert score(logit, labels % 2) == score(share, labels % 2)
    with pytest.raises(UsageError, match="not a known metric"):
        score(outputs, labels, "accurcy")
