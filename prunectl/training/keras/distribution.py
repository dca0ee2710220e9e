"""Where a model trains: on which device, beside which other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.training.keras.backend import Library

_CPU, _AUTO = "cpu", "auto"
_ACCELERATORS = ("gpu", "cuda")


@dataclass(slots=True)
class DevicePlacement:
    """The device and the strategy under which variables are made and steps are taken."""

    strategy: Any = None
    device: str = ""
    """Where it stays although there is more, such as `cpu:0` or `gpu:1`; empty leaves it to the framework."""

    @contextmanager
    def scope(self, library: Library) -> Iterator[None]:
        """Make variables and run in this place."""
        with ExitStack() as stack:
            if self.strategy is None and _workers() > 1:
                self.strategy = _together(library)
            if self.strategy is not None:
                stack.enter_context(self.strategy.scope())
            if self.device:
                stack.enter_context(_upon(library, self.device))
            yield

    @property
    def processes(self) -> tuple[int, int]:
        """Which process this is, of how many."""
        return (_worker(), _workers()) if self.strategy is not None else (0, 1)


def check(library: Library, device: str) -> str:
    """The device to stay on where the framework would take another; refuse what there is not."""
    name, _, number = device.strip().lower().partition(":")
    if name in {"", _AUTO}:
        return ""
    if name not in {_CPU, *_ACCELERATORS} or not (number.isdecimal() or not number):
        raise UsageError(f"Keras has no device {device}", hint="known: auto, cpu, gpu, gpu:1")
    found = _accelerators(library)
    if name == _CPU:
        return "cpu:0" if found else ""
    if not found:
        raise UsageError(f"{library.backend} finds no GPU here", hint="say --device cpu, or auto")
    at = int(number or 0)
    if at >= found:
        raise UsageError(f"{library.backend} finds no {device}: {found} GPU here, counted from 0")
    return f"gpu:{at}" if at else ""


def _together(library: Library) -> Any:
    if not library.is_two:
        raise UsageError(
            "Keras 3 does not train in several processes: its metrics fail in a MultiWorkerMirroredStrategy",
            hint="unset TF_CONFIG, or save the model with tf_keras",
        )
    return library.tensorflow.distribute.MultiWorkerMirroredStrategy()


def _accelerators(library: Library) -> int:
    if library.is_on_tensorflow:
        return len(library.tensorflow.config.list_physical_devices("GPU"))
    if library.backend == "torch":
        return int(library.torch.cuda.device_count())
    return sum(device.platform != _CPU for device in library.jax.devices())


def _upon(library: Library, device: str) -> Any:
    return library.tensorflow.device(f"/{device.upper()}") if library.is_two else library.keras.device(device)


def _cluster() -> dict[str, Any]:
    """What TF_CONFIG says of the processes that train together."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"TF_CONFIG is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _hosts() -> list[tuple[str, int]]:
    cluster = _cluster().get("cluster") or {}
    return [(kind, at) for kind in ("chief", "worker") for at in range(len(cluster.get(kind) or []))]


def _workers() -> int:
    return max(len(_hosts()), 1)


def _worker() -> int:
    task = _cluster().get("task") or {}
    mine = (str(task.get("type", "")), int(task.get("index", 0)))
    return _hosts().index(mine) if mine in _hosts() else 0
