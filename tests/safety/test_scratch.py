"""Scratch folders: those of dead runs go, and nothing else ever does; who may read a result."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunectl.errors import WorkError
from prunectl.formats import atomic, scratch
from prunectl.formats.scratch import HIDDEN, SHOWN, LockedFolder, Scratch, temporary_folder
from tests.running import FIXTURES, here

OURS = f"{HIDDEN}0123456789abcdef"
HALF = ("-s", "0.5", "-q")


def make(parent: Path, name: str, *inside: str) -> Path:
    folder = parent / name
    folder.mkdir(0o700)
    for one in inside:
        (folder / one).write_text("")
    return folder


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        (f"{HIDDEN}mine", ("notes.txt",)),
        (f"{HIDDEN}mine", ("lock",)),
        (OURS, ("lock", "notes.txt")),
        (OURS, ("notes.txt",)),
        (OURS, ("new",)),
        (f"{OURS}0", ("lock",)),
    ],
)
def test_a_folder_of_the_users_own_stays_whatever_it_is_called(
    name: str, inside: tuple[str, ...], tmp_path: Path
) -> None:
    folder = make(tmp_path, name, *inside)
    atomic.write_text(tmp_path / "out", "done", is_forced=False)
    assert sorted(os.listdir(folder)) == sorted(inside)


def test_a_link_or_a_folder_that_others_write_to_is_not_taken_for_a_dead_run(tmp_path: Path) -> None:
    elsewhere = make(tmp_path, "elsewhere", "lock", "new")
    (tmp_path / OURS).symlink_to(elsewhere)
    shared = make(tmp_path, f"{HIDDEN}ffffffffffffffff", "lock", "new")
    shared.chmod(0o777)
    scratch.clear_stale(tmp_path, HIDDEN)
    assert len(os.listdir(elsewhere)) == len(os.listdir(shared)) == 2
    assert (tmp_path / OURS).is_symlink()


@pytest.mark.parametrize("inside", [("lock", "new"), ("lock", "new", "old"), ("lock", "packed"), ("lock",), ()])
def test_what_a_dead_run_has_left_is_cleared(inside: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path, OURS, *inside)
    atomic.write_text(tmp_path / "out", "done", is_forced=False)
    assert os.listdir(tmp_path) == ["out"]


def test_the_temporary_folder_is_cleared_of_dead_runs_and_of_nothing_else(temporary: Path) -> None:
    make(temporary, f"{SHOWN}0123456789abcdef", "lock", "new")
    make(temporary, f"{SHOWN}mine", "notes.txt")
    alive = LockedFolder()
    alive.take(temporary, SHOWN)
    with temporary_folder() as folder:
        (folder / "weights").write_text("much")
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert sorted(os.listdir(temporary)) == sorted([f"{SHOWN}mine", alive.inside.parent.name, folder.parent.name])
    alive.release()
    assert os.listdir(temporary) == [f"{SHOWN}mine"]


def test_a_run_that_is_killed_leaves_what_the_next_one_clears(temporary: Path) -> None:
    code = "from prunectl.formats.scratch import Scratch; import os, signal; kept = Scratch(); os.kill(os.getpid(), 9)"
    words = [sys.executable, "-c", code]
    assert (
        subprocess.run(words, env={**os.environ, "TMPDIR": str(temporary)}, check=False).returncode == -signal.SIGKILL
    )
    assert len(os.listdir(temporary)) == 1
    with temporary_folder():
        assert len(os.listdir(temporary)) == 1
    assert not os.listdir(temporary)


def test_a_scratch_folder_goes_with_who_holds_it_but_not_in_a_child(temporary: Path) -> None:
    held = Scratch()
    child = os.fork()
    if child == 0:
        held.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert held.path.is_dir()
    del held
    assert not os.listdir(temporary)


def test_a_temporary_folder_that_is_nowhere_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(WorkError, match="no writable temporary folder"), temporary_folder():
        pass


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_output_is_written_and_only_what_is_a_day_old_is_cleared(tmp_path: Path) -> None:
    young, old = make(tmp_path, OURS, "lock"), make(tmp_path, f"{HIDDEN}ffffffffffffffff", "lock")
    (old / "new").mkdir()
    long_ago = time.time() - 2 * 24 * 3600
    for path in (old / "lock", old / "new", old):
        os.utime(path, (long_ago, long_ago))
    atomic.write_text(tmp_path / "out", "done", is_forced=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out", young.name}


def without_renameat2(*_: object) -> int:
    return errno.EINVAL


@pytest.fixture(params=["renameat2", "links", "neither"])
def placing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the filesystem offers to take a free place."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param != "renameat2":
        monkeypatch.setattr(atomic, "_renameat2", without_renameat2)
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


@pytest.mark.usefixtures("placing")
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_free_place_is_taken(is_folder: bool, tmp_path: Path) -> None:
    with atomic.atomic_replace(tmp_path / "out", may_replace=False) as folder:
        if is_folder:
            (folder / "out").mkdir()
        (folder / "out" / "inside" if is_folder else folder / "out").write_text("done")
    assert (tmp_path / "out" / "inside" if is_folder else tmp_path / "out").read_text() == "done"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("placing")
def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with atomic.atomic_replace(out, may_replace=False) as folder:
            (folder / "out").write_text("ours")
            out.write_text("theirs")

    with pytest.raises(WorkError, match="was created while prunectl was running"):
        write()
    assert out.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("come", ["empty", "full"])
def test_a_folder_that_came_meanwhile_is_not_replaced_even_if_it_is_empty(
    come: str, placing: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with atomic.atomic_replace(out, may_replace=False) as folder:
            (folder / "out").mkdir()
            out.mkdir()
            if come == "full":
                (out / "mine").write_text(placing)

    with pytest.raises(WorkError, match="was created while prunectl was running"):
        write()
    assert os.listdir(out) == ([] if come == "empty" else ["mine"])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("source", "result"), [(0o600, 0o600), (0o640, 0o640), (0o666, 0o644), (0o400, 0o400)])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("prune", *HALF), "digits_cnn.pt"),
        (("strip", "-q"), "digits_cnn.pt"),
        (("export", "--to", "npz", "-q"), "digits_cnn.pt"),
        (("prune", "--pattern", "channel", *HALF), "digits_cnn.onnx"),
        (("prune", *HALF), "external_data/model.onnx"),
    ],
)
def test_a_result_may_be_read_by_those_who_may_read_its_source(
    words: tuple[str, ...], name: str, source: int, result: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree((FIXTURES / name).parent, tmp_path / "in")) if "/" in name else tmp_path / "in"
    folder.mkdir(exist_ok=True)
    model = folder / Path(name).name
    shutil.copy(FIXTURES / name, model)
    for path in folder.iterdir():
        path.chmod(source)
    (tmp_path / "out").mkdir()
    command, *more = words
    done = here(command, model, "-o", tmp_path / "out" / f"m{model.suffix if command != 'export' else '.npz'}", *more)
    assert done.code == 0, done.err
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {result}


@pytest.mark.usefixtures("umask")
def test_in_place_and_by_force_the_mode_and_the_owner_stay(tmp_path: Path) -> None:
    model, other = (Path(shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / name)) for name in ("m.pt", "o.pt"))
    model.chmod(0o664)
    other.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(model, 12345, 23456)
    before = model.stat()
    assert here("prune", model, "--in-place", *HALF).code == 0
    after = model.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert here("prune", model, "-o", other, "--force", *HALF).code == 0
    assert mode(other) == 0o600


def test_a_group_that_cannot_be_kept_gains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    out = tmp_path / "out"
    out.write_text("old")
    out.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(out, -1, 23456)
    else:
        pytest.skip("only root gives a file away")
    monkeypatch.setattr(os, "chown", refuse)
    atomic.write_text(out, "new", is_forced=True)
    assert (out.read_text(), mode(out)) == ("new", 0o644)


@pytest.mark.usefixtures("umask")
def test_files_in_folders_and_the_folders_themselves_keep_their_modes(tmp_path: Path) -> None:
    model = Path(shutil.copytree(FIXTURES / "digits_cnn_savedmodel", tmp_path / "m"))
    for path in (model, *model.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    (model / "saved_model.pb").chmod(0o640)
    assert here("prune", model, "-o", tmp_path / "out", *HALF).code == 0
    found = {path.relative_to(tmp_path / "out"): mode(path) for path in (tmp_path / "out").rglob("*")}
    assert found == {path.relative_to(model): mode(path) for path in model.rglob("*")}
    assert mode(tmp_path / "out") == 0o700


def test_no_file_of_a_run_under_a_strict_umask_is_open_to_others(tmp_path: Path) -> None:
    model = Path(shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "m.pt"))
    model.chmod(0o644)
    before = os.umask(0o077)
    try:
        assert here("prune", model, "-o", tmp_path / "out.pt", "--manifest", tmp_path / "run.json", *HALF).code == 0
    finally:
        os.umask(before)
    assert mode(tmp_path / "out.pt") == mode(tmp_path / "run.json") == 0o600
