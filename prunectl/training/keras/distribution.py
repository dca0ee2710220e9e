"""Devices and `tf.distribute` strategies for Keras, from --device and TF_CONFIG."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.training.keras.backend import KerasLibrary

_CPU, _AUTO = "cpu", "auto"
_ACCELERATORS = ("gpu", "cuda")


@dataclass(slots=True)
class DevicePlacement:
    """The device and the strategy under which variables are made and steps are taken."""

    strategy: Any = None
    device: str = ""
    """A forced device such as `cpu:0` or `gpu:1`; empty leaves it to the framework."""

    @contextmanager
    def scope(self, library: KerasLibrary) -> Iterator[None]:
        """Make variables and run in this place."""
        with ExitStack() as stack:
            if self.strategy is None and _num_processes() > 1:
                self.strategy = _distribution_strategy(library)
            if self.strategy is not None:
                stack.enter_context(self.strategy.scope())
            if self.device:
                stack.enter_context(_device_scope(library, self.device))
            yield

    @property
    def processes(self) -> tuple[int, int]:
        """Which process this is, of how many."""
        return (_process_index(), _num_processes()) if self.strategy is not None else (0, 1)


def resolve_device(library: KerasLibrary, device: str) -> str:
    """The device to force for `--device`, empty where the framework takes it anyway; a missing one is refused."""
    name, _, number = device.strip().lower().partition(":")
    if name in {"", _AUTO}:
        return ""
    if name not in {_CPU, *_ACCELERATORS} or not (number.isdecimal() or not number):
        raise UsageError(f"Keras has no device {device}", hint="known: auto, cpu, gpu, gpu:1")
    num_accelerators = _num_accelerators(library)
    if name == _CPU:
        return "cpu:0" if num_accelerators else ""
    if not num_accelerators:
        raise UsageError(f"{library.backend} finds no GPU here", hint="say --device cpu, or auto")
    index = int(number or 0)
    if index >= num_accelerators:
        raise UsageError(f"{library.backend} finds no {device}: {num_accelerators} GPU here, counted from 0")
    return f"gpu:{index}" if index else ""


def _distribution_strategy(library: KerasLibrary) -> Any:
    if not library.is_keras2:
        raise UsageError(
            "Keras 3 does not train in several processes: its metrics fail in a MultiWorkerMirroredStrategy",
            hint="unset TF_CONFIG, or save the model with tf_keras",
        )
    return library.tensorflow.distribute.MultiWorkerMirroredStrategy()


def _num_accelerators(library: KerasLibrary) -> int:
    if library.is_on_tensorflow:
        return len(library.tensorflow.config.list_physical_devices("GPU"))
    if library.backend == "torch":
        return int(library.torch.cuda.device_count())
    return sum(device.platform != _CPU for device in library.jax.devices())


def _device_scope(library: KerasLibrary, device: str) -> Any:
    return library.tensorflow.device(f"/{device.upper()}") if library.is_keras2 else library.keras.device(device)


def _tf_config() -> dict[str, Any]:
    """What TF_CONFIG says of the processes that train together."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UsageError(f"TF_CONFIG is no JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _processes() -> list[tuple[str, int]]:
    cluster = _tf_config().get("cluster") or {}
    return [(kind, index) for kind in ("chief", "worker") for index in range(len(cluster.get(kind) or []))]


def _num_processes() -> int:
    return max(len(_processes()), 1)


def _process_index() -> int:
    task = _tf_config().get("task") or {}
    own = (str(task.get("type", "")), int(task.get("index", 0)))
    return _processes().index(own) if own in _processes() else 0
