"""Stripping TensorFlow checkpoints: what is left restores in TensorFlow, Keras 2 and Keras 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.formats.tensorflow import bundle_write, leveldb
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.pruning.destination import Destination
from prunectl.pruning.strip import Stripped
from prunectl.pruning.strip import strip as run
from tests.contract import Array, raw
from tests.networks import keras, small_keras, tf_keras

tf: Any = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("ignore")


def strip(prefix: Path, *parts: StripPart, to_half: bool = False) -> tuple[str, Stripped]:
    """Strip some parts, or all of them, of a checkpoint, and return the prefix of another."""
    target = prefix.with_name("stripped.index")
    wish = StripOptions(frozenset(parts or StripPart), to_half=to_half)
    return str(target).removesuffix(".index"), run(prefix, wish, Destination(target), is_packed=False)


def stock(prefix: Path | str) -> dict[str, Array]:
    reader = tf.train.load_checkpoint(str(prefix))
    kinds = reader.get_variable_to_dtype_map()
    return {name: np.asarray(reader.get_tensor(name)) for name in kinds if kinds[name] != tf.string}


def bits(weights: Any) -> list[bytes]:
    return [raw(np.asarray(weight)) for weight in weights]


def trained(k: Any, optimizer: Any = "adam") -> Any:
    model = small_keras(k, {})
    model.compile(optimizer, "mse", run_eagerly=True)
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    return model


def legacy() -> Any:
    return tf_keras().optimizers.legacy.Adam()


def scaled() -> Any:
    return tf_keras().mixed_precision.LossScaleOptimizer(tf_keras().optimizers.SGD(momentum=0.9))


@pytest.mark.parametrize("optimizer", [lambda: "adam", legacy, scaled])
def test_a_checkpoint_of_keras_2_holds_its_model_alone(optimizer: Any, tmp_path: Path) -> None:
    model = trained(tf_keras(), optimizer())
    prefix = Path(tf.train.Checkpoint(net=model, opt=model.optimizer).save(str(tmp_path / "x")))
    target, found = strip(prefix)
    again = small_keras(tf_keras(), {})
    tf.train.Checkpoint(net=again).restore(target).assert_consumed()
    assert bits(again.get_weights()) == bits(model.get_weights())
    left, before = stock(target), stock(prefix)
    assert {name: raw(array) for name, array in left.items()} == {
        name: raw(array) for name, array in before.items() if name in left
    }
    assert len(left) == len(model.weights) + 1  # and the checkpoint's own counter
    assert sum(thing.bytes for thing in found.removed) == sum(
        array.nbytes for name, array in before.items() if name not in left
    )
    resumed = trained(tf_keras(), optimizer())
    tf.train.Checkpoint(net=resumed, opt=resumed.optimizer).restore(target).expect_partial()
    assert bits(resumed.get_weights()) == bits(model.get_weights())


def test_the_weights_of_keras_3_stay_although_the_optimizer_names_them(tmp_path: Path) -> None:
    model = trained(keras())
    prefix = Path(tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / "x")))
    assert any("optimizer/_trainable_variables" in name for name in stock(prefix))
    assert {str(tensor.role) for tensor in open_model(prefix).tensors} == {"optimizer", "kernel", "bias"}
    target, _ = strip(prefix)
    again = small_keras(keras(), {})
    tf.train.Checkpoint(model=again).read(target).assert_existing_objects_matched()
    assert bits(again.get_weights()) == bits(model.get_weights())
    assert len(stock(target)) == len(model.weights)


def test_weights_that_only_the_optimizer_leads_to_are_no_state_of_it(tmp_path: Path) -> None:
    model = trained(keras())
    prefix = Path(tf.train.Checkpoint(opt=model.optimizer).write(str(tmp_path / "x")))
    target, _ = strip(prefix)
    assert sorted(bits(stock(target).values())) == sorted(bits(model.get_weights()))


def test_saved_weights_load_into_the_model(tmp_path: Path) -> None:
    model = trained(tf_keras())
    model.save_weights(tmp_path / "w")
    target, found = strip(tmp_path / "w")
    again = small_keras(tf_keras(), {})
    again.load_weights(target).assert_consumed()
    assert bits(again.get_weights()) == bits(model.get_weights())
    assert {thing.part for thing in found.removed} == {StripPart.OPTIMIZER}
    assert found.after.about.optimizer == ""


@pytest.mark.parametrize("optimizer", ["AdamOptimizer", "MomentumOptimizer", "FtrlOptimizer"])
def test_a_checkpoint_of_tensorflow_1_restores_its_weights(optimizer: str, tmp_path: Path) -> None:
    v1 = tf.compat.v1
    more = {"momentum": 0.9} if optimizer == "MomentumOptimizer" else {}
    with v1.Graph().as_default(), v1.Session() as session:
        kernel = v1.get_variable("SGD/dense/kernel", [6, 5])  # a scope of this name is no optimizer
        table = v1.get_variable("table", [10, 4], partitioner=v1.fixed_size_partitioner(2))
        loss = v1.reduce_sum(kernel**2) + v1.reduce_sum(v1.convert_to_tensor(table) ** 2)
        weights = v1.global_variables()
        v1.train.__dict__[optimizer](0.1, **more).minimize(loss, global_step=v1.train.get_or_create_global_step())
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "x"))
        expected = bits(session.run(weights))
        target, found = strip(tmp_path / "x")
        session.run(v1.global_variables_initializer())
        v1.train.Saver([*weights, v1.train.get_global_step()]).restore(session, target)
        assert bits(session.run(weights)) == expected
    assert stock(target).keys() == {"SGD/dense/kernel", "table", "global_step"}
    assert found.removed


def test_what_bert_calls_the_state_of_its_optimizer_goes(tmp_path: Path) -> None:
    names = ["bert/kernel", "bert/kernel/adam_m", "bert/kernel/adam_v"]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"),
        tensor_names=names,
        shape_and_slices=[""] * 3,
        tensors=[tf.fill((3, 4), float(number)) for number in range(3)],
    )
    target, _ = strip(tmp_path / "x")
    assert stock(target).keys() == {"bert/kernel"}


def test_the_optimizer_stays_unless_it_is_named(tmp_path: Path) -> None:
    trained(tf_keras()).save_weights(tmp_path / "w")
    target, found = strip(tmp_path / "w", StripPart.TRAINING)
    assert found.removed == ()
    assert Path(f"{target}.index").read_bytes() == (tmp_path / "w.index").read_bytes()


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    small_keras(tf_keras(), {}).save_weights(tmp_path / "w")
    with pytest.raises(UsageError, match="cannot hold 16-bit floats"):
        strip(tmp_path / "w", to_half=True)


def test_wrappers_are_refused_and_the_rest_can_go(tmp_path: Path) -> None:
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    model = sparsity.prune_low_magnitude(small_keras(tf_keras(), {}))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "w")
    with pytest.raises(InputError, match="has pruning wrappers, such as the one around first") as caught:
        strip(tmp_path / "w")
    assert "--only optimizer" in caught.value.hint
    target, _ = strip(tmp_path / "w", StripPart.OPTIMIZER, StripPart.TRAINING)
    assert len(stock(target)) == len(model.weights)


def test_several_shards_stay_several(tmp_path: Path) -> None:
    for part, name in enumerate(["dense/kernel", "dense/kernel/Adam"]):
        tf.raw_ops.SaveV2(
            prefix=str(tmp_path / f"part{part}"), tensor_names=[name], shape_and_slices=[""], tensors=[tf.ones((3, 4))]
        )
    parts = [str(tmp_path / f"part{part}") for part in range(2)]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "whole"), delete_old_dirs=False
    )
    target, _ = strip(tmp_path / "whole")
    assert stock(target).keys() == {"dense/kernel"}


keys = st.lists(st.binary(min_size=1, max_size=40), unique=True, max_size=60)


@given(keys, st.integers(0, 300_000))
def test_a_table_is_read_back_as_it_was_written(names: list[bytes], nbytes: int) -> None:
    records = [(name, bytes([len(name)]) * (nbytes if place == 0 else 9)) for place, name in enumerate(sorted(names))]
    data = memoryview(leveldb.table(records))
    found = [(record.key, bytes(record.data[record.begin : record.end])) for record in leveldb.records(Path("x"), data)]
    assert found == records


def test_a_table_is_written_as_tensorflow_writes_it(tmp_path: Path) -> None:
    names = [f"layer_{number}/kernel" for number in range(40)]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"), tensor_names=names, shape_and_slices=[""] * 40, tensors=[tf.ones((2, 2))] * 40
    )
    path = tmp_path / "x.index"
    found = [
        (record.key, bytes(record.data[record.begin : record.end]))
        for record in leveldb.records(path, leveldb.read_file(path))
    ]
    own = leveldb.table(found)
    first = read_bundle(path).entries[b"layer_0/kernel"].block
    assert own[: first.crc_at + 4] == path.read_bytes()[: first.crc_at + 4]


@pytest.mark.parametrize("text", [b"", b"short", b"x" * 300, bytes(range(256)) * 100])
def test_a_string_is_stored_as_tensorflow_stores_it(text: bytes, tmp_path: Path) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"), tensor_names=["text"], shape_and_slices=[""], tensors=[tf.constant(text)]
    )
    entry = read_bundle(tmp_path / "x.index").entries[b"text"]
    assert bundle_write.string_bytes(text) == ((tmp_path / "x.data-00000-of-00001").read_bytes(), entry.crc)
