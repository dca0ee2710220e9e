"""Models at URLs: only what is needed is read, a server that lies is told, and nothing is half-written."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractBufferedFile
from safetensors.numpy import save_file

import prunectl
from prunectl.errors import UsageError, WorkError
from prunectl.formats import budgets, remote_files
from prunectl.formats.detect import without_secrets
from tests.formats.test_folder import files_of
from tests.pruning.test_parts import folder
from tests.running import FIXTURES, here

__all__ = ["folder"]
Answer = Callable[[BaseHTTPRequestHandler, bytes, int, int], bool]
"""Answers a request for a range of a file, and returns whether it did."""


@dataclass
class Server:
    """A web server on this machine that knows ranges, and counts what it sends."""

    root: Path
    url: str = ""
    sent: int = 0
    asked: list[str] = field(default_factory=list)
    answer: Answer = lambda *_: False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = Server(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = state.root / unquote(self.path.partition("?")[0].lstrip("/"))
            state.asked.append(self.path)
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert match is not None
            begin, end = int(match[1]), min(int(match[2]) + 1, size)
            with path.open("rb") as file:
                file.seek(begin)
                body = file.read(end - begin)
            if state.answer(self, body, begin, size):
                return
            reply(self, 206, body, ETag='"1"', Content_Range=f"bytes {begin}-{end - 1}/{size}")
            state.sent += len(body)

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    state.url = f"http://127.0.0.1:{running.server_address[1]}"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    running.shutdown()
    running.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system of fsspec that is in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def upload(system: Any, source: Path, root: str) -> None:
    for name, content in files_of(source).items():
        system.pipe_file(f"{root}/{name}", content)


def big_file(path: Path, nbytes: int) -> Path:
    """A safetensors file with nothing but a header, and holes behind it."""
    shape = [nbytes >> 12, 1024]
    header = {"model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    return path


def test_a_look_at_eight_gigabytes_reads_less_than_one_megabyte(server: Server, tmp_path: Path) -> None:
    big_file(tmp_path / "model.safetensors", 8 << 30)
    seen = here("inspect", f"{server.url}/model.safetensors", "--json")
    assert seen.code == 0, seen.err
    (model,) = seen.json["models"]
    assert model["bytes"]["raw"] > 8 << 30
    assert model["params"]["total"] == 2 << 30
    assert model["sparsity"] is None
    assert server.sent < 1 << 20
    assert "Zeros were not counted" in here("inspect", f"{server.url}/model.safetensors").err


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_commands_say_of_a_url_what_they_say_of_the_folder(
    folder: Path, memory: Any, server: Server, kind: str
) -> None:
    upload(memory, folder, "/bucket/model")
    url = "memory://bucket/model" if kind == "memory" else f"{server.url}/model"
    for words in (("inspect", "--zeros"), ("size",), ("diff", folder)):
        here_too = here(words[0], folder, *words[1:], "--json").json
        found = here(words[0], url, *words[1:], "--json")
        assert found.code == 0, found.err
        assert found.out.replace(url, str(folder)) == json.dumps(here_too, indent=2, ensure_ascii=False) + "\n"
    read = here("inspect", f"{url}/model.safetensors.index.json", "--zeros", "--json").json["models"][0]
    assert read["params"] == here("inspect", folder, "--json").json["models"][0]["params"]


def test_what_is_no_safetensors_is_fetched_whole_which_is_said(server: Server, memory: Any, tmp_path: Path) -> None:
    for name in ("digits_cnn.onnx", "digits_cnn.h5", "digits_cnn.pt"):
        shutil.copy(FIXTURES / name, tmp_path / name)
        memory.pipe_file(f"/bucket/{name}", (tmp_path / name).read_bytes())
        for url in (f"{server.url}/{name}", f"memory://bucket/{name}"):
            seen = here("inspect", url, "--format", "csv")
            assert seen.out == here("inspect", tmp_path / name, "--format", "csv").out.replace(
                str(tmp_path / name), url
            )
            assert f"{name} is fetched whole" in seen.err


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    done = here("inspect", "s3://bucket/model.safetensors")
    assert done.code == 4
    assert "fsspec is not installed" in done.err
    assert "does not exist" not in done.err


def test_a_file_system_that_is_not_installed_is_named() -> None:
    done = here("inspect", "s3://bucket/model.safetensors")
    assert done.code == 4
    assert "s3fs" in done.err


def test_what_is_not_there_is_told(server: Server, memory: Any) -> None:
    for url in (f"{server.url}/no.safetensors", "memory://bucket/no.safetensors"):
        done = here("inspect", url)
        assert done.code == 3
        assert f"{url} does not exist" in done.err
    done = here("inspect", f"{server.url}/nothing")
    assert done.code == 3
    assert "has no model that is found" in done.err


def whole(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(size))
    handler.end_headers()
    return True


def endless(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{size}")
    handler.end_headers()
    try:
        for _ in range(200):
            handler.wfile.write(bytes(1 << 20))
    except OSError:
        pass
    return True


def continuing(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
    dripped(handler, b"HTTP/1.1 100 Continue\r\n\r\n")
    return True


def dripping(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
    handler.wfile.write(b"HTTP/1.1 206 Some\r\nX: ")
    dripped(handler, b"x")
    return True


def dripped(handler: BaseHTTPRequestHandler, piece: bytes) -> None:
    with suppress(OSError):
        for _ in range(200):
            handler.wfile.write(piece)
            time.sleep(0.1)


def long_winded(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
    """Send a redirection whose own body does not end: whoever reads it gets no further."""
    handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /none.safetensors\r\nContent-Length: 1000000000\r\n\r\n")
    dripped(handler, b"x")
    return True


def lying(status: int = 206, *, cut: int = 0, to: str = "", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
        span = f"bytes {begin}-{begin + len(body) - 1}/{size}"
        if to:
            headers["Location"] = to
        reply(handler, status, body[: len(body) - cut], **{"Content_Range": span, **headers})
        return True

    return answer


LIES: dict[str, tuple[Answer, str]] = {
    "ranges ignored": (whole, "cannot be read in ranges"),
    "endless": (endless, "sends more bytes"),
    "truncated": (lying(cut=9), "sends fewer bytes"),
    "truncated and longer": (lying(cut=9, Content_Length="65536"), "cannot be read|fewer bytes"),
    "no range": (lying(Content_Range="some"), "does not say which bytes"),
    "another range": (lying(Content_Range="bytes 8-99/4096"), "other bytes than those"),
    "a size beyond any": (lying(Content_Range=f"bytes 0-65535/{10**18}"), "truncated or damaged|other bytes|overlaps"),
    "compressed": (lying(Content_Encoding="gzip"), "comes compressed"),
    "circles": (lying(302, to="/again.safetensors"), "redirects in circles"),
    "another scheme": (lying(302, to="file:///etc/passwd"), "not on the web"),
    "nowhere": (lying(302, to="http://[::1/x"), "redirects to one that is not"),
    "no host": (lying(302, to="http://a..b/x"), "redirects to one that is not"),
    "no letters": (lying(302, to="http://\xff\xfe/x"), "redirects to one that is not"),
    "wait and wait": (continuing, "is too slow"),
    "a header that does not end": (dripping, "is too slow"),
    "a redirection that does not end": (long_winded, "l.safetensors does not exist"),
    "forbidden": (lying(403), "asks for permission"),
    "broken": (lying(500), "status 500"),
}


SLOW = ("wait and wait", "a header that does not end")


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_refused_in_a_sentence(
    server: Server, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(remote_files, "_SILENCE_SECONDS", 0.3 if lie in SLOW else 30.0)
    for name in ("model.safetensors", "again.safetensors"):
        big_file(tmp_path / name, 1 << 20)
    server.answer, sentence = LIES[lie]
    done = here("inspect", f"{server.url}/model.safetensors")
    assert done.code == 3, done.err
    assert re.search(sentence, done.err), done.err
    assert len(done.err.splitlines()[0]) <= 320


def test_a_file_that_changes_between_two_requests_is_told(server: Server, folder: Path) -> None:
    tags = iter(range(1000))

    def changed(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
        span = f"bytes {begin}-{begin + len(body) - 1}/{size}"
        reply(handler, 206, body, Content_Range=span, ETag=f'"{next(tags)}"')
        return True

    server.answer = changed
    done = here("size", f"{server.url}/model/model-00001-of-00006.safetensors")
    assert done.code == 3
    assert "was changed while it was being read" in done.err


def test_a_long_header_is_read_to_its_end_and_one_that_lies_is_refused(server: Server, tmp_path: Path) -> None:
    many = {f"model.layers.{number}.mlp.up_proj.weight": np.ones((2, 2), np.float32) for number in range(2000)}
    save_file(many, tmp_path / "many.safetensors")
    assert here("inspect", f"{server.url}/many.safetensors", "--json").json["models"][0]["params"]["total"] == 8000
    for claim in (1 << 30, 1 << 62):
        (tmp_path / "lies.safetensors").write_bytes(claim.to_bytes(8, "little") + b"{" + bytes(100_000))
        done = here("inspect", f"{server.url}/lies.safetensors")
        assert done.code == 3
        assert "claims a header" in done.err


def in_memory(system: Any, root: str) -> dict[str, bytes]:
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


SCOPES = [("-s", "50%"), ("-s", "30%", "--scope", "global")]


@pytest.mark.parametrize("words", SCOPES)
def test_a_folder_at_a_url_is_pruned_to_the_bytes_of_the_folder_here(
    folder: Path, memory: Any, server: Server, words: tuple[str, ...]
) -> None:
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    expected = files_of(folder.parent / "whole")
    upload(memory, folder, "/bucket/model")
    places = [("memory://bucket/model", "memory://bucket/out"), (f"{server.url}/model", str(folder.parent / "out"))]
    places += [("memory://bucket/model", str(folder.parent / "here")), (str(folder), "memory://bucket/up")]
    for source, output in places:
        done = here("prune", source, "-o", output, *words, "--json")
        assert done.code == 0, done.err
        assert [one["path"] for one in done.json["models"]] == [source, output]
        is_up = output.startswith("memory")
        found = in_memory(memory, f"/bucket/{output[16:]}") if is_up else files_of(Path(output))
        # What no list names is not found on a web server.
        kept = {name for name in expected if not (source.startswith("http") and name.startswith("extra"))}
        assert found == {name: content for name, content in expected.items() if name in kept}
        report = here("prune", source, "-o", output, *words)
        assert report.code == 2
        assert f"{output} exists" in report.err


def test_parts_of_a_folder_at_a_url_go_to_a_bucket_and_are_joined_there(folder: Path, memory: Any) -> None:
    words = ("-s", "30%", "--scope", "global")
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    upload(memory, folder, "/bucket/model")
    place = ("memory://bucket/model", "-o", "memory://bucket/out")
    assert here("prune", *place, *words, "--part", "2/2").code == 0
    assert "model.safetensors.index.json" not in in_memory(memory, "/bucket/out")
    early = here("prune", *place, "--join")
    assert early.code == 5
    assert "part 1/2 of memory://bucket/out is not done" in early.err
    done = here("prune", *place, *words, "--part", "1/2")
    assert "becomes a model by --join" in done.err + done.out
    again = here("prune", *place, *words, "--part", "2/2", "--format", "csv")
    assert {row[0].rpartition(",")[2] for row in again.rows[1:]} == {"before"}
    assert here("prune", *place, *words[:1], "40%", *words[2:], "--part", "2/2").code == 2
    assert here("prune", *place, "--join").code == 0
    assert in_memory(memory, "/bucket/out") == files_of(folder.parent / "whole")


def test_a_single_file_and_every_other_mode_are_fetched_and_uploaded_whole(memory: Any, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.safetensors", tmp_path / "m.safetensors")
    memory.pipe_file("/bucket/m.safetensors", (tmp_path / "m.safetensors").read_bytes())
    for words in (("-s", "50%"), ("--target-gzip", "9KB"), ("--pattern", "2:4", "--force")):
        here_too, up = tmp_path / "out.safetensors", "memory://bucket/out.safetensors"
        assert here("prune", tmp_path / "m.safetensors", "-o", here_too, *words, "--force").code == 0
        memory.store.pop("/bucket/out.safetensors", None)
        done = here("prune", "memory://bucket/m.safetensors", "-o", up, *words)
        assert done.code == 0, done.err
        assert memory.cat_file("/bucket/out.safetensors") == here_too.read_bytes()
    assert here("prune", "memory://bucket/m.safetensors", "-o", up, "-s", "50%").code == 2
    assert here("prune", "memory://bucket/m.safetensors", "-o", "https://x.org/out.safetensors", "-s", "50%").code == 2
    assert here("prune", "memory://bucket/m.safetensors", "--in-place", "-s", "50%").code == 2


def fill(memory: Any, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let a bucket be full after so many files."""
    room = iter(range(after))
    opened = type(memory).open

    def full(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and next(room, None) is None:
            raise OSError(28, "No space left on device")
        return opened(self, path, mode, **options)

    monkeypatch.setattr(type(memory), "open", full)


def test_a_full_bucket_is_told_and_what_was_written_is_no_model(
    folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(memory, monkeypatch, after=9)
    done = here("prune", folder, "-o", "memory://bucket/out", "-s", "50%")
    assert done.code == 5
    assert "cannot be written: [Errno 28] No space left" in done.err
    assert "model.safetensors.index.json" not in in_memory(memory, "/bucket/out")
    monkeypatch.undo()
    assert here("prune", folder, "-o", "memory://bucket/out", "-s", "50%").code == 0
    assert here("prune", folder, "-o", folder.parent / "whole", "-s", "50%").code == 0
    assert in_memory(memory, "/bucket/out") == files_of(folder.parent / "whole")


class Parts:
    """A store that takes files in parts, as object stores do, and refuses one of them, or the last word."""

    def __init__(self, refused: int) -> None:
        self.refused = refused
        self.taken: list[bytes] = []
        self.ended: list[str] = []

    def open(self, path: str, mode: str, block_size: int) -> Any:
        store = self

        class InParts(AbstractBufferedFile):  # type: ignore[misc]
            def _initiate_upload(self) -> None:
                self.is_begun = True

            def _upload_chunk(self, final: bool = False) -> bool:
                if len(store.taken) == store.refused:
                    # As `hf://` ends its sentences.
                    raise PermissionError("AccessDenied..")
                store.taken.append(self.buffer.getvalue())
                if final:
                    store.ended.append("published")
                return True

            def discard(self) -> None:
                store.ended.append("aborted")

        return InParts(SimpleNamespace(), path, mode, block_size=block_size)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("refused", [0, 1])
def test_an_upload_that_is_refused_is_aborted_and_not_published_later(
    tmp_path: Path, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "COPY_BYTES", 8)
    (tmp_path / "a").write_bytes(b"0123456789")
    store = Parts(refused)
    with pytest.raises(WorkError, match=r"s3://bucket/a cannot be written: AccessDenied$"):
        remote_files.FsspecFolder(store, "bucket", "s3://bucket").put(tmp_path / "a", "a")
    gc.collect()
    assert store.ended == ["aborted"]
    assert len(store.taken) == refused


@pytest.mark.parametrize("words", [("-s", "50%", "--scope", "layer"), ("-s", "50%", "--scope", "global")])
def test_a_folder_in_a_store_that_is_replaced_while_it_is_pruned_is_told(
    folder: Path, memory: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, folder, "/bucket/model")
    reads = iter(range(1000))
    read = type(memory).cat_file

    def replaced(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        # After the six headers.
        if path.endswith("safetensors") and next(reads) == 7:
            upload(memory, folder, "/bucket/model")
        return read(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", replaced)
    done = here("prune", "memory://bucket/model", "-o", "memory://bucket/out", *words)
    assert done.code == 3, done.err
    assert "was changed while it was being read" in done.err
    assert "model.safetensors.index.json" not in in_memory(memory, "/bucket/out")


def test_what_cannot_be_looked_at_is_not_taken_for_free(
    folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, folder, "/bucket/out")
    expected = in_memory(memory, "/bucket/out")
    look = type(memory).info

    def forbidden(self: Any, path: str, **options: Any) -> Any:
        if path.rstrip("/").endswith("out"):
            raise PermissionError(13, "Forbidden")
        return look(self, path, **options)

    monkeypatch.setattr(type(memory), "info", forbidden)
    done = here("prune", folder, "-o", "memory://bucket/out", "-s", "50%")
    assert done.code == 3, done.err
    assert "Forbidden" in done.err
    monkeypatch.undo()
    assert in_memory(memory, "/bucket/out") == expected


def test_a_model_that_is_replaced_by_force_is_none_until_all_of_the_new_one_is_there(
    folder: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, folder, "/bucket/out")
    assert here("export", folder, "-o", tmp_path / "two", "--shard-size", "40KB").code == 0
    fill(memory, monkeypatch, after=2)
    words = ("prune", tmp_path / "two", "-o", "memory://bucket/out", "-s", "50%", "--force")
    record = tmp_path / "record.json"
    done = here(*words, "--json", "--manifest", record)
    assert done.code == 5, done.err
    assert done.json["models"] == done.json["artifacts"] == []
    assert not record.exists()
    assert "with --force" in done.json["error"]["hint"]
    assert "resumes" not in done.json["error"]["hint"]
    monkeypatch.undo()
    assert here("inspect", "memory://bucket/out").code == 3
    memory.store.clear()
    upload(memory, folder, "/bucket/out")
    memory.pipe_file("/bucket/out/notes.txt", b"mine")
    assert here(*words, "--manifest", record).code == 0
    assert record.exists()
    assert here("prune", tmp_path / "two", "-o", tmp_path / "whole", "-s", "50%").code == 0
    assert in_memory(memory, "/bucket/out") == {**files_of(tmp_path / "whole"), "notes.txt": b"mine"}


@pytest.mark.parametrize(
    "url",
    ["http://a..b/m.safetensors", "http://[::1/m.safetensors", f"http://{'a' * 70}.org/m.safetensors", "http:///m.bin"],
)
def test_what_is_no_address_is_told(url: str) -> None:
    done = here("inspect", url)
    assert done.code == 3
    assert "is not a valid URL" in done.err or "no host given" in done.err


def test_after_one_failure_nobody_waits_for_what_the_server_sends_slowly(server: Server, folder: Path) -> None:
    (folder / "model-00001-of-00006.safetensors").unlink()
    sent = []

    def slow(handler: BaseHTTPRequestHandler, body: bytes, begin: int, size: int) -> bool:
        if not handler.path.endswith("safetensors"):
            return False
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{size}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b"x")
                sent.append(handler.path)
                time.sleep(0.1)
        return True

    server.answer = slow
    done = here("inspect", f"{server.url}/model/model.safetensors.index.json")
    assert done.code == 3
    assert "model-00001-of-00006.safetensors does not exist" in done.err
    assert len(sent) < 150


def test_names_on_a_web_server_are_quoted(server: Server, folder: Path, tmp_path: Path) -> None:
    index = folder / "model.safetensors.index.json"
    name = "m\u00f6 #1?50%41.safetensors"
    (folder / "model-00001-of-00006.safetensors").rename(folder / name)
    index.write_text(index.read_text().replace("model-00001-of-00006.safetensors", name))
    expected = here("size", folder, "--format", "csv").rows[1:]
    found = here("size", f"{server.url}/model", "--format", "csv")
    assert [row[1:] for row in found.rows[1:]] == [row[1:] for row in expected]
    assert here("inspect", f"{server.url}/model/m\u00f6 %231%3F50%2541.safetensors").code == 0


def test_a_folder_that_is_no_model_is_refused_by_its_list(memory: Any) -> None:
    for number in range(5):
        memory.pipe_file(f"/bucket/data/{number}.csv", b"x" * 1000)
        memory.pipe_file(f"/bucket/data/sub/{number}.onnx", b"x" * 1000)
    done = here("inspect", "memory://bucket/data")
    assert done.code == 3
    assert "has no model of a format" in done.err
    assert "sub/0.onnx" in done.err
    assert "fetched" not in done.err


def test_a_bucket_is_given_up_before_it_is_listed_whole(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_FILES", 20)
    listed, look = [], type(memory).ls
    for number in range(50):
        memory.pipe_file(f"/bucket/{number}/model.safetensors", b"x")

    def seen(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        listed.append(path)
        return look(self, path, detail=detail, **options)

    monkeypatch.setattr(type(memory), "ls", seen)
    done = here("inspect", "memory://bucket")
    assert done.code == 3
    assert "has more than 20 files" in done.err
    assert len(listed) == 1


def test_headers_and_what_is_fetched_have_a_limit_for_all_together(
    folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, folder, "/bucket/model")
    monkeypatch.setattr(budgets, "MAX_HEADERS_BYTES", 1000)
    assert "headers are longer than 1000 bytes" in here("inspect", "memory://bucket/model").err
    monkeypatch.undo()
    for name in ("saved_model.pb", "variables/variables.data-00000-of-00001"):
        memory.pipe_file(f"/bucket/saved/{name}", b"x" * 600)
    monkeypatch.setattr(budgets, "MAX_FETCHED_BYTES", 1000)
    done = here("inspect", "memory://bucket/saved")
    assert done.code == 3
    assert "too much would be fetched whole (1200 bytes)" in done.err
    # Safetensors are what their headers say, whatever needs all of them.
    assert here("prune", "memory://bucket/model", "-s", "50%", "--dry-run").code == 0


def test_names_that_no_folder_here_can_hold_are_told(folder: Path, memory: Any) -> None:
    upload(memory, folder, "/bucket/model")
    memory.pipe_file(f"/bucket/model/{'n' * 300}", b"x")
    done = here("inspect", "memory://bucket/model")
    assert done.code == 3, done.err
    assert "cannot be kept as a file here" in done.err
    assert tempfile.gettempdir() not in done.err


def test_secrets_in_an_address_are_not_shown(server: Server, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "digits_cnn.safetensors", tmp_path / "m.safetensors")
    (tmp_path / "lies.safetensors").write_bytes(b"\xff" * 8 + b"x" * 100)
    page, out = tmp_path / "page.html", tmp_path / "out.safetensors"
    for words in (
        ("inspect", f"{server.url}/m.safetensors?token=SECRET", "--html", page),
        ("size", f"{server.url}/m.safetensors?token=SECRET", "--json"),
        ("diff", f"{server.url}/m.safetensors?token=SECRET", tmp_path / "m.safetensors"),
        ("prune", f"{server.url}/m.safetensors?token=SECRET", "-o", out, "-s", "50%"),
        ("inspect", f"{server.url}/lies.safetensors?token=SECRET"),
        ("inspect", f"{server.url}/none.safetensors?token=SECRET"),
        ("inspect", "http://me:SECRET@127.0.0.1:1/m.safetensors"),
    ):
        done = here(*words)
        assert "SECRET" not in done.out + done.err
        assert "m.safetensors/m" not in done.out + done.err
    assert "SECRET" not in page.read_text()
    assert without_secrets("abfss://box@me.dfs.core.windows.net/m") == "abfss://box@me.dfs.core.windows.net/m"
    assert without_secrets("s3://me:SECRET@bucket/m") == "s3://bucket/m"


def test_an_estimate_of_a_model_at_a_url_is_refused(memory: Any) -> None:
    done = here("size", "memory://bucket/m.safetensors", "--estimate")
    assert done.code == 2
    assert "--estimate needs a file, not a URL" in done.err


def test_the_report_on_a_folder_that_goes_to_a_url_does_not_miss_what_is_there(folder: Path, memory: Any) -> None:
    done = here("prune", folder, "-o", "memory://bucket/out", "-s", "50%")
    assert "/bucket/out/config.json" in memory.store
    assert "Only the weights were written" not in done.out + done.err


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """A folder of shards in a store of fsspec."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/stripped/model", recursive=True)
    yield "memory://stripped/model"
    system.rm("/stripped", recursive=True)


def test_strip_reads_a_model_at_a_url(bucket: str, folder: Path, tmp_path: Path) -> None:
    done = here("strip", bucket, "-o", tmp_path / "out")
    assert done.code == 0
    assert here("strip", folder, "-o", tmp_path / "same").code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "same")
    assert here("strip", bucket, "--in-place").code == 2
    assert here("strip", bucket, "-o", tmp_path / "new", "--if-changed").code == 2


def test_python_reads_models_at_urls_as_the_commands_do(bucket: str, folder: Path, tmp_path: Path) -> None:
    looked = prunectl.inspect(bucket)
    assert looked.path == bucket
    assert looked.params == prunectl.inspect(folder).params
    assert prunectl.size(bucket).bytes.raw == prunectl.size(folder).bytes.raw
    assert prunectl.diff(bucket, folder, fail_on="changed").is_ok
    prunectl.strip(bucket, tmp_path / "stripped")
    pruned = prunectl.prune(bucket, tmp_path / "pruned", sparsity="50%")
    assert pruned.before.path == bucket
    prunectl.prune(folder, tmp_path / "same", sparsity="50%")
    assert files_of(tmp_path / "pruned") == files_of(tmp_path / "same")
    for call in (prunectl.strip, prunectl.prune):
        with pytest.raises(UsageError, match="cannot be replaced in place"):
            call(bucket, None, in_place=True)


def test_a_budget_at_a_url_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "prunectl.toml").write_text('[[budget]]\npath = "hf://org/name"\nmax-gzip = "1MB"\n')
    done = here("check", cwd=tmp_path)
    assert done.code == 2
    assert "prunectl.toml:2: hf://org/name is a URL" in done.err
    assert "hf download org/name" in done.err
