"""Targets: the size that comes out is the size that was asked for, or what is in reach is said."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from prunectl.errors import WorkError
from prunectl.pruning.prune import bisect_sparsity
from tests.pruning.reference import arrays, prune
from tests.running import FIXTURES, here

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DIGITS = FIXTURES / "digits_cnn.pt"


@pytest.mark.parametrize("name", ["digits_cnn.pt", "digits_cnn.h5", "digits_cnn.onnx", "digits_cnn.safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_gzipped_size_is_reached_from_below_within_a_percent(name: str, share: float, tmp_path: Path) -> None:
    path = FIXTURES / name
    target = round(share * len(gzip.compress(path.read_bytes(), 6, mtime=0)))
    out = tmp_path / f"out{path.suffix}"
    done = here("prune", path, "-o", out, "--target-gzip", str(target))
    assert done.code == 0, done.err
    assert 0.99 * target <= len(gzip.compress(out.read_bytes(), 6, mtime=0)) <= target


@pytest.mark.parametrize("name", ["digits_cnn.pt", "digits_cnn.keras", "digits_cnn.h5"])
def test_a_packed_size_is_that_of_the_packed_file(name: str, tmp_path: Path) -> None:
    path = FIXTURES / name
    target = round(0.5 * path.stat().st_size)
    out = tmp_path / path.name
    done = here("prune", path, "-o", out, "--target-packed", str(target), "--pack")
    assert done.code == 0, done.err
    assert 0.99 * target <= out.stat().st_size <= target


def test_a_size_that_the_model_has_already_drops_nothing(tmp_path: Path) -> None:
    found, _ = prune(DIGITS, tmp_path / "out", target_gzip=10**9)
    assert found.plan.drop == 0


@pytest.mark.parametrize("option", ["--target-gzip", "--target-packed"])
def test_a_size_out_of_reach_says_what_is_in_reach(option: str, tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", option, "1KB")
    assert done.code == 5
    assert " size of 1000 bytes cannot be reached: 99% sparsity gives " in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_container_without_compression_has_no_packed_size(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.safetensors"
    done = here("prune", path, "-o", tmp_path / "out.safetensors", "--target-packed", "10KB")
    assert done.code == 3
    assert "no compression of its own" in done.err


@pytest.mark.parametrize(
    "words", [(), ("--exclude", "conv*"), ("--policy", "all"), ("--scope", "global"), ("--layer", "fc2=0.1")], ids=str
)
@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_compression_counts_all_parameters_over_those_kept(
    factor: float, words: tuple[str, ...], tmp_path: Path
) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "--compression", str(factor), *words)
    assert done.code == 0, done.err
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    total = sum(tensor.numel() for tensor in state.values())
    kept = sum(int(torch.count_nonzero(tensor)) for tensor in state.values())
    # Each tensor's own share is rounded to whole weights.
    assert kept == pytest.approx(total / factor, abs=len(state))


def test_a_compression_out_of_reach_says_how_far_it_goes(tmp_path: Path) -> None:
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "--compression", "1000", "--layers", "fc1.weight")
    assert done.code == 2
    assert "cannot be reached" in done.err
    sizes = {name: array.size for name, array in arrays(DIGITS).items()}
    most = sum(sizes.values()) / (sum(sizes.values()) - sizes["fc1.weight"])
    assert f"prunable weights gives {most:.3g}" in done.err


@pytest.mark.parametrize("bend", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("target", [2_000, 5_000, 9_999])
def test_the_search_is_short_on_any_falling_curve(bend: float, target: int) -> None:
    tried: list[float] = []

    def size_at(sparsity: float) -> int:
        tried.append(sparsity)
        return round(10_000 * (1 - sparsity**bend) + 900)

    found = size_at(bisect_sparsity(size_at, target, "made-up"))
    assert 0.99 * target <= found <= target
    assert len(tried) < 25


def test_a_floor_is_named_by_the_search() -> None:
    with pytest.raises(WorkError, match="gives 500"):
        bisect_sparsity(lambda sparsity: 500 + round(500 * (1 - min(sparsity / 0.99, 1.0))), 499, "made-up")


def test_the_dry_run_says_the_size_that_the_run_has(tmp_path: Path) -> None:
    words = ("--target-gzip", "30KB", "--json")
    planned = here("prune", DIGITS, "--dry-run", *words).json["models"][1]
    made = here("prune", DIGITS, "-o", tmp_path / "out.pt", *words).json["models"][1]
    assert planned["bytes"] == made["bytes"]
    assert made["bytes"]["raw"] == (tmp_path / "out.pt").stat().st_size
    assert planned["sparsity"] == made["sparsity"]
    assert planned["sha256"] == made["sha256"]
