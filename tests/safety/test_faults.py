"""Full disks, deaths at any moment, two runs at once, inputs that change: the output is whole or absent.

The input is whole, and whatever else lies there is the user's, and stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunectl.errors import InputError, PrunectlError, WorkError, translate
from prunectl.formats import atomic, extents, patch, scratch
from prunectl.formats.onnx import messages, rewrite
from prunectl.formats.patch import TensorUpdate
from prunectl.formats.registry import open_model
from prunectl.formats.workers import workers
from tests import forked
from tests.contract import digest
from tests.running import COMMAND, FIXTURES, ROOT, clean, here

# Where other tests of the same process have left threads behind, Python warns of the forks of this one.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

HALF = ("-s", "0.5", "-q")
_DISK_BYTES = 1 << 20
SCRATCH = f"{scratch.SHOWN}0123456789abcdef"


def put(name: str, folder: Path) -> Path:
    source = FIXTURES / name
    return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name))


# A full disk.


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disk")
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mount") or library.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=1m"):
        pytest.skip("nothing can be mounted here")
    yield folder
    library.umount2(bytes(folder), 2)


@pytest.fixture
def disk(small_disk: Path) -> Iterator[Path]:
    yield small_disk
    for path in small_disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes."""
    (disk / "filler").write_bytes(bytes(_DISK_BYTES - free))


