"""What all tests share."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from prunectl.formats import sandbox, scratch
from prunectl.formats.sandbox import SandboxPolicy
from tests import forked

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    # Workers share the processors: threads that wait for one another by spinning take ten times as long then, and
    # those of TensorFlow take longer than what they share out.
    os.environ.setdefault(_threads, "1")


def _is_roomy(folder: str) -> bool:
    """Whether tests can write there, and run what they write."""
    if not os.access(folder, os.W_OK):
        return False
    return disk_usage(folder).free > 4 << 30 and not os.statvfs(folder).f_flag & os.ST_NOEXEC


# Outputs are synced to the disk, thousands of them, for which a third of all time would be waited.
if "TMPDIR" not in os.environ and _is_roomy("/dev/shm"):
    os.environ["TMPDIR"] = "/dev/shm"
    tempfile.tempdir = None

# A shell starts background jobs with SIGINT ignored, and children inherit it: tests that interrupt one would hang.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's affair.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Commands run in hundreds of processes, each of which would compile prunectl again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

TRUSTED = frozenset({"analysis", "calibration", "channels", "checks", "exporting", "golden", "pruning", "training"})
"""Folders of tests whose files are sound: what is asked of them is not how files are read."""
TRUSTED_FILES = frozenset({"test_packing.py", "test_strip_keras.py", "test_strip_saved_model.py", "test_inspect.py"})


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Import frameworks and tests without looking for garbage, which takes as long again, and never look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # A network is tens of thousands of objects: with Python's 700, a twentieth of all time goes into looking.
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    """Leave alone what a file's tests leave behind in the frameworks: to look through all of it takes seconds.

    Whoever collects garbage would, as Keras does for each variable that goes, and every forked process would copy it.
    """
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.path != item.path:
            gc.collect()
            gc.freeze()


def pytest_runtest_setup() -> None:
    """Let PyTorch build its table of ONNX functions once: nothing changes it, and it takes a third of an export."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry: Any = module and module.ONNXRegistry
    if registry and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(cache(registry.from_torchlib))


@pytest.fixture(autouse=True)
def _policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read files in a sandbox, as users' files are read, or here, which is faster."""
    folder, *_ = request.path.relative_to(Path(__file__).parent).parts
    is_trusted = folder in TRUSTED or request.path.name in TRUSTED_FILES
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "policy", SandboxPolicy.HERE if is_trusted else SandboxPolicy.SANDBOX)
        yield


@pytest.fixture
def _forked_rebuilding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebuild SavedModels in processes that are forked: what they do is asked, not how they are started."""
    subprocess = SimpleNamespace(run=forked.run, TimeoutExpired=TimeoutError)
    monkeypatch.setattr("prunectl.formats.tensorflow.strip.subprocess", subprocess)


@pytest.fixture
def trials_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of a sweep run their trials here, where their processes would load the frameworks again."""
    from prunectl.sweeping import workers  # noqa: PLC0415 - NumPy comes with it, and counts its threads then

    lock = threading.Lock()

    def attempt(worker: Any, trial: Any) -> Any:
        with lock:
            reply = workers.handle(json.loads(worker._job), asdict(trial))
        return workers.decode_reply(trial, json.loads(json.dumps(reply)))

    monkeypatch.setattr(workers.ProcessWorker, "attempt", attempt)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own, which is looked through as if for the first time."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(scratch, "_cleared", set())
    return folder
