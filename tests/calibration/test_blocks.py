"""Solving in blocks on several threads: all of them work, none is waited for in vain, and the bytes are the same."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from prunectl.calibration import alps, blocks, least_squares, sparsegpt, statistics
from prunectl.calibration.blocks import block_threads, map_blocks
from prunectl.calibration.least_squares import least_squares_refit
from prunectl.errors import WorkError
from prunectl.formats.workers import check_stopped
from prunectl.training.backend import WeightUse
from tests.calibration.by_hand import normal, shown
from tests.calibration.runs import digits
from tests.contract import Array

ROWS, FEATURES = 200, 600


def dependent(count: int = 1500, features: int = FEATURES) -> Array:
    """Inputs that go with each other, as those of a trained layer do."""
    return normal(count, features // 4) @ normal(features // 4, features, seed=1) + normal(count, features, seed=2)


def pruned(seed: int = 0) -> tuple[Array, Array]:
    return normal(ROWS, FEATURES, seed=seed), normal(ROWS, FEATURES, seed=seed + 1) > 0.8


def by_columns() -> tuple[Array, ...]:
    x = dependent()
    parts = sparsegpt.unstructured_blocks(ROWS, FEATURES, ROWS * FEATURES // 2, 128)
    return sparsegpt.prune_rows(normal(ROWS, FEATURES), x.T @ x, parts, 0.01, 128)


def by_groups() -> tuple[Array, ...]:
    x = dependent()
    parts = sparsegpt.nm_blocks(FEATURES, FEATURES, 5, 7)
    return sparsegpt.prune_rows(normal(ROWS, FEATURES), x.T @ x, parts, 0.01, 128)


def by_admm() -> tuple[Array, ...]:
    x, rows = dependent(), normal(ROWS, FEATURES)
    gram = sparsegpt.dampen(x.T @ x, 0.01)
    return alps.prune_rows(rows, gram, rows @ gram, alps.lowest(rows.size // 2))


def by_least_squares() -> tuple[Array, ...]:
    x, (rows, kept) = dependent(), pruned()
    return (least_squares_refit(rows, x.T @ x, x.T @ x, kept, 0.01),)


def products() -> tuple[Array, ...]:
    x, use = dependent().astype("f4"), WeightUse(0, 1)
    both = statistics.CrossStatistics(use)
    both.add(shown(x, use), shown(x[::-1], use), (ROWS, FEATURES))
    return both.gram, both.cross_gram, statistics.gram(shown(x, use), (ROWS, FEATURES))[0]


@pytest.mark.parametrize("work", [by_columns, by_groups, by_admm, by_least_squares, products])
def test_each_step_gives_the_same_bytes_on_one_two_and_three_threads(work: Callable[[], tuple[Array, ...]]) -> None:
    results = []
    for threads in (1, 2, 3):
        with block_threads(threads):
            results.append([array.tobytes() for array in work()])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("file", ["digits_cnn.pt", "digits_cnn.onnx"])
@pytest.mark.parametrize(
    "wish",
    [{"strategy": "obs"}, {"strategy": "alps"}, {"is_repaired": True}, {"strategy": "obs", "scope": "global"}],
    ids=["obs", "alps", "repair", "obs, global"],
)
def test_a_file_is_pruned_to_the_same_bytes_on_one_two_and_three_threads(
    wish: dict[str, object], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that the layers of a small network have several.
    monkeypatch.setattr(map_blocks, "__defaults__", (5,))
    monkeypatch.setattr(sparsegpt, "_ROWS", 5)
    monkeypatch.setattr(sparsegpt, "_PANEL", 7)
    monkeypatch.setattr(statistics, "_FEATURES", 11)
    written = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        target = tmp_path / threads / file
        target.parent.mkdir()
        digits(file, target, **wish)
        written.append(target.read_bytes())
    assert written[0] == written[1] == written[2]


def test_blocks_are_worked_on_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=60)
    with block_threads(2):
        assert map_blocks(lambda part: (both.wait() >= 0, part.start), 2, 1) == [(True, 0), (True, 1)]


def test_without_threads_and_on_one_blocks_come_in_their_order() -> None:
    def where(part: slice) -> tuple[int, int, int]:
        return part.start, part.stop, threading.get_ident()

    here = threading.get_ident()
    expected = [(0, 4, here), (4, 8, here), (8, 10, here)]
    assert map_blocks(where, 10, 4) == expected
    with block_threads(1):
        assert map_blocks(where, 10, 4) == expected
    assert map_blocks(where, 0, 4) == []


def test_a_block_that_has_blocks_does_not_wait_for_itself() -> None:
    with block_threads(2):
        found = map_blocks(lambda outer: map_blocks(lambda inner: outer.start + inner.start, 4, 1), 6, 1)
    assert found == [[outer + inner for inner in range(4)] for outer in range(6)]


def test_a_block_that_fails_ends_the_others_and_the_failure_arrives() -> None:
    begun: list[int] = []
    first_failed = threading.Event()

    def work(part: slice) -> None:
        begun.append(part.start)
        if part.start == 0:
            first_failed.set()
            raise WorkError("no")
        assert first_failed.wait(60)
        while True:
            time.sleep(0.01)
            check_stopped()

    with pytest.raises(WorkError, match=r"^no$"), block_threads(2):
        map_blocks(work, 1000, 1)
    assert len(begun) <= 4


ENDLESS = """
import numpy as np, threading
from prunectl.calibration.blocks import block_threads
from prunectl.calibration.least_squares import least_squares_refit
rows, inputs = np.random.default_rng(0).standard_normal((4000, 1500)), np.random.default_rng(1).random((2000, 1500))
gram, kept = inputs.T @ inputs, rows > 0.3
print("begun", flush=True)
try:
    with block_threads(2):
        while True:
            least_squares_refit(rows, gram, gram, kept, 0.01)
