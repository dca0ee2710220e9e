"""The device that a user names is the one that Keras trains on, held against frameworks that only pretend."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from prunectl.errors import MissingExtraError, UsageError
from prunectl.formats import safe_json
from prunectl.training.keras.backend import DevicePlacement, KerasLibrary, resolve_device


class Pretended(KerasLibrary):
    """A Keras on TensorFlow that sees some GPUs, and takes down which device is entered."""

    def __init__(self, gpus: int, *, is_keras2: bool) -> None:
        self.entered: list[str]
        object.__setattr__(self, "entered", [])
        object.__setattr__(self, "_gpus", gpus)
        enter: Any = lambda name: (self.entered.append(name), nullcontext())[1]  # noqa: E731
        super().__init__(SimpleNamespace(device=enter), is_keras2, "tensorflow")
        object.__setattr__(self, "_enter", enter)

    @property
    def tensorflow(self) -> Any:
        listed = ["GPU"] * self._gpus  # type: ignore[attr-defined]
        return SimpleNamespace(
            config=SimpleNamespace(list_physical_devices=lambda _: listed),
            device=self._enter,  # type: ignore[attr-defined]
        )


@pytest.mark.parametrize(
    ("device", "place", "entered"),
    [
        ("auto", "", []),
        ("cuda", "", []),
        ("cuda:0", "", []),
        ("cuda:1", "gpu:1", ["/GPU:1"]),
        ("gpu:1", "gpu:1", ["/GPU:1"]),
        ("cpu", "cpu:0", ["/CPU:0"]),
    ],
)
def test_the_device_is_the_one_that_was_named(device: str, place: str, entered: list[str]) -> None:
    for is_keras2 in (True, False):
        library = Pretended(2, is_keras2=is_keras2)
        assert resolve_device(library, device) == place
        with DevicePlacement(device=place).scope(library):
            pass
        assert library.entered == (entered if is_keras2 else [name.lower().lstrip("/") for name in entered])


@pytest.mark.parametrize(
    ("gpus", "device", "said"),
    [
        (1, "cuda:1", "finds no cuda:1: this machine has 1 GPU, numbered from 0"),
        (0, "cuda:1", "finds no GPU"),
        (1, "tpu", "Keras has no device tpu"),
        (1, "cuda:one", "Keras has no device cuda:one"),
        (1, "mps", "Keras has no device mps"),
    ],
)
def test_a_device_that_is_not_there_is_refused(gpus: int, device: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_device(Pretended(gpus, is_keras2=True), device)


def test_jax_comes_with_no_extra_and_the_hint_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(safe_json.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError) as caught:
        _ = KerasLibrary(None, is_keras2=False, backend="jax").jax
    assert caught.value.hint.endswith("pip install jax")
