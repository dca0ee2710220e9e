from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.api import prune
from prunectl.errors import InputError, UntrustedError, UsageError
from prunectl.exporting.bench import BenchRequest, bench
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest as Pruning
from prunectl.training.backend import GradientStatistic, LoadOptions, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.evaluate import evaluate_file
from prunectl.training.finetune import FinetuneResult, finetune
from prunectl.training.request import FinetuneRequest, KeepWeights
from prunectl.training.runtimes import load_trainable
from tests.networks import tf_keras
from tests.running import FIXTURES

tf_keras()
tf = importlib.import_module("tensorflow")

RANDOM = np.random.default_rng(4)
X = RANDOM.normal(size=(22, 6)).astype(np.float32)
Z = RANDOM.normal(size=(22, 3)).astype(np.float32)
Y = RANDOM.normal(size=(22, 4)).astype(np.float32)
BATCH = Batch((X, Z), Y)
MEANS = TrainOptions(optimizer="sgd:learning_rate=0.1", loss="mse", example=BATCH)


class Plain(tf.Module):  # type: ignore[misc, name-defined]
    """Two inputs, code of its own, a variable that is not trained, and one that is not served."""

    def __init__(self) -> None:
        super().__init__()
        source = np.random.default_rng(1)
        self.first = tf.Variable(source.normal(size=(6, 8)).astype(np.float32))
        self.layers = [tf.Variable(source.normal(size=(11, 4)).astype(np.float32)), tf.Variable(tf.zeros(4))]
        self.scale = tf.Variable(2.0, trainable=False)
        self.unused = tf.Variable(tf.ones((3, 3)))

    def answer(self, x: Any, z: Any) -> dict[str, Any]:
        hidden = tf.concat([tf.nn.relu(x @ self.first), z], axis=1)
        return {"out": (hidden @ self.layers[0] + self.layers[1]) * self.scale}


def saved(path: Path, batch: int | None = None) -> Path:
    module = Plain()
    specs = [tf.TensorSpec((batch, 6), tf.float32, "x"), tf.TensorSpec((batch, 3), tf.float32, "z")]
    tf.saved_model.save(module, path, signatures=tf.function(module.answer).get_concrete_function(*specs))
    return path


def test_a_signature_that_draws_random_numbers_is_known(tmp_path: Path) -> None:
    module = Plain()
    module.draw = tf.function(lambda x: {"out": (x @ module.first) + tf.random.normal((8,))})
    signature = module.draw.get_concrete_function(tf.TensorSpec((None, 6), tf.float32, "x"))
    tf.saved_model.save(module, tmp_path / "random", signatures=signature)
    paths = (tmp_path / "random", saved(tmp_path / "plain"))
    assert [load_trainable(open_model(path), LoadOptions())._random.has_hidden_state for path in paths] == [True, False]


def opened(path: Path) -> Any:
    network = load_trainable(open_model(path), LoadOptions())
    network.prepare(MEANS)
    return network


def by_hand(count: int) -> dict[str, Any]:
    """Train as one would without us, and return the weights by the names that the checkpoint format gives them."""
    module = Plain()
    trained = [module.first, *module.layers]
    for _ in range(count):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((module.answer(X, Z)["out"] - Y) ** 2)
        for variable, slope in zip(trained, tape.gradient(loss, trained), strict=True):
            variable.assign_sub(0.1 * slope)
    return {"first": module.first, "layers/0": module.layers[0], "layers/1": module.layers[1], "scale": module.scale}


@pytest.mark.parametrize("batch", [None, 4, 22], ids=["any size", "four at a time", "all at a time"])
def test_steps_are_those_of_a_loop_of_ones_own_whatever_size_was_saved(batch: int | None, tmp_path: Path) -> None:
    network = opened(saved(tmp_path / "m", batch))
    assert any(f"for {batch} examples at a time" in note for note in network.notes) is (batch is not None)
    for _ in range(3):
        network.step(BATCH, 1.0)
    found = network.tensors()
    for name, value in by_hand(3).items():
        assert np.allclose(found[name], value.numpy(), atol=1e-5), name
    assert "unused" not in found


