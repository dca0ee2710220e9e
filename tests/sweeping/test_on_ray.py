"""Sweeps on a Ray cluster: the same table as on one machine, also after a kill."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from prunectl.commands import app
from prunectl.errors import MissingExtraError, UsageError, WorkError
from prunectl.sweeping.sweep import sweep
from prunectl.sweeping.trial import SweepConfig
from tests.formats.test_folder import files_of
from tests.pruning.test_parts import folder
from tests.running import FIXTURES, clean, here, prunectl
from tests.sweeping.test_sweep import killed_after, noted

__all__ = ["folder"]
ONNX, FEW = FIXTURES / "digits_cnn.onnx", f"{FIXTURES / 'digits.npz'}?limit=60"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
_HEAD = """
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of somebody else with two processors: what `--on` joins it by, and the environment with its token."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-W", "ignore", "-c", _HEAD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean(**environment)) as head:
        assert head.stdin
        assert head.stdout
        yield f"ray:{head.stdout.readline().decode().strip()}", environment
        head.stdin.write(b"\n")


@needs_ray
def test_a_cluster_of_two_workers_makes_the_same_table_and_another_goes_on_after_a_kill(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    place, environment = cluster
    sparsities = tuple(round(0.1 + 0.01 * at, 2) for at in range(8))
    words = ["--data", FEW, "--strategies", "magnitude,gradient", "--sparsities", ",".join(map(str, sparsities))]
    alone = sweep(ONNX, SweepConfig(data=FEW, strategies=("magnitude",), sparsities=sparsities), tmp_path / "alone")
    broken = tmp_path / "broken"
    words += ["-o", str(broken), "-j", "2", "--on"]
    killed_after(3, ONNX, *words, "ray", OMP_NUM_THREADS="1")
    assert 3 <= noted(broken) < 8
    found = prunectl("sweep", ONNX, *words, place, "--json", OMP_NUM_THREADS="1", **environment)
    points = [
        (one["point"]["sparsity"], one["point"]["value"], one["bytes"]["compressed"])
        for one in found.json["models"][:9]
    ]
    assert points == [(point.sparsity, one.value, one.gzip) for point, one in alone.outcomes.items()]
    # What one point cannot do is told as on one machine.
    assert found.code == 2
    assert "onnxruntime cannot compute" in found.json["error"]["message"]
    assert (broken / "magnitude-global-15/model.onnx").read_bytes() == (
        tmp_path / "alone/magnitude-global-15/model.onnx"
    ).read_bytes()


@needs_ray
def test_parts_of_a_folder_on_a_cluster_give_the_bytes_of_one_process(
    cluster: tuple[str, dict[str, str]], folder: Path
) -> None:
    place, environment = cluster
    words = ("-s", "30%", "--scope", "global")
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    output = folder.parent / "parts"
    # What one of two parts has done before is not done again.
    assert here("prune", folder, "-o", output, *words, "--part", "2/2").code == 0
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    done = prunectl("prune", folder, "-o", output, *words, "--on", place, "--json", **environment)
    assert done.code == 0, done.err
    assert done.json["models"][1]["path"] == str(output)
    assert files_of(output) == files_of(folder.parent / "whole")
    assert {name: (output / name).stat().st_mtime_ns for name in times} == times
    # What a worker cannot do is told as here.
    again, shard = folder.parent / "again", folder / "model-00003-of-00006.safetensors"
    assert here("prune", folder, "-o", again, *words, "--part", "2/2").code == 0
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x41")
    done = prunectl("prune", folder, "-o", again, *words, "--on", place, **environment)
    assert done.code == 3, done.err
    assert f"{shard.name} was changed while the parts were pruned" in done.err
    assert "start all parts again" in done.err
    assert not (again / "model.safetensors.index.json").exists()


@needs_ray
def test_what_no_worker_could_do_is_told_before_a_cluster_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        pytest.fail("a cluster was started")

    monkeypatch.setattr("ray.init", start)
    output, words = folder.parent / "parts", ("-s", "30%", "--on", "ray")
    assert here("prune", folder, "-o", output, "-s", "30%", "--part", "1/2").code == 0
    before = files_of(output)
    (folder.parent / "taken").mkdir()
    (folder.parent / "taken/mine").write_text("mine")
    for place, sparsity, code, sentence in (
        (output, "40%", 2, "sparsity is 0.4, but 0.3 in the parts of"),
        (folder.parent / "taken", "30%", 2, "taken exists"),
    ):
        done = here("prune", folder, "-o", place, "-s", sparsity, *words[2:])
        assert (done.code, sentence in done.err) == (code, True), done.err
    (folder / "model-00003-of-00006.safetensors").unlink()
    done = here("prune", folder, "-o", folder.parent / "out", *words)
    assert done.code == 3
    assert "is incomplete: its shard model-00003-of-00006.safetensors is missing" in done.err
    assert files_of(output) == before
    assert not (folder.parent / "out").exists()


def test_a_cluster_for_parts_goes_without_those_of_others(folder: Path) -> None:
    for words in (("--on", "ray", "--join"), ("--on", "slurm"), ("--on", "ray", "--data", "x.npz")):
        done = here("prune", folder, "-o", folder.parent / "out", "-s", "50%", *words)
        assert done.code == 2
        assert words[1] in done.err or "--on" in done.err
    assert not (folder.parent / "out").exists()


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as caught:
        app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), "--data", FEW, "--on", "ray"])
    assert caught.value.exit_code == 4
    assert caught.value.hint.endswith("pip install ray")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not known"):
        app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), "--data", FEW, "--on", "rays"])


@needs_ray
def test_a_node_that_does_not_come_up_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr("ray.init", times_out)
    words = ["--data", FEW, "--sparsities", "50%", "--on", "ray"]
    with pytest.raises(WorkError, match="no Ray cluster answered at this machine: The current node timed out"):
        app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), *words])


@needs_ray
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        place = f"ray:127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WorkError, match="no Ray cluster answered") as caught:
            app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), "--data", FEW, "--on", place])
    assert caught.value.hint.startswith("run ray start --head")


@needs_ray
def test_a_cluster_that_listens_and_refuses_may_ask_for_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")  # as Ray does, whatever the reason

    monkeypatch.setattr("ray.init", refuses)
    with socket.create_server(("127.0.0.1", 0)) as head:
        words = ["--data", FEW, "--sparsities", "50%", "--on", f"ray:127.0.0.1:{head.getsockname()[1]}"]
        with pytest.raises(WorkError, match="no Ray cluster answered") as caught:
            app.run(["sweep", str(ONNX), "-o", str(tmp_path / "points"), *words])
    assert "RAY_AUTH_MODE=token" in caught.value.hint


@needs_ray
def test_more_workers_than_there_is_room_for_are_refused() -> None:
    on_ray = importlib.import_module("prunectl.sweeping.ray_workers")
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    on_ray.check_resources(nodes, 2, 3)
    with pytest.raises(WorkError, match="room for 3 workers with 2 threads each, not for 4") as caught:
        on_ray.check_resources(nodes, 2, 4)
    assert caught.value.hint == "--jobs 3"
    with pytest.raises(WorkError, match="room for 0 workers") as caught:
        on_ray.check_resources(nodes, 8, 1)
    assert "OMP_NUM_THREADS=1" in caught.value.hint
