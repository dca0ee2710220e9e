"""A canary for every way in times every command that loads a framework: nothing that a file brings along runs."""

from __future__ import annotations

import base64
import marshal
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from prunectl.errors import PrunectlError, attempt
from prunectl.formats.registry import open_model
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from tests.pruning.test_real_models import FOLDER, found
from tests.running import FIXTURES, here
from tests.safety import test_trust_torch as pytorch
from tests.safety.test_trust_keras import archive, functional, h5, writing
from tests.safety.test_trust_tensorflow import KERAS, SERVED, field, function, graph, node, with_more

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FRAMEWORKS = ("tensorflow", "keras", "tf_keras", "tensorflow_model_optimization", "torch", "jax", "onnxruntime")
Maker = Callable[[Path, Path], Path]
"""Makes a model in a folder that leaves a canary where a framework opens it."""


def keras_archive(folder: Path, canary: Path) -> Path:
    """An archive with a Lambda, as Keras 3 marshals it."""
    code = compile(f"lambda x: (open({str(canary)!r}, 'w').close(), x)[1]", "evil", "eval").co_consts[0]
    marshalled = {"code": base64.b64encode(marshal.dumps(code)).decode(), "defaults": None, "closure": None}
    function = {"class_name": "__lambda__", "config": marshalled}
    config = {"name": "evil", "trainable": True, "dtype": "float32", "function": function, "arguments": {}}
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": config, "registered_name": None}
    return archive(folder / "m.keras", lambda layers: layers.insert(1, layer))


def saved_model(fixture: str) -> Maker:
    def make(folder: Path, canary: Path) -> Path:
        printed = node("PrintV2", output_stream=field(2, f"file://{canary}"))
        return with_more(fixture, folder / "m", graph(functions=[function("__inference_evil_1", printed)]))

    return make


PLANTED: dict[str, Maker] = {
    "h5": lambda folder, canary: h5(folder / "m.h5", functional(writing(canary))),
    "keras": keras_archive,
    "SavedModel of Keras": saved_model(KERAS),
    "SavedModel": saved_model(SERVED),
    "TorchScript": lambda folder, canary: pytorch.planted_script(folder / "m.pt", canary),
    "pt": lambda folder, canary: pytorch.planted_module(folder / "m.pt", canary),
    "pt2 inputs": lambda folder, canary: pytorch.planted_inputs(FIXTURES / "digits_cnn.pt2", folder / "m.pt2", canary),
    "pt2 weight": lambda folder, canary: pytorch.planted_weight(FIXTURES / "digits_cnn.pt2", folder / "m.pt2", canary),
}
"""The canary of a SavedModel sings in `test_trust_tensorflow`: one that sings takes TensorFlow to make."""
COMMANDS: dict[str, str] = {
    "groups": "inspect M --groups",
    "sensitivity": "inspect M --sensitivity --data D",
    "channels": "prune M -o O --pattern channel -s 50%",
    "data": "prune M -o O -s 50% --strategy activation-magnitude --data D",
    "wrap": "prune M -o O -s 50% --wrap",
    "max-drop": "prune M -o O --max-drop 1pp --data D",
    "export": "export M -o X",
    "finetune": "finetune M -o O --data D --epochs 1",
    "finetune max-drop": "finetune M -o O --data D --epochs 1 --max-drop 1pp",
    "distill": "finetune S -o P --data D --epochs 1 --distill M",
    "eval": "eval M --data D",
    "sweep": "sweep M -o O --data D --sparsities 50%",
    "check": "check --config C",
    "check against": "check --config A",
}


SOUND = {"m": "h5", "m.h5": "h5", "m.keras": "keras", "m.pt": "pt2", "m.pt2": "pt2", "m.onnx": "onnx"}
UNOPENED = {
    ("h5", "groups"): (0, ""),
    ("keras", "groups"): (0, ""),
    ("SavedModel", "groups"): (3, "does not describe its Keras layers"),
    ("SavedModel", "channels"): (3, "does not describe its Keras layers"),
    ("pt2 inputs", "wrap"): (3, "cannot hold pruning wrappers"),
    ("pt2 weight", "wrap"): (3, "cannot hold pruning wrappers"),
}
"""What ends otherwise, as it needs no framework, or is no way for such files."""


def words(command: str, path: Path, data: Path, out: Path) -> list[str | Path]:
    """A command about a model, a sound model beside it."""
    sound = FIXTURES / f"digits_cnn.{SOUND[path.name]}"
    places = {
        "M": path,
        "D": data,
        "S": sound,
        "O": out / f"out{path.suffix}",
        "P": out / f"out{sound.suffix}",
        "X": out / "m.onnx",
    }
    for name, judged, against in (("C", path, path), ("A", sound, path)):
        places[name] = path.parent / f"{name}.toml"
        drop = f"max-drop = {{fail = '1pp', data = '{data}', against = '{against}'}}"
        places[name].write_text(f"[[budget]]\npath = '{judged}'\n{drop}\n")
    return [places.get(word, word) for word in COMMANDS[command].split()]


def digits(folder: Path) -> Path:
    with np.load(FIXTURES / "digits.npz") as all_digits:
        np.savez(folder / "d.npz", x=all_digits["x"][:16], y=all_digits["y"][:16])
    return folder / "d.npz"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PLANTED)
