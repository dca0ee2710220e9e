"""Axes that a file leaves open: --input or data says their lengths where those that are tried do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.formats.registry import open_model
from tests.channels.keras.nets import LIBRARIES, filled
from tests.channels.made import numpy_helper, onnx, op, saved
from tests.exporting.exporting import save
from tests.running import Outcome, here

pytestmark = pytest.mark.filterwarnings("ignore")
CROPPED = 150
LENGTH = 2 * CROPPED + 10
WORDS = ("--pattern", "channel", "-s", "50%")


def cropping(folder: Path) -> Path:
    """An ONNX graph that crops more than images of any usual size have."""
    random = np.random.default_rng(0)
    weights = {"one": (6, 3, 3, 3), "two": (8, 6, 3, 3), "three": (2, 8, 1, 1)}
    held = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()
    ]
    for name, numbers in (("begin", [CROPPED] * 2), ("end", [-CROPPED] * 2), ("axes", [2, 3])):
        held.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    nodes = [
        op("Conv", "x one", "a", pads=[1, 1, 1, 1]),
        op("Relu", "a", "b"),
        op("Slice", "b begin end axes", "c"),
        op("Conv", "c two", "d"),
        op("Relu", "d", "e"),
        op("Conv", "e three", "f"),
        op("GlobalAveragePool", "f", "y"),
    ]
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", kind, ["batch", 3, "h", "w"])], [value("y", kind, ["batch", 2, 1, 1])], held
    )
    return saved(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), folder)


def cut(path: Path, *words: str | Path) -> Outcome:
    output = path.with_name(f"small{path.suffix}")
    return here("prune", path, "-o", output, *WORDS, "--force", *words)


def kernels(path: Path) -> list[tuple[int, ...]]:
    return [tensor.shape for tensor in open_model(path).tensors if tensor.role == "kernel"]


def test_an_onnx_graph_that_crops_more_than_is_tried_says_how_to_go_on(tmp_path: Path) -> None:
    done = cut(cropping(tmp_path))
    assert done.code == 3
    assert "--input x:1,3,448,448" in done.err


def test_an_onnx_graph_that_cannot_run_on_the_lengths_that_were_assumed_asks_for_others(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {"one": (6, 3, 3), "two": (2, 6, 3)}
    held = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()
    ]
    # A border may reflect less than there is: on 64 steps it cannot be as wide as this.
    held.append(numpy_helper.from_array(np.array([0, 0, 0, 0, 0, CROPPED], np.int64), "border"))
    nodes = [op("Conv", "x one", "a"), op("Relu", "a", "b"), op("Conv", "b two", "c")]
    nodes += [op("Pad", "c border", "y", mode="reflect"), op("Identity", "state", "same")]
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", kind, ["batch", 3, "steps"]), value("state", kind, [2, "batch", 5])],
        [value("y", kind, ["batch", 2, "all"]), value("same", kind, [2, "batch", 5])],
        held,
    )
    path = saved(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), tmp_path
    )
    done = cut(path)
    assert done.code == 5
    assert "--input x:1,3,448 --input state:2,1,5" in done.err
    assert cut(path, "--input", "x:1,3,448", "--input", "state:2,1,5").code == 0


@pytest.mark.parametrize("name", ["", "x:"])
def test_an_onnx_graph_is_cut_with_the_lengths_of_input(name: str, tmp_path: Path) -> None:
    path = cropping(tmp_path)
    done = cut(path, "--input", f"{name}1,3,{LENGTH},{LENGTH}")
    assert done.code == 0, done.err
    assert kernels(path.with_name("small.onnx")) == [(3, 3, 3, 3), (4, 3, 3, 3), (2, 4, 1, 1)]
    assert here("inspect", path, "--groups", "--input", f"1,3,{LENGTH},{LENGTH}").code == 0


def test_an_onnx_graph_is_cut_with_the_lengths_of_data(tmp_path: Path) -> None:
    path = cropping(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, 3, LENGTH, LENGTH)).astype(np.float32)
    np.save(tmp_path / "x.npy", images)
    done = cut(path, "--data", tmp_path / "x.npy")
    assert done.code == 0, done.err
    dry = here("prune", path, *WORDS, "--data", tmp_path / "x.npy", "--dry-run", "--json")
    assert dry.json["channels"]["data_batches"]
    assert kernels(path.with_name("small.onnx")) == [(3, 3, 3, 3), (4, 3, 3, 3), (2, 4, 1, 1)]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("1,3,224", "the input x of the model has the shape ?,3,?,?, but --input gives 1,3,224"),
        ("1,4,224,224", "the input x of the model has the shape ?,3,?,?, but --input gives 1,4,224,224"),
        ("1,3,224,0", "is not a shape"),
        ("z:1,3,224,224", "the model has no input z"),
    ],
)
def test_an_input_that_the_model_does_not_take_is_refused(said: str, why: str, tmp_path: Path) -> None:
    done = cut(cropping(tmp_path), "--input", said)
    assert done.code == 2
    assert why in done.err
    assert cut(cropping(tmp_path), "--input", said, "--input", said).code == 2


@pytest.mark.parametrize("which", LIBRARIES)
@pytest.mark.parametrize("how", ["nothing", "input", "data"])
def test_what_a_keras_network_crops_is_behind_lengths_that_fit(which: str, how: str, tmp_path: Path) -> None:
    library: Any = LIBRARIES[which]
    of = library.layers
    layers = [
        library.Input((None, None, 3)),
        of.Conv2D(6, 3, name="one"),
        of.Cropping2D(CROPPED),
        of.Conv2D(8, 3, name="two"),
        of.GlobalAveragePooling2D(),
        of.Dense(2, name="three"),
    ]
    path = tmp_path / ("net.h5" if which == "two" else "net.keras")
    save(filled(library.Sequential(layers)), path)
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(size=(2, LENGTH, LENGTH, 3)).astype(np.float32))
    words = {"nothing": (), "input": ("--input", f"1,{LENGTH},{LENGTH},3"), "data": ("--data", tmp_path / "x.npy")}
    done = cut(path, *words[how], *(["--allow-empty"] if how == "nothing" else []))
    assert ("give their lengths with --input or --data" in done.err) == (how == "nothing")
    if how != "nothing":
        assert done.code == 0, done.err
        assert kernels(path.with_name(f"small{path.suffix}")) == [(3, 3, 3, 3), (3, 3, 3, 4), (4, 2)]


@pytest.mark.parametrize("which", LIBRARIES)
def test_a_network_that_crops_its_outputs_to_nothing_asks_for_lengths(which: str, tmp_path: Path) -> None:
    library: Any = LIBRARIES[which]
    of = library.layers
    steps = library.Input((None, 4))
    x = of.Conv1D(8, 3, padding="same", activation="relu", name="one")(steps)
    x = of.Conv1D(2, 3, padding="same", name="two")(x)
    path = tmp_path / ("net.h5" if which == "two" else "net.keras")
    save(filled(library.Model(steps, of.Cropping1D(CROPPED)(x))), path)
    done = cut(path)
    assert done.code == 5
    assert "give their lengths with --input or --data" in done.err
    done = cut(path, "--input", f"1,{2 * CROPPED + 10},4")
    assert done.code == 0, done.err
    assert kernels(path.with_name(f"small{path.suffix}")) == [(3, 4, 4), (3, 4, 2)]


def test_an_export_that_asks_for_lengths_shows_a_shape_of_the_models_rank(tmp_path: Path) -> None:
    library: Any = LIBRARIES["three"]
    model = library.Sequential([library.Input((None, 4), name="steps"), library.layers.GRU(3)])
    save(filled(model), tmp_path / "net.keras")
    done = here("export", tmp_path / "net.keras", "-o", tmp_path / "net.onnx")
    assert done.code == 2
    assert "add --input steps:1,128,4" in done.err


def test_an_onnx_graph_is_tried_on_what_input_says(tmp_path: Path) -> None:
    path = cropping(tmp_path)
    done = here("export", path, "-o", tmp_path / "half.onnx", "--half")
    assert done.code == 2
    assert "add --input x:1,3,224,224" in done.err
    done = here("export", path, "-o", tmp_path / "half.onnx", "--half", "--input", f"1,3,{LENGTH},{LENGTH}")
    assert done.code == 0, done.err
    assert onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.shape.dim[2].dim_param
