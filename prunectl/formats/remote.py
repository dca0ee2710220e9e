"""Models at URLs: a local folder of stub files represents the model, and byte ranges are read on demand.

The stub of a safetensors file is its header; `formats.extents` reads the rest from the server. Code that opens a stub
in another way finds a truncated file, instead of one full of zeros. Other files are downloaded whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any
from urllib.parse import unquote

from prunectl.errors import InputError, PrunectlError, UsageError, WorkError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.detect import (
    NETWORK_OF_DIFFUSERS,
    PIPELINE_INDEX,
    missing_index,
    parts_without_index,
    without_secrets,
)
from prunectl.formats.extents import REMOTE, RemoteFile
from prunectl.formats.folder import LEDGER, training_part
from prunectl.formats.registry import SUFFIXES, WEIGHT_FILES
from prunectl.formats.remote_files import (
    COPY_BYTES,
    FsspecFile,
    FsspecFolder,
    RemoteFolder,
    fsspec_folder,
    is_inside,
    remote_folder,
    shown,
)
from prunectl.formats.safe_json import parse_object
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.workers import workers

_HEAD_BYTES = 64 << 10
"""Size of the first read of a file, which covers the header of most safetensors."""
_WINDOW_BYTES = 8 << 20
_CONCURRENT_REQUESTS = 8
_FACTS = frozenset({"config.json", "adapter_config.json", "generation_config.json", "model_index.json", "modules.json"})
"""Configs of a model, which are downloaded whole; other files beside the weights only if they are copied."""
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "README.md", "LICENSE"),
)
"""Files that are tried in a folder on a web server, which cannot be listed."""
Tell = Callable[[str], object]


@dataclass(slots=True)
class _Mirror:
    """A local folder of stubs that represents a folder at a URL."""

    folder: Path
    url: str
    """The URL as it is shown in messages."""
    tell: Tell
    """Shows a note to the user."""
    stubs: list[Path] = field(default_factory=list)
    nbytes: int = 0
    """Total size of the stubs."""
    _lock: Any = field(default_factory=Lock)

    def stub(self, name: str, file: RemoteFile, *, is_config: bool) -> None:
        """Create the stub of a file: the header of safetensors, the whole content of a config, else nothing."""
        path, head = self.folder / name, b""
        if is_config:
            head = _whole(file, budgets.MAX_JSON_BYTES)
        elif path.suffix == ".safetensors":
            head = _header(file, path)
        with self._lock:
            self.nbytes += len(head)
        if self.nbytes > budgets.MAX_HEADERS_BYTES:
            raise InputError(f"{self.url} is refused: its headers are longer than {budgets.MAX_HEADERS_BYTES} bytes")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(head)
        except OSError as error:
            # An object store may hold both x and x/y, or names that are too long for the file system.
            raise InputError(f"{shown(file.url)} cannot be kept as a file here: {error.strerror}") from error
        if not is_config:
            REMOTE[path] = _Buffered(file)
            self.stubs.append(path)


def _whole(file: RemoteFile, most: int) -> bytes:
    head = file.head(_HEAD_BYTES, most)
    if file.nbytes > most:
        raise InputError(f"{shown(file.url)} is refused: it is longer than {most} bytes")
    return head + file.read(len(head), file.nbytes - len(head)) if len(head) < file.nbytes else head


def _header(file: RemoteFile, path: Path) -> bytes:
    """The length and header of a safetensors file."""
    head = file.head(_HEAD_BYTES)
    length = int.from_bytes(head[:8], "little") + 8
    if length > min(budgets.MAX_SAFETENSORS_HEADER_BYTES, file.nbytes):
        raise InputError(f"{path} is truncated or damaged: it claims a header of {length - 8} bytes")
    return head[:length] if length <= len(head) else head + file.read(len(head), length - len(head))


class _Buffered:
    """A remote file that is read in windows of 8 MiB, of which the last few are cached."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.url = file, file.url
        if file.nbytes < 0:
            file.head(1)
        self.nbytes, self.version = file.nbytes, file.version

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        return self.file.head(nbytes, whole)

    def read(self, offset: int, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            number, begin = divmod(offset + len(data), _WINDOW_BYTES)
            piece = _window(self, number)[begin : begin + nbytes - len(data)]
            if not piece:
                raise InputError(f"{shown(self.url)} ends too early")
            data += piece
        return bytes(data)


@lru_cache(maxsize=4)
def _window(buffered: _Buffered, number: int) -> bytes:
    begin = number * _WINDOW_BYTES
    return buffered.file.read(begin, min(_WINDOW_BYTES, max(buffered.nbytes - begin, 0)))


def download(path: Path) -> None:
    """Replace a stub by the whole file, downloaded in ranges; InputError if the file changes meanwhile."""
    check_unchanged(path)
    file = _unbuffered(REMOTE[path])
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as target:
        for offset in range(0, file.nbytes, COPY_BYTES):
            target.write(file.read(offset, min(COPY_BYTES, file.nbytes - offset)))
    check_unchanged(path)
    os.replace(part, path)
    del REMOTE[path]


def check_unchanged(path: Path) -> None:
    """Refuse a file in an object store that has changed since its first read; HttpFile checks this at each read."""
    file = _unbuffered(REMOTE[path]) if path in REMOTE else None
    if not isinstance(file, FsspecFile):
        return
    nbytes, version = file.state()
    file.version = file.version or version
    if (nbytes, version) != (file.nbytes, file.version):
        raise InputError(f"{shown(file.url)} was changed while it was being read")


def _unbuffered(file: RemoteFile) -> RemoteFile:
    return file.file if isinstance(file, _Buffered) else file


@contextmanager
def downloaded(path: Path) -> Generator[None]:
    """Replace a stub by the whole file within the block; afterwards, restore the stub."""
    remote = REMOTE.get(path)
    if remote is None:
        yield
        return
    stub = path.read_bytes()
    download(path)
    try:
        yield
    finally:
        path.write_bytes(stub)
        REMOTE[path] = remote


UPLOADS: dict[Path, FsspecFolder] = {}
"""The destinations of outputs that are uploaded once they are written, by their local path."""


@contextmanager
def uploading(url: str, *, is_forced: bool, begun: str = "") -> Generator[Path]:
    """Yield a local path for an output; at the end, the output is uploaded, the file by which it is opened last.

    The URL must be free, or have the unfinished output marked by `begun`, unless `is_forced`. In that case, the file by
    which the old model is opened is removed first, so that no old index is ever beside new weights.
    """
    if url.startswith("http"):
        raise UsageError(f"{shown(url)} cannot be written to", hint="use s3://, gs://, az:// or hf://, or write a file")
    remote = fsspec_folder(url)
    if not is_forced:
        remote.check_free(begun)
    with temporary_folder() as scratch:
        target = scratch.resolve() / (_name(url) or "model")
        UPLOADS[target] = remote
        try:
            yield target
            _put(remote, target, is_forced=is_forced)
        except PrunectlError as error:
            own, url = str(target), without_secrets(url)
            error.message, error.hint = error.message.replace(own, url), error.hint.replace(own, url)
            raise
        finally:
            del UPLOADS[target]


def _put(remote: FsspecFolder, target: Path, *, is_forced: bool) -> None:
    """Upload a file, or all files of a folder."""
    inside = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    new = {"": target} if target.is_file() else inside
    last = [name for name in new if PurePosixPath(name).name in WEIGHT_FILES]
    try:
        old = _remove_heads(remote) if is_forced and new and "" not in new else []
        for name in [*sorted(new.keys() - last), *sorted(last)]:
            remote.put(new[name], name)
        for name in old:
            if name not in new:
                remote.remove(name)
    except WorkError as error:
        # The upload cannot be resumed, because no ledger records the files uploaded so far.
        error.hint = "run the same command again, with --force, which replaces what was uploaded"
        raise


def _remove_heads(remote: FsspecFolder) -> list[str]:
    """Remove the files by which a model in a folder is opened, and return the shards that its index names."""
    files = remote.files() or {}
    indexed: list[str] = []
    for name in [name for name in files if PurePosixPath(name).name in WEIGHT_FILES]:
        folder = name.rpartition("/")[0]
        if name.endswith(".json"):
            # An index that cannot be read is removed all the same.
            with suppress(InputError):
                text = _whole(files[name], budgets.MAX_JSON_BYTES)
                weights = parse_object(text, Path(name), "the index").get("weight_map")
                shards = set(map(str, weights.values())) if isinstance(weights, dict) else set()
                indexed += [
                    file for file in files if PurePosixPath(file).name in shards and file.rpartition("/")[0] == folder
                ]
        remote.remove(name)
    return sorted(set(indexed))


def fetch(path: Path, tell: Tell) -> None:
    """Download all stubs in a folder, or a single one; training state beside the weights is left out."""
    stubs = [stub for stub in REMOTE if stub == path or stub.is_relative_to(path)]
    is_known = any((path / name).exists() for name in (*WEIGHT_FILES, PIPELINE_INDEX))
    if is_known or (path.is_dir() and parts_without_index(path)):
        # Optimizer files are big and not part of the model. Safetensors are: an index may give shards such names.
        stubs = [
            stub for stub in stubs if stub.suffix == ".safetensors" or training_part(stub.relative_to(path)) is None
        ]
    _fetch(stubs, tell)


def _fetch(paths: list[Path], tell: Tell) -> None:
    """Download stubs; the size of files other than safetensors is limited, as they may not be models at all."""
    unknown = [path for path in paths if path.suffix != ".safetensors"]
    nbytes = sum(REMOTE[path].nbytes for path in unknown)
    if nbytes > budgets.MAX_FETCHED_BYTES:
        raise InputError(f"{unknown[0]} is refused: too much would be fetched whole ({nbytes} bytes)")
    for path in paths:
        why = "only safetensors are read in ranges" if path in unknown else "what is asked for needs all of it"
        tell(f"{path.name} is fetched whole ({REMOTE[path].nbytes} bytes): {why}")
        download(path)


@contextmanager
def mirrored(url: str, *, tell: Tell = lambda _: None, is_read_whole: bool = False) -> Generator[Path]:
    """Yield a local path for the model at a URL, downloaded if `is_read_whole` (to be read not only by `extents`)."""
    with temporary_folder() as scratch:
        name = _name(url)
        folder = path = scratch.resolve() / (name if is_inside(name) else "model")
        folder.mkdir()
        mirror = _Mirror(folder, without_secrets(url).rstrip("/"), tell)
        try:
            path = _mirror(mirror, url)
            if is_read_whole:
                fetch(mirror.folder, tell)
            yield path
        except PrunectlError as error:
            error.message = error.message.replace(str(folder), mirror.url)
            # `prunectl export` does not read URLs.
            typed, possible = f"prunectl export {folder}", f"download it, then prunectl export {folder.name}"
            error.hint = error.hint.replace(typed, possible).replace(str(folder), mirror.url)
            raise
        finally:
            for stub in mirror.stubs:
                REMOTE.pop(stub, None)
            _window.cache_clear()


def _name(url: str) -> str:
    name = PurePosixPath(url.partition("?")[0].partition("://")[2]).name
    plain = unquote(name) if url.startswith("http") else name
    return plain if is_inside(plain) and "/" not in plain else name


def _mirror(mirror: _Mirror, url: str) -> Path:
    """Create the stubs for a URL, and return the local path of the model."""
    remote, name = remote_folder(url), _name(url)
    listed = remote.files()
    if PurePosixPath(name).suffix in _SUFFIXES if listed is None else not listed:
        mirror.url = without_secrets(_parent(url))
        return _one_file(mirror, remote_folder(_parent(url)), name)
    files = _probed(remote) if listed is None else listed
    index = next((weights for weights in WEIGHT_FILES if weights in files), "")
    is_pipeline = not index and (PIPELINE_INDEX in files or _has_networks(files))
    if not index and not is_pipeline and not any(marker in files for marker in _DOWNLOADED_FOLDERS):
        what = missing_index(files) or "has no model of a format that prunectl knows"
        raise InputError(f"{shown(url)} {what}", hint=_hint(files))
    needed = _shards(mirror, remote, index, listed) if index.endswith(".json") else [index]
    rest = {other: file for other, file in files.items() if not os.path.exists(mirror.folder / other)}
    _make_stubs(mirror, rest, frozenset(filter(_is_config, rest)))
    if not index and not is_pipeline:
        # None of the weights can be read in ranges.
        needed = list(rest)
    _fetch_needed(mirror, needed)
    return mirror.folder


def _fetch_needed(mirror: _Mirror, names: list[str]) -> None:
    paths = (mirror.folder / name for name in names if not name.endswith(".safetensors"))
    _fetch([path for path in paths if path in REMOTE], mirror.tell)


_DOWNLOADED_FOLDERS = ("saved_model.pb", ".metadata", "latest")
"""Files that mark a folder to download whole: a SavedModel, or a checkpoint of many ranks."""


def _has_networks(files: Mapping[str, RemoteFile]) -> bool:
    """Whether a folder holds parts of a pipeline without an index, as a training checkpoint of diffusers does."""
    parts = [name.split("/") for name in files]
    return any(
        len(names) == 2 and names[1] in NETWORK_OF_DIFFUSERS and f"{names[0]}/config.json" in files for names in parts
    )


def _is_config(name: str) -> bool:
    """Whether a file is needed whole to open the model: a config, or the index of a part of a pipeline."""
    path = PurePosixPath(name)
    return path.name in _FACTS or (len(path.parts) == 2 and path.suffix == ".json" and path.name in WEIGHT_FILES)


def _hint(files: Mapping[str, RemoteFile]) -> str:
    """Files in a folder that may have been meant."""
    if any(name.startswith(f"{LEDGER}/") for name in files):
        return "it holds parts of a model that are not joined: prunectl prune … --join"
    # Of JSON files, only an index is a model.
    models = sorted(
        name for name in files if PurePosixPath(name).suffix in _SUFFIXES - {".json"} or name.endswith(".index.json")
    )[:3]
    return f"name a file: {', '.join(map(abbreviated, models))}" if models else "name the folder of a model, or a file"


_SUFFIXES = SUFFIXES | {".ckpt"}
"""Suffixes of single model files; on a disk, .ckpt may also be TensorFlow's, but at a URL it is Lightning's."""


def _parent(url: str) -> str:
    base, mark, query = url.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def _one_file(mirror: _Mirror, remote: RemoteFolder, name: str) -> Path:
    file, path = remote.file(name), mirror.folder / name
    if name.endswith(".index.json"):
        _fetch_needed(mirror, _shards(mirror, remote, name, remote.files()))
        return path
    mirror.stub(name, file, is_config=path.suffix == ".json")
    _fetch_needed(mirror, [name])
    return path


def _shards(mirror: _Mirror, remote: RemoteFolder, index: str, files: Mapping[str, RemoteFile] | None) -> list[str]:
    """Create the stubs of an index and of its shards, and return the names of the shards."""
    path = mirror.folder / index
    text = _whole(remote.file(index), budgets.MAX_JSON_BYTES)
    path.write_bytes(text)
    names = parse_object(text, path, "the index").get("weight_map")
    values = dict.fromkeys(names.values()) if isinstance(names, dict) else {}
    wanted = [shard for shard in values if isinstance(shard, str) and is_inside(shard) and "/" not in shard]
    if len(wanted) > budgets.MAX_FILES:
        raise InputError(f"{path} is refused: it names more than {budgets.MAX_FILES} shards")
    # Opening the model reports missing shards by name.
    _make_stubs(mirror, {shard: remote.file(shard) for shard in wanted if files is None or shard in files}, frozenset())
    return wanted


_ON_HUB = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)")


