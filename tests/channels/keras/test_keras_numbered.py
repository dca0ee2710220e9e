"""`.keras` archives whose folders are numbered as Keras 2.13 did it: channels go from the layers that were meant."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.training.backend import TrainOptions
from prunectl.training.finetune import finetune
from prunectl.training.request import FinetuneRequest
from tests.channels.keras.masked import silence
from tests.channels.keras.nets import filled, nested, tf_keras
from tests.channels.keras.test_keras_nets import cut, images, say

pytestmark = pytest.mark.filterwarnings("ignore")

OLD, NEW = "_layer_checkpoint_dependencies", "layers"
Counting = Callable[[int, bool], int]


def as_keras_213(path: Path, target: Path) -> Path:
    """Copy an archive, in which a layer with weights then takes two numbers."""
    return _renumbered(path, target, OLD, lambda at, has_weights: at * 2 if has_weights else at)


def as_keras_now(path: Path, target: Path) -> Path:
    """Copy such an archive so that the Keras of today loads it: every layer takes one number."""
    return _renumbered(path, target, NEW, lambda at, has_weights: at // 2 if has_weights else at)


def _renumbered(path: Path, target: Path, container: str, number: Counting) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith(".h5"):
                out = io.BytesIO()
                with h5py.File(io.BytesIO(data)) as source, h5py.File(out, "w") as file:
                    _copied(source, file, container, number)
                data = out.getvalue()
            copy.writestr(name, data)
    return target


def _copied(source: Any, target: Any, container: str, number: Counting, *, is_list: bool = False) -> None:
    target.attrs.update(source.attrs)
    for name, item in source.items():
        if isinstance(item, h5py.Dataset):
            source.copy(name, target)
            continue
        match = re.fullmatch(r"(.+?)_(\d+)", name)
        new = name
        if is_list and match is not None:
            new = f"{match[1]}_{number(int(match[2]), _has_weights(item))}"
        elif name in {OLD, NEW}:
            new = container
        _copied(item, target.create_group(new), container, number, is_list=name in {OLD, NEW})


def _has_weights(group: Any) -> bool:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return bool(found)


def chain(*widths: int) -> Any:
    """Convolutions of the same class in a row, and two dense layers."""
    of = tf_keras.layers
    layers = [tf_keras.Input((6, 6, 3))]
    for at, width in enumerate(widths):
        layers += [of.Conv2D(width, 3, padding="same", name=f"conv_{at}"), of.BatchNormalization(name=f"norm_{at}")]
        layers.append(of.ReLU(name=f"relu_{at}"))
    layers += [of.GlobalAveragePooling2D(), of.Dense(widths[-1], activation="relu", name="hidden")]
    return filled(tf_keras.Sequential([*layers, of.Dense(widths[-1], name="last")]))


def equal() -> Any:
    return chain(3, 3, 3, 3)


def different() -> Any:
    return chain(4, 6, 8, 10)


def inside() -> Any:
    return filled(nested(tf_keras))


def timed() -> Any:
    of = tf_keras.layers
    steps = [tf_keras.Input((6, 6, 3)), *(of.Conv2D(4, 3, name=f"conv_{at}", activation="relu") for at in range(2))]
    inner = tf_keras.Sequential([*steps, of.Flatten()], name="inner")
    given = tf_keras.Input((2, 6, 6, 3))
    return filled(tf_keras.Model(given, of.Dense(3, name="last")(of.TimeDistributed(inner, name="each")(given))))


@pytest.mark.parametrize("make", [equal, different, inside, timed])
def test_the_layers_that_were_meant_lose_their_channels(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "now.keras")
    path, output = as_keras_213(tmp_path / "now.keras", tmp_path / "net.keras"), tmp_path / "small.keras"
    assert {one.name for one in open_model(path).tensors} == {
        one.name for one in open_model(tmp_path / "now.keras").tensors
    }
    found = cut(path, output)
    assert found.dropped
    with zipfile.ZipFile(output) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        assert OLD in file
        assert NEW not in file
    given = images(model)
    small = tf_keras.models.load_model(as_keras_now(output, tmp_path / "small-now.keras"))
    for one, other in zip(say(small, given), say(silence(model, found), given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_weights_that_fit_neither_way_to_count_are_refused(tmp_path: Path) -> None:
    different().save(tmp_path / "now.keras")
    path = as_keras_213(tmp_path / "now.keras", tmp_path / "net.keras")
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(held["config.json"])
    config["config"]["layers"][4]["config"]["filters"] = 5
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**held, "config.json": json.dumps(config).encode()}.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="do not match the layers of") as caught:
        cut(path, tmp_path / "small.keras")
    assert "save it again" in caught.value.hint
    assert not (tmp_path / "small.keras").exists()


def test_it_is_trained_as_the_same_model_of_today_is(tmp_path: Path) -> None:
    equal().save(tmp_path / "now.keras")
    as_keras_213(tmp_path / "now.keras", tmp_path / "old.keras")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 6, 6, 3)).astype(np.float32), random.normal(size=(8, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    request = FinetuneRequest(
        str(tmp_path / "data.npz"), epochs=1, means=TrainOptions(loss="mse", optimizer="sgd", lr=0.01)
    )
    for name in ("now", "old"):
        finetune(tmp_path / f"{name}.keras", request, Destination(tmp_path / f"{name}-out.keras"))
    now, old = (open_model(tmp_path / f"{name}-out.keras") for name in ("now", "old"))
    held = {tensor.name: old.read(tensor) for tensor in old.tensors}
    assert len(held) == len(now.tensors)
    for tensor in now.tensors:
        np.testing.assert_array_equal(now.read(tensor), held[tensor.name])
