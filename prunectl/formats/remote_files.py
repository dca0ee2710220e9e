"""Remote files: on web servers, and in object stores that fsspec supports.

Servers are not trusted: every response is checked against the request, and limited in size and time. There is an error
message for a server that ignores ranges, sends other bytes than requested, stops early or never, redirects in circles,
or changes the file meanwhile.
"""

from __future__ import annotations

import http.client
import io
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from prunectl import __version__
from prunectl.errors import InputError, MissingExtraError, PrunectlError, UsageError, WorkError, abbreviated, first_line
from prunectl.formats import budgets
from prunectl.formats.detect import without_secrets
from prunectl.formats.extents import RemoteFile
from prunectl.formats.safe_json import require
from prunectl.formats.workers import StoppedError, check_stopped

_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
COPY_BYTES = 16 << 20
_TRIES = 3
_PAUSE_SECONDS = 0.5
_PIECE_BYTES = 1 << 16
_SILENCE_SECONDS = 30.0
"""The time that a server may take to respond."""
_MIN_BYTES_PER_SECOND = 16 << 10
"""A slower server is taken for one that keeps the connection open on purpose."""
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
"""HTTP errors that may not occur again on a retry."""


class _TooSlowError(Exception):
    """A server has not sent its response in time."""


class _Timed(io.RawIOBase):
    """The bytes from a server, with a deadline: without it, a server could send a byte at a time forever."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__()
        self.deadline = time.monotonic() + _SILENCE_SECONDS
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        check_stopped()
        if time.monotonic() > self.deadline:
            raise _TooSlowError
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.timed = _Timed(self.fp.detach())
        self.fp = io.BufferedReader(self.timed)


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _TlsConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_TlsConnection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_repeats, max_redirections = 2, 5

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Follow a redirect without reading its body, which urllib would read whole, however long."""
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:  # noqa: PLR0917
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in {"http", "https"} or (scheme == "http" and req.type == "https"):
            raise InputError(f"{shown(req.full_url)} redirects to {shown(newurl)}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_Redirects, _Http, _Https)


def shown(url: str) -> str:
    """A URL for a message: abbreviated, without its query and credentials."""
    return abbreviated(without_secrets(url).partition("?")[0])


@dataclass(slots=True)
class HttpFile:
    """A file on a web server."""

    url: str
    nbytes: int = -1
    """-1 until the first response."""
    version: str = ""
    """The ETag or modification time of the first response."""

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        """The first bytes; sets the size and version. A server without ranges may send a file of up to `whole`."""
        return self._get(0, nbytes, whole)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._get(offset, nbytes, 0)

    def _get(self, offset: int, nbytes: int, whole: int) -> bytes:
        for attempt in range(1, _TRIES + 1):
            try:
                return self._try_get(offset, nbytes, whole)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _TRANSIENT or attempt == _TRIES:
                    raise self._status_error(error) from error
            except (OSError, http.client.HTTPException) as error:
                if attempt == _TRIES:
                    cause = getattr(error, "reason", error)
                    text = first_line(cause) if isinstance(cause, Exception) else str(cause)
                    raise InputError(f"{shown(self.url)} cannot be read: {text or type(error).__name__}") from error
            except _TooSlowError as error:
                raise InputError(f"{shown(self.url)} cannot be read: the server is too slow") from error
            except ValueError as error:
                raise InputError(f"{shown(self.url)} is not a valid URL, or redirects to one that is not") from error
            time.sleep(_PAUSE_SECONDS * attempt)
        raise AssertionError

    def _status_error(self, error: urllib.error.HTTPError) -> InputError:
        name = shown(self.url)
        if error.code in {404, 410}:
            return InputError(f"{name} does not exist")
        if error.code in {401, 403}:
            return InputError(f"{name} cannot be read: the server asks for permission (status {error.code})")
        if error.code == 416:
            return InputError(f"{name} is empty, or shorter than it was")
        if 300 <= error.code < 400:
            return InputError(f"{name} redirects in circles, or to an address that is not on the web")
        return InputError(f"{name} cannot be read: the server answers with status {error.code}")

    def _try_get(self, offset: int, nbytes: int, whole: int) -> bytes:
        headers = {
            "Range": f"bytes={offset}-{offset + nbytes - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": f"prunectl/{__version__}",
        }
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310 - the URL is http or https
        with _opener.open(request, timeout=_SILENCE_SECONDS) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise InputError(f"{shown(self.url)} comes compressed, so that no range of it can be read")
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                begin, end, total = self._range(response.headers, offset, nbytes)
            else:
                length = response.headers.get("Content-Length", "")
                total = int(length) if length.isdecimal() and len(length) < 20 else whole + 1
                if total > whole:
                    raise InputError(
                        f"{shown(self.url)} cannot be read in ranges: the server answers with the whole file "
                        f"(status {response.status})",
                        hint=f"download it first: curl -LO {shown(self.url)}",
                    )
                begin, end = 0, total
            self._check_same(total, response.headers)
            return self._body(response, end - begin)

    def _range(self, headers: Message, offset: int, nbytes: int) -> tuple[int, int, int]:
        match = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None:
            raise InputError(f"{shown(self.url)} cannot be read: the server does not say which bytes it sends")
        begin, end, total = int(match[1]), int(match[2]) + 1, int(match[3])
        if begin != offset or end != min(offset + nbytes, total) or total > budgets.MAX_COUNT:
            raise InputError(f"{shown(self.url)} cannot be read: the server sends other bytes than those asked for")
        return begin, end, total

    def _check_same(self, total: int, headers: Message) -> None:
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        if self.nbytes < 0:
            self.nbytes, self.version = total, version[: budgets.MAX_MARK_BYTES]
        elif (self.nbytes, self.version) != (total, version[: budgets.MAX_MARK_BYTES]):
            raise InputError(f"{shown(self.url)} was changed while it was being read")

    def _body(self, response: Any, nbytes: int) -> bytes:
        """The body; at most one byte more than announced is read, to notice that there are more."""
        response.timed.deadline = time.monotonic() + _SILENCE_SECONDS + nbytes / _MIN_BYTES_PER_SECOND
        body = bytearray()
        while len(body) <= nbytes and (piece := response.read1(min(_PIECE_BYTES, nbytes + 1 - len(body)))):
            body += piece
        if len(body) != nbytes:
            what = "more" if len(body) > nbytes else "fewer"
            raise InputError(f"{shown(self.url)} cannot be read: the server sends {what} bytes than it says")
        return bytes(body)


_VERSIONS = (
    "ETag",
    "etag",
    "e_tag",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
    "blob_id",
)
"""Keys of fsspec's file information that change with the content of a file."""


class RemoteFolder(Protocol):
    """A folder at a URL."""

    @property
    def url(self) -> str:
        """The URL of the folder."""

    def files(self) -> dict[str, RemoteFile] | None:
        """Its files by relative names; None where they cannot be listed."""

    def file(self, name: str) -> RemoteFile:
        """A file of the folder, which may not exist."""


@dataclass(frozen=True, slots=True)
class HttpFolder:
    """A folder on a web server, whose files cannot be listed."""

    url: str
    query: str = ""

    def files(self) -> None:
        """None, because a web server lists no files."""
        return

    def file(self, name: str) -> RemoteFile:
        """A file of the folder, which may not exist."""
        return HttpFile(f"{self.url}/{urllib.parse.quote(name)}{self.query}")


@contextmanager
def _fsspec_errors(url: str) -> Generator[None]:
    """Turn any error of fsspec or one of its backends into an InputError."""
    try:
        yield
    except (PrunectlError, StoppedError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{shown(url)} does not exist") from error
    except ImportError as error:
        raise MissingExtraError(
            f"{url.partition(':')[0]}:// needs a package that is not installed: {first_line(error)}",
            hint="pip install s3fs, gcsfs, adlfs or huggingface_hub, for s3://, gs://, az:// or hf://",
        ) from error
    except Exception as error:
        raise InputError(f"{shown(url)} cannot be read: {type(error).__name__}: {first_line(error)}") from error


@dataclass(slots=True)
class FsspecFile:
    """A file that fsspec reads."""

    system: Any
    path: str
    url: str
    nbytes: int = -1
    version: str = ""
    """Empty until `state` was called: a listing may have other keys, or other values for the same keys."""

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        """The first bytes, or all of a file of up to `whole` bytes; sets the size and version."""
        if not self.version:
            self.nbytes, self.version = self.state()
        return self.read(0, min(max(nbytes, min(self.nbytes, whole)), self.nbytes))

    def read(self, offset: int, nbytes: int) -> bytes:
        with _fsspec_errors(self.url):
            check_stopped()
            data = bytes(self.system.cat_file(self.path, start=offset, end=offset + nbytes)) if nbytes else b""
        if len(data) != min(nbytes, max(self.nbytes - offset, 0)):
            raise InputError(
                f"{shown(self.url)} was truncated, or another file took its place, while it was being read"
            )
        return data

    def state(self) -> tuple[int, str]:
        """The current size and version of the file."""
        with _fsspec_errors(self.url):
            self.system.invalidate_cache()
            facts = self.system.info(self.path)
            if facts.get("type") == "directory":
                raise FileNotFoundError
        version = next((str(facts[name]) for name in _VERSIONS if facts.get(name)), "")
        return int(facts.get("size") or 0), version[: budgets.MAX_MARK_BYTES]


@dataclass(frozen=True, slots=True)
class FsspecFolder:
    """A folder, or a key prefix of an object store, in a file system of fsspec."""

    system: Any
    root: str
    url: str

    def files(self) -> dict[str, RemoteFile] | None:
        """Its files by relative names; empty if the URL is that of a file."""
        with _fsspec_errors(self.url):
            self.system.invalidate_cache()
            facts_of = self._listed()
        if self.root in facts_of:
            return {}
        prefix = self.root.strip("/") + "/"
        names = ((path.strip("/").removeprefix(prefix), path, facts) for path, facts in facts_of.items())
        return {
            name: FsspecFile(self.system, path, f"{self.url}/{name}", int(facts.get("size") or 0))
            for name, path, facts in names
            if is_inside(name)
        }

    def _listed(self) -> dict[str, Mapping[str, Any]]:
        """All files, folder by folder, so that a bucket named by mistake is refused before all of it is listed."""
        facts_of: dict[str, Mapping[str, Any]] = {}
        folders, seen = [self.root], 0
        while folders:
            here = folders.pop()
            check_stopped()
            try:
                listed = self.system.ls(here, detail=True)
            except FileNotFoundError:
                listed = []
            seen += 1 + len(listed)
            if seen > budgets.MAX_FILES:
                raise InputError(f"{shown(self.url)} is refused: it has more than {budgets.MAX_FILES} files")
            for facts in listed:
                path = str(facts["name"])
                if facts.get("type") != "directory":
                    facts_of[path] = facts
                elif path.strip("/") != here.strip("/"):
                    folders.append(path)
        return facts_of

    def file(self, name: str) -> FsspecFile:
        """A file of the folder, which may not exist."""
        return FsspecFile(self.system, f"{self.root}/{name}", f"{self.url}/{name}")

    def check_free(self, begun: str) -> None:
        """Refuse a folder that is not empty, unless it has a file named `begun`, which marks an unfinished output."""
        with _fsspec_errors(self.url):
            self.system.invalidate_cache()
            is_taken = self._has(self.root) and not (begun and self._has(f"{self.root}/{begun}"))
        if is_taken:
            raise UsageError(f"{shown(self.url)} exists", hint="choose another --output, or replace it with --force")

    def _has(self, path: str) -> bool:
        """Whether a file or a folder with files exists; `exists` of most file systems returns False on any error."""
        try:
            facts = self.system.info(path)
            return facts.get("type") != "directory" or bool(self.system.ls(path, detail=False))
        except FileNotFoundError:
            return False

    def put(self, source: Path, name: str) -> None:
        """Upload a file, in several parts if it is big; it appears once it is complete."""
        try:
            target = self.system.open(f"{self.root}/{name}".rstrip("/"), "wb", block_size=COPY_BYTES)
            try:
                with source.open("rb") as file:
                    shutil.copyfileobj(file, target, COPY_BYTES)
                target.close()
            except BaseException:
                # Closing it, even by the garbage collector, would publish an incomplete file: discard it instead.
                with suppress(Exception):
                    target.discard()
                with suppress(Exception):
                    target.closed = True
                raise
        except (PrunectlError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise WorkError(
                f"{shown(f'{self.url}/{name}'.rstrip('/'))} cannot be written: {first_line(error).rstrip('.')}",
                hint="run the same command again, which resumes",
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file of the folder, or a subfolder with all its files."""
        with _fsspec_errors(self.url):
            self.system.rm(f"{self.root}/{name}", recursive=True)


def is_inside(name: str) -> bool:
    """Whether a relative name cannot lead out of its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def remote_folder(url: str) -> RemoteFolder:
    """The folder at a URL."""
    if url.startswith("http"):
        base, mark, query = url.partition("?")
        scheme, _, rest = base.partition("://")
        host, slash, path = rest.rstrip("/").partition("/")
        # As browsers do: characters that are quoted already stay as they are.
        path, query = (urllib.parse.quote(text, safe="%/:@!$&'()*+,;=~?") for text in (path, query))
        return HttpFolder(f"{scheme}://{host}{slash}{path}", mark + query)
    return fsspec_folder(url)


def fsspec_folder(url: str) -> FsspecFolder:
    """The folder at a URL that fsspec reads and writes."""
    require("fsspec", extra="remote")
    with _fsspec_errors(url):
        system, root = require("fsspec.core", extra="remote").url_to_fs(url.rstrip("/"))
    return FsspecFolder(system, root.rstrip("/"), url.rstrip("/"))
