"""A model of many files as one stream, beside Python's tarfile."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from prunectl.analysis.sizes import iter_model_bytes, iter_tar
from prunectl.formats.base import ModelFile, ModelInfo
from prunectl.formats.registry import open_model
from tests.running import FIXTURES

Content = dict[str, bytes]


def written(folder: Path, content: Content, *, time: int = 0) -> tuple[Path, ...]:
    """Write files in the order given."""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (time, time))
    return tuple(folder / name for name in content)


def by_tarfile(content: Content) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in sorted(content.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ours(folder: Path, files: tuple[Path, ...]) -> bytes:
    return b"".join(iter_tar(folder, files))


NAMES = st.lists(
    st.text("ab_ü.0", min_size=1, max_size=60).filter(lambda part: part not in {".", ".."}), min_size=1, max_size=3
).map(lambda parts: "/".join(f"{part}x" for part in parts))
DATA = st.one_of(st.binary(max_size=20), st.sampled_from([0, 511, 512, 513, 10_240, 20_000]).map(bytes))


@given(st.dictionaries(NAMES, DATA, max_size=6))
def test_it_is_to_the_byte_what_tarfile_writes_of_sorted_files_without_times(named: Content) -> None:
    # A folder cannot be where a file is.
    content = {f"{number}/{name}": data for number, (name, data) in enumerate(sorted(named.items()))}
    with tempfile.TemporaryDirectory() as folder:
        assert ours(Path(folder), written(Path(folder), content)) == by_tarfile(content)


def test_names_longer_than_a_tar_header_has_room_for_are_kept(tmp_path: Path) -> None:
    content = {f"{'f' * 120}/{'n' * length}": b"data" for length in (1, 99, 100, 101, 200)}
    content |= {"k" * 99: b"", "l" * 100: b"", "m" * 101: b""}
    data = ours(tmp_path, written(tmp_path, content))
    assert data == by_tarfile(content)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == sorted(content)


def test_the_end_is_filled_to_a_whole_record_also_when_it_is_nearly_full(tmp_path: Path) -> None:
    for blocks in range(15, 22):
        content = {"a": bytes(512 * blocks)}
        assert ours(tmp_path, written(tmp_path, content)) == by_tarfile(content)


def test_no_files_are_an_empty_record(tmp_path: Path) -> None:
    assert ours(tmp_path, ()) == by_tarfile({}) == bytes(10_240)


def test_neither_time_nor_order_nor_rights_nor_the_name_of_the_folder_matters(tmp_path: Path) -> None:
    content = {"b/2": b"two", "a": b"one", "b/10": b"ten"}
    first, second = tmp_path / "first", tmp_path / "a longer name"
    data = ours(first, written(first, content, time=1_000_000_000))
    files = written(second, dict(reversed(content.items())), time=1_700_000_000)
    files[0].chmod(0o600)
    assert ours(second, tuple(reversed(files))) == data


def test_one_file_is_streamed_as_it_is_and_a_folder_with_one_file_as_a_tar(tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.safetensors"
    assert b"".join(iter_model_bytes(open_model(path))) == path.read_bytes()
    files = written(tmp_path, {"only": b"one"})
    folder = ModelFile(tmp_path, "made", (), ModelInfo(), files)
    assert b"".join(iter_model_bytes(folder)) == by_tarfile({"only": b"one"})


def test_shards_are_a_tar_of_their_names_beside_the_index() -> None:
    folder = FIXTURES / "two_shards"
    expected = by_tarfile({path.name: path.read_bytes() for path in folder.iterdir()})
    assert b"".join(iter_model_bytes(open_model(folder))) == expected
