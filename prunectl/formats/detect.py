"""Format detection by the first and last bytes, entry names and file names; its cost does not grow with the file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cached_property
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets

HEAD_BYTES = 4096
TAIL_BYTES = 64
_END_HEAD_BYTES, _END64_BYTES = 22, 20 + 56
"""Sizes of a zip's end record without its comment, and of the Zip64 locator and record before it."""
_END_BYTES = _END64_BYTES + _END_HEAD_BYTES + (1 << 16)


def refuse_long_directory(path: Path, file: BinaryIO | BufferedReader) -> None:
    """Refuse a zip with more than MAX_ZIP_ENTRIES entries, before `zipfile` creates an object for each."""
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(file_bytes - _END_BYTES, 0))
    end = file.read()
    end_offset = end.rfind(b"PK\x05\x06")
    if end_offset < 0 or end_offset + _END_HEAD_BYTES > len(end):
        return  # no central directory at all: an error of its own elsewhere
    nbytes = int.from_bytes(end[end_offset + 12 : end_offset + 16], "little")
    if end_offset >= _END64_BYTES and end[end_offset - 20 : end_offset - 16] == b"PK\x06\x07":
        nbytes = int.from_bytes(end[end_offset - 36 : end_offset - 28], "little")
    if nbytes <= budgets.MAX_ZIP_DIRECTORY_BYTES:
        behind = file_bytes - len(end) + end_offset
        begin = max(behind - nbytes - _END64_BYTES, 0)
        file.seek(begin)
        if file.read(behind - begin).count(b"PK\x01\x02") <= budgets.MAX_ZIP_ENTRIES:
            return
    raise InputError(f"{path} is refused: it holds more than {budgets.MAX_ZIP_ENTRIES} entries")


_URL = re.compile(r"(https?|ftp|hf|s3a?|gs|gcs|az|abfss?|memory):/+(.+)")
"""A URL, also after `Path` has merged its two slashes into one."""
URL = re.compile(r"(https?|hf|s3a?|gs|gcs|az|abfss?|memory)://.")
"""The URLs that `formats.remote` reads."""
_SECRET = re.compile(r"(https?://)[^/?#]*@|(\w+://)[^/?#@]*:[^/?#]*@")


def without_secrets(url: str) -> str:
    """A URL without credentials and query, both of which may be secret; local paths are returned unchanged."""
    if URL.match(url) is None:
        return url
    return _SECRET.sub(lambda match: match[1] or match[2], url.partition("?")[0], count=1)


_FETCH = {
    "hf": "hf download {rest}",
    "s3": "aws s3 cp {url} .",
    "gs": "gcloud storage cp {url} .",
}


def missing_error(path: Path) -> InputError:
    """The error for a file that does not exist; a URL gets a message of its own, because it cannot be used here."""
    return url_error(str(path)) or InputError(f"{path} does not exist", did_you_mean=_neighbours(path))


_MAX_LISTED = 10_000
"""The most entries of a folder that are listed, to find parts of a pipeline or names like a misspelt one."""


