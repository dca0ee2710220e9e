"""A difference is told, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from prunectl.errors import WorkError
from prunectl.exporting import onnx as exporting_onnx
from prunectl.exporting.compare import INTEGERS, Tolerance, compare, tolerance_of
from prunectl.exporting.job import ExportJob, InputSpec, Samples
from prunectl.exporting.request import ExportRequest
from tests.contract import Array
from tests.exporting.exporting import DIGITS, export


@dataclass(frozen=True)
class Made:
    """A model that doubles."""

    inputs: tuple[InputSpec, ...] = ()
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        return {"same": inputs[0], "twice": inputs[0] * 2}


X = np.array([[1.0, 2.0], [3.0, 40.0]], np.float32)
EXACT = Tolerance(1e-4, 1e-4)


def compared(change: float, tolerance: Tolerance = EXACT, *, is_data: bool = True) -> object:
    samples = Samples(((X,), (X[:1],)), is_data)
    return compare(Made(), lambda given: {"same": given[0], "twice": given[0] * 2 + change}, samples, tolerance)


def test_the_difference_is_the_largest_and_the_mean() -> None:
    found = compared(0.5, Tolerance(1.0, 0.0))
    assert found.largest == 0.5
    assert found.mean == 0.25
    assert found.examples == 3
    assert found.top1_agreement == 1.0
    assert compared(0.0, is_data=False).top1_agreement is None


def test_the_first_output_that_differs_is_named_with_both_values() -> None:
    with pytest.raises(
        WorkError, match=r"the output twice differs from the source: 2\.5 instead of 2, in 6 of 6"
    ) as caught:
        compared(0.5)
    assert caught.value.exit_code == 5


def test_nan_and_infinity_are_equal_to_themselves_alone() -> None:
    odd = np.array([[np.nan, np.inf]], np.float32)
    with np.errstate(invalid="ignore"):
        compare(Made(), lambda given: Made().run(given), Samples(((odd,),), is_data=False), EXACT)
        with pytest.raises(WorkError, match="differs"):
            compare(
                Made(),
                lambda given: {name: np.zeros_like(given[0]) for name in ("same", "twice")},
                Samples(((odd,),), is_data=False),
                EXACT,
            )


def test_other_shapes_and_fewer_outputs_are_differences() -> None:
    samples = Samples(((X,),), is_data=False)
    with pytest.raises(WorkError, match="has 1 output, its source 2"):
        compare(Made(), lambda given: {"same": given[0]}, samples, EXACT)
    with pytest.raises(WorkError, match="the output same has the shape 2 instead of 2x2"):
        compare(Made(), lambda given: {"same": given[0][:, 0], "twice": given[0]}, samples, EXACT)


def test_a_converter_that_gets_it_wrong_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")

    def wrong(job: ExportJob, target: Path) -> tuple[str, ...]:
        proto = onnx.load(str(job.file.path))
        for one in proto.graph.initializer:
            if one.name == "fc2.bias":
                one.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one) + 1, one.name))
        onnx.save(proto, str(target))
        return ()

    monkeypatch.setattr(exporting_onnx, "write", wrong)
    with pytest.raises(WorkError, match="the output scores differs") as caught:
        export("digits_cnn.onnx", tmp_path / "wrong.onnx", data=DIGITS)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []
    found = export("digits_cnn.onnx", tmp_path / "wrong.onnx", data=DIGITS, atol=1.5, samples=50)
    assert found.comparison is not None
    assert found.comparison.examples == 50
    assert found.comparison.largest == pytest.approx(1.0, abs=1e-5)
    assert found.comparison.top1_agreement == 1.0


def answered(expected: Array, found: Array, tolerance: Tolerance, *, is_data: bool) -> float | None:
    """Compare two tables of answers."""
    source = Table(expected)
    result = compare(source, lambda _: {"answers": found}, Samples(((expected,),), is_data), tolerance)
    return result.top1_agreement


@dataclass(frozen=True)
class Table:
    """A model that answers with what it knows."""

    table: Array
    inputs: tuple[InputSpec, ...] = ()
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        assert len(inputs) == 1
        return {"answers": self.table}


def test_of_integers_the_noise_counts_and_for_classes_the_largest_answer() -> None:
    whole = np.random.default_rng(0).standard_normal((200, 5))
    scale = np.linalg.norm(whole) / np.linalg.norm(np.ones_like(whole))
    near, far = whole + 0.049 * scale, whole + 0.051 * scale
    assert answered(whole, near, INTEGERS, is_data=False) is None
    with pytest.raises(WorkError, match=r"the output answers differs by 5\.1% of its RMS"):
        answered(whole, far, INTEGERS, is_data=False)
    # With data the same numbers are classes, and moving all of them changes none.
    assert answered(whole, whole + 3, INTEGERS, is_data=True) == 1.0
    other = whole.copy()
    other[:4] = other[:4, ::-1] * np.array([1, 1, 0, 1, 1])
    wrong = int((other.argmax(1) != whole.argmax(1)).sum())
    assert 2 < wrong <= 4
    assert answered(whole, other, INTEGERS, is_data=True) == 1 - wrong / 200
    other[4:14] = -other[4:14]
    with pytest.raises(WorkError, match=r"the top-1 answer is the same for 9\d\.\d% of 200 examples; 98%"):
        answered(whole, other, INTEGERS, is_data=True)


def test_of_labels_the_share_that_is_the_same_counts() -> None:
    whole = np.arange(200) % 7
    other = whole.copy()
    other[:4] = (whole[:4] + 3) % 7
    answered(whole, other, INTEGERS, is_data=True)
    other[4] = (whole[4] + 1) % 7
    with pytest.raises(WorkError, match=r"the same for 97\.5% of 200"):
        answered(whole, other, INTEGERS, is_data=True)
    # Neighbours among large numbers are as wrong as others.
    with pytest.raises(WorkError, match=r"the same for 0\.0% of 200"):
        answered(whole + 1000, whole + 1001, INTEGERS, is_data=True)


def test_of_pixels_the_noise_counts_though_they_are_integers() -> None:
    pixels = np.arange(100, 228).reshape(8, 16)
    for kind in (np.uint8, np.int64):
        answered(pixels.astype(kind), (pixels + 1).astype(kind), INTEGERS, is_data=True)
        with pytest.raises(WorkError, match="of its RMS"):
            answered(pixels.astype(kind), (pixels + 20).astype(kind), INTEGERS, is_data=True)


def test_what_is_no_number_is_beyond_every_noise_and_what_is_zero_has_none() -> None:
    whole = np.ones((3, 2))
    for value in (np.nan, np.inf):
        broken = whole.copy()
        broken[1, 1] = value
        with pytest.raises(WorkError, match="differs"):
            answered(whole, broken, INTEGERS, is_data=False)
    assert answered(whole * 0, whole * 0, INTEGERS, is_data=False) is None
    with pytest.raises(WorkError, match="differs"):
        answered(whole * 0, whole, INTEGERS, is_data=False)


def test_of_a_few_examples_one_may_be_another_if_all_numbers_are_near() -> None:
    whole = np.tile([0.0, 1.0, 1.001], (4, 1))
    other = whole.copy()
    other[0, 1] = 1.002
    assert answered(whole, other, INTEGERS, is_data=True) == 0.75
    other[2, 1] = 1.002
    with pytest.raises(WorkError, match="the top-1 answer"):
        answered(whole, other, INTEGERS, is_data=True)
    far = np.eye(2)
    with pytest.raises(WorkError, match="of its RMS"):
        answered(far, far[[0, 0]], INTEGERS, is_data=True)


def test_what_the_user_allows_takes_the_place_of_what_is_usual() -> None:
    assert tolerance_of(ExportRequest(int8=True)) is INTEGERS
    assert tolerance_of(ExportRequest(int8=True, atol=0.5)) == Tolerance(0.5, 0.0)
    assert tolerance_of(ExportRequest(rtol=0.5)) == Tolerance(1e-4, 0.5)


def test_words_and_complex_numbers_are_compared_as_well() -> None:
    words, numbers = np.array(["cat", "dog"], object), np.array([1 + 2j, 3 - 1j])
    for whole, other in ((words, words[::-1]), (numbers, numbers.conj())):
        answered(whole, whole.copy(), EXACT, is_data=False)
        with pytest.raises(WorkError, match="differs"):
            answered(whole, other, EXACT, is_data=False)
