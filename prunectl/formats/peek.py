"""A first look at a file: enough to recognise it, cheap whatever its size."""

from __future__ import annotations

import stat
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from prunectl.errors import InputError

HEAD_BYTES = 4096
TAIL_BYTES = 64


class Peek:
    """The head, the tail and the entry names of a file or folder."""

    def __init__(self, path: Path) -> None:
        """Look at the path itself; its content is read when it is asked for."""
        self.path = path
        try:
            facts = path.stat()
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist") from error
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
            with ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except (BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
            return ()

    def entries_end_with(self, *names: str) -> bool:
        """Whether the zip has an entry of each name, at the top or inside its one folder."""
        return all(any(entry == name or entry.endswith("/" + name) for entry in self.entries) for name in names)