def _neighbours(path: Path) -> tuple[str, ...]:
    """Files in the folder of a missing file with similar names."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MAX_LISTED)]
    except OSError:
        return ()
    return tuple(str(path.with_name(name)) for name in get_close_matches(path.name, names, n=3, cutoff=0.75))


def url_error(word: str, *, is_written: bool = False) -> InputError | None:
    """The error for a URL that was given as an input or (`is_written`) an output; None for any other word."""
    match = _URL.fullmatch(word)
    if match is None or os.path.lexists(word):
        return None
    scheme, rest = match.groups()
    url = f"{scheme}://{rest}"
    if is_written:
        return InputError(f"{abbreviated(url)} is a URL, where a file is needed", hint="write a file, and upload it")
    # A file with code is given as `FILE.py:FUNCTION`.
    url, rest = (re.sub(r"(?<=\.py):\w.*", "", text) for text in (url, rest))
    other = "curl -LO {url}" if scheme in {"http", "https", "ftp"} else "copy it into a file here"
    fetch = _FETCH.get(scheme, other).format(url=url, rest=rest)
    return InputError(f"{abbreviated(url)} is a URL, where a file is needed: download it first", hint=fetch)


class FileProbe:
    """The head, the tail and the entry names of a file or folder."""

    def __init__(self, path: Path) -> None:
        """Check that the path is a readable file or folder; its content is read on first access."""
        self.path = path
        try:
            facts = path.stat()
        except FileNotFoundError as error:
            raise missing_error(path) from error
        except NotADirectoryError as error:
            raise InputError(f"{path} does not exist: a part of the path is a file") from error
        except PermissionError as error:
            raise InputError(f"{path} cannot be read: permission denied") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        self.is_folder = stat.S_ISDIR(facts.st_mode)
        self.nbytes = 0 if self.is_folder else facts.st_size
        if not self.is_folder and not stat.S_ISREG(facts.st_mode):
            raise InputError(
                f"{path} is a pipe or a device, not a file", hint="to read a model from standard input, write -"
            )

    @cached_property
    def _ends(self) -> tuple[bytes, bytes]:
        if self.is_folder:
            return b"", b""
        try:
            with self.path.open("rb") as file:
                head = file.read(HEAD_BYTES)
                file.seek(max(0, self.nbytes - TAIL_BYTES))
                return head, file.read(TAIL_BYTES)
        except PermissionError as error:
            raise InputError(f"{self.path} cannot be read: permission denied") from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error

    @property
    def head(self) -> bytes:
        """The first bytes of a file; none for a folder."""
        return self._ends[0]

    @property
    def tail(self) -> bytes:
        """The last bytes of a file; none for a folder."""
        return self._ends[1]

    def has_file(self, name: str) -> bool:
        """Whether this is a folder with a file of that name."""
        return self.is_folder and (self.path / name).is_file()

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Entry names in a zip, from its central directory; none if this is not a zip."""
        if not self.head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return ()
        from zipfile import BadZipFile, ZipFile  # noqa: PLC0415 - most files are not zips

        try:
            with self.path.open("rb") as file:
                refuse_long_directory(self.path, file)
                with ZipFile(file) as archive:
                    return tuple(archive.namelist())
        except (BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
            return ()

    def entries_end_with(self, *names: str) -> bool:
        """Whether the zip has an entry of each name, at the top or in a folder."""
        return all(any(entry == name or entry.endswith("/" + name) for entry in self.entries) for name in names)


HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
TORCH_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The pickle opcode LONG1 with torch's magic number, with which every legacy file begins."""


def is_hdf5(probe: FileProbe) -> bool:
    """HDF5, with or without a user block before it."""
    return any(probe.head[offset : offset + 8] == HDF5_MAGIC for offset in (0, 512, 1024, 2048))


def is_keras_zip(probe: FileProbe) -> bool:
    """A zip with a Keras configuration and weights."""
    return "config.json" in probe.entries and "model.weights.h5" in probe.entries


def is_saved_model(probe: FileProbe) -> bool:
    """A folder with a SavedModel in it."""
    return probe.has_file("saved_model.pb")


def is_checkpoint_index(probe: FileProbe) -> bool:
    """The index of a TensorFlow checkpoint, a LevelDB table."""
    return probe.tail.endswith(TABLE_MAGIC)


def is_exported_program(probe: FileProbe) -> bool:
    """A zip that `torch.export.save` wrote."""
    return probe.entries_end_with("archive_format") or probe.entries_end_with("serialized_exported_program.json")


def is_torch_zip(probe: FileProbe) -> bool:
    """A zip with a pickle of tensors, as `torch.save` and `torch.jit.save` write it."""
    return probe.entries_end_with("data.pkl") or probe.entries_end_with("constants.pkl")


def is_torch_legacy(probe: FileProbe) -> bool:
    """The pickles that `torch.save` wrote before PyTorch 1.6, which uses zips."""
    return probe.head[:1] == b"\x80" and probe.head[2:14] == TORCH_LEGACY_MAGIC


def is_distributed_checkpoint(probe: FileProbe) -> bool:
    """The metadata pickle of `torch.distributed.checkpoint`, which lies beside the files of its ranks."""
    return probe.path.name == ".metadata" and probe.head[:1] == b"\x80"


ZERO_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
"""A file of one DeepSpeed ZeRO rank with its part of the optimizer state, which includes the weights."""
_TAG_BYTES = 256


def is_zero_checkpoint(probe: FileProbe) -> bool:
    """The optimizer file of the first rank of DeepSpeed ZeRO; those of the other ranks lie beside it."""
    match = ZERO_RANK.fullmatch(probe.path.name)
    return match is not None and not int(match[1]) and not int(match[2]) and probe.entries_end_with("data.pkl")


_WHOLE_MODEL = "mp_rank_00_model_states.pt"
"""The model file of DeepSpeed without model parallelism; where ZeRO is not used, an ordinary PyTorch checkpoint."""


def refuse_model_parallelism(path: Path) -> None:
    """Refuse a DeepSpeed folder whose model file has only a part of the weights."""
    if path.name != _WHOLE_MODEL:
        return
    with os.scandir(path.parent) as entries:
        others = (entry.name for entry in entries if entry.name.endswith("model_states.pt"))
        other = min((name for name in others if name != path.name), default="")
    if other:
        raise InputError(
            f"{path.parent} was saved with model parallelism, which prunectl does not read: "
            f"{abbreviated(other)} holds weights too",
            hint=f"merge them with the code that trained them, or name one file, such as {path}",
        )


def zero_checkpoints(folder: Path) -> Iterator[str]:
    """Yield the files by which a DeepSpeed checkpoint may be opened: in the folder, then in that named by `latest`."""
    first = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = (*(f"{prefix}{first}" for prefix in ("bf16_", "fp16_", "")), _WHOLE_MODEL)
    yield from states
    tag = ""
    with suppress(OSError), (folder / "latest").open("rb") as file:
        tag = file.read(_TAG_BYTES).decode("utf-8", "replace").strip()
    if tag not in {"", ".", ".."} and "/" not in tag and "\0" not in tag:
        yield from (f"{tag}/{name}" for name in states)


PIPELINE_INDEX = "model_index.json"
AVERAGED = "_ema"
"""Suffix of the folder with the moving average (EMA) of a pipeline part: `unet` and `unet_ema`."""
NETWORK_OF_DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")


def is_pipeline(probe: FileProbe) -> bool:
    """A folder with the index of a diffusers pipeline, or a checkpoint of its training, which has no index."""
    return probe.has_file(PIPELINE_INDEX) or (probe.is_folder and _is_training_checkpoint(probe.path))


def _is_training_checkpoint(folder: Path) -> bool:
    """Whether the parts in a folder are those of one pipeline, and not a collection of models, which looks similar."""
    parts = parts_without_index(folder)
    if not parts:
        return False
    from prunectl.formats.folder import is_training_state  # noqa: PLC0415 - most models are files

    names = _listed(folder)
    has_average = any(f"{part}{AVERAGED}" in parts for part in parts)
    # A folder with a single part, such as the output of strip, is not a collection of models.
    return has_average or len(names) == 1 or any(is_training_state(folder / name) for name in names)


def parts_without_index(folder: Path) -> tuple[str, ...]:
    """The folder names of the parts of a pipeline without an index; none if no part is a network.

    Each part has a `config.json`, and its name is an attribute of the pipeline, hence a Python identifier.
    """
    names = (name for name in _listed(folder) if name.isidentifier() and not (folder / name).is_symlink())
    parts = tuple(name for name in names if (folder / name / "config.json").is_file())
    has_network = any((folder / part / name).is_file() for part in parts for name in NETWORK_OF_DIFFUSERS)
    return parts if has_network else ()


def _listed(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, _MAX_LISTED))


