"""Once one tensor has failed, or the user has pressed Ctrl-C, no other is worked on."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl.errors import InputError
from prunectl.formats.workers import StoppedError, check_stopped, workers
from tests.pruning.reference import prune
from tests.running import COMMAND, ROOT, clean

_TENSORS = 12
_SLOW = """
import time
from concurrent.futures import Future
from pathlib import Path

log = Path(__file__).with_suffix(".log")

def slow(w):
    with log.open("a") as file:
        file.write("scored\\n")
    time.sleep(0 if w.max() == 100 else 0.2)
    return abs(w)

def by_blocks(w):
    return slow(w)

by_blocks.is_elementwise = True
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Return a file of strategies that take their time with every tensor but one, and write down each call."""
    (tmp_path / "slow.py").write_text(_SLOW)
    return tmp_path / "slow.py"


def model(folder: Path, rows: int = 4) -> Path:
    tensors = {f"{i:02}.weight": np.ones((rows, 64), np.float32) for i in range(_TENSORS)}
    # Scored at once, and refused.
    tensors["00.weight"][0, :2] = 100, np.inf
    save_file(tensors, folder / "m.safetensors")
    return folder / "m.safetensors"


def calls(slow: Path) -> int:
    log = slow.with_suffix(".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_tensor_that_fails_ends_the_run_without_the_others(scope: str, slow: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weight has weights that are NaN or infinite"):
        prune(model(tmp_path), tmp_path / "out", sparsity=0.5, scope=scope, strategy=f"{slow}:slow")
    assert 1 <= calls(slow) <= 4
    assert not list((tmp_path / "out").iterdir())


def test_a_tensor_that_is_half_done_when_another_fails_is_left_at_the_next_block(slow: Path, tmp_path: Path) -> None:
    path = model(tmp_path, rows=40_000)
    with pytest.raises(InputError, match="weight has weights that are NaN or infinite"):
        prune(path, tmp_path / "out", sparsity=0.5, strategy=f"{slow}:by_blocks")
    # Ten blocks each.
    assert 1 <= calls(slow) <= 6


def test_ctrl_c_ends_a_run_before_all_is_done(slow: Path, tmp_path: Path) -> None:
    path, out = model(tmp_path), tmp_path / "out"
    out.mkdir()
    words = ["prune", str(path), "-o", str(out / "m.safetensors"), "-s", "50%", "--nan", "keep"]
    process = subprocess.Popen(
        [*COMMAND, *words, "--strategy", f"{slow}:slow"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=clean(PYTHONPATH=str(ROOT)),
        # A process of pytest-xdist does not listen to it, and what it starts would not either.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no lock is taken
    )
    while not calls(slow) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 128 + signal.SIGINT
    assert 1 <= calls(slow) < _TENSORS
    assert not list(out.iterdir())


def wait_until_stopped() -> None:
    while True:
        check_stopped()
        time.sleep(0.001)


def fail() -> None:
    raise InputError("this is why")


def fail_beside(waiting: list[Future[None]]) -> None:
    with workers(2) as pool:
        waiting.append(pool.submit(wait_until_stopped))
        pool.submit(fail)
        waiting[0].result()


def test_a_pool_raises_what_failed_first_and_not_what_was_stopped_for_it() -> None:
    waiting: list[Future[None]] = []
    with pytest.raises(InputError, match="this is why"):
        fail_beside(waiting)
    assert isinstance(waiting[0].exception(), StoppedError)


def interrupt_a_pool_inside_a_pool(began: list[int]) -> None:
    def inner(number: int) -> None:
        began.append(number)
        wait_until_stopped()

    def outer() -> None:
        with workers(2) as pool:
            list(pool.map(inner, range(8)))

    with workers(1) as pool:
        pool.submit(outer)
        while len(began) < 2:
            time.sleep(0.001)
        raise KeyboardInterrupt


def test_a_pool_inside_a_job_stops_with_the_pool_around_it() -> None:
    began: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_a_pool_inside_a_pool(began)
    assert sorted(began) == [0, 1]


def test_a_pool_that_is_left_in_peace_does_all_its_jobs() -> None:
    with workers(2) as pool:
        assert list(pool.map(str, range(20))) == [str(number) for number in range(20)]
        last = pool.submit(str, 20)
    assert last.result() == "20"
