from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.training.backend import ModelSignature
from prunectl.training.data.source import Source, as_tuple, peek
from tests.training.data.sources import Array, model, opened, whole

image: Any = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("dog", 2), ("cat", 3)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    (tmp_path / "images" / "cat" / ".hidden.png").write_bytes(b"holds no images")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("holds no images")
    return tmp_path / "images"


def pixels(path: Path, mode: str = "RGB") -> Array:
    with image.open(path) as file:
        return np.array(file.convert(mode))


def first(source: Source) -> Array:
    batch = peek(source)
    assert batch is not None
    return as_tuple(batch.x)[0][0]


def test_folders_are_classes_in_the_order_of_their_names(folder: Path) -> None:
    source = opened(f"{folder}/")
    x, y = whole(source)
    assert y.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(x[3], pixels(folder / "dog" / "0.png"))
    assert source.count == 5
    assert "2 classes, one for each folder: 0 cat, 1 dog" in source.notes[1]
    assert opened(folder).count == 5


@pytest.mark.parametrize(
    ("signature", "shape"),
    [
        (model(6, 8, 3), (6, 8, 3)),
        (model(3, 6, 8, first=True), (3, 6, 8)),
        (model(4, 5, 1), (4, 5, 1)),
        (model(1, 4, 5, first=True), (1, 4, 5)),
        (model(4, 5), (4, 5)),
        (model(None, None, 3), (6, 8, 3)),
        (None, (6, 8, 3)),
    ],
)
def test_pictures_take_the_shape_of_the_model(
    folder: Path, signature: ModelSignature | None, shape: tuple[int, ...]
) -> None:
    assert first(opened(folder, signature)).shape == shape


def test_grey_and_size_are_pillows_own(folder: Path) -> None:
    found = first(opened(f"{folder}?color=grey&size=3x4"))
    with image.open(folder / "cat" / "0.png") as file:
        expected = np.array(file.convert("L").resize((4, 3), image.Resampling.BILINEAR))
    assert np.array_equal(found[:, :, 0], expected)


def test_channels_first_is_the_same_picture_turned(folder: Path) -> None:
    last, turned = first(opened(folder, model(6, 8, 3))), first(opened(folder, model(3, 6, 8, first=True)))
    assert np.array_equal(np.moveaxis(turned, 0, -1), last)


def test_a_flat_folder_has_no_targets(folder: Path) -> None:
    source = opened(folder / "cat")
    assert (source.count, source.has_targets) == (3, False)


def test_classes_are_chosen_without_opening_a_picture(folder: Path) -> None:
    (folder / "dog" / "1.png").write_bytes(b"holds no images")
    assert opened(f"{folder}?classes=1").count == 2
    assert [y.tolist() for y in opened(f"{folder}?classes=1&relabel=1").labels()] == [[0, 0]]


def test_pictures_of_differing_size_name_the_odd_one(folder: Path) -> None:
    image.new("RGB", (5, 5)).save(folder / "dog" / "9.png")
    with pytest.raises(InputError, match=r"9\.png is \(5, 5, 3\)"):
        whole(opened(folder))
    assert whole(opened(f"{folder}?size=6x8"))[0].shape == (6, 6, 8, 3)


def test_a_broken_picture_is_named(folder: Path) -> None:
    (folder / "dog" / "1.png").write_bytes((folder / "dog" / "1.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"1\.png cannot be read as an image"):
        whole(opened(folder))


def test_a_folder_of_splits_is_no_folder_of_classes(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(folder.parent)
    assert "name it instead" in caught.value.hint


def test_pictures_beside_folders_and_empty_folders_are_refused(folder: Path) -> None:
    image.new("RGB", (6, 8)).save(folder / "stray.png")
    with pytest.raises(InputError, match="holds both images and folders"):
        opened(folder)
    (folder / "cat" / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        opened(folder / "cat" / "empty")


@pytest.mark.parametrize("options", ["size=28", "size=axb", "color=blue"])
def test_options_of_pictures_are_checked(folder: Path, options: str) -> None:
    with pytest.raises(UsageError):
        opened(f"{folder}?{options}")
    with pytest.raises(UsageError, match="takes 4 channels"):
        opened(folder, model(6, 8, 4))


def test_a_photo_is_held_upright(tmp_path: Path) -> None:
    photo = image.new("RGB", (8, 6))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert first(opened(f"{tmp_path}/")).shape == (8, 6, 3)