_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")


def missing_index(names: Iterable[str]) -> str:
    """The message for a folder with shards but without their index; empty if there are no shards."""
    shard = next((match for match in map(_SHARD.fullmatch, sorted(names)) if match is not None), None)
    if shard is None:
        return ""
    return (
        f"has shards of a model, such as {abbreviated(shard[0])}, but not their index, "
        f"{abbreviated(shard[1])}{shard[2]}.index.json"
    )


def is_torch_tar(probe: FileProbe) -> bool:
    """The tar that `torch.save` wrote before PyTorch 0.2."""
    first = probe.head[:100].split(b"\0", 1)[0].removeprefix(b"./")
    return probe.head[257:262] == b"ustar" and first in {b"storages", b"tensors", b"pickle", b"sys_info"}


def is_safetensors(probe: FileProbe) -> bool:
    """A header length below 2^32 (or any, if the file is named .safetensors), then a JSON header."""
    is_length = probe.head[4:8] == bytes(4) or probe.path.suffix == ".safetensors"
    return is_length and probe.head[8:9] == b"{"


def is_shard_index(probe: FileProbe) -> bool:
    """The JSON index of a sharded checkpoint, which maps tensors to shards."""
    return probe.head.lstrip()[:1] == b"{" and probe.path.name.endswith(".index.json")


def is_tflite(probe: FileProbe) -> bool:
    """A FlatBuffer with TensorFlow Lite's identifier."""
    return probe.head[4:8] == b"TFL3"


def is_onnx(probe: FileProbe) -> bool:
    """A protobuf whose first fields are those of a ModelProto; it has no magic number.

    Field 1 is the version of the format, a small number. Every writer puts it first, but protobuf does not guarantee
    the order, so a file named .onnx may also begin with another field of a ModelProto.
    """
    head = probe.head
    if probe.path.name == "saved_model.pb":  # begins with the same fields
        return False
    if probe.path.suffix == ".mlmodel":  # so does Core ML
        return False
    starts_with_version = head[:1] == b"\x08" and len(head) > 2 and head[1] < 0x80 and head[2] in _MODEL_FIELDS
    return starts_with_version or (probe.path.suffix == ".onnx" and head[:1] != b"" and head[0] in _MODEL_FIELDS)


_MODEL_FIELDS = frozenset({0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA})
"""First tag bytes of ModelProto's fields: 1..8 and 14, then those that take two bytes (20, 25)."""