def test_a_program_in_a_folder_whose_name_is_no_text_is_opened(tmp_path: Path) -> None:
    found = opened(saved(tmp_path / "m").rename(tmp_path / os.fsdecode(b"\xff"))).tensors()
    assert np.array_equal(found["scale"], Plain().scale.numpy())


def test_says_what_goes_in_and_comes_out(tmp_path: Path) -> None:
    signature = opened(saved(tmp_path / "m")).signature
    assert [(port.name, port.shape, port.dtype) for port in signature.inputs] == [
        ("x", (6,), "float32"),
        ("z", (3,), "float32"),
    ]
    assert [(port.name, port.shape) for port in signature.outputs] == [("out", (4,))]


def test_metrics_of_several_outputs_have_their_names(tmp_path: Path) -> None:
    class Two(tf.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(RANDOM.normal(size=(6, 7)).astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32)])  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> dict[str, Any]:
            made = x @ self.kernel
            return {"kind": made[:, :4], "size": made[:, 4:]}

    module = Two()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.__call__})
    labels = Y.argmax(axis=1)
    np.savez(tmp_path / "d.npz", x=X, kind=labels, size=Z)
    done = evaluate_file(tmp_path / "m", FinetuneRequest(data=f"{tmp_path}/d.npz[x,size+kind]"))
    assert done.metric == "kind_accuracy"
    expected = float(np.mean((X @ module.kernel.numpy())[:, :4].argmax(axis=1) == labels))
    assert done.value == pytest.approx(expected)


def test_masks_hold_under_momentum_and_decay(tmp_path: Path) -> None:
    network = load_trainable(open_model(saved(tmp_path / "m")), LoadOptions())
    network.prepare(TrainOptions(optimizer="adamw:learning_rate=0.1,weight_decay=0.1", loss="mse", example=BATCH))
    network.step(BATCH, 1.0)
    mask = RANDOM.random((6, 8)) > 0.5
    network.mask({"first": mask})
    for _ in range(3):
        network.step(BATCH, 1.0)
    assert np.array_equal(network.tensors()["first"] != 0, mask)


def tuned(path: Path, target: Path, data: str, **words: Any) -> FinetuneResult:
    pruning = Pruning(sparsity=0.75)
    return finetune(
        path, FinetuneRequest(data, epochs=2, pruning=pruning, keep=KeepWeights.LAST, **words), Destination(target)
    )


def test_a_model_that_keras_3_has_exported_is_tuned_and_served_again(tmp_path: Path) -> None:
    found = tuned(
        FIXTURES / "every_variable_twice",
        tmp_path / "out",
        f"{FIXTURES / 'digits.npz'}?limit=200",
        means=TrainOptions(lr=0.01),
    )
    assert found.masked == found.kept == sum(round(0.75 * size) for size in (72, 1152, 8192, 320))
    root = tf.saved_model.load(str(tmp_path / "out"))
    before = tf.saved_model.load(str(FIXTURES / "every_variable_twice"))
    for variable, old in zip(root.variables, before.variables, strict=True):
        if len(variable.shape) > 1:
            assert np.count_nonzero(variable.numpy() == 0) == round(0.75 * old.numpy().size)
        assert not np.array_equal(variable.numpy(), old.numpy())
    served = root.signatures["serving_default"](pixels=tf.ones((2, 8, 8, 1)))["output_0"]
    assert np.allclose(served, root.serve(tf.ones((2, 8, 8, 1))), atol=1e-5)


def test_what_is_not_served_is_pruned_but_not_trained(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, z=Z, y=Y)
    path = saved(tmp_path / "m")
    result = tuned(path, tmp_path / "out", f"{tmp_path / 'd.npz'}[x+z,y]", means=MEANS)
    assert "Not trained, since the signature does not use it: unused. --exclude keeps it unpruned." in result.notes
    old, new = open_model(path), open_model(tmp_path / "out")
    held = {tensor.name: new.read(tensor) for tensor in new.tensors}
    for tensor in old.tensors:
        same = np.array_equal(old.read(tensor), held[tensor.name])
        assert same is (tensor.name == "scale"), tensor.name
    assert sorted(held["unused"].reshape(-1)) == [0] * 7 + [1] * 2
    assert (path / "saved_model.pb").read_bytes() == (tmp_path / "out" / "saved_model.pb").read_bytes()