except KeyboardInterrupt:
    print("given up", threading.active_count(), flush=True)
"""


def test_ctrl_c_ends_all_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "given up 1\n"
    assert process.returncode == 0


def blas_of_numpy() -> tuple[Callable[[], int], Callable[[int], None]]:
    """What tells and sets the number of threads."""
    linked = ctypes.CDLL(import_module("numpy.linalg._umath_linalg").__file__)
    for getter, setter, _ in blocks._BLAS:
        if hasattr(linked, getter):
            return getattr(linked, getter), getattr(linked, setter)
    pytest.skip("the BLAS of this NumPy has no number of threads")


@pytest.fixture
def blas_threads() -> Iterator[Callable[[], int]]:
    """The number of threads that the BLAS has, which is two to begin with."""
    get, put = blas_of_numpy()
    before = get()
    put(2)
    yield get
    put(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_numpys_blas_keeps_to_one_thread_meanwhile(threads: int, blas_threads: Callable[[], int]) -> None:
    with block_threads(threads):
        assert blas_threads() == 1
    assert blas_threads() == 2
    with pytest.raises(WorkError), block_threads(threads):
        raise WorkError("no")
    assert blas_threads() == 2


def test_the_blas_keeps_to_one_thread_until_the_last_of_two_runs_is_over(blas_threads: Callable[[], int]) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(blocks._single_threaded_blas())
    second.enter_context(blocks._single_threaded_blas())
    first.close()
    assert blas_threads() == 1
    second.close()
    assert blas_threads() == 2


class OpenmpBlas:
    """An OpenBLAS built on OpenMP: each thread has a number of its own, four to begin with."""

    def __init__(self, parallel: int) -> None:
        self._own = threading.local()
        self._parallel = parallel

    def openblas_get_num_threads(self) -> int:
        return getattr(self._own, "number", 4)

    def openblas_set_num_threads(self, number: int) -> None:
        self._own.number = number

    def openblas_get_parallel(self) -> int:
        return self._parallel


@pytest.mark.parametrize(("parallel", "is_alone"), [(2, True), (1, False)], ids=["OpenMP", "threads of its own"])
def test_a_blas_that_can_be_told_in_one_thread_only_works_there(
    parallel: int, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blas = OpenmpBlas(parallel)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: blas)
    with block_threads(2):
        seen = map_blocks(lambda _: (threading.get_ident(), blas.openblas_get_num_threads()), 4, 1)
    assert (set(seen) == {(threading.get_ident(), 1)}) == is_alone
    assert blas.openblas_get_num_threads() == 4


def test_a_blas_that_cannot_be_told_gets_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLAS", (("no_such_get", "no_such_set", ""),))
    with block_threads(2):
        assert set(map_blocks(lambda _: threading.get_ident(), 4, 1)) == {threading.get_ident()}


@pytest.mark.parametrize("size", [255, 256, 257, 700])
def test_a_factor_in_panels_is_that_of_the_whole_matrix(size: int) -> None:
    x = dependent(800, size)
    gram = sparsegpt.dampen(x.T @ x, 0.01)
    with block_threads(2):
        found, _ = sparsegpt.inverse_cholesky(x.T @ x, 0.01)
    expected = np.linalg.cholesky(np.linalg.inv(gram)).T
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_array_equal(found, np.triu(found))


def test_a_matrix_whose_last_panel_needs_more_damping_gets_it_on_threads_too() -> None:
    x = normal(400, 600)
    products = x.T @ x
    with block_threads(2):
        found, _ = sparsegpt.inverse_cholesky(products, 1e-30)
        # The threads still work after a factor that failed.
        assert len(map_blocks(lambda part: part.start, 8, 1)) == 8
    assert np.isfinite(found).all()


@pytest.mark.parametrize("small", [1024, 10])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9], ids="{:.0%} kept".format)
@pytest.mark.parametrize("settled", [-1.0, least_squares._TOLERANCE], ids=["to the end", "until little is won"])
def test_rows_are_fitted_whether_they_are_eliminated_or_go_along_gradients(
    share: float, small: int, settled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_SMALL", small)
    monkeypatch.setattr(least_squares, "_TOLERANCE", settled)
    x, rows = dependent(900, 240), normal(9, 240, seed=3)
    kept = np.random.default_rng(4).random(rows.shape) < share
    kept[7], kept[8] = False, True
    found = least_squares_refit(rows, x.T @ x, x.T @ x, kept, 0.01)
    ridge = np.sqrt(0.01 * np.square(x).sum(axis=0).mean())
    for row, keep, ours in zip(rows, kept, found, strict=True):
        extended = np.concatenate([x[:, keep], ridge * np.eye(np.count_nonzero(keep))])
        wanted = np.concatenate([x @ row, ridge * row[keep]])
        best = np.linalg.lstsq(extended, wanted, rcond=None)[0]
        if settled > 0:
            error, least = (np.linalg.norm(extended @ weights - wanted) for weights in (ours[keep], best))
            assert error <= 1.01 * least + 1e-6 * np.linalg.norm(wanted)
        else:
            np.testing.assert_allclose(ours[keep], best, rtol=1e-6, atol=1e-8)
        assert not ours[~keep].any()


def test_rows_that_gradients_do_not_solve_in_time_are_eliminated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_FEW_STEPS", 1)
    # A thousandfold difference between features that are alike: a number of steps that nobody waits for.
    x = (normal(900, 3) @ normal(3, 240, seed=1) + 1e-4 * normal(900, 240, seed=2)) * np.logspace(-2, 2, 240)
    rows, kept = normal(6, 240, seed=3), normal(6, 240, seed=4) > 0.5
    found = least_squares_refit(rows, x.T @ x, x.T @ x, kept, 1e-10)
    damped = sparsegpt.dampen(x.T @ x, 1e-10)
    wanted = np.where(kept, rows @ damped, 0.0)
    left = np.abs(np.where(kept, found @ damped, 0.0) - wanted).max(axis=1)
    assert (left <= 1e-9 * np.abs(rows @ damped).max(axis=1)).all()


@pytest.mark.parametrize("precision", ["f4", "f8"])
@pytest.mark.parametrize("damp", [1e-12, 1e-10, 1e-6])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_never_farther_off_than_they_were_where_steps_lead_astray(
    seed: int, damp: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None of them is eliminated.
    monkeypatch.setattr(least_squares, "_SMALL", 10)
    # Thirty examples of 200 features of many sizes: the damping of the others is lost where numbers have few digits.
    x, rows = (normal(30, 200, seed=seed) * np.logspace(-2, 2, 200)).astype(precision), normal(8, 200, seed=seed + 3)
    gram = (x.T @ x).astype("f8")
    kept = np.random.default_rng(seed).random(rows.shape) < 0.9
    damped = sparsegpt.dampen(gram, damp)
    found = least_squares_refit(rows, gram, gram, kept, damp)
    before, after = (((way @ damped) * way).sum(axis=1) for way in (np.where(kept, 0.0, -rows), found - rows))
    assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_steps_lose_their_way_for_are_eliminated(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = normal(30, 200, seed=seed) * np.logspace(-2, 2, 200), normal(8, 200, seed=seed + 3)
    kept = np.random.default_rng(seed).random(rows.shape) < 0.9
    found = least_squares_refit(rows, x.T @ x, x.T @ x, kept, 1e-11)
    monkeypatch.setattr(least_squares, "_FEW_STEPS", np.inf)
    np.testing.assert_array_equal(found, least_squares_refit(rows, x.T @ x, x.T @ x, kept, 1e-11))


@pytest.mark.parametrize("damp", [0.01, 2000.0])
@pytest.mark.parametrize("offset", [1e4, 1000.1])
def test_inputs_that_hardly_differ_leave_rows_to_be_fitted(offset: float, damp: float) -> None:
    x, rows = np.full((64, 200), offset, "f4") + 0.1 * normal(64, 200).astype("f4") * (offset == 1e4), normal(6, 200)
    centred = (x.T @ x).astype("f8") - np.outer(x.sum(axis=0, dtype="f8"), x.sum(axis=0, dtype="f8")) / 64
    kept = normal(6, 200, seed=1) > -0.8
    found = least_squares_refit(rows, centred, centred, kept, damp)
    assert np.isfinite(found).all()
    assert not found[~kept].any()


@pytest.mark.parametrize("few_steps", [least_squares._FEW_STEPS, 1], ids=["at once", "after gradients"])
def test_rows_of_a_singular_matrix_are_fitted_and_stay_near_the_old_weights(
    few_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_FEW_STEPS", few_steps)
    # Each feature has a twin, and the damping is lost in rounding: elimination divides by zero.
    x, rows = np.repeat(normal(60, 4).round(2), 2, axis=1), normal(5, 8, seed=3)
    kept = np.ones(rows.shape, np.bool_)
    kept[:, :2] = False
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.solve((x.T @ x)[2:, 2:], np.ones(6))
    found = least_squares_refit(rows, x.T @ x, x.T @ x, kept, 1e-17)
    for row, ours in zip(rows, found, strict=True):
        change = np.linalg.lstsq(x[:, 2:], x @ row - x[:, 2:] @ row[2:], rcond=None)[0]
        np.testing.assert_allclose(ours[2:], row[2:] + change, rtol=1e-6, atol=1e-8)
        assert not ours[:2].any()


@pytest.mark.parametrize("power", [-120, 130])
def test_alps_takes_weights_that_single_precision_does_not_hold(power: int) -> None:
    x, rows = dependent(300, 24), normal(5, 24, seed=3)
    gram, target = least_squares.normal_equations(rows, x.T @ x, x.T @ x, 0.01)
    values, dropped = alps.prune_rows(rows, gram, target, alps.lowest(60))
    scale = 2.0**power
    scaled_values, scaled_dropped = alps.prune_rows(scale * rows, gram, scale * target, alps.lowest(60))
    np.testing.assert_array_equal(scaled_dropped, dropped)
    np.testing.assert_array_equal(scaled_values, scale * values)


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_products_of_many_features_and_groups_are_those_of_the_inputs(groups: int) -> None:
    features = 300 if groups < 4 else 6
    x, use = normal(50, groups * features).astype("f4"), WeightUse(0, 1, groups)
    with block_threads(2):
        found, count = statistics.gram(shown(x, use), (8, groups * features))
    by_group = x.astype("f8").reshape(50, groups, features)
    np.testing.assert_allclose(found, np.einsum("pgf,pgh->gfh", by_group, by_group), rtol=1e-4, atol=1e-4)
    assert count == 50
