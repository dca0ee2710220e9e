"""What calibrating takes of the machine: all its processors, and no more memory than there is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from prunectl.calibration import statistics
from prunectl.calibration.blocks import block_threads
from prunectl.errors import WorkError
from tests.calibration.runs import DIGITS, digits
from tests.contract import Array
from tests.running import FIXTURES, here, prunectl

EXAMPLES = """
import os
from pathlib import Path
import numpy as np
from threadpoolctl import threadpool_info

def examples():
    found = [one["num_threads"] for one in threadpool_info() if one["internal_api"] == "openblas"]
    Path("threads").write_text(" ".join(map(str, found)))
    Path("pages").write_text(os.environ["THP_MEM_ALLOC_ENABLE"])
    yield np.zeros((8, 8, 8, 1), "f4")
"""


@pytest.mark.parametrize(
    "environment",
    [{}, {"OPENBLAS_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"}],
    ids=str,
)
def test_numpy_takes_all_processors_and_pytorch_big_pages_unless_the_user_says_otherwise(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "own.py").write_text(EXAMPLES)
    words = ("--data", "./own.py:examples", "--strategy", "activation-magnitude", "-s", "50%", "--dry-run")
    done = prunectl("prune", FIXTURES / "digits_cnn.onnx", *words, cwd=tmp_path, **environment)
    assert done.code == 0, done.err
    assert (tmp_path / "pages").read_text() == environment.get("THP_MEM_ALLOC_ENABLE", "1")
    wanted = 1 if environment else len(os.sched_getaffinity(0))
    assert set(map(int, (tmp_path / "threads").read_text().split())) == {wanted}


@pytest.mark.parametrize("wish", [{"strategy": "obs"}, {"is_repaired": True}, {"strategy": "obs", "scope": "global"}])
def test_a_layer_whose_gram_matrices_do_not_fit_is_named_before_they_are_made(
    wish: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    matmul = np.matmul

    def watched(one: Array, other: Array) -> Array:
        sizes.append(one.shape[-2])
        found: Array = matmul(one, other)
        return found

    # The largest layer has 256 features, and one copy of its matrix takes 8 x 256 x 256 bytes.
    monkeypatch.setattr(statistics, "available_bytes", lambda: 4 * 8 * 255 * 256)
    monkeypatch.setattr(np, "matmul", watched)
    with pytest.raises(WorkError, match=r"^fc1\.weight has 256 input features, .* are free") as caught:
        digits("digits_cnn.onnx", tmp_path / "out.onnx", **wish)
    assert caught.value.hint.startswith("--exclude fc1")
    assert 256 not in sizes
    assert not sizes or "scope" in wish, "where layers are solved one after the other, none is before all fit"
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_says_it_as_work_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "available_bytes", lambda: 1000)
    words = ("--strategy", "obs", "-s", "50%", "--data", DIGITS, "--samples", "8")
    done = here("prune", FIXTURES / "digits_cnn.onnx", "-o", tmp_path / "out.onnx", *words)
    assert done.code == 5
    assert "--exclude" in done.err


def test_the_memory_that_is_free_is_what_the_system_says() -> None:
    found = statistics.available_bytes()
    if found is None:
        pytest.skip("this system does not tell")
    assert 1e6 < found < 1e14
    statistics.check_memory("small", groups=1, features=100, kept=2)


@pytest.mark.parametrize(("threads", "copies"), [(1, 2 + 6.5), (2, 2 + 7), (8, 2 + 10)])
def test_each_thread_has_its_share_of_the_memory(threads: int, copies: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = 8 * 100**2
    with block_threads(threads):
        monkeypatch.setattr(statistics, "available_bytes", lambda: int(copies * matrix))
        statistics.check_memory("layer", groups=1, features=100, kept=2)
        monkeypatch.setattr(statistics, "available_bytes", lambda: int(copies * matrix) - 1)
        with pytest.raises(WorkError, match="100 input features"):
            statistics.check_memory("layer", groups=1, features=100, kept=2)


@pytest.mark.parametrize(("limit", "used", "expected"), [("max", "5", 2048), ("1000", "400", 600), ("100", "400", 0)])
def test_the_limit_of_a_container_counts(
    limit: str, used: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("meminfo", "MemAvailable:   2 kB"), ("memory.max", limit), ("memory.current", used)):
        (tmp_path / name).write_text(text)
    told = tuple((tmp_path / path.name, line) for path, line in statistics._MEMORY_FILES)
    monkeypatch.setattr(statistics, "_MEMORY_FILES", told)
    assert statistics.available_bytes() == expected
    monkeypatch.setattr(statistics, "_MEMORY_FILES", ((tmp_path / "nothing", "x"),))
    assert statistics.available_bytes() is None
