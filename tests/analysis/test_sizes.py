"""Sizes to the byte, beside Python's own compressors."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from prunectl.analysis import estimate
from prunectl.analysis.estimate import estimate_size
from prunectl.analysis.sizes import CodecName, compress, get_codec, measure, packed_bytes
from prunectl.errors import InputError, UsageError
from prunectl.formats.registry import open_model
from tests.running import FIXTURES


def data_of(kind: str, nbytes: int) -> bytes:
    random = np.random.default_rng(nbytes)
    noise = random.integers(0, 256, nbytes, np.uint8)
    if kind == "sparse":
        noise[random.random(nbytes) < 0.8] = 0
    if kind == "zeros":
        noise[:] = 0
    if kind == "text":
        noise = np.resize(np.frombuffer(b"the quick brown fox ", np.uint8), nbytes)
    return noise.tobytes()


def cut(data: bytes, steps: list[int]) -> Iterator[bytes]:
    """Yield data in pieces of odd lengths, empty ones among them, over and over."""
    at = place = 0
    while at < len(data):
        step = steps[place % len(steps)]
        yield data[at : at + step]
        at, place = at + step, place + 1


KINDS = st.sampled_from(["random", "sparse", "zeros", "text"])
LENGTHS = st.one_of(st.integers(0, 70), st.integers(0, 200_000))
STEPS = st.lists(st.one_of(st.integers(0, 40), st.integers(1, 70_000)), max_size=4).map(lambda steps: [*steps, 32_771])


@given(kind=KINDS, nbytes=LENGTHS, steps=STEPS, level=st.integers(1, 9))
def test_gzip_is_to_the_byte_what_python_makes_of_it_whole(
    kind: str, nbytes: int, steps: list[int], level: int
) -> None:
    data = data_of(kind, nbytes)
    found = compress(cut(data, steps), get_codec(CodecName.GZIP, level))
    assert found.nbytes == len(gzip.compress(data, level, mtime=0))
    assert found.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("level", range(1, 10))
@pytest.mark.parametrize("kind", ["random", "sparse", "zeros", "text"])
def test_so_it_is_for_what_is_longer_than_any_window(kind: str, level: int) -> None:
    data = data_of(kind, 150_001)
    expected = len(gzip.compress(data, level, mtime=0))
    for steps in ([1 << 20], [100_003], [1, 65_536, 9]):
        assert compress(cut(data, steps), get_codec(CodecName.GZIP, level)).nbytes == expected


@given(kind=KINDS, nbytes=st.integers(0, 5000), steps=STEPS, level=st.integers(1, 3))
def test_xz_is_to_the_byte_what_python_makes_of_it_whole(kind: str, nbytes: int, steps: list[int], level: int) -> None:
    data = data_of(kind, nbytes)
    assert compress(cut(data, steps), get_codec(CodecName.XZ, level)).nbytes == len(lzma.compress(data, preset=level))


def test_xz_at_its_usual_level_is_what_lzma_does_by_itself() -> None:
    data = data_of("sparse", 20_000)
    assert compress([data], get_codec(CodecName.XZ, None)).nbytes == len(lzma.compress(data))


@given(kind=KINDS, nbytes=st.integers(0, 50_000), steps=STEPS)
def test_zstd_can_be_unpacked_to_the_data_and_none_changes_nothing(kind: str, nbytes: int, steps: list[int]) -> None:
    data = data_of(kind, nbytes)
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    assert compress(cut(data, steps), get_codec(CodecName.ZSTD, None)).nbytes == len(
        stream.compress(data) + stream.flush()
    )
    assert compress(cut(data, steps), get_codec(CodecName.NONE, None)).nbytes == nbytes


def test_each_byte_is_counted_once() -> None:
    counted: list[int] = []
    compress(cut(bytes(100_000), [7, 999]), get_codec(CodecName.GZIP, None), counted.append)
    assert sum(counted) == 100_000


@pytest.mark.parametrize(("name", "usual", "highest"), [("gzip", 6, 9), ("zstd", 3, 22), ("xz", 6, 9)])
def test_levels_are_those_of_the_codec(name: str, usual: int, highest: int) -> None:
    codec = CodecName(name)
    assert get_codec(codec, None).level == usual
    assert get_codec(codec, 1).level == 1
    assert get_codec(codec, highest).level == highest
    for level in (0, -1, highest + 1):
        with pytest.raises(UsageError, match=f"must be from 1 to {highest}"):
            get_codec(codec, level)


def test_the_library_is_named_with_its_version() -> None:
    assert get_codec(CodecName.GZIP, None).library == f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
    assert get_codec(CodecName.ZSTD, None).library == f"zstandard {zstandard.__version__}"
    assert get_codec(CodecName.NONE, None).library == ""


MODELS = ["digits_cnn.h5", "digits_cnn.keras", "digits_cnn.pt", "digits_cnn.onnx", "digits_cnn.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_all_sizes_of_a_model_are_measured_in_one_go(name: str) -> None:
    path = FIXTURES / name
    found = measure(open_model(path), get_codec(CodecName.GZIP, None))
    data = path.read_bytes()
    assert found.bytes.raw == len(data)
    assert found.bytes.compressed == len(gzip.compress(data, 6, mtime=0))
    assert found.bytes.packed is not None
    assert found.bytes.packed <= len(data)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.params.zero is not None


def test_what_has_no_compression_of_its_own_is_as_big_packed_as_raw() -> None:
    path = FIXTURES / "digits_cnn.safetensors"
    assert packed_bytes(open_model(path), lambda _: None) == path.stat().st_size


def test_files_beside_a_model_count_as_they_are() -> None:
    model = open_model(FIXTURES / "external_data" / "model.onnx")
    assert len(model.files) == 2
    assert packed_bytes(model, lambda _: None) == sum(path.stat().st_size for path in model.files)


def test_a_model_that_cannot_be_packed_ends_the_work_in_a_sentence(tmp_path: Path) -> None:
    source = FIXTURES / "digits_cnn.pt"
    tensor = open_model(source).tensors[4]
    assert tensor.storage.extent is not None
    data = bytearray(source.read_bytes())
    data[tensor.storage.extent.offset] ^= 1
    path = tmp_path / "m.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"m\.pt is damaged"):
        measure(open_model(path), get_codec(CodecName.GZIP, None))


def write_mixed(path: Path, tensors: int = 10) -> None:
    """Write tensors that gzip makes quite different things of."""
    random = np.random.default_rng(7)
    state = {}
    for index in range(tensors):
        values = random.standard_normal(512 * 1024, np.float32)
        values[random.random(values.size) < (0.0, 0.8, 0.95, 0.5)[index % 4]] = 0
        state[f"layers.{index}"] = values
    save_file(state, path)


def test_an_estimate_is_within_the_error_that_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_mixed(path)
    for name, value in (("EXACT_BYTES", 1 << 20), ("_PIECES", 16), ("_PROBES", 200), ("_AIM", 0.05)):
        monkeypatch.setattr(estimate, name, value)
    model, codec = open_model(path), get_codec(CodecName.GZIP, None)
    found, exact = estimate_size(model, codec), len(gzip.compress(path.read_bytes(), 6, mtime=0))
    assert found.bytes.compressed is not None
    assert found.estimate is not None
    assert found.estimate.error <= 0.05
    assert found.estimate.sampled < path.stat().st_size
    assert abs(found.bytes.compressed / exact - 1) <= found.estimate.error
    assert estimate_size(model, codec) == found


def test_of_a_small_model_nothing_is_estimated() -> None:
    model, codec = open_model(FIXTURES / "digits_cnn.h5"), get_codec(CodecName.GZIP, None)
    assert estimate_size(model, codec) == measure(model, codec)


@pytest.mark.parametrize("what", ["mixed", "zeros"])
def test_what_a_sample_says_too_little_of_is_measured(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    if what == "mixed":
        write_mixed(path, 1)
        monkeypatch.setattr(estimate, "_AIM", 0.0)
    else:
        save_file({"w": np.zeros(1 << 20, np.float32)}, path)
    monkeypatch.setattr(estimate, "EXACT_BYTES", 0)
    model, codec = open_model(path), get_codec(CodecName.GZIP, None)
    assert estimate_size(model, codec) == measure(model, codec)
