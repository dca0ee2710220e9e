"""Other backends of Keras 3, and several processes that train together: each in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import UsageError
from tests import forked
from tests.networks import keras, tf_keras
from tests.running import ROOT
from tests.training.keras import nets, on_backend, on_workers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SECONDS = 300
QUICK_TO_COMPILE = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Three networks take the same steps, each a few times: to compile them well, or again, takes most of the time."""


def command(script: str, path: Path) -> list[str]:
    return [sys.executable, "-m", f"tests.training.keras.{script}", str(path)]


def silent(**environment: str) -> dict[str, str]:
    # Without the level that the tests set: what is silent here is silent for users.
    kept = {name: value for name, value in os.environ.items() if name not in {"TF_CPP_MIN_LOG_LEVEL", "TF_CONFIG"}}
    return {**kept, "PYTHONPATH": str(ROOT), **environment}


def outcome(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def on_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model's file, and what comes of it where TensorFlow is the backend."""
    folder = tmp_path_factory.mktemp("tensorflow")
    model = keras().Sequential(
        [
            keras().layers.Input((nets.FEATURES,)),
            keras().layers.Dense(8, name="first", activation="relu"),
            keras().layers.BatchNormalization(name="norm"),
            keras().layers.Dense(4, activation="softmax", name="second"),
        ]
    )
    return nets.saved(model, folder / "model.keras"), on_backend.main(folder)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_backend_of_keras_3_trains_and_keeps_the_zeros(
    backend: str, on_tensorflow: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    path, ours = on_tensorflow
    shutil.copy(path, tmp_path)
    # A process that loads nothing but what it needs, as it does for users, has nothing to say; to load it takes long.
    run = forked.run if backend == "jax" else subprocess.run
    setting = silent(KERAS_BACKEND=backend, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"), **QUICK_TO_COMPILE)
    done = run(command("on_backend", tmp_path), env=setting, capture_output=True, timeout=SECONDS)
    theirs = outcome(done)
    assert (theirs["backend"], ours["backend"]) == (backend, "tensorflow")
    assert theirs["lost"] == ours["lost"] == 0
    assert theirs["is_same"]
    assert ours["is_same"]
    assert theirs["recalibrated"] == 1
    assert backend == "jax" or not done.stderr
    for name, array in ours["dense"].items():
        np.testing.assert_allclose(theirs["dense"][name], array, rtol=1e-3, atol=1e-4)
    for key in ("logs", "evaluated", "evidence"):
        assert theirs[key] == pytest.approx(ours[key], rel=1e-2)


def cluster(path: Path) -> list[dict[str, Any]]:
    workers = [f"localhost:{forked.free_port()}" for _ in range(2)]
    tasks = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": at}} for at in range(2)]
    running = [forked.Forked(command("on_workers", path), env=silent(TF_CONFIG=json.dumps(task))) for task in tasks]
    return [outcome(one.end()) for one in running]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    path = nets.saved(nets.dense(tf_keras()), tmp_path / "model.keras")
    first, second = cluster(path)
    alone: dict[str, Any] = on_workers.main(path)
    assert (first["is_chief"], second["is_chief"], alone["is_chief"]) == (True, False, True)
    assert first["lost"] == second["lost"] == 0
    assert first["tensors"] == second["tensors"]
    assert first["evidence"] == second["evidence"]
    for key in ("tensors", "evidence"):
        for name, array in alone[key].items():
            np.testing.assert_allclose(first[key][name], array, rtol=1e-4, atol=1e-6)
    for key in ("logs", "evaluated"):
        assert first[key] == pytest.approx(alone[key], rel=1e-4)


def test_keras_3_refuses_to_train_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nets.saved(nets.dense(keras()), tmp_path / "model.keras")
    config = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(UsageError, match="cannot train in several processes"):
        nets.opened(path)
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(UsageError, match="not JSON"):
        nets.opened(path)
