from __future__ import annotations

import csv
import importlib
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.errors import InputError, MissingExtraError, UsageError
from prunectl.training.data import tables
from prunectl.training.data.readers import IndexedSource, IterableSource
from prunectl.training.data.source import EpochOrder
from tests.training.data.sources import opened, whole

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(floats, floats, st.text("ab,;\"'\n é", min_size=1).filter(str.strip)), min_size=1, max_size=9
    )
)
def test_what_pythons_csv_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    text = io.StringIO()
    csv.writer(text).writerows([["one", "two, quoted", "label"], *rows])
    path.write_text(text.getvalue(), "utf-8", newline="")
    x, y = whole(opened(f"{path}?target=label"))
    words = [row[2].strip() for row in rows]
    assert np.array_equal(x, np.array([row[:2] for row in rows], np.float32))
    assert [sorted(set(words))[number] for number in y] == words


def test_targets_keep_what_they_are_whole_broken_or_words(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,whole,broken,word", "1,3,0.5,dog", "2,1,2,cat")
    whole_y, broken, words = (
        whole(opened(f"{path}?target={name}&columns=a"))[1] for name in ("whole", "broken", "word")
    )
    assert whole_y.tolist() == [3, 1]
    assert whole_y.dtype == np.int64
    assert broken.tolist() == [0.5, 2]
    assert broken.dtype == np.float32
    assert words.tolist() == [1, 0]
    assert whole(opened(f"{path}?target=whole,broken&columns=a"))[1].tolist() == [[3, 0.5], [1, 2]]
    assert "0 cat, 1 dog" in opened(f"{path}?target=word&columns=a").notes[0]


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", "\t")])
def test_the_separator_is_found(tmp_path: Path, name: str, separator: str) -> None:
    lines = [separator.join(cells) for cells in (("\ufeffa", "b", "y"), ("1", "2", "0"), ("3", "4", "1"))]
    x, y = whole(opened(f"{written(tmp_path / name, *lines)}?target=y&columns=a,b"))
    assert x.tolist() == [[1, 2], [3, 4]]
    assert y.tolist() == [0, 1]


def test_columns_come_in_the_order_that_is_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b,c", "1,2,3")
    assert [batch.x.tolist() for batch in opened(f"{path}?columns=c,a").batches(EpochOrder(2))] == [[[3, 1]]]
    assert not opened(path).has_targets


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a,y", "1,0", "two,1"], "line 3: 'two' in column 'a' is not a number"),
        (["a,y", "1,0", ",1"], "line 3: the column 'a' is empty"),
        (["a,y", "1,0", "2, "], "line 3: the column 'y' is empty"),
        (["a,y", "1,0", "2"], "line 3: the row has 1 cells, the header 2"),
        (["a,a,y", "1,2,0"], "two columns called 'a'"),
        (["a,y"], "no rows"),
        (["1.5,2", "3,4"], "its first line holds numbers"),
        ([], "is empty"),
        (["a,y", '1,"0'], "is not a text table"),
    ],
)
def test_a_flaw_in_a_table_is_told_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    path = written(tmp_path / "t.csv", *lines)
    with pytest.raises(InputError, match=said):
        list(opened(f"{path}?target=y").batches(EpochOrder(2)))


def test_a_misspelt_column_says_what_was_meant(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "width,label", "1,0")
    with pytest.raises(UsageError) as caught:
        opened(f"{path}?target=lable")
    assert caught.value.did_you_mean == ("label",)
    with pytest.raises(UsageError, match="both as an input and as a target"):
        opened(f"{path}?target=label&columns=label")


def test_a_table_too_big_to_hold_streams_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t.csv", "a,y", *(f"{number},c{number % 3}" for number in range(3000)))
    held = opened(f"{path}?target=y")
    monkeypatch.setattr(tables, "HELD_BYTES", 0)
    streamed = opened(f"{path}?target=y")
    assert isinstance(held, IndexedSource)
    assert isinstance(streamed, IterableSource)
    assert held.count == streamed.count == 3000
    for one, other in zip(whole(held), whole(streamed), strict=True):
        assert np.array_equal(one, other)


def test_parquet_columns_are_read_like_those_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32)
    words = ["dog", "cat", "ant", "cat", "dog"] * 1000
    table = arrow.table(
        {
            "a": x[:, 0],
            "b": x[:, 1].astype(np.float64),
            "word": words,
            "coded": arrow.array(words).dictionary_encode(),
            "flat": x.tolist(),
            "whole": np.arange(5000, dtype=np.int32),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    for target in ("word", "coded"):
        found, y = whole(opened(f"{tmp_path}/t.parquet?target={target}&columns=a,b"))
        assert np.array_equal(found, x)
        assert [["ant", "cat", "dog"][number] for number in y] == words
    monkeypatch.setattr(tables, "HELD_BYTES", 0)
    source = opened(f"{tmp_path}/t.parquet?target=whole&columns=flat")
    assert isinstance(source, IterableSource)
    assert source.count == 5000
    found, y = whole(source)
    assert np.array_equal(found, x)
    assert np.array_equal(y, np.arange(5000))


def test_parquet_holes_words_and_damage_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"hole": [1.0, None], "word": ["a", "b"], "ragged": [[1], [2, 3]], "y": [0, 1]})
    parquet.write_table(table, tmp_path / "t.parquet")
    for name, said in (
        ("hole", "is empty in 1 rows"),
        ("word", "holds string, not numbers"),
        ("ragged", "differ in length"),
    ):
        with pytest.raises(InputError, match=said):
            opened(f"{tmp_path}/t.parquet?target=y&columns={name}")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        opened(f"{tmp_path}/cut.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def missing(name: str) -> ModuleType:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name="pyarrow")
        return load(name)

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError) as caught:
        opened(tmp_path / "t.parquet")
    assert caught.value.hint.endswith("pip install pyarrow")