def test_nothing_runs_without_trust_and_no_framework_is_imported_to_find_out(
    kind: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, out = tmp_path / "canary", tmp_path / "out"
    out.mkdir()
    path = PLANTED[kind](tmp_path, canary)
    command_line = words(command, path, digits(tmp_path), out)
    for name in FRAMEWORKS:
        monkeypatch.setitem(sys.modules, name, None)
    done = here(*command_line)
    code, words_of_error = UNOPENED.get((kind, command), (3, "--trust"))
    assert (done.code, canary.exists(), list(out.iterdir())) == (code, False, []), done.err
    assert words_of_error in done.err


@pytest.mark.parametrize("kind", ["h5", "keras", "TorchScript", "pt", "pt2 inputs", "pt2 weight"])
def test_the_canary_sings_for_those_who_trust_the_file(kind: str, tmp_path: Path) -> None:
    """Otherwise the test above would hold nothing."""
    path = PLANTED[kind](tmp_path, tmp_path / "canary")
    shape = ("--input", "2,16") if path.suffix == ".pt" else ()
    # It may well be no model that works; what matters is that it runs.
    here("export", path, "-o", tmp_path / "out.onnx", "--trust", *shape)
    assert (tmp_path / "canary").exists()


WITH_CODE = {
    "cifar10_resnet56_group_sl.pth": "class engine.models.cifar.resnet_tiny.ResNet",
    "garnet_1layer_weights.h5": "custom class GarNet",
    "garnet_3layer_weights.h5": "custom class GarNetStack",
    "hgq_mnist_heterogeneous.h5": "custom class FixedPointQuantizer",
    "hgq_mnist_homogeneous.h5": "custom class FixedPointQuantizer",
    "model.keras": "custom class VAE",
    "model_colab.keras": "custom class VAE",
    "model_k112.h5": "Lambda layer lambda_1",
    "model_k206.h5": "Lambda layer lambda_1",
    **dict.fromkeys(("pruned_model_50.h5", "pruned_model_95.h5"), "custom class CustomModel"),
    **dict.fromkeys((f"pruned_model_{share}.h5" for share in (55, 60, 65, 90)), "custom class DynamicPolyActn_D2"),
    "q_aware.h5": "custom class QuantizeWrapperV2",
}
"""Published models that need `--trust`, and what for."""


def graph_of_onnx(path: Path, operator: str, domain: str, location: str) -> Path:
    """A graph of one weight and one operator, the weight maybe in a file of its own."""
    weight, value = onnx.numpy_helper.from_array(np.ones((64, 10), np.float32), "w"), onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Flatten", ["x"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["hidden"]),
        onnx.helper.make_node(operator, ["hidden"], ["y"], domain=domain),
    ]
    ports = [value("x", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])], [value("y", onnx.TensorProto.FLOAT, ["n", 10])]
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("foreign", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ports, [weight]), opset_imports=sets, ir_version=9
    )
    if location:
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], location)
        model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("location", ["../secret", "{}/secret", "link"])
def test_no_graph_reads_outside_of_its_folder(location: str, command: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (tmp_path / "secret").write_bytes(bytes(2560))
    (folder / "link").symlink_to("../secret")
    path = graph_of_onnx(folder / "m.onnx", "Relu", "", location.format(tmp_path))
    done = here(*words(command, path, digits(tmp_path), out))
    assert (done.code, list(out.iterdir())) == (3, []), done.err
    # A sentence is cut in its middle where folders have long names.
    assert "its folder" in done.err


@pytest.mark.parametrize("command", ["sensitivity", "data", "max-drop", "export", "sweep", "check", "check against"])
def test_no_library_is_looked_for_that_an_operator_would_come_from(command: str, tmp_path: Path) -> None:
    path, out = graph_of_onnx(tmp_path / "m.onnx", "Deed", "foreign", ""), tmp_path / "out"
    out.mkdir()
    done = here(*words(command, path, digits(tmp_path), out))
    assert (done.code, "is not a registered function/op" in done.err) == (3, True), done.err


@pytest.mark.parametrize("command", [name for name, line in COMMANDS.items() if set("DCA") & set(line.split())])
@pytest.mark.parametrize("kind", ["npz", "npy", "two"])
def test_no_command_unpickles_data(kind: str, command: str, tmp_path: Path) -> None:
    canary, x, y = tmp_path / "canary", np.ones((16, 1, 8, 8), np.float32), np.arange(16) % 10
    planted, data = np.array([pytorch.Planted(canary)] * 16, object), tmp_path / f"d.{kind}"
    if kind == "npz":
        np.savez(data, x=planted, y=y)
    else:
        np.save(tmp_path / "d.npy", planted, allow_pickle=True)
        np.save(tmp_path / "x.npy", x)
    if kind == "two":
        data = Path(f"{tmp_path / 'x.npy'},{tmp_path / 'd.npy'}")
    name = "m.pt2" if command.startswith(("finetune", "distill")) else "m.onnx"
    path = Path(shutil.copy(FIXTURES / f"digits_cnn{Path(name).suffix}", tmp_path / name))
    done = here(*words(command, path, data, tmp_path))
    assert (done.code, canary.exists()) == (3, False), done.err
    assert "holds Python objects, which prunectl never unpickles" in done.err


@pytest.mark.skipif(not FOLDER.is_dir(), reason="there are no real models here")
def test_of_models_that_others_have_published_those_with_code_of_their_own_need_trust_and_no_others() -> None:
    refused, opened = {}, 0
    for path in found():
        model = attempt(open_model, path)
        if isinstance(model, PrunectlError):
            continue
        verdict = attempt(lambda file: user_code.check(file, LoadOptions()), model)
        opened += verdict is None
        if isinstance(verdict, PrunectlError):
            refused[path.name.partition("__")[2]] = str(verdict).removeprefix(f"{path} holds ")
    assert opened > 100
    assert refused.keys() == WITH_CODE.keys()
    assert {name: words for name, words in refused.items() if WITH_CODE[name] not in words} == {}
