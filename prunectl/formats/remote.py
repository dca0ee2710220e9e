"""Models at URLs: a folder of stubs stands for them here, whose bytes come in ranges as they are asked for.

Of a safetensors file the stub is the header; `formats.extents` reads the rest where it is. Whatever else read a stub
would find it truncated, and not full of zeros. What is no safetensors is fetched whole.
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
from prunectl.formats.places import (
    COPY_BYTES,
    LibraryFile,
    LibraryPlace,
    Place,
    is_inside,
    library_place,
    place_of,
    shown,
)
from prunectl.formats.registry import IN_A_FOLDER, SUFFIXES
from prunectl.formats.safe_json import parse_object
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.workers import workers

_HEAD_BYTES = 64 << 10
"""What is read of a file at first: the header of most safetensors, and no more of it than of a long one."""
_WINDOW_BYTES = 8 << 20
_ASKED_AT_ONCE = 8
_FACTS = frozenset({"config.json", "adapter_config.json", "generation_config.json", "model_index.json", "modules.json"})
"""What tells what a model is, beside its index; all else in its folder is fetched only to be copied."""
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "README.md", "LICENSE"),
)
"""What is looked for in a folder on a web server, which lists none."""
Tell = Callable[[str], object]


@dataclass(slots=True)
class _Mirror:
    """A folder of stubs, and what they stand for."""

    folder: Path
    url: str
    """That which the folder stands for, as it is shown."""
    tell: Tell
    stubs: list[Path] = field(default_factory=list)
    nbytes: int = 0
    """Of all stubs."""
    _lock: Any = field(default_factory=Lock)

    def stub(self, name: str, file: RemoteFile, *, is_fact: bool) -> None:
        """Make the stub of a file: of safetensors with the header, of what tells of the model with all of it."""
        path, head = self.folder / name, b""
        if is_fact:
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
            # A store may have x and x/y, and longer names than a file system.
            raise InputError(f"{shown(file.url)} cannot be kept as a file here: {error.strerror}") from error
        if not is_fact:
            REMOTE[path] = _Buffered(file)
            self.stubs.append(path)


def _whole(file: RemoteFile, most: int) -> bytes:
    head = file.head(_HEAD_BYTES, most)
    if file.nbytes > most:
        raise InputError(f"{shown(file.url)} is refused: it is longer than {most} bytes")
    return head + file.read(len(head), file.nbytes - len(head)) if len(head) < file.nbytes else head


def _header(file: RemoteFile, path: Path) -> bytes:
    """The header of a safetensors file, or all that is there of one that claims a longer one."""
    head = file.head(_HEAD_BYTES)
    length = int.from_bytes(head[:8], "little") + 8
    if length > min(budgets.MAX_SAFETENSORS_HEADER_BYTES, file.nbytes):
        raise InputError(f"{path} is truncated or damaged: it claims a header of {length - 8} bytes")
    return head[:length] if length <= len(head) else head + file.read(len(head), length - len(head))


class _Buffered:
    """A file that is read in windows, of which a few are kept."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.url = file, file.url
        if file.nbytes < 0:
            file.head(1)
        self.nbytes, self.version = file.nbytes, file.version

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        return self.file.head(nbytes, whole)

    def read(self, offset: int, nbytes: int) -> bytes:
        found = bytearray()
        while len(found) < nbytes:
            number, begin = divmod(offset + len(found), _WINDOW_BYTES)
            piece = _window(self, number)[begin : begin + nbytes - len(found)]
            if not piece:
                raise InputError(f"{shown(self.url)} ends too early")
            found += piece
        return bytes(found)


@lru_cache(maxsize=4)
def _window(buffered: _Buffered, number: int) -> bytes:
    begin = number * _WINDOW_BYTES
    return buffered.file.read(begin, min(_WINDOW_BYTES, max(buffered.nbytes - begin, 0)))


def download(path: Path) -> None:
    """Make a file of a stub, its bytes in ranges; it is checked that nobody has changed it meanwhile."""
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
    """Refuse a file in a store that is no longer what it was when it was first seen; a web server says so itself."""
    file = _unbuffered(REMOTE[path]) if path in REMOTE else None
    if not isinstance(file, LibraryFile):
        return
    nbytes, version = file.state()
    file.version = file.version or version
    if (nbytes, version) != (file.nbytes, file.version):
        raise InputError(f"{shown(file.url)} was changed while it was being read")


def _unbuffered(file: RemoteFile) -> RemoteFile:
    return file.file if isinstance(file, _Buffered) else file


@contextmanager
def downloaded(path: Path) -> Generator[None]:
    """Have a file here for a while, if only its stub is; then the stub again."""
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


