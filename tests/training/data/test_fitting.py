from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from prunectl.errors import InputError, PrunectlError, UsageError
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.adapt import CHECKED_EXAMPLES, adapt, check_batches
from prunectl.training.data.readers import IterableSource, from_arrays
from prunectl.training.data.source import Batch, EpochOrder, Source, as_tuple
from prunectl.training.task import Task, TaskKind
from tests.training.data.sources import Array, model, whole


def source_of(x: Array, y: Array | None = None) -> Source:
    return from_arrays("train.npz", {"x": x}, {} if y is None else {"y": y})


def adapted(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> Array:
    x = np.arange(2 * int(np.prod(shape)), dtype=np.float32).reshape(2, *shape)
    return whole_x(adapt(source_of(x), model(*wanted))[0])


def whole_x(source: Source) -> Array:
    return np.concatenate([as_tuple(batch.x)[0] for batch in source.batches(EpochOrder(5))])


@pytest.mark.parametrize(
    ("shape", "wanted", "becomes"),
    [
        ((28, 28), (28, 28, 1), (28, 28, 1)),
        ((28, 28), (1, 28, 28), (1, 28, 28)),
        ((28, 28, 1), (1, 28, 28), (1, 28, 28)),
        ((28, 28, 1), (28, 28), (28, 28)),
        ((28, 28), (None, None, 1), (28, 28, 1)),
        ((5,), (5, 1), (5, 1)),
        ((4, 6, 3), (3, 4, 6), (3, 4, 6)),
        ((3, 4, 6), (4, 6, 3), (4, 6, 3)),
        ((3, 4, 6), (None, None, 3), (4, 6, 3)),
        ((4, 6, 3), (None, None, 3), (4, 6, 3)),
        ((3, 3, 3), (3, 3, 3), (3, 3, 3)),
        ((28, 28), (784,), (28, 28)),
        ((4, 6), (6, 4), (4, 6)),
    ],
)
def test_shapes_are_changed_only_where_one_way_is_clear(
    shape: tuple[int, ...], wanted: tuple[int | None, ...], becomes: tuple[int, ...]
) -> None:
    found = adapted(shape, wanted)
    assert found.shape[1:] == becomes
    plain = np.arange(found.size, dtype=np.float32).reshape(2, *shape)
    if sorted(shape) == sorted(becomes) and shape != becomes and 1 not in shape:
        turned = np.moveaxis(plain, -1, 1) if becomes[0] == shape[-1] else np.moveaxis(plain, 1, -1)
        assert np.array_equal(found, turned)
    else:
        assert np.array_equal(found.ravel(), plain.ravel())


def test_everything_that_is_changed_is_said() -> None:
    x, y = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    source, notes = adapt(source_of(x, y), model(4, 4, 1))
    assert [note.removeprefix("x of train.npz: ") for note in notes[:1]] == ["examples of 4x4 are reshaped to 4x4x1"]
    assert "?norm=/16" in notes[1]
    assert "?norm=unit" in notes[1]
    assert notes[2] == "y of train.npz: uint8 is cast to int64"
    found_x, found_y = whole(source)
    assert (found_x.dtype, found_y.dtype) == (np.float32, np.int64)
    assert adapt(source, model(4, 4, 1))[1] == ()


def test_whole_numbers_stay_whole_for_a_model_of_tokens() -> None:
    source, _ = adapt(source_of(np.array([[1.0, 2.0]])), model(2, dtype="int64"))
    assert whole_x(source).dtype == np.int64
    broken, _ = adapt(source_of(np.array([[1.0, 2.0], [1.5, 2.0]])), model(2, dtype="int64"))
    with pytest.raises(InputError, match="whole numbers"):
        whole_x(broken)
    far, _ = adapt(source_of(np.array([[1, 1 << 40]])), model(2, dtype="int32"))
    with pytest.raises(InputError, match="fit into int32, but some are not"):
        whole_x(far)


def test_too_many_inputs_or_none_at_all_are_refused() -> None:
    two = from_arrays("train.npz", {"a": np.zeros((2, 3)), "b": np.zeros((2, 3))}, {})
    with pytest.raises(UsageError, match=r"has 2 inputs, but the model has 1 \(image\)"):
        adapt(two, model(3))
    with pytest.raises(InputError, match="no examples"):
        adapt(source_of(np.zeros((0, 3))), model(3))


def checked(
    x: Array, y: Array | None = None, *, signature: ModelSignature | None = None, classes: int | None = 10
) -> None:
    tasks = () if classes is None else (Task(TaskKind.LABELS, classes),)
    check_batches(source_of(x, y), signature or model(4), needs_targets=y is not None, tasks=tasks)


def spoilt(place: tuple[int, ...], value: float) -> Array:
    found = np.zeros((700, 4), np.float32)
    found[place] = value
    return found


ZEROS = np.zeros((700, 4), np.float32)
LABELS = np.zeros(700, np.int64)
TEN = Task(TaskKind.LABELS, 10)


def labelled(place: int, value: float, dtype: type = np.int64) -> Array:
    found = np.zeros(700, dtype)
    found[place] = value
    return found


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.zeros((3, 5), np.float32), LABELS[:3], "5 for each example, but the input 'image' of the model has 4"),
        (spoilt((600, 2), np.nan), LABELS, "x of train.npz holds .* first in example 600"),
        (spoilt((600, 2), np.inf), LABELS, "x of train.npz holds .* first in example 600"),
        (ZEROS, labelled(650, np.nan, np.float32), "y of train.npz holds .* first in example 650"),
        (ZEROS, labelled(650, 10), "the label 10 in example 650 is outside 0 to 9: the model has 10 classes"),
        (ZEROS, labelled(650, -1), "the label -1 in example 650"),
        (ZEROS, labelled(650, 0.5, np.float32), "0.5 in example 650 is not a label"),
        (
            ZEROS,
            np.zeros((700, 9)),
            "y of train.npz has the shape 9 for each example, but the output of the model has 10",
        ),
        (ZEROS, np.array(["a"] * 700), "holds <U1, not numbers"),
        (ZEROS[:0], LABELS[:0], "no examples"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_before_the_first_step(x: Array, y: Array, said: str) -> None:
    with pytest.raises(PrunectlError, match=said) as caught:
        checked(x, y)
    # What does not fit the model is a wrong word; what fits none, a wrong file.
    assert caught.type is (UsageError if "model" in said or "label " in said else InputError)


@pytest.mark.parametrize(
    "y",
    [
        LABELS + 9,
        LABELS[:, None] + 9,
        np.full(700, 9.0),
        np.eye(10)[LABELS],
        np.full((700, 10), 0.1, np.float32),
    ],
)
def test_labels_and_a_number_for_each_class_pass(y: Array) -> None:
    checked(ZEROS, y)


def test_pixels_have_labels_too() -> None:
    signature = ModelSignature(
        (TensorSpec("image", (4,), "float32"),), (TensorSpec("map", (5, 6, 3), "float32"),), False
    )
    checked(ZEROS, np.full((700, 5, 6), 2), signature=signature, classes=3)
    with pytest.raises(UsageError, match="the label 3"):
        checked(ZEROS, np.full((700, 5, 6), 3), signature=signature, classes=3)


def test_numbers_to_be_predicted_need_no_classes() -> None:
    checked(ZEROS, np.full(700, 1e6), classes=None)


def test_missing_targets_are_refused_only_where_they_are_needed() -> None:
    with pytest.raises(UsageError, match="no targets"):
        check_batches(source_of(ZEROS), model(4), needs_targets=True, tasks=(TEN,))
    assert check_batches(source_of(ZEROS), model(4), needs_targets=False, tasks=(TEN,)) == ()


def test_a_late_label_is_found_also_where_the_inputs_are_too_many_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunectl.training.data.adapt.CHECKED_BYTES", 1)
    with pytest.raises(UsageError, match="the label 10 in example 650"):
        checked(ZEROS, labelled(650, 10))
    notes = check_batches(source_of(ZEROS, LABELS), model(4), needs_targets=True, tasks=(TEN,))
    assert notes == ("train.npz: only the first 256 of 700 examples were checked, and all labels",)


def test_an_endless_stream_is_looked_at_from_its_beginning_only() -> None:
    def forever() -> Iterator[Batch]:
        while True:
            yield Batch(np.zeros((100, 4), np.float32), np.zeros(100, np.int64))

    notes = check_batches(IterableSource("endless", None, True, forever), model(4), needs_targets=True, tasks=(TEN,))
    assert f"first {CHECKED_EXAMPLES:,} examples" in notes[0]


def test_a_change_of_inputs_and_targets_reaches_the_cheap_labels() -> None:
    source, _ = adapt(source_of(np.zeros((3, 4, 4), np.uint8), np.arange(3, dtype=np.uint8)), model(4, 4, 1))
    assert [as_tuple(y)[0].dtype for y in source.labels()] == [np.int64]
    with pytest.raises(PrunectlError, match="the label 2 in example 2"):
        check_batches(source, model(4, 4, 1, classes=2), needs_targets=True, tasks=(Task(TaskKind.LABELS, 2),))
