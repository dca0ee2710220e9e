from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import EpochOrder, as_tuple, peek
from tests.training.data.sources import opened, whole

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("x", "y"), ("x_train", "y_train"), ("X", "y"), ("pictures", "kinds")])
def test_npz_inputs_and_targets_are_found_by_their_names(
    tmp_path: Path, save: Callable[..., None], names: tuple[str, str]
) -> None:
    save(tmp_path / "a.npz", **{names[1]: Y, names[0]: X})
    source = opened(tmp_path / "a.npz")
    x, y = whole(source)
    assert np.array_equal(x, X)
    assert np.array_equal(y, Y)
    assert source.count == 6
    assert bool(source.notes) == (names[0] == "pictures")


def test_npz_arrays_are_chosen_in_brackets_and_several_inputs_with_a_plus(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=X, b=X * 2, labels=Y, other=np.zeros(3))
    batch = peek(opened(f"{tmp_path}/a.npz[b+a,labels]"))
    assert batch is not None
    assert batch.y is not None
    assert [part.tolist() for part in as_tuple(batch.x)] == [(X * 2).tolist(), X.tolist()]
    assert not opened(f"{tmp_path}/a.npz[a]").has_targets


TEXT = ModelSignature(
    (TensorSpec("mask", (4,), "int64"), TensorSpec("ids", (4,), "int64")),
    (TensorSpec("kind", (3,), ""), TensorSpec("score", (1,), "")),
    is_channels_first=False,
)


@pytest.mark.parametrize("spec", ["a.npz", "a.npz[ids+mask,score+kind]", "ids.npy+mask.npy,score.npy+kind.npy"])
def test_arrays_that_have_the_names_of_a_model_go_where_it_has_them(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {"ids": X, "score": Y * 2, "kind": Y, "mask": X > 3}
    np.savez("a.npz", **arrays)
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    source = opened(spec, TEXT)
    batch = peek(source)
    assert batch is not None
    assert batch.y is not None
    for name, array in zip(("mask", "ids", "kind", "score"), (*as_tuple(batch.x), *as_tuple(batch.y)), strict=True):
        assert np.array_equal(array, arrays[name])
    assert bool(source.notes) == (spec != "a.npz")


def test_a_name_of_the_model_in_another_place_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=X, attention=X, kind=Y, score=Y)
    with pytest.raises(UsageError, match="ids is not in the model's position"):
        opened(f"{tmp_path}/a.npz[ids+attention,kind+score]", TEXT)
    peek(opened(f"{tmp_path}/a.npz[attention+ids,kind+score]", TEXT))


def test_stored_npz_entries_are_mapped_and_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(X), y=Y)
    x, _ = whole(opened(tmp_path / "a.npz"))
    assert np.array_equal(x, X)
    batch = peek(opened(tmp_path / "a.npz"))
    assert batch is not None
    assert batch.y is not None
    assert isinstance(as_tuple(batch.y)[0].base, np.memmap)


def test_npz_with_many_arrays_says_which_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=X, two=Y, three=Y)
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "a.npz")
    assert "one, two, three" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        opened(f"{tmp_path}/a.npz[one,tow]")
    assert caught.value.did_you_mean == ("two",)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([object], dtype=object), y=Y)
    for spec in ("x.npy", "a.npz"):
        with pytest.raises(InputError, match="never unpickles"):
            opened(tmp_path / spec)


def test_npy_files_are_joined_by_commas_and_pluses(tmp_path: Path) -> None:
    folder = tmp_path / "c++,data"
    folder.mkdir()
    np.save(folder / "a.npy", X)
    np.save(folder / "b.npy", X * 2)
    np.save(folder / "y.npy", Y)
    batch = peek(opened(f"{folder}/a.npy+{folder}/b.npy,{folder}/y.npy"))
    assert batch is not None
    assert batch.y is not None
    assert [part.sum() for part in as_tuple(batch.x)] == [X.sum(), 2 * X.sum()]
    assert isinstance(as_tuple(batch.x)[0].base, np.memmap)
    with pytest.raises(UsageError, match="names 3 groups of arrays"):
        opened(f"{folder}/a.npy,{folder}/b.npy,{folder}/y.npy")


def test_arrays_of_different_lengths_are_refused_with_both_lengths(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y[:4])
    with pytest.raises(InputError, match="x has 6, y has 4"):
        opened(tmp_path / "a.npz")


def test_words_and_single_numbers_are_no_examples(tmp_path: Path) -> None:
    np.savez(tmp_path / "words.npz", x=X, y=np.array(list("abcabc")))
    np.savez(tmp_path / "single.npz", x=np.array(3.0))
    with pytest.raises(InputError, match="not of numbers"):
        opened(tmp_path / "words.npz")
    with pytest.raises(InputError, match="single number"):
        opened(tmp_path / "single.npz")


@pytest.mark.parametrize("cut", [0, 5, 60, 200])
def test_a_truncated_npy_is_told_as_damaged(tmp_path: Path, cut: int) -> None:
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged"):
        opened(tmp_path / "cut.npy")


def test_a_compressed_entry_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    with pytest.raises(InputError, match="96 bytes, but 88 follow"):
        opened(tmp_path / "a.npz")


def test_a_path_that_is_not_there_is_an_input_error_and_says_how_to_quote(tmp_path: Path) -> None:
    for name in ("a.npz", "x.npy", "t.csv", "t.parquet", "images/", "nothing"):
        with pytest.raises(InputError, match="does not exist"):
            opened(tmp_path / name)
    with pytest.raises(InputError) as caught:
        opened(f"{tmp_path}/*.tfrecord?schema=f.json")
    assert "quote the SPEC" in caught.value.hint


def test_a_slice_of_a_mapped_array_can_be_shuffled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    source = opened(tmp_path / "a.npz")
    rows = np.concatenate([as_tuple(b.x)[0] for b in source.batches(EpochOrder(4, is_shuffled=True))])
    assert sorted(rows[:, 0].tolist()) == X[:, 0].tolist()
    assert rows.tolist() != X.tolist()
