"""A first look at a file: enough to recognise it, cheap whatever its size."""

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
"""What a zip ends in, before its comment; and what stands before that in one of more than 4 GB."""
_END_BYTES = _END64_BYTES + _END_HEAD_BYTES + (1 << 16)


def refuse_long_directory(path: Path, file: BinaryIO | BufferedReader) -> None:
    """Refuse a zip of more entries than any model has, before an object is made of each of them."""
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(file_bytes - _END_BYTES, 0))
    end = file.read()
    end_offset = end.rfind(b"PK\x05\x06")
    if end_offset < 0 or end_offset + _END_HEAD_BYTES > len(end):
        return  # no directory at all, which has its own sentence
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
"""As a path would have it as well, in which two slashes are one."""
URL = re.compile(r"(https?|hf|s3a?|gs|gcs|az|abfss?|memory)://.")
"""What `formats.remote` reads."""
_SECRET = re.compile(r"(https?://)[^/?#]*@|(\w+://)[^/?#@]*:[^/?#]*@")


def without_secrets(url: str) -> str:
    """An address without who asks, and without what follows its path: both may be secrets. Paths stay as they are."""
    if URL.match(url) is None:
        return url
    return _SECRET.sub(lambda match: match[1] or match[2], url.partition("?")[0], count=1)


_FETCH = {
    "hf": "hf download {rest}",
    "s3": "aws s3 cp {url} .",
    "gs": "gcloud storage cp {url} .",
}


def missing_error(path: Path) -> InputError:
    """The error for a file that is not there; an address gets a sentence of its own: nothing is downloaded here."""
    return url_error(str(path)) or InputError(f"{path} does not exist", did_you_mean=_neighbours(path))


_MOST_LISTED = 10_000
"""A folder with more files is not searched for a name that is misspelt."""


def _neighbours(path: Path) -> tuple[str, ...]:
    """Files beside a missing one with names that look like it."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_LISTED)]
    except OSError:
        return ()
    return tuple(str(path.with_name(name)) for name in get_close_matches(path.name, names, n=3, cutoff=0.75))


def url_error(word: str, *, is_written: bool = False) -> InputError | None:
    """The error for a word that is an address, whether of what is to be read or of what is to be written."""
    match = _URL.fullmatch(word)
    if match is None or os.path.lexists(word):
        return None
    scheme, rest = match.groups()
    url = f"{scheme}://{rest}"
    if is_written:
        return InputError(f"{abbreviated(url)} is a URL, where a file is needed", hint="write a file, and upload it")
    # What follows a file with code is the name of a function.
    url, rest = (re.sub(r"(?<=\.py):\w.*", "", text) for text in (url, rest))
    other = "curl -LO {url}" if scheme in {"http", "https", "ftp"} else "copy it into a file here"
    fetch = _FETCH.get(scheme, other).format(url=url, rest=rest)
    return InputError(f"{abbreviated(url)} is a URL, where a file is needed: download it first", hint=fetch)


class FileProbe:
    """The head, the tail and the entry names of a file or folder."""

    def __init__(self, path: Path) -> None:
        """Look at the path itself; its content is read when it is asked for."""
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

    def holds(self, name: str) -> bool:
        """Whether this folder has a file of that name."""
        return self.is_folder and (self.path / name).is_file()

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Names in a zip, as its central directory has them; none when it is no zip."""
        if not self.head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return ()
        from zipfile import BadZipFile, ZipFile  # noqa: PLC0415 - most files are no zip

        try:
            with self.path.open("rb") as file:
                refuse_long_directory(self.path, file)
                with ZipFile(file) as archive:
                    return tuple(archive.namelist())
        except (BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
            return ()

    def entries_end_with(self, *names: str) -> bool:
        """Whether the zip has an entry of each name, at the top or inside its one folder."""
        return all(any(entry == name or entry.endswith("/" + name) for entry in self.entries) for name in names)


HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
TORCH_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The pickle opcode LONG1 with torch's magic number, which every legacy file begins with."""


def is_hdf5(peek: FileProbe) -> bool:
    """HDF5, with or without a user block before it."""
    return any(peek.head[offset : offset + 8] == HDF5_MAGIC for offset in (0, 512, 1024, 2048))


def is_keras_zip(peek: FileProbe) -> bool:
    """A zip with a Keras configuration and weights."""
    return "config.json" in peek.entries and "model.weights.h5" in peek.entries


def is_saved_model(peek: FileProbe) -> bool:
    """A folder with a SavedModel in it."""
    return peek.holds("saved_model.pb")


def is_checkpoint_index(peek: FileProbe) -> bool:
    """The index of a TensorFlow checkpoint, a LevelDB table."""
    return peek.tail.endswith(TABLE_MAGIC)


def is_exported_program(peek: FileProbe) -> bool:
    """A zip that `torch.export.save` wrote."""
    return peek.entries_end_with("archive_format") or peek.entries_end_with("serialized_exported_program.json")


def is_torch_zip(peek: FileProbe) -> bool:
    """A zip with a pickle program that rebuilds tensors."""
    return peek.entries_end_with("data.pkl") or peek.entries_end_with("constants.pkl")


def is_torch_legacy(peek: FileProbe) -> bool:
    """The pickles that torch wrote before it used zips."""
    return peek.head[:1] == b"\x80" and peek.head[2:14] == TORCH_LEGACY_MAGIC


def is_distributed_checkpoint(peek: FileProbe) -> bool:
    """The pickle beside the parts that the ranks of `torch.distributed.checkpoint` wrote."""
    return peek.path.name == ".metadata" and peek.head[:1] == b"\x80"


ZERO_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
"""What a rank of DeepSpeed ZeRO saves of the optimizer, and with it of the weights."""
_TAG_BYTES = 256


def is_zero_checkpoint(peek: FileProbe) -> bool:
    """What the first rank of DeepSpeed ZeRO saved of the optimizer; the other ranks' lies beside it."""
    match = ZERO_RANK.fullmatch(peek.path.name)
    return match is not None and not int(match[1]) and not int(match[2]) and peek.entries_end_with("data.pkl")


_WHOLE_MODEL = "mp_rank_00_model_states.pt"
"""What DeepSpeed saves of a model that is not cut; a PyTorch file like others where ZeRO is not used."""


def refuse_model_parallelism(path: Path) -> None:
    """Refuse a file of DeepSpeed that stands for its folder, but has only a part of the weights in it."""
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
    """Yield by what checkpoints of DeepSpeed are opened: in the folder itself, then in what its `latest` names."""
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
"""What the folder of an average is called, behind the name of the part that it is one of."""
NETWORK_OF_DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")


def is_pipeline(peek: FileProbe) -> bool:
    """A folder with the index of a pipeline of diffusers, or a checkpoint of its training, which has none."""
    return peek.holds(PIPELINE_INDEX) or (peek.is_folder and _is_training_checkpoint(peek.path))


def _is_training_checkpoint(folder: Path) -> bool:
    """Whether the parts in a folder are those of one pipeline: a collection of models looks much the same."""
    parts = parts_without_index(folder)
    if not parts:
        return False
    from prunectl.formats.folder import is_training_state  # noqa: PLC0415 - most models are files

    names = _listed(folder)
    has_average = any(f"{part}{AVERAGED}" in parts for part in parts)
    # Where one part is all there is, as strip leaves it, there is nothing to mistake it for.
    return has_average or len(names) == 1 or any(is_training_state(folder / name) for name in names)


def parts_without_index(folder: Path) -> tuple[str, ...]:
    """The parts of a pipeline by their folders, where no index names them; none without a network.

    Each has its configuration, and is called by an attribute of the pipeline.
    """
    names = (name for name in _listed(folder) if name.isidentifier() and not (folder / name).is_symlink())
    parts = tuple(name for name in names if (folder / name / "config.json").is_file())
    has_network = any((folder / part / name).is_file() for part in parts for name in NETWORK_OF_DIFFUSERS)
    return parts if has_network else ()


def _listed(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, _MOST_LISTED))


