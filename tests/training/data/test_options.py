from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.training.data import spec
from prunectl.training.data.source import as_tuple, peek
from tests.training.data.sources import model, opened, whole

BYTES = np.arange(0, 240, 10, dtype=np.uint8).reshape(6, 2, 2)
Y = np.array([0, 3, 5, 0, 1, 5])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", x=BYTES, y=Y)
    return tmp_path / "a.npz"


def test_classes_keep_their_examples_and_are_numbered_anew_only_when_asked(saved: Path) -> None:
    x, y = whole(opened(f"{saved}?classes=5,0,3"))
    kept = np.isin(Y, [0, 3, 5])
    assert np.array_equal(x, BYTES[kept])
    assert np.array_equal(y, Y[kept])
    source = opened(f"{saved}?classes=5,0,3&relabel=1")
    assert source.count == 5
    assert whole(source)[1].tolist() == [0, 1, 2, 0, 2]
    assert [y.tolist() for y in source.labels()] == [[0, 1, 2, 0, 2]]


def test_a_limit_counts_what_the_classes_leave(saved: Path) -> None:
    source = opened(f"{saved}?limit=2&classes=5")
    assert source.count == 2
    assert whole(source)[0].tolist() == BYTES[[2, 5]].tolist()


def test_norms_are_what_they_say(saved: Path) -> None:
    assert np.allclose(whole(opened(f"{saved}?norm=unit"))[0], BYTES / 255)
    assert np.allclose(whole(opened(f"{saved}?norm=0.5:0.25"))[0], (BYTES / 255 - 0.5) / 0.25, atol=1e-6)
    assert whole(opened(f"{saved}?norm=none"))[0].dtype == np.float32


@pytest.mark.parametrize("first", [True, False])
def test_the_imagenet_norm_finds_the_channels(tmp_path: Path, first: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    stored, wanted = (np.moveaxis(a, -1, 1) if first else a for a in (pixels, expected))
    np.savez(tmp_path / "a.npz", x=stored, y=Y[:4])
    found = whole(opened(f"{tmp_path}/a.npz?norm=imagenet", model(3, 5, 6, first=first)))[0]
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_where_both_ends_could_be_channels_the_model_decides(tmp_path: Path, first: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, y=Y[:2])
    found = whole(opened(f"{tmp_path}/a.npz?norm=0,0.5,1:1,2,4", model(3, 5, 3, first=first)))[0]
    mean, deviation = (np.array(v).reshape((1, 3, 1, 1) if first else (3,)) for v in ([0, 0.5, 1], [1, 2, 4]))
    assert np.allclose(found, (pixels / 255 - mean) / deviation, atol=1e-6)


def test_what_is_normalised_already_is_not_divided_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=BYTES / 255, y=Y)
    with pytest.raises(UsageError, match="already between -1 and 1"):
        opened(f"{tmp_path}/a.npz?norm=unit")


def test_shape_flatten_and_onehot(saved: Path) -> None:
    assert whole(opened(f"{saved}?shape=1x2x2"))[0].tolist() == BYTES.reshape(6, 1, 2, 2).tolist()
    assert whole(opened(f"{saved}?flatten"))[0].tolist() == BYTES.reshape(6, 4).tolist()
    assert whole(opened(f"{saved}?onehot=6"))[1].tolist() == np.eye(6)[Y].tolist()
    with pytest.raises(InputError, match="the label 5 does not fit onehot=5: labels must be 0 to 4"):
        peek(opened(f"{saved}?onehot=5"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nrom=unit", "has no option nrom"),
        ("target=a", "has no option target"),
        ("size=2x2", "has no option size"),
        ("limit=0", "limit=0 is not a count"),
        ("norm=halves", "norm=halves is not known"),
        ("norm=0.5:0", "deviations above zero"),
        ("norm=imagenet", "3 channels"),
        ("relabel=1", "relabel needs classes"),
        ("relabel=maybe&classes=1", "must be 0 or 1"),
        ("classes=", "is not a list of classes"),
        ("classes=a,b", "is not a list of classes"),
        ("shape=2x0", "shape=0 is not a count"),
        ("limit=1&limit=2", "limit twice"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(saved: Path, options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        opened(f"{saved}?{options}")


def test_a_misspelt_option_says_what_was_meant_and_what_there_is(saved: Path) -> None:
    with pytest.raises(UsageError) as caught:
        opened(f"{saved}?nrom=unit")
    assert caught.value.did_you_mean == ("norm",)
    assert "classes" in caught.value.hint


def test_an_unknown_kind_of_data_says_the_grammar(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    for text in (f"{tmp_path}/a.txt", " "):
        with pytest.raises(UsageError) as caught:
            opened(text)
        assert "table.csv?target=label" in caught.value.hint


def test_question_marks_of_globs_and_names_are_told_from_options(tmp_path: Path) -> None:
    assert spec.parse("part-0?.tfrecord?schema=f.json").where == "part-0?.tfrecord"
    assert spec.parse("part-?.npz").where == "part-?.npz"
    assert spec.parse("t.csv?target=what?").options == {"target": "what?"}
    assert spec.parse("t.csv?target=a%26b").options == {"target": "a&b"}
    odd = tmp_path / "a?b=1"
    odd.mkdir()
    assert spec.parse(str(odd)).where == str(odd)


def test_random_data_follows_the_model_and_is_marked(tmp_path: Path) -> None:
    source = opened("random:64", model(3, 8, 8, classes=4))
    x, y = whole(source)
    assert "random" in source.notes[0]
    assert x.shape == (64, 3, 8, 8)
    assert x.dtype == np.float32
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert np.array_equal(x, whole(opened("random:64", model(3, 8, 8, classes=4)))[0])
    assert "random" in opened("random:3?limit=2", model(4)).notes[0]


def test_random_data_needs_every_length() -> None:
    with pytest.raises(UsageError, match=r"\(3, \?, \?\)"):
        opened("random:8", model(3, None, None))
    batch = peek(opened("random:8?shape=3x16x16", model(3, None, None)))
    assert batch is not None
    assert as_tuple(batch.x)[0].shape == (8, 3, 16, 16)
    with pytest.raises(UsageError, match="not a count"):
        opened("random:many", model(3))
    with pytest.raises(UsageError, match="needs a model"):
        opened("random:8")
