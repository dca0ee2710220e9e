"""Sentences stay sentences, however long a name, a type, a path or a shape from a file may be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.running import here
from tests.safety import makers
from tests.safety.makers import Maker

LONG = "n" * 1_000_000


def header(**facts: object) -> Maker:
    """A safetensors file of one tensor with a long name."""
    told = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **facts}
    return makers.safetensors(json.dumps({LONG: told}).encode(), bytes(4))


def linked(folder: Path) -> Path:
    with h5py.File(folder / "m.h5", "w") as file:
        file["a" * 60_000] = h5py.ExternalLink("b" * 60_000, "c")
    return folder / "m.h5"


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "m.keras", "w") as archive:
        for name in ("config.json", "model.weights.h5", "../" + "n" * 60_000):
            archive.writestr(name, b"{}")
    return folder / "m.keras"


SENTENCES: dict[str, tuple[Maker, str]] = {
    "a name": (header(data_offsets=[0, 5]), "does not match bytes 0..5"),
    "a type": (header(dtype=LONG), "a type that prunectl does not read"),
    "a shape": (header(shape=[1] * 10_000), "too large for any memory"),
    "a number": (header(shape=[10**4000]), "is not JSON"),
    "a name that lies nowhere": (header(data_offsets=[]), "does not give the offsets"),
    "a shard that is missing": (makers.index(b'{"weight_map":{"a":"%s"}}' % LONG.encode()[:200]), "is missing"),
    "a shard elsewhere": (makers.index(json.dumps({"weight_map": {"a": f"/{LONG}"}}).encode()), "outside its folder"),
    "a link": (linked, "links to another file"),
    "an entry of a zip": (zipped, "points out of the archive"),
}


@pytest.mark.parametrize(("make", "reason"), SENTENCES.values(), ids=SENTENCES)
def test_a_sentence_is_short_and_still_says_why(make: Maker, reason: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    found = here("inspect", path)
    error, *_ = found.err.splitlines()
    assert found.code == 3
    assert len(error) <= 310
    assert path.name in error
    assert reason in error


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A sound model with a tensor that has a very long name."""
    return header()(tmp_path)


def written(*words: str) -> Callable[[Path, Path], str]:
    return lambda path, _: here("inspect", path, *words).out


def paged(path: Path, folder: Path) -> str:
    assert here("inspect", path, "--html", folder / "page.html").code == 0
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "show",
    [written(), written("--format", "plain"), written("--format", "csv"), written("--format", "markdown"), paged],
    ids=["as it comes", "plain", "csv", "markdown", "html"],
)
def test_a_table_shows_the_two_ends_of_a_very_long_name(
    show: Callable[[Path, Path], str], named: Path, tmp_path: Path
) -> None:
    text = show(named, tmp_path)
    assert "n" * 50 in text
    assert "…" in text
    assert "n" * 2500 not in text


def test_json_has_a_very_long_name_whole(named: Path) -> None:
    assert [row["name"] for row in here("inspect", named, "--json").json["models"][0]["layers"]] == [LONG]


def test_a_producer_that_is_very_long_is_cut(tmp_path: Path) -> None:
    path = makers.safetensors(
        json.dumps(
            {"__metadata__": {"format": LONG}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        ).encode(),
        np.ones(1, np.float32).tobytes(),
    )(tmp_path)
    found = here("inspect", path, "--format", "human")
    assert len(found.out) < 10_000