def test_what_is_not_served_has_no_gradient_to_rank_it_by(tmp_path: Path) -> None:
    network = opened(saved(tmp_path / "m"))
    with pytest.raises(UsageError, match="does not use it"):
        network.track_gradients(GradientStatistic.SALIENCE, ["first", "unused"])
    with pytest.raises(UsageError, match="does not use it"):
        network.gradients(["first", "unused"], BATCH)


def test_what_is_not_served_is_ranked_by_magnitude_where_inputs_decide(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, z=Z, y=Y)
    data = f"{tmp_path / 'd.npz'}[x+z,y]"
    pruned = prune(saved(tmp_path / "m"), tmp_path / "out", sparsity=0.75, strategy="obs", data=data)
    assert any("unused: ranked by magnitude" in note for note in pruned.notes)
    model = open_model(tmp_path / "out")
    unused = next(model.read(tensor) for tensor in model.tensors if tensor.name == "unused")
    assert sorted(unused.reshape(-1)) == [0] * 7 + [1] * 2


def test_of_several_signatures_one_with_weights_is_run_and_named(tmp_path: Path) -> None:
    module = Plain()
    specs = [tf.TensorSpec((None, size), tf.float32, name) for size, name in ((6, "x"), (3, "z"))]
    version = tf.function(lambda x: {"version": x + 1.0}).get_concrete_function(specs[0])
    answer = tf.function(module.answer).get_concrete_function(*specs)
    tf.saved_model.save(module, tmp_path / "m", signatures={"serving_default": version, "answer": answer})
    np.savez(tmp_path / "d.npz", x=X, z=Z, y=Y)
    done = evaluate_file(tmp_path / "m", FinetuneRequest(data=f"{tmp_path}/d.npz[x+z,y]", means=MEANS))
    assert done.logs["loss"] == pytest.approx(float(np.mean((module.answer(X, Z)["out"] - Y) ** 2)), rel=1e-5)
    named = f"{tmp_path / 'm'} is run by its signature answer, not by serving_default."
    assert named in done.notes
    assert named in bench([tmp_path / "m"], BenchRequest(seconds=0.1)).notes


def test_without_a_signature_there_is_nothing_to_train(tmp_path: Path) -> None:
    tf.saved_model.save(Plain(), tmp_path / "m")
    with pytest.raises(InputError, match="no signature that uses them"):
        load_trainable(open_model(tmp_path / "m"), LoadOptions())


def test_a_signature_of_one_example_is_not_run_on_batches(tmp_path: Path) -> None:
    module = Plain()

    def answer(x: Any) -> dict[str, Any]:
        return {"out": tf.linalg.matvec(module.first, x, transpose_a=True)}

    signature = tf.function(answer).get_concrete_function(tf.TensorSpec((6,), tf.float32, "x"))
    tf.saved_model.save(module, tmp_path / "m", signatures=signature)
    with pytest.raises(InputError, match="takes one example, not a batch"):
        load_trainable(open_model(tmp_path / "m"), LoadOptions())


def test_constants_are_not_trained(tmp_path: Path) -> None:
    module = Plain()
    module.layers, module.first, module.scale = [], None, None
    double = tf.function(lambda x: {"out": 2 * x}).get_concrete_function(tf.TensorSpec((None, 6), tf.float32, "x"))
    tf.saved_model.save(module, tmp_path / "m", signatures=double)
    with pytest.raises(InputError, match="its weights are constants of the graph"):
        load_trainable(open_model(tmp_path / "m"), LoadOptions())


def test_a_program_that_reads_files_is_run_for_those_who_trust_it_alone(tmp_path: Path) -> None:
    module = Plain()

    def answer(x: Any) -> dict[str, Any]:
        return {"out": x @ module.first, "secret": tf.io.read_file(str(FIXTURES / "README.md"))}

    signature = tf.function(answer).get_concrete_function(tf.TensorSpec((None, 6), tf.float32, "x"))
    tf.saved_model.save(module, tmp_path / "m", signatures=signature)
    with pytest.raises(UntrustedError, match="ReadFile") as caught:
        load_trainable(open_model(tmp_path / "m"), LoadOptions())
    assert "--trust" in caught.value.hint
    assert load_trainable(open_model(tmp_path / "m"), LoadOptions(is_trusted=True)).signature.inputs[0].name == "x"
