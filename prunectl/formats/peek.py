"""A first look at a file: enough to recognise it, cheap whatever its size."""

from __future__ import annotations

import os
import re
import stat
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

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
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or at + _END_HEAD_BYTES > len(end):
        return  # no directory at all, which has its own sentence
    nbytes = int.from_bytes(end[at + 12 : at + 16], "little")
    if at >= _END64_BYTES and end[at - 20 : at - 16] == b"PK\x06\x07":
        nbytes = int.from_bytes(end[at - 36 : at - 28], "little")
    if nbytes <= budgets.MAX_ZIP_DIRECTORY_BYTES:
        behind = file_bytes - len(end) + at
        begin = max(behind - nbytes - _END64_BYTES, 0)
        file.seek(begin)
        if file.read(behind - begin).count(b"PK\x01\x02") <= budgets.MAX_ZIP_ENTRIES:
            return
    raise InputError(f"{path} is refused: it holds more than {budgets.MAX_ZIP_ENTRIES} entries")


_URL = re.compile(r"(https?|ftp|hf|s3|gs):/+(.+)")
_FETCH = {
    "hf": "hf download {rest}",
    "s3": "aws s3 cp {url} .",
    "gs": "gcloud storage cp {url} .",
}


def missing(path: Path) -> InputError:
    """The error for a file that is not there; an address gets a sentence of its own: nothing is downloaded here."""
    return address(str(path)) or InputError(f"{path} does not exist")


def address(word: str, *, is_written: bool = False) -> InputError | None:
    """The error for a word that is an address, whether of what is to be read or of what is to be written."""
    found = _URL.fullmatch(word)
    if found is None or os.path.lexists(word):
        return None
    scheme, rest = found.groups()
    url = f"{scheme}://{rest}"
    if is_written:
        return InputError(f"{abbreviated(url)} is a URL, and prunectl writes files", hint="write a file, and upload it")
    # What follows a file with code is the name of a function.
    url, rest = (re.sub(r"(?<=\.py):\w.*", "", one) for one in (url, rest))
    fetch = _FETCH.get(scheme, "curl -LO {url}").format(url=url, rest=rest)
    return InputError(f"{abbreviated(url)} is a URL, and prunectl reads files: download it first", hint=fetch)


class Peek:
    """The head, the tail and the entry names of a file or folder."""

    def __init__(self, path: Path) -> None:
        """Look at the path itself; its content is read when it is asked for."""
        self.path = path
        try:
            facts = path.stat()
        except FileNotFoundError as error:
            raise missing(path) from error
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
                f"{path} is a pipe or a device, not a file", hint="a model on standard input is written as -"
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