@pytest.mark.parametrize(
    ("name", "words", "free"),
    [
        ("digits_cnn.pt", ("prune", *HALF), 4096),
        ("digits_cnn.h5", ("strip", "-q"), 0),
        ("digits_cnn.h5", ("strip", "-q"), 16 << 10),
        ("digits_cnn.h5", ("strip", "-q"), 68 << 10),
        ("digits_cnn.h5", ("strip", "-q"), 100 << 10),
        ("chunked_and_gzipped.h5", ("prune", *HALF), 60 << 10),
        ("chunked_and_gzipped.h5", ("prune", *HALF, "--pack"), 68 << 10),
        ("deflated.keras", ("prune", *HALF), 8 << 10),
        ("digits_cnn.onnx", ("prune", *HALF, "--pack"), 8 << 10),
        ("digits_cnn_savedmodel", ("prune", *HALF), 16 << 10),
    ],
)
def test_a_disk_without_room_for_the_output_is_said(name: str, words: tuple[str, ...], free: int, disk: Path) -> None:
    command, *more = words
    fill(disk, free)
    done = here(command, FIXTURES / name, "-o", disk / f"out{Path(name).suffix}", *more)
    assert (done.code, "has no space for the result" in done.err) == (5, True), done.err
    assert os.listdir(disk) == ["filler"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits_cnn.onnx", ("size",)),
        ("digits_cnn.h5", ("size",)),
        ("deflated.keras", ("inspect",)),
        ("digits_cnn.onnx", ("prune", *HALF, "--dry-run", "--pack")),
    ],
)
def test_a_temporary_folder_without_room_is_said(
    name: str, words: tuple[str, ...], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    command, *more = words
    fill(disk, 4096)
    done = here(command, FIXTURES / name, *more)
    assert done.code == 5, done.err
    assert "has no space" in done.err or "no space left" in done.err
    assert os.listdir(disk) == ["filler"]


# A death, or a change of mind, at any moment.


def died(words: list[str | Path], temporary: Path, moment: int, deed: Callable[[], None]) -> tuple[int, int]:
    """Run a command in a fork that does a deed when it touches the disk for the nth time.

    Return how it ended, and how many moments there were.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            moments = itertools.count(1)
            last = 0

            def hook(event: str, given: tuple[Any, ...]) -> None:
                nonlocal last
                is_known = event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"}
                if is_known or event.startswith("ctypes.dlsym") or (event == "open" and _is_written(given)):
                    last = next(moments)
                    if last == moment:
                        deed()

            sys.addaudithook(hook)
            try:
                code = here(*words).code
            except KeyboardInterrupt:
                code = 130
            os.write(writer, str(last).encode())
            os._exit(code)
        finally:
            os._exit(99)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or b"0")


def _is_written(given: tuple[Any, ...]) -> bool:
    flags = given[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


WRITERS = {
    "prune in place": ("digits_cnn.pt", ["prune", "m", "--in-place", *HALF]),
    "pack": ("digits_cnn.onnx", ["prune", "m", "-o", "out", "--pack", "--manifest", "run.json", *HALF]),
    "prune a folder": ("digits_cnn_savedmodel", ["prune", "m", "-o", "out", *HALF]),
    "strip an archive": ("deflated.keras", ["strip", "m", "-o", "out", "-q"]),
    "export": ("digits_cnn.pt", ["export", "m", "-o", "out", "--to", "npz", "-q"]),
}


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("what", WRITERS)
def test_whatever_the_moment_the_output_is_whole_or_absent_and_the_next_run_tidies_up(
    what: str, deed: signal.Signals, tmp_path: Path, temporary: Path
) -> None:
    fixture, template = WRITERS[what]
    suffix = Path(fixture).suffix
    model = tmp_path / f"m{suffix}"
    out = model if "--in-place" in template else tmp_path / f"out{'.npz' if what == 'export' else suffix}"
    places = {"m": model, "out": out, "run.json": tmp_path / "run.json"}
    words = [places.get(word, word) for word in template]
    allowed = {"mine.txt", "temporary", *(path.name for path in places.values())}

    def fresh() -> None:
        for path in places.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        source = FIXTURES / fixture
        (shutil.copytree if source.is_dir() else shutil.copy)(source, model)

    (tmp_path / "mine.txt").write_text("dear")
    fresh()
    before = digest(model)
    code, moments = died(words, temporary, 0, partial(int))
    assert (code, moments > 5) == (0, True)
    whole = digest(out)
    for moment in sorted({1 + round(turn * (moments - 1) / 3) for turn in range(4)}):
        fresh()
        code, _ = died(words, temporary, moment, lambda: os.kill(os.getpid(), deed))
        assert code in ({-signal.SIGKILL} if deed == signal.SIGKILL else {130, 0}), moment
        assert digest(model) in ({before, whole} if out == model else {before})
        assert not out.exists() or digest(out) in {before, whole}
        if deed == signal.SIGINT:
            assert set(os.listdir(tmp_path)) <= allowed, moment
            assert not os.listdir(temporary)
    fresh()
    with scratch.temporary_folder():
        assert died(words, temporary, 0, partial(int))[0] == 0
    assert digest(out) == whole
    assert not os.listdir(temporary)
    assert set(os.listdir(tmp_path)) == {name for name in allowed if name != "run.json" or name in template}
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_an_export_that_is_killed_while_its_framework_works_leaves_what_the_next_one_clears(
    tmp_path: Path, temporary: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    # TorchScript, whose converter writes into the scratch folder by itself, and is the quicker one.
    model, out = put("digits_cnn_torchscript.pt", work), work / "out.onnx"
    before, words = digest(model), ["export", str(model), "-o", str(out), "-q", "--input", "1,1,8,8"]
    for opened in ("/out.onnx", "/onnxruntime/"):
        command = [sys.executable, "-m", "tests.safety.killed", opened, *words]
        code = forked.run(command, env=clean(TMPDIR=str(temporary))).returncode
        assert (code, digest(model), out.exists()) == (-signal.SIGKILL, before, False), opened
    assert (here(*words).code, out.exists()) == (0, True)
    assert sorted(os.listdir(work)) == [model.name, out.name]
    # PyTorch has a cache there.
    assert not [name for name in os.listdir(temporary) if name.startswith(scratch.SHOWN)]


def test_a_change_of_mind_between_two_files_comes_before_or_after_both(tmp_path: Path) -> None:
    real, seen = atomic._move_into_place, []

    def interrupted(*words: Any, **more: Any) -> None:
        real(*words, **more)
        seen.append(words)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)

    def write() -> None:
        with (
            pytest.MonkeyPatch.context() as patched,
            atomic.atomic_replace(tmp_path / "a", may_replace=False) as folder,
        ):
            patched.setattr(atomic, "_move_into_place", interrupted)
            for name in ("a", "b"):
                (folder / name).write_text(name)

    # A process of pytest-xdist does not listen to it.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(signal.SIGINT, heard)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("name", ["prunectl.cli", "prunectl.commands.app", "typer", "numpy"])
def test_a_change_of_mind_during_the_first_imports_gets_no_traceback(name: str, tmp_path: Path) -> None:
    # Python imports it by itself, before anything else.
    (tmp_path / "sitecustomize.py").write_text(f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Late())
""")
    done = subprocess.run(
        [*COMMAND, "inspect", str(FIXTURES / "digits_cnn.pt")],
        env=clean(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "")


# Two at once.


@pytest.mark.parametrize("more", [(), ("--if-changed",), ("--force",)])
def test_of_two_runs_onto_one_output_it_is_that_of_one(more: tuple[str, ...], tmp_path: Path) -> None:
    model = put("digits_cnn.safetensors", tmp_path)
    words = [[*COMMAND, "prune", str(model), "-o", str(tmp_path / "out.safetensors"), *more] for _ in range(2)]
    pair = [
        subprocess.Popen(
            [*command, "-s", sparsity],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=clean(PYTHONPATH=str(ROOT)),
        )
        for command, sparsity in zip(words, ("0.5", "0.6"), strict=True)
    ]
    said = [process.communicate()[1] for process in pair]
    codes = sorted(process.returncode for process in pair)
    assert codes[0] == 0, said
    assert codes[1] in {0, 2, 5}, said
    for sparsity in ("0.5", "0.6"):
        assert here("prune", model, "-o", tmp_path / sparsity, "-s", sparsity, "-q").code == 0
    assert digest(tmp_path / "out.safetensors") in {digest(tmp_path / sparsity) for sparsity in ("0.5", "0.6")}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(scratch.HIDDEN)]


