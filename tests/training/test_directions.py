"""In which direction is a metric better? By a table of names, or as somebody says, and never by a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunectl.errors import UsageError
from prunectl.training.backend import TrainOptions
from prunectl.training.monitor import Monitor, check_direction, known_direction, make_monitor, resolve_direction
from prunectl.training.request import parse_metrics

UP = """
accuracy val_accuracy acc top5 top-3 top_k_categorical_accuracy sparse_top_k_categorical_accuracy binary_accuracy
SparseCategoricalAccuracy AUC auc_1 precision_2 recall f1_score fbeta_score cosine_similarity mean_io_u MeanIoU
one_hot_mean_io_u true_positives true_negatives r2_score PrecisionAtRecall laptop/loss.py:accuracy
"""
DOWN = """
loss val_loss mae MAE mse mean_squared_error MeanSquaredError val_mean_absolute_error_1 rmse huber log_cosh
kl_divergence
sparse_categorical_crossentropy BinaryCrossentropy cross-entropy hinge poisson false_positives false_negatives
accuracy/top/m.py:mae
"""
UNKNOWN = ("dice.py:score", "km.py:kappa", "laptop/m.py:err", "dice", "stop_accuracy_gap", "inverse_accuracy", "mean")


@pytest.mark.parametrize("name", UP.split())
def test_more_of_what_is_known_to_be_good_is_better(name: str) -> None:
    assert known_direction(name) is True


@pytest.mark.parametrize("name", DOWN.split())
def test_less_of_what_is_known_to_be_bad_is_better(name: str) -> None:
    assert known_direction(name) is False


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_name_says_is_refused_with_the_way_to_say_it(name: str) -> None:
    assert known_direction(name) is None
    with pytest.raises(UsageError, match=r"prunectl does not know whether a higher .* is better") as refused:
        resolve_direction(name)
    assert f"write --metric {name}:max or --metric {name}:min" == refused.value.hint
    assert resolve_direction(name, "max")
    assert not resolve_direction(name, "min")


def test_every_metric_and_loss_of_keras_has_a_direction_or_none_on_purpose() -> None:
    keras = pytest.importorskip("keras")
    none = {"dice", "tversky", "mean", "sum", "get", "serialize", "deserialize", "metric", "loss_function_wrapper"}
    none |= {"mean_metric_wrapper", "circle", "dice", "tversky"}
    plain = {name.replace("_", "") for name in none}
    names = [name for home in (keras.metrics, keras.losses) for name in dir(home) if not name.startswith("_")]
    assert [
        name for name in names if known_direction(name) is None and name.lower().replace("_", "") not in plain
    ] == []


def test_the_name_of_an_output_before_a_metric_is_no_part_of_it() -> None:
    assert known_direction("digits_accuracy", ("digits",)) is True
    assert known_direction("digits_loss", ("digits",)) is False
    assert known_direction("inverse_accuracy", ("digits",)) is None


@pytest.mark.parametrize(
    ("words", "metrics", "decides", "goal"),
    [
        (["accuracy"], ("accuracy",), "accuracy", ""),
        (["f.py:score:max"], ("f.py:score",), "f.py:score", "max"),
        (["auc:min", "mae"], ("auc", "mae"), "auc", "min"),
        (["loss"], (), "loss", ""),
        (["f.py:max"], ("f.py:max",), "f.py:max", ""),
        (["f.py:max:min"], ("f.py:max",), "f.py:max", "min"),
        ([""], (), "", ""),
    ],
)
def test_the_direction_is_said_behind_the_name_which_stays_free_of_it(
    words: list[str], metrics: tuple[str, ...], decides: str, goal: str
) -> None:
    assert parse_metrics(words) == {"metrics": metrics, "decides": decides, "goal": goal}


def test_a_direction_of_what_does_not_decide_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot have max or min"):
        parse_metrics(["accuracy", "f.py:score:max"])


def test_what_was_asked_first_decides_whatever_the_order_of_the_numbers() -> None:
    logs = {"accuracy": 0.5, "loss": 1.0, "score": 3.0}
    assert make_monitor(logs, TrainOptions()) == Monitor("accuracy", higher_is_better=True)
    assert make_monitor(logs, TrainOptions(**parse_metrics(["loss", "accuracy"]))) == Monitor(
        "loss", higher_is_better=False
    )
    assert make_monitor(logs, TrainOptions(**parse_metrics([f"{Path('m.py')}:score:max"]))) == Monitor(
        "score", higher_is_better=True
    )
    several = {"loss": 1.0, "a_loss": 0.4, "b_loss": 0.6}
    assert make_monitor(several, TrainOptions(), ["a", "b"]).name == "loss"
    assert make_monitor({"loss": 1.0, "kl_loss": 0.4}, TrainOptions(goal="min"), ["a"]).name == "kl_loss"
    assert make_monitor(several | {"b_mae": 0.2}, TrainOptions(), ["a", "b"]).name == "b_mae"
    with pytest.raises(UsageError, match="is not measured"):
        make_monitor({"loss": 1.0}, TrainOptions(**parse_metrics(["accuracy"])))


def test_a_function_without_a_direction_is_refused_before_a_file_is_opened() -> None:
    with pytest.raises(UsageError, match="is better"):
        check_direction(TrainOptions(**parse_metrics(["m.py:score"])))