UPLOADS: dict[Path, LibraryPlace] = {}
"""Where an output goes that is written here first, by its path here."""


@contextmanager
def uploading(url: str, *, is_forced: bool, begun: str = "") -> Generator[Path]:
    """Yield a path for an output; what is there at the end goes to a URL, that by which it is opened last.

    Nothing may be there yet but what was begun, unless the user said so: then by what the old model is opened goes
    first, so that no old index ever stands beside new weights.
    """
    if url.startswith("http"):
        raise UsageError(f"{shown(url)} cannot be written to", hint="use s3://, gs://, az:// or hf://, or write a file")
    place = library_place(url)
    if not is_forced:
        place.check_free(begun)
    with temporary_folder() as scratch:
        target = scratch.resolve() / (_name(url) or "model")
        UPLOADS[target] = place
        try:
            yield target
            _put(place, target, is_forced=is_forced)
        except PrunectlError as error:
            own, url = str(target), without_secrets(url)
            error.message, error.hint = error.message.replace(own, url), error.hint.replace(own, url)
            raise
        finally:
            del UPLOADS[target]


def _put(place: LibraryPlace, target: Path, *, is_forced: bool) -> None:
    """Upload a file, or all of a folder."""
    inside = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    found = {"": target} if target.is_file() else inside
    last = [name for name in found if PurePosixPath(name).name in IN_A_FOLDER]
    try:
        old = _remove_heads(place) if is_forced and found and "" not in found else []
        for name in [*sorted(found.keys() - last), *sorted(last)]:
            place.put(found[name], name)
        for name in old:
            if name not in found:
                place.remove(name)
    except WorkError as error:
        # Nothing notes what has been uploaded.
        error.hint = "run the same command again, with --force, which replaces what was uploaded"
        raise


def _remove_heads(place: LibraryPlace) -> list[str]:
    """Remove that by which a model in a folder is opened, and return what its index named."""
    files = place.files() or {}
    named: list[str] = []
    for name in [name for name in files if PurePosixPath(name).name in IN_A_FOLDER]:
        folder = name.rpartition("/")[0]
        if name.endswith(".json"):
            # What cannot be read names nothing, and goes all the same.
            with suppress(InputError):
                text = _whole(files[name], budgets.MAX_JSON_BYTES)
                weights = parse_object(text, Path(name), "the index").get("weight_map")
                shards = set(map(str, weights.values())) if isinstance(weights, dict) else set()
                named += [
                    one for one in files if PurePosixPath(one).name in shards and one.rpartition("/")[0] == folder
                ]
        place.remove(name)
    return sorted(set(named))


def fetch(path: Path, tell: Tell) -> None:
    """Make files of all stubs in a folder, or of one, but for what is only copied, if at all."""
    stubs = [stub for stub in REMOTE if stub == path or stub.is_relative_to(path)]
    is_known = any((path / name).exists() for name in (*IN_A_FOLDER, PIPELINE_INDEX))
    if is_known or (path.is_dir() and parts_without_index(path)):
        # Optimizers are bigger than the weights, and no part of what is opened; weights may be called so in an index.
        stubs = [
            stub for stub in stubs if stub.suffix == ".safetensors" or training_part(stub.relative_to(path)) is None
        ]
    _fetch(stubs, tell)


def _fetch(paths: list[Path], tell: Tell) -> None:
    """Make files of stubs; of what is no safetensors only so much, as nobody knows yet whether it is a model."""
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
    """Yield a path that stands for a URL; what is to be read by others than `formats.extents` is fetched whole."""
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
            # It reads files alone.
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
    """Make the stubs for a URL, and return the path that stands for it."""
    place, name = place_of(url), _name(url)
    listed = place.files()
    if PurePosixPath(name).suffix in _SUFFIXES if listed is None else not listed:
        mirror.url = without_secrets(_parent(url))
        return _one_file(mirror, place_of(_parent(url)), name)
    files = _probed(place) if listed is None else listed
    index = next((one for one in IN_A_FOLDER if one in files), "")
    is_pipeline = not index and (PIPELINE_INDEX in files or _has_networks(files))
    if not index and not is_pipeline and not any(one in files for one in _FETCHED_FOLDERS):
        what = missing_index(files) or "has no model of a format that prunectl knows"
        raise InputError(f"{shown(url)} {what}", hint=_hint(files))
    needed = _shards(mirror, place, index, listed) if index.endswith(".json") else [index]
    rest = {one: file for one, file in files.items() if not os.path.exists(mirror.folder / one)}
    _make(mirror, rest, frozenset(filter(_is_fact, rest)))
    if not index and not is_pipeline:
        # No weights that could be read where they are.
        needed = list(rest)
    _fetch_needed(mirror, needed)
    return mirror.folder