def test_what_somebody_writes_while_if_changed_works_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = put("digits_cnn.safetensors", tmp_path), tmp_path / "out.safetensors"
    words = ("prune", model, "-o", out, "--if-changed", "-q")
    assert here(*words, "-s", "0.5").code == 0
    real = atomic._move_order

    def late(*given: Any) -> Any:
        out.write_text("mine")
        return real(*given)

    monkeypatch.setattr(atomic, "_move_order", late)
    done = here(*words, "-s", "0.6")
    assert (done.code, "has changed since prunectl wrote it" in done.err) == (2, True), done.err
    assert out.read_text() == "mine"


# An input that changes, a disk that is broken.


def test_an_input_that_becomes_shorter_while_it_is_read_is_the_inputs_fault(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(bytes(3 << 20))
    reading = extents.blocks(extents.Extent(path, 0, 3 << 20), extents.BYTE)
    next(reading)
    os.truncate(path, 1 << 20)
    with pytest.raises(InputError, match="was truncated while prunectl was reading"):
        next(reading)


def test_an_input_that_becomes_shorter_while_it_is_copied_is_the_inputs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": np.ones((64, 64), np.float32), "b.weight": np.ones((64, 64), np.float32)}, path)
    first, *_ = sorted(open_model(path).tensors, key=lambda tensor: tensor.storage.extent.offset)
    rewrite = TensorUpdate(first, lambda: iter([np.zeros((64, 64), np.float32)]))
    real = patch.copy_range

    def late(*given: Any) -> None:
        os.truncate(path, 1000)
        real(*given)

    monkeypatch.setattr(patch, "copy_range", late)
    with pytest.raises(InputError, match="was truncated while prunectl was copying it"):
        patch.copy_with_patches(path, tmp_path / "out", [rewrite])


def test_a_graph_that_becomes_shorter_while_it_is_copied_does_not_keep_the_copy_busy(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"12345")
    with (
        path.open("rb") as source,
        (tmp_path / "out").open("wb") as out,
        pytest.raises(InputError, match="was truncated while prunectl was copying it"),
    ):
        rewrite._copy(source, messages.Span(0, 10), out)


def broken(number: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("name", ["preadv", "pread"])
def test_a_disk_that_cannot_be_read_is_the_inputs_fault(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put("digits_cnn.safetensors", tmp_path)
    monkeypatch.setattr(os, "copy_file_range", broken(errno.EIO))
    monkeypatch.setattr(os, name, broken(errno.EIO))
    done = here("prune", model, "-o", tmp_path / "out.safetensors", *HALF)
    assert done.code == 3, done.err
    assert f"{model} cannot be read: Input/output error" in done.err
    assert os.listdir(tmp_path) == [model.name]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("name", ["pwrite", "mkdir", "fsync"])
def test_a_disk_that_cannot_be_written_is_not(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put("digits_cnn.safetensors", tmp_path)
    monkeypatch.setattr(os, name, broken(number))
    done = here("prune", model, "-o", tmp_path / "out.safetensors", *HALF)
    assert done.code == 5, done.err
    assert str(tmp_path) in done.err
    assert os.strerror(number) in done.err
    assert "Traceback" not in done.err
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [model.name]


def test_a_disk_that_fails_while_it_is_written_to_is_heard_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").write_bytes(bytes(1 << 16))

    def failing(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(sync_file_range=failing))
    with pytest.raises(OSError, match="Input/output error"):
        atomic.flush_meanwhile(tmp_path, Event())


def test_who_gives_up_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(bytes(1 << 16))

    def waiting() -> None:
        with workers(1) as pool:
            pool.submit(atomic.flush_meanwhile, tmp_path, Event())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), WorkError, "no space left"),
        (OSError(errno.EROFS, "Read-only file system", "/out/m.pt"), WorkError, "/out/m.pt cannot be written"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/t/prunectl-0123456789abcdef/new/a"),
            WorkError,
            "written",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/in/m.pt"), InputError, "/in/m.pt cannot be opened"),
        (OSError(errno.EIO, "Input/output error"), WorkError, "Input/output error"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), WorkError, "Connection refused"),
        (TimeoutError("timed out"), WorkError, "timed out"),
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), WorkError, "not known"),
    ],
)
def test_an_error_of_the_system_is_that_of_the_input_only_if_it_is_about_it(
    error: OSError, kind: type[PrunectlError], said: str
) -> None:
    found = translate(error)
    assert type(found) is kind
    assert said in str(found)


