"""Sweeps over patterns and parameters: what goes together is tried, and what does not is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunectl import api
from prunectl.commands import app
from prunectl.errors import UsageError
from prunectl.sweeping.grid import grid, next_trials, skipped_combinations, variants
from prunectl.sweeping.sweep import sweep
from prunectl.sweeping.trial import BASELINE, SweepConfig, TrialResult, Variant
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")

ONNX, FEW = FIXTURES / "digits_cnn.onnx", f"{FIXTURES / 'digits.npz'}?limit=60"


def test_only_what_goes_together_is_tried() -> None:
    choices = SweepConfig(
        data="d.npz",
        strategies=("magnitude", "obs"),
        scopes=("layer", "global"),
        patterns=("unstructured", "2:4", "channel"),
        params=(("damp", ("0.01", "0.1")),),
    )
    assert variants(choices) == [
        Variant("magnitude", "layer"),
        Variant("magnitude", "layer", pattern="2:4"),
        Variant("magnitude", "layer", pattern="channel"),
        Variant("magnitude", "global"),
        Variant("magnitude", "global", pattern="channel"),
        *(
            Variant("obs", "layer", pattern=pattern, params=f"damp={damp}")
            for pattern in ("", "2:4")
            for damp in ("0.01", "0.1")
        ),
        *(Variant("obs", "global", params=f"damp={damp}") for damp in ("0.01", "0.1")),
    ]
    reasons = skipped_combinations(choices)
    same = "the scope global cannot be used with the pattern 2:4, the same in every layer"
    assert reasons[Variant("magnitude", "global", pattern="2:4")] == same
    assert reasons[Variant("obs", "layer", pattern="channel")] == "obs is not a known channel strategy"


def test_a_pattern_that_decides_the_sparsity_is_one_point() -> None:
    choices = SweepConfig(data="d.npz", patterns=("unstructured", "3:4"), sparsities=(0.5, 0.9))
    assert [(point.pattern, point.sparsity) for point in grid(choices)[1:]] == [("", 0.5), ("", 0.9), ("3:4", 0.75)]
    assert choices == SweepConfig.from_json(choices.as_json)


def test_a_pattern_that_decides_the_sparsity_is_not_searched() -> None:
    choices = SweepConfig(data="d.npz", patterns=("2:4",))
    worth = TrialResult("accuracy", 0.9, {}, 0.0, 1, 1, "")
    (point,) = next_trials(choices, {BASELINE: worth}, (), 0.01)
    assert (point.pattern, point.sparsity) == ("2:4", 0.5)
    assert next_trials(choices, {BASELINE: worth, point: worth}, (), 0.01) == []


def test_channels_are_cut_before_training_begins() -> None:
    choices = SweepConfig(
        data="d.npz", patterns=("unstructured", "channel"), schedules=("constant", "polynomial"), epochs=1
    )
    assert [(way.schedule, way.pattern) for way in variants(choices)] == [
        *(("constant", ""), ("constant", "channel"), ("polynomial", ""))
    ]
    assert (
        "the schedule polynomial cannot be used with channels"
        in skipped_combinations(choices)[Variant("magnitude", "layer", "polynomial", "channel")]
    )


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (SweepConfig(data="d", patterns=("2:4",), scopes=("global",)), "the same in every layer"),
        (SweepConfig(data="d", patterns=("4:2:1",)), "4:2:1"),
        (SweepConfig(data="d", params=(("damp", ("1",)),)), "none of the strategies has a parameter damp"),
        (SweepConfig(data="d", strategies=("obs",), params=(("damp", ("wet",)),)), "damp"),
        (SweepConfig(data="d", patterns=("channel",), policy="all"), "cannot be used with"),
    ],
)
def test_where_nothing_goes_together_the_reason_is_an_error(choices: SweepConfig, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        variants(choices)


@pytest.mark.usefixtures("trials_here")
def test_points_are_what_prune_writes(tmp_path: Path) -> None:
    choices = SweepConfig(
        data=FEW,
        strategies=("magnitude", "obs"),
        patterns=("2:4", "channel"),
        params=(("norm", ("2",)), ("damp", ("0.1",))),
        sparsities=(0.4,),
        samples=60,
    )
    found = sweep(ONNX, choices, tmp_path / "points")
    own = tmp_path / "own.onnx"
    words = {
        "magnitude-layer-2:4-50": {"pattern": "2:4"},
        "magnitude-layer-channel-norm=2-40": {"pattern": "channel", "sparsity": 0.4, "param": ["norm=2"]},
        "obs-layer-2:4-damp=0.1-50": {
            "pattern": "2:4",
            "strategy": "obs",
            "param": ["damp=0.1"],
            "data": FEW,
            "samples": 60,
        },
    }
    assert [point.name for point in found.outcomes] == ["base", *words]
    for name, said in words.items():
        api.prune(ONNX, own, force=True, **said)
        assert (tmp_path / "points" / name / "model.onnx").read_bytes() == own.read_bytes()


@pytest.mark.usefixtures("trials_here")
def test_the_table_says_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(ONNX), "-o", str(tmp_path / "points"), "--data", FEW, "--sparsities", "50%,60%"]
    words += ["--scopes", "layer,global", "--patterns", "unstructured,2:4", "--max-drop", "20pp"]
    assert app.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    patterns = [(model["point"]["pattern"], model["point"]["params"]) for model in found["models"]]
    assert patterns[0] == (None, None)
    assert {pattern for pattern, _ in patterns[1:]} == {"unstructured", "2:4"}
    (fixed,) = [held for held in found["max_drop"] if held["pattern"] == "2:4"]
    assert fixed["sparsity"] in {0.5, None}
    assert app.run([*words, "--format", "human", "-n", "0"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "The pattern 2:4 fixes the sparsity at 50.0 %: no other was tried." in told
    reason = "the scope global cannot be used with the pattern 2:4, the same in every layer."
    assert f"Not tried: magnitude global 2:4: {reason}" in told


@pytest.mark.parametrize("word", ["damp", "=1", "damp="])
def test_a_parameter_without_values_is_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"values|is an empty list"):
        app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), "--data", FEW, "--param", word])
