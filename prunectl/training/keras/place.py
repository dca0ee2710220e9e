"""Where a model trains: on which device, beside which other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.training.keras.library import Library

_CPU, _AUTO = "cpu", "auto"
_ACCELERATORS = ("gpu", "cuda")


@dataclass(slots=True)
class Place:
    """The device and the strategy under which variables are made and steps are taken."""

    strategy: Any = None
    is_on_cpu: bool = False
    """Whether it stays on the processor although there is more."""

    @contextmanager
    def scope(self, library: Library) -> Iterator[None]:
        """Make variables and run in this place."""
        with ExitStack() as stack:
            if self.strategy is None and _workers() > 1:
                self.strategy = _together(library)
            if self.strategy is not None:
                stack.enter_context(self.strategy.scope())
            if self.is_on_cpu:
                stack.enter_context(_on_cpu(library))
            yield

    @property
    def processes(self) -> tuple[int, int]:
        """Which process this is, of how many."""
        return (_worker(), _workers()) if self.strategy is not None else (0, 1)


def check(library: Library, device: str) -> bool:
    """Return whether a device is the processor where there is more; refuse what there is not."""
    name = device.strip().lower().partition(":")[0]
    if name in {"", _AUTO}:
        return False
    if name == _CPU:
        return _has_accelerator(library)
    if name not in _ACCELERATORS:
        raise UsageError(f"Keras has no device {device}", hint="known: auto, cpu, gpu")
    if not _has_accelerator(library):
        raise UsageError(f"{library.backend} finds no GPU here", hint="say --device cpu, or auto")
    return False


def _together(library: Library) -> Any:
    if not library.is_two:
        raise UsageError(
            "Keras 3 does not train in several processes: its metrics fail in a MultiWorkerMirroredStrategy",
            hint="unset TF_CONFIG, or save the model with tf_keras",
        )
    return library.tensorflow.distribute.MultiWorkerMirroredStrategy()


def _has_accelerator(library: Library) -> bool:
    if library.is_on_tensorflow:
        return bool(library.tensorflow.config.list_physical_devices("GPU"))
    if library.backend == "torch":
        return bool(library.torch.cuda.is_available())
    return any(device.platform != _CPU for device in library.jax.devices())


def _on_cpu(library: Library) -> Any:
    return library.tensorflow.device("/CPU:0") if library.is_two else library.keras.device("cpu:0")


def _cluster() -> dict[str, Any]:
    """Return what TF_CONFIG says of the processes that train together."""
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