def _probed(remote: RemoteFolder) -> dict[str, RemoteFile]:
    """The usual files that exist in a folder that cannot be listed."""
    found: dict[str, RemoteFile] = {}
    for names in (WEIGHT_FILES, (*_FACTS, *_BESIDE)):
        for name in names:
            file = remote.file(name)
            try:
                file.head(1, budgets.MAX_JSON_BYTES)
            except InputError as error:
                if not error.message.endswith("does not exist"):
                    raise
            else:
                found[name] = file
                if names is WEIGHT_FILES:
                    break
        if not found:
            raise _not_found(remote)
    return found


def _not_found(remote: RemoteFolder) -> InputError:
    """The error for a folder on a web server in which none of the usual files exist."""
    match = _ON_HUB.match(remote.url)
    listed = f"use hf://{match[1]}" if match else "use hf://, s3:// or gs://"
    try:
        remote.file(PIPELINE_INDEX).head(1, budgets.MAX_JSON_BYTES)
    except InputError:
        what, other = "has no model that is found without a list of its files", "name a file: the index, or the weights"
    else:
        what, other = "is a pipeline of diffusers, of which a web server lists no files", "name the folder of one part"
    return InputError(f"{shown(remote.url)} {what}", hint=f"{other}; or {listed}, where files are listed")


def _make_stubs(mirror: _Mirror, files: Mapping[str, RemoteFile], configs: frozenset[str]) -> None:
    with workers(_CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda item: mirror.stub(*item, is_config=item[0] in configs), files.items()))