_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")


def missing_index(names: Iterable[str]) -> str:
    """That there are shards in a folder, but not what says which tensor is in which; empty where there are none."""
    shard = next((match for match in map(_SHARD.fullmatch, sorted(names)) if match is not None), None)
    if shard is None:
        return ""
    return (
        f"has shards of a model, such as {abbreviated(shard[0])}, but not their index, "
        f"{abbreviated(shard[1])}{shard[2]}.index.json"
    )


def is_torch_tar(peek: FileProbe) -> bool:
    """The tar of the earliest torch."""
    first = peek.head[:100].split(b"\0", 1)[0].removeprefix(b"./")
    return peek.head[257:262] == b"ustar" and first in {b"storages", b"tensors", b"pickle", b"sys_info"}


def is_safetensors(peek: FileProbe) -> bool:
    """A length below 2^32 (or any length, if the name says so), then a JSON header."""
    is_length = peek.head[4:8] == bytes(4) or peek.path.suffix == ".safetensors"
    return is_length and peek.head[8:9] == b"{"


def is_shard_index(peek: FileProbe) -> bool:
    """The JSON that says which shard holds which tensor."""
    return peek.head.lstrip()[:1] == b"{" and peek.path.name.endswith(".index.json")


def is_tflite(peek: FileProbe) -> bool:
    """A FlatBuffer with TensorFlow Lite's identifier."""
    return peek.head[4:8] == b"TFL3"


def is_onnx(peek: FileProbe) -> bool:
    """A protobuf whose first fields are those of a ModelProto; it has no magic number.

    Field 1 is the version of the format, a small number; every writer puts it first, but the order is not
    promised, so a file named .onnx may also begin with another field that a ModelProto has.
    """
    head = peek.head
    if peek.path.name == "saved_model.pb":  # begins with the same fields
        return False
    if peek.path.suffix == ".mlmodel":  # so does Core ML
        return False
    starts_with_version = head[:1] == b"\x08" and len(head) > 2 and head[1] < 0x80 and head[2] in _MODEL_FIELDS
    return starts_with_version or (peek.path.suffix == ".onnx" and head[:1] != b"" and head[0] in _MODEL_FIELDS)


_MODEL_FIELDS = frozenset({0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA})
"""First tag bytes of ModelProto's fields: 1..8 and 14, then those that take two bytes (20, 25)."""
