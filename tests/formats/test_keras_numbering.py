"""Folders of `.keras` weights and the layers they belong to, numbered as each version of Keras does it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.formats.kernel_axes import einsum_axes
from prunectl.formats.registry import open_model
from tests.running import here

LAYERS: tuple[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]], ...] = (
    ("InputLayer", {"name": "image"}, ()),
    ("Conv2D", {"name": "stem", "filters": 4, "kernel_size": [3, 3]}, ((3, 3, 1, 4), (4,))),
    ("BatchNormalization", {"name": "bn_a"}, ((4,), (4,), (4,), (4,))),
    ("ReLU", {"name": "relu_a"}, ()),
    ("Conv2D", {"name": "body", "filters": 4, "kernel_size": [3, 3]}, ((3, 3, 4, 4), (4,))),
    ("BatchNormalization", {"name": "bn_b"}, ((4,), (4,), (4,), (4,))),
    ("ReLU", {"name": "relu_b"}, ()),
    ("Conv2D", {"name": "last", "filters": 8, "kernel_size": [3, 3]}, ((3, 3, 4, 8), (8,))),
    ("Flatten", {"name": "flat"}, ()),
    ("Dense", {"name": "hidden", "units": 6}, ((8, 6), (6,))),
    ("Dense", {"name": "head", "units": 6}, ((6, 6), (6,))),
)
SLUGS = {"Conv2D": "conv2d", "BatchNormalization": "batch_normalization", "Dense": "dense", "ReLU": "re_lu"}
Layers = tuple[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]], ...]


def write(path: Path, layers: Layers, *, is_twice: bool, container: str = "_layer_checkpoint_dependencies") -> None:
    """Write a `.keras`; Keras 2.13 walked a list in which every layer with weights stood twice."""
    inside = [{"module": "keras.layers", "class_name": kind, "config": config} for kind, config, _ in layers]
    config = {"module": "keras", "class_name": "Functional", "config": {"name": "net", "layers": inside}}
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        used: dict[str, int] = {}
        for number, (kind, _, shapes) in enumerate(layers):
            slug = SLUGS.get(kind, kind.lower())
            name = f"{slug}_{used[slug]}" if used.get(slug) else slug
            used[slug] = used.get(slug, 0) + (2 if is_twice and shapes else 1)
            group = file.create_group(f"{container}/{name}/vars")
            for place, shape in enumerate(shapes):
                group[str(place)] = np.full(shape, number + 1, np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.13.1" if is_twice else "2.14.0"}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", held.getvalue())


def numbers(path: Path) -> dict[str, float]:
    """The number that every weight holds, by its name."""
    model = open_model(path)
    return {tensor.name: float(model.read(tensor).flat[0]) for tensor in model.tensors}


def kernels(found: dict[str, float]) -> dict[str, int]:
    """The kernels by the names of their layers."""
    return {name.removesuffix("/kernel"): int(value) for name, value in found.items() if name.endswith("/kernel")}


EXPECTED = {"stem": 2, "body": 5, "last": 8, "hidden": 10, "head": 11}


@pytest.mark.parametrize(
    ("is_twice", "container"),
    [(True, "_layer_checkpoint_dependencies"), (False, "_layer_checkpoint_dependencies"), (False, "layers")],
    ids=["2.13", "2.14", "3"],
)
def test_every_weight_has_the_name_of_its_own_layer(is_twice: bool, container: str, tmp_path: Path) -> None:
    write(tmp_path / "m.keras", LAYERS, is_twice=is_twice, container=container)
    found = numbers(tmp_path / "m.keras")
    assert kernels(found) == EXPECTED
    assert found["bn_b/gamma"] == 6
    assert not open_model(tmp_path / "m.keras").about.notes


def test_only_prunes_the_layer_that_it_names(tmp_path: Path) -> None:
    write(tmp_path / "m.keras", LAYERS, is_twice=True)
    done = here("prune", tmp_path / "m.keras", "-o", tmp_path / "out.keras", "-s", "50%", "--layers", "body/*kernel")
    assert done.code == 0, done.err
    model = open_model(tmp_path / "out.keras")
    pruned = [(t.name, t.shape) for t in model.tensors if not np.asarray(model.read(t)).all()]
    assert pruned == [("body/kernel", (3, 3, 4, 4))]


def test_layers_without_weights_take_one_number_only(tmp_path: Path) -> None:
    bare: Layers = (("BatchNormalization", {"name": "bare"}, ()), *LAYERS[1:3], *LAYERS[4:6])
    write(tmp_path / "m.keras", bare, is_twice=True)
    found = numbers(tmp_path / "m.keras")
    assert (found["bn_a/gamma"], found["bn_b/gamma"]) == (3, 5)


def test_nested_models_are_numbered_by_themselves(tmp_path: Path) -> None:
    write(tmp_path / "inner.keras", LAYERS, is_twice=True)
    with zipfile.ZipFile(tmp_path / "inner.keras") as archive:
        inner = json.loads(archive.read("config.json"))
        held = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
    outer = {"class_name": "Functional", "config": {"name": "outer", "layers": [LAYERS[0], inner]}}
    outer["config"]["layers"][0] = {"class_name": "InputLayer", "config": {"name": "image"}}  # type: ignore[index]
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        held.copy("_layer_checkpoint_dependencies", file.create_group("_layer_checkpoint_dependencies/functional"))
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(outer))
        archive.writestr("model.weights.h5", out.getvalue())
    assert kernels(numbers(tmp_path / "m.keras")) == {f"net/{name}": number for name, number in EXPECTED.items()}


def changed(place: int, **config: Any) -> Layers:
    kind, before, shapes = LAYERS[place]
    return (*LAYERS[:place], (kind, {**before, **config}, shapes), *LAYERS[place + 1 :])


@pytest.mark.parametrize("is_twice", [True, False])
@pytest.mark.parametrize(
    "layers",
    [changed(4, filters=9), changed(7, kernel_size=[5, 5]), changed(9, units=7), LAYERS[:4]],
    ids=["filters", "window", "units", "layers"],
)
def test_what_does_not_fit_its_configuration_keeps_its_path_for_a_name(
    layers: Layers, is_twice: bool, tmp_path: Path
) -> None:
    write(tmp_path / "whole.keras", LAYERS, is_twice=is_twice)
    write(tmp_path / "said.keras", layers, is_twice=is_twice)
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            source = "whole" if name.endswith("h5") else "said"
            archive.writestr(name, zipfile.ZipFile(tmp_path / f"{source}.keras").read(name))
    model = open_model(tmp_path / "m.keras")
    assert any("named by their paths in the file" in note for note in model.about.notes)
    convolutions = {tensor.name for tensor in model.tensors if tensor.shape[:2] == (3, 3)}
    folders = ("conv2d", "conv2d_2", "conv2d_4") if is_twice else ("conv2d", "conv2d_1", "conv2d_2")
    assert convolutions == {f"_layer_checkpoint_dependencies/{folder}/kernel" for folder in folders}
    assert all(tensor.is_prunable for tensor in model.tensors if tensor.shape[:2] == (3, 3))


@pytest.mark.parametrize("name", ["layers/dense/vars/", "layers/d"])
def test_a_number_that_is_too_long_for_one_is_a_name(name: str, tmp_path: Path) -> None:
    long = f"{name}{'9' * 5000}"
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for path in ("layers/dense/vars/0", long if name.endswith("/") else f"{long}/vars/0"):
            file[path] = np.ones((4, 4), np.float32)
        file["layers/prune_low_magnitude/vars/0"] = np.int64(1)
    done = here("inspect", tmp_path / "m.weights.h5")
    assert (done.code, len(done.rows)) == (0, 3), done.err


def test_the_equation_of_an_einsum_is_not_read_beyond_what_keras_can_mean() -> None:
    assert einsum_axes("ab,bc->ac", 2) == (1, 0)
    assert einsum_axes(f"ab,bc->a{'c' * 100}", 2) is None