# Names that nobody expects.


def test_names_that_are_not_utf8_are_read_and_written(tmp_path: Path) -> None:
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff\x1b[31m.safetensors"))
    out, stripped = (
        Path(os.fsdecode(os.fsencode(tmp_path) + name))
        for name in (b"/out\xfe.safetensors", b"/stripped\xfd.safetensors")
    )
    shutil.copy(FIXTURES / "digits_cnn.safetensors", model)
    for words in (["prune", model, "-o", out, *HALF[:2]], ["inspect", out], ["strip", model, "-o", stripped]):
        done = subprocess.run(
            [*COMMAND, *map(os.fspath, words)], env=clean(PYTHONPATH=str(ROOT)), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
    assert set(os.listdir(os.fsencode(tmp_path))) == {os.fsencode(path.name) for path in (model, out, stripped)}


BUDGET = """
[[budget]]
path = "m.safetensors"

[[budget.layer]]
name = "*"
min-sparsity = "50%"
"""
_HOSTILE = (
    "\x1b]0;title\x07\x1b[2J",
    "a\nb\tc\rd",
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "\u202egpj",
    "]]>",
)


def test_hostile_names_of_tensors_reach_no_terminal_page_or_report_as_they_are(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    save_file({name + ".weight": np.ones((8, 8), np.float32) for name in _HOSTILE}, model)
    for words in (("--format", "human"), ("--format", "plain"), ("--format", "csv"), ("--json",)):
        found = here("inspect", model, *words, "--html", tmp_path / "page.html")
        assert found.code == 0, found.err
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(found.out)
        if "--json" in words:
            json.loads(found.out)
    page = (tmp_path / "page.html").read_text()
    assert not {"\x1b", "\x07", "\u202e"} & set(page)
    assert "<script>alert" not in page
    (tmp_path / "prunectl.toml").write_text(BUDGET)
    reports = {name: tmp_path / f"report.{name}" for name in ("junit", "sarif", "markdown", "gitlab", "html", "json")}
    asked = [word for name, path in reports.items() for word in ("--report", f"{name}:{path}")]
    done = here("check", *asked, cwd=tmp_path)
    assert done.code == 1, done.err
    for name, path in reports.items():
        text = path.read_text()
        assert not {"\x1b", "\x07", "\u202e"} & set(text), path
        assert "<script>alert" not in text or name in {"sarif", "gitlab", "json"}, path