def _fetch_needed(mirror: _Mirror, names: list[str]) -> None:
    paths = (mirror.folder / one for one in names if not one.endswith(".safetensors"))
    _fetch([path for path in paths if path in REMOTE], mirror.tell)


_FETCHED_FOLDERS = ("saved_model.pb", ".metadata", "latest")
"""What tells a folder without weights that are read where they are: SavedModel, many ranks."""


def _has_networks(files: Mapping[str, RemoteFile]) -> bool:
    """Whether a folder holds parts of a pipeline that no index names, as a checkpoint of diffusers does."""
    parts = [one.split("/") for one in files]
    return any(
        len(names) == 2 and names[1] in NETWORK_OF_DIFFUSERS and f"{names[0]}/config.json" in files for names in parts
    )


def _is_fact(name: str) -> bool:
    """Whether all of a file is read to know the model: also the index of a part of a pipeline."""
    path = PurePosixPath(name)
    return path.name in _FACTS or (len(path.parts) == 2 and path.suffix == ".json" and path.name in IN_A_FOLDER)


def _hint(files: Mapping[str, RemoteFile]) -> str:
    """Files in a folder that may have been meant."""
    if any(one.startswith(f"{LEDGER}/") for one in files):
        return "it holds parts of a model that are not joined: prunectl prune … --join"
    # Of JSON an index is a model, and all else tells of one.
    named = sorted(
        one for one in files if PurePosixPath(one).suffix in _SUFFIXES - {".json"} or one.endswith(".index.json")
    )[:3]
    return f"name a file: {', '.join(map(abbreviated, named))}" if named else "name the folder of a model, or a file"


_SUFFIXES = SUFFIXES | {".ckpt"}
"""Of files by a name of their own; checkpoints of Lightning are called as TensorFlow's folders are on a disk."""


def _parent(url: str) -> str:
    base, mark, query = url.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def _one_file(mirror: _Mirror, place: Place, name: str) -> Path:
    file, path = place.file(name), mirror.folder / name
    if name.endswith(".index.json"):
        _fetch_needed(mirror, _shards(mirror, place, name, place.files()))
        return path
    mirror.stub(name, file, is_fact=path.suffix == ".json")
    _fetch_needed(mirror, [name])
    return path


def _shards(mirror: _Mirror, place: Place, index: str, files: Mapping[str, RemoteFile] | None) -> list[str]:
    """Make the stubs of an index and of the shards that it names, and return the names of those."""
    path = mirror.folder / index
    text = _whole(place.file(index), budgets.MAX_JSON_BYTES)
    path.write_bytes(text)
    names = parse_object(text, path, "the index").get("weight_map")
    values = dict.fromkeys(names.values()) if isinstance(names, dict) else {}
    wanted = [one for one in values if isinstance(one, str) and is_inside(one) and "/" not in one]
    if len(wanted) > budgets.MAX_FILES:
        raise InputError(f"{path} is refused: it names more than {budgets.MAX_FILES} shards")
    # One that is not there is missed when the model is opened, which names it.
    _make(mirror, {one: place.file(one) for one in wanted if files is None or one in files}, frozenset())
    return wanted


_ON_HUB = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)")


def _probed(place: Place) -> dict[str, RemoteFile]:
    """What is found of the usual files in a folder that lists nothing."""
    found: dict[str, RemoteFile] = {}
    for names in (IN_A_FOLDER, (*_FACTS, *_BESIDE)):
        for name in names:
            file = place.file(name)
            try:
                file.head(1, budgets.MAX_JSON_BYTES)
            except InputError as error:
                if not error.message.endswith("does not exist"):
                    raise
            else:
                found[name] = file
                if names is IN_A_FOLDER:
                    break
        if not found:
            raise _not_found(place)
    return found


def _not_found(place: Place) -> InputError:
    """The error for a folder on a web server, which does not say what is in it."""
    match = _ON_HUB.match(place.url)
    listed = f"use hf://{match[1]}" if match else "use hf://, s3:// or gs://"
    try:
        place.file(PIPELINE_INDEX).head(1, budgets.MAX_JSON_BYTES)
    except InputError:
        what, other = "has no model that is found without a list of its files", "name a file: the index, or the weights"
    else:
        what, other = "is a pipeline of diffusers, of which a web server lists no files", "name the folder of one part"
    return InputError(f"{shown(place.url)} {what}", hint=f"{other}; or {listed}, where files are listed")


def _make(mirror: _Mirror, files: Mapping[str, RemoteFile], facts: frozenset[str]) -> None:
    with workers(_ASKED_AT_ONCE) as pool:
        list(pool.map(lambda one: mirror.stub(one[0], one[1], is_fact=one[0] in facts), files.items()))
