"""What every format must do, shown on files written by the format's own library."""

from __future__ import annotations

import hashlib
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.registry import by_name, open_model, recognise

Array = NDArray[Any]


def sample() -> dict[str, Array]:
    """Three tensors of a small network, with zeros in them."""
    random = np.random.default_rng(0)
    kernel = random.standard_normal((6, 5)).astype(np.float32)
    kernel[kernel < 0] = 0
    return {
        "first.weight": kernel,
        "first.bias": random.standard_normal(6).astype(np.float32),
        "second.weight": random.standard_normal((3, 6)).astype(np.float32),
    }


def digest(path: Path) -> str:
    """One hash over a file or all files of a folder."""
    files = sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def raw(array: Array) -> bytes:
    """The bits of an array: NaN equals itself, minus zero differs from zero."""
    return np.ascontiguousarray(array).tobytes()


def read_all(path: Path) -> dict[str, Array]:
    """Every tensor that we find in a file, by name."""
    model = open_model(path)
    return {tensor.name: model.read(tensor) for tensor in model.tensors}


class FormatContract:
    """Subclass this beside a handler; the format is done when all of it is green."""

    format: ClassVar[str]
    name: ClassVar[str]
    """File name, with the suffix that users give it."""
    is_checksummed: ClassVar[bool] = False

    @abstractmethod
    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        """Write a model with the format's own library, never with ours."""

    @abstractmethod
    def read_back(self, path: Path) -> dict[str, Array]:
        """Read it with that library: every tensor under the name that we should use."""

    def payload(self, path: Path) -> Path:
        """Return the file that damage is done to: the biggest."""
        files = [child for child in path.rglob("*") if child.is_file()] or [path]
        return max(files, key=lambda child: child.stat().st_size)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        target = tmp_path / self.name
        self.write(target, sample())
        return target

    @pytest.fixture
    def model(self, path: Path) -> ModelFile:
        return open_model(path)

    def test_it_is_recognised_under_its_own_name_and_under_any_other(self, path: Path, tmp_path: Path) -> None:
        assert recognise(path).name == self.format
        renamed = tmp_path / "stranger.dat"
        if path.is_dir():
            shutil.copytree(path, renamed)
        else:
            renamed = shutil.copy(path, renamed)
        assert recognise(renamed).name == self.format

    def test_names_shapes_dtypes_and_values_equal_what_its_library_reads(self, path: Path, model: ModelFile) -> None:
        expected = self.read_back(path)
        assert {tensor.name for tensor in model.tensors} == set(expected)
        for tensor in model.tensors:
            array = model.read(tensor)
            assert tensor.shape == array.shape == expected[tensor.name].shape
            assert tensor.dtype == array.dtype == expected[tensor.name].dtype
            assert raw(array) == raw(expected[tensor.name])

    def test_an_extent_is_where_the_bytes_of_a_storage_lie(self, path: Path, model: ModelFile) -> None:
        for tensor in model.tensors:
            extent = tensor.storage.extent
            if extent is not None and tensor.strides is None and not tensor.storage.big_endian:
                begin = extent.offset + tensor.start * tensor.dtype.itemsize
                assert extent.path.read_bytes()[begin : begin + tensor.nbytes] == raw(model.read(tensor))

    def test_what_is_read_cannot_be_written_to(self, model: ModelFile) -> None:
        for tensor in model.tensors:
            assert not model.read(tensor).flags.writeable

    def test_reading_leaves_the_file_as_it_was(self, path: Path) -> None:
        before = digest(path)
        model = open_model(path)
        for tensor in model.tensors:
            model.read(tensor)
        assert digest(path) == before

    def test_every_kernel_says_its_layer_and_where_its_outputs_are(self, model: ModelFile) -> None:
        kernels = [tensor for tensor in model.tensors if tensor.role == "kernel"]
        assert kernels
        for tensor in kernels:
            assert tensor.layer
            assert tensor.out_axis is not None
            assert tensor.shape[tensor.out_axis] in {6, 3}

    @pytest.mark.parametrize("sixteenth", range(16))
    def test_a_truncated_file_is_refused_in_a_sentence(self, path: Path, sixteenth: int) -> None:
        payload = self.payload(path)
        payload.write_bytes(payload.read_bytes()[: payload.stat().st_size * sixteenth // 16])
        with pytest.raises(InputError) as caught:
            read_all(path)
        assert path.name in caught.value.message

    def test_its_own_name_appears_in_the_facts(self, path: Path, model: ModelFile) -> None:
        assert model.path == path
        assert model.format == self.format
        assert model.family is by_name(self.format).family
        assert all(file.is_file() for file in model.files)
