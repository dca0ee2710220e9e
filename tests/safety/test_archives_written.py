"""A zip that is written again keeps what its directory says of every entry."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import pytest

from prunectl.formats import zip_write
from prunectl.formats.extents import Extent
from prunectl.formats.zip_read import ZipEntry, open_archive
from tests.running import FIXTURES, here, prunectl

HALF = ("-s", "0.5", "-q")
_TIMES = b"UT\x05\x00\x01\x00\x00\x00\x40"
"""An extra record, as Info-ZIP writes it."""


def decorated(source: Path, target: Path, kind: int) -> Path:
    """Write an archive again with everything in its directory that others may have put there."""
    with ZipFile(source) as old, ZipFile(target, "w") as new:
        new.comment = b"of the archive"
        # What PyTorch promises of where bytes lie does not hold of an archive that is written again.
        kept = [info for info in old.infolist() if not info.filename.endswith("/.format_version")]
        for number, before in enumerate(kept):
            info = ZipInfo(before.filename, (2020, 1, 2, 3, 4, 6))
            info.compress_type, info.create_system = kind, number % 2 * 3
            info.external_attr, info.internal_attr = (0o100640 + number % 2) << 16, number % 2
            info.comment, info.extra = f"of entry {number}".encode(), _TIMES
            new.writestr(info, old.read(before))
        new.writestr(ZipInfo("assets/", (2020, 1, 2, 3, 4, 6)), b"")
    return target


def said(path: Path, *, with_times: bool = True) -> dict[str, tuple[object, ...]]:
    with ZipFile(path) as archive:
        entries = {
            info.filename: (
                info.create_system,
                info.external_attr,
                info.internal_attr,
                info.comment,
                *((info.date_time, info.extra) if with_times else ()),
            )
            for info in archive.infolist()
        }
        return {"": (archive.comment,), **entries}


@pytest.mark.parametrize("kind", [ZIP_DEFLATED, ZIP_STORED])
@pytest.mark.parametrize("words", [("prune", *HALF), ("strip", "-q")])
def test_a_keras_archive_keeps_comments_modes_and_extra_records(
    words: tuple[str, ...], kind: int, tmp_path: Path
) -> None:
    model = decorated(FIXTURES / "deflated.keras", tmp_path / "m.keras", kind)
    command, *more = words
    assert here(command, model, "-o", tmp_path / "out.keras", *more).code == 0
    assert said(tmp_path / "out.keras") == said(model)


def test_a_deflated_archive_of_pytorch_keeps_them_too(tmp_path: Path) -> None:
    model = decorated(FIXTURES / "digits_cnn.pt", tmp_path / "m.pt", ZIP_DEFLATED)
    assert here("prune", model, "-o", tmp_path / "out.pt", *HALF).code == 0
    assert said(tmp_path / "out.pt") == said(model)


def test_packing_keeps_all_but_times(tmp_path: Path) -> None:
    model = decorated(FIXTURES / "digits_cnn.pt", tmp_path / "m.pt", ZIP_STORED)
    assert here("prune", model, "-o", tmp_path / "out.pt", "--pack", *HALF).code == 0
    assert said(tmp_path / "out.pt", with_times=False) == said(model, with_times=False)


def test_the_entries_that_changed_are_found_without_asking_each_of_each() -> None:
    entries = [ZipEntry(str(index), 8, Extent(Path("m"), 100 + 10 * index, 8), True, 0) for index in range(100_000)]
    # To ask each of each takes minutes.
    assert zip_write._touched(entries, [entry.extent.offset + 4 for entry in entries[::2]]) == entries[::2]


def test_a_huge_file_in_the_place_of_a_manifest_is_not_read_whole(tmp_path: Path) -> None:
    huge = tmp_path / "run.json"
    with huge.open("wb") as file:
        file.write(b'{"mine":')
        os.truncate(file.fileno(), 1 << 40)
    done = prunectl("prune", FIXTURES / "digits_cnn.pt", "-o", tmp_path / "out.pt", "--manifest", huge, *HALF)
    assert (done.code, "is not a prunectl manifest" in done.err) == (2, True), done.err
    assert not (tmp_path / "out.pt").exists()
    assert huge.stat().st_size == 1 << 40


def test_a_manifest_of_a_run_before_is_written_over(tmp_path: Path) -> None:
    words = ("prune", FIXTURES / "digits_cnn.pt", "--manifest", tmp_path / "run.json", *HALF)
    assert here(*words, "-o", tmp_path / "one.pt").code == here(*words, "-o", tmp_path / "two.pt").code == 0


def test_entries_with_64_bit_lengths_are_aligned_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ZipFile(tmp_path / "old.zip", "w") as old:
        for size in (900, 980, 1100):
            old.writestr(f"of {size} bytes", bytes(size))
    # In place of entries of 2 GB: those of more than 952 bytes get the lengths.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    zip_write.rewrite_zip(open_archive(tmp_path / "old.zip"), tmp_path / "new.zip", {}, alignment=64)
    entries = open_archive(tmp_path / "new.zip").entries.values()
    assert [entry.extent.offset % 64 for entry in entries] == [0, 0, 0]
