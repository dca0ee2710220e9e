"""TensorFlow Lite answers as the model that it was converted from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.formats.registry import open_model
from prunectl.training.backend import LoadOptions, ModelSignature, TensorSpec, TrainOptions
from prunectl.training.distillation import _in_order_of
from prunectl.training.evaluate import evaluate_file
from prunectl.training.request import FinetuneRequest
from prunectl.training.runtimes import load_predictor
from tests.networks import tf_keras

k = tf_keras()
tf = importlib.import_module("tensorflow")
RANDOM = np.random.default_rng(5)
NUMBERS = RANDOM.normal(size=(7, 6)).astype(np.float32)
WORDS = RANDOM.integers(0, 9, (7, 3)).astype(np.int32)


def network(batch: int | None) -> Any:
    words = k.Input((3,), batch, name="words", dtype="int32")
    numbers = k.Input((6,), batch, name="numbers")
    joined = k.layers.Concatenate()([k.layers.Flatten()(k.layers.Embedding(9, 4)(words)), numbers])
    return k.Model([words, numbers], k.layers.Dense(5, name="kind")(joined))


def converted(model: Any, path: Path, *, is_quantized: bool = False) -> Path:
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if is_quantized:

        def examples() -> Iterator[dict[str, Any]]:
            for row in range(len(WORDS)):
                yield {"words": WORDS[row : row + 1], "numbers": NUMBERS[row : row + 1]}

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = examples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())
    return path


@pytest.mark.parametrize("batch", [None, 3])
def test_any_number_of_examples_is_answered_whatever_goes_in_at_a_time(batch: int | None, tmp_path: Path) -> None:
    model = network(batch)
    predictor = load_predictor(open_model(converted(model, tmp_path / "m.tflite")), LoadOptions())
    assert predictor is not None
    arrays = {"words": WORDS, "numbers": NUMBERS}
    inputs = predictor.signature.inputs
    assert {port.name: port.shape for port in inputs} == {"words": (3,), "numbers": (6,)}
    found = predictor.predict(tuple(arrays[port.name] for port in inputs))
    wanted = model.predict_on_batch([WORDS, NUMBERS]) if batch is None else None
    if wanted is None:
        free = network(None)
        free.set_weights(model.get_weights())
        wanted = free.predict_on_batch([WORDS, NUMBERS])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_integers_that_stand_for_numbers_go_in_and_out_as_numbers(tmp_path: Path) -> None:
    model = network(None)
    path = converted(model, tmp_path / "m.tflite", is_quantized=True)
    (detail,) = tf.lite.Interpreter(str(path)).get_output_details()
    assert detail["dtype"] == np.int8
    predictor = load_predictor(open_model(path), LoadOptions())
    assert predictor is not None
    assert {port.name: port.dtype for port in predictor.signature.inputs} == {"words": "int32", "numbers": "float32"}
    arrays = {"words": WORDS, "numbers": NUMBERS}
    found = np.asarray(predictor.predict(tuple(arrays[port.name] for port in predictor.signature.inputs)))
    wanted = model.predict_on_batch([WORDS, NUMBERS])
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    # A number of its own for each integer, and no more.
    steps = found / detail["quantization"][0]
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)


def test_an_output_that_counts_no_examples_is_refused(tmp_path: Path) -> None:
    line = k.Input((6,), name="line")
    model = k.Model(line, k.layers.Lambda(lambda x: tf.reduce_sum(x, axis=0))(line))
    predictor = load_predictor(open_model(converted(model, tmp_path / "m.tflite")), LoadOptions())
    assert predictor is not None
    with pytest.raises(InputError, match="has no batch axis"):
        predictor.predict(NUMBERS)


def test_each_output_is_judged_by_the_targets_of_its_name(tmp_path: Path) -> None:
    line = k.Input((6,), name="line")
    model = k.Model(line, [k.layers.Dense(4, name="kind")(line), k.layers.Dense(1, name="age")(line)])
    path = converted(model, tmp_path / "m.tflite")
    predictor = load_predictor(open_model(path), LoadOptions())
    assert predictor is not None
    kinds, ages = model.predict_on_batch(NUMBERS)
    labels = kinds.argmax(axis=1)
    np.savez(tmp_path / "d.npz", line=NUMBERS, kind=labels, age=ages + 0.5)
    for metric, value in (("kind_accuracy", 1.0), ("age_mae", 0.5)):
        means = TrainOptions(metrics=(metric,))
        done = evaluate_file(path, FinetuneRequest(data=f"{tmp_path}/d.npz[line,kind+age]", means=means))
        assert (done.metric, done.value) == (metric, pytest.approx(value, abs=1e-5))
    # The converter sorts outputs: which of them the targets are for is not guessed.
    with pytest.raises(UsageError, match="2 outputs, but the data has 1 arrays"):
        evaluate_file(path, FinetuneRequest(data=f"{tmp_path}/d.npz[line,kind]"))


def test_a_teacher_answers_by_the_names_of_its_inputs_and_outputs() -> None:
    one, two = TensorSpec("one", (2,), "float32"), TensorSpec("two", (2,), "float32")
    answer, theirs = _in_order_of(
        ModelSignature((one, two), (two,), is_channels_first=False),
        ModelSignature((two, one), (one, two), is_channels_first=False),
        lambda x: (x[1] * 10, x[0] * 100),
    )
    assert (theirs.inputs, theirs.outputs) == ((one, two), (two, one))
    assert np.array_equal(answer((np.array([1]), np.array([2]))), [[200], [10]])
