"""Limits judged at, below and above what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from prunectl.analysis.sizes import SizeLimits, check_limits
from prunectl.analysis.stats import ModelStats, ParamCounts, SizeStats
from prunectl.formats.base import ModelInfo
from tests.running import FIXTURES, here

FOUND = ModelStats(
    path="m.h5",
    format="keras-h5",
    bytes=SizeStats(raw=1000, packed=600, compressed=500),
    params=ParamCounts(total=100, prunable=80, zero=50, prunable_zero=40),
    parts=(),
    layers=(),
    about=ModelInfo(),
)
BASELINE = replace(FOUND, path="old.h5", bytes=SizeStats(raw=1000, packed=500, compressed=400))


@pytest.mark.parametrize(
    ("limit", "actual"), [("max_raw", 1000), ("max_packed", 600), ("max_compressed", 500), ("max_growth_bytes", 100)]
)
@pytest.mark.parametrize(("away", "ok"), [(-1, False), (0, True), (1, True)])
def test_a_size_may_be_the_limit_but_not_a_byte_more(limit: str, actual: int, away: int, ok: bool) -> None:
    (gate,) = check_limits(FOUND, replace(SizeLimits(baseline=BASELINE), **{limit: actual + away}))
    assert (gate.ok, gate.limit, gate.actual, gate.model) == (ok, actual + away, actual, "m.h5")


@pytest.mark.parametrize(("limit", "ok"), [(0.49, True), (0.5, True), (0.51, False), (0.0, True), (1.0, False)])
def test_sparsity_may_be_the_limit_but_not_less(limit: float, ok: bool) -> None:
    (gate,) = check_limits(FOUND, SizeLimits(min_sparsity=limit))
    assert (gate.id, gate.metric, gate.ok, gate.actual) == ("min-sparsity", "prunable_sparsity", ok, 0.5)


@pytest.mark.parametrize("scope", ["layer", "global", "erk"])
@pytest.mark.parametrize("sparsity", ["33.3%", "90%", "97.77%"])
def test_what_a_prune_leaves_keeps_the_limit_that_says_the_same(sparsity: str, scope: str, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    done = here("prune", FIXTURES / "digits_cnn.h5", "-o", out, "-s", sparsity, "--scope", scope)
    assert done.code == 0, done.err
    (tmp_path / "prunectl.toml").write_text(f'[[budget]]\npath = "*.h5"\nmin-sparsity = "{sparsity}"\n')
    assert here("size", out, "--min-sparsity", sparsity).code == 0
    assert here("check", "--config", tmp_path / "prunectl.toml").code == 0
    with h5py.File(out, "r+") as file:
        kernel = file["model_weights/fc1/fc1/kernel:0"]
        changed = kernel[()]
        changed.reshape(-1)[np.flatnonzero(changed == 0)[:4]] = 1
        kernel[...] = changed
    assert here("size", out, "--min-sparsity", sparsity).code == 1
    assert here("check", "--config", tmp_path / "prunectl.toml").code == 1


@pytest.mark.parametrize(("limit", "ok"), [(0.249, False), (0.25, True), (0.251, True)])
def test_growth_is_a_share_of_the_baseline(limit: float, ok: bool) -> None:
    (gate,) = check_limits(FOUND, SizeLimits(baseline=BASELINE, max_growth_ratio=limit))
    assert (gate.id, gate.ok, gate.actual) == ("max-growth", ok, 0.25)


def test_a_model_that_shrank_grew_by_less_than_nothing() -> None:
    smaller = replace(FOUND, bytes=SizeStats(raw=1, packed=1, compressed=300))
    gates = check_limits(smaller, SizeLimits(baseline=BASELINE, max_growth_bytes=0, max_growth_ratio=0.0))
    assert [(gate.ok, gate.actual) for gate in gates] == [(True, -100), (True, -0.25)]


def test_growth_without_a_baseline_and_sizes_not_measured_are_not_judged() -> None:
    assert check_limits(FOUND, SizeLimits(max_growth_bytes=0, max_growth_ratio=0.0)) == ()
    unmeasured = replace(FOUND, bytes=SizeStats(raw=1000))
    limits = SizeLimits(max_packed=1, max_compressed=1, baseline=BASELINE, max_growth_bytes=1)
    assert check_limits(unmeasured, limits) == ()


def test_without_limits_there_is_nothing_to_judge() -> None:
    assert check_limits(FOUND, SizeLimits()) == ()
    assert check_limits(FOUND, SizeLimits(baseline=BASELINE)) == ()


def test_limits_are_judged_in_the_order_of_the_work() -> None:
    limits = SizeLimits(1, 2, 3, 0.9, BASELINE, 4, 0.1)
    gates = check_limits(FOUND, limits)
    assert [gate.id for gate in gates] == [
        *("max-raw", "max-packed", "max-gzip", "min-sparsity", "max-growth", "max-growth")
    ]
    assert not any(gate.ok for gate in gates)
    assert [gate.limit for gate in gates] == [1, 2, 3, 0.9, 4, 0.1]


def test_a_model_without_prunable_weights_is_not_sparse() -> None:
    none = replace(FOUND, params=ParamCounts(total=10, prunable=0, zero=10, prunable_zero=0))
    (gate,) = check_limits(none, SizeLimits(min_sparsity=0.1))
    assert (gate.ok, gate.actual) == (False, 0.0)
