"""The output is whole or not there, the input is never touched, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from prunectl.commands.max_drop import _copy_result
from prunectl.errors import WorkError
from prunectl.formats import atomic, scratch
from prunectl.formats import atomic as exchanging
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination, check
from prunectl.pruning.prune import prune as run
from prunectl.pruning.request import PruneRequest
from tests.contract import digest, read_all
from tests.pruning import stock
from tests.running import COMMAND, FIXTURES, ROOT, clean, here

pytestmark = pytest.mark.filterwarnings("ignore")

HALF = ("-s", "0.5")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURES / "digits_cnn.pt", tmp_path / "m.pt"))


def sparsity(path: Path) -> float:
    found = open_model(path)
    kernels = [found.read(tensor) for tensor in found.tensors if tensor.is_prunable]
    return sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def copy_of(name: str, target: Path) -> Path:
    return Path((shutil.copytree if (FIXTURES / name).is_dir() else shutil.copy)(FIXTURES / name, target))


def test_an_output_that_exists_is_refused_and_replaced_by_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("mine")
    done = here("prune", model, "-o", out, *HALF)
    assert (done.code, out.read_text()) == (2, "mine")
    assert "--force" in done.err
    assert here("prune", model, "-o", out, *HALF, "--force").code == 0
    assert sparsity(out) == 0.5


@pytest.mark.parametrize("name", ["out.h5", "out.pt2", "out.onnx", "out.SAFETENSORS"])
def test_a_name_that_promises_another_format_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    done = here("prune", model, "-o", tmp_path / name, *HALF)
    assert done.code == 2
    assert "keeps its format, PyTorch" in done.err
    onnx = here("prune", FIXTURES / "digits_cnn.onnx", "-o", tmp_path / "out.pt", "-s", "50%")
    assert "out.pt has the suffix of PyTorch, but" in onnx.err
    assert "prunectl export" in done.err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["out.pth", "out.pth.tar", "out.bin", "out.ckpt", "out"])
def test_every_name_that_promises_none_or_the_same_is_taken(name: str, model: Path, tmp_path: Path) -> None:
    assert here("prune", model, "-o", tmp_path / name, *HALF).code == 0


@pytest.mark.parametrize("link", ["itself", "symlink", "hard link"])
def test_the_input_is_not_overwritten_under_any_name(link: str, model: Path, tmp_path: Path) -> None:
    out = {"itself": model, "symlink": tmp_path / "s.pt", "hard link": tmp_path / "h.pt"}[link]
    if link == "symlink":
        out.symlink_to(model)
    if link == "hard link":
        out.hardlink_to(model)
    before = digest(model)
    for more in ((), ("--force",)):
        done = here("prune", model, "-o", out, *HALF, *more)
        assert done.code == 2
        assert "is the input itself" in done.err
    assert digest(model) == before


def test_in_place_replaces_what_a_link_leads_to(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to("m.pt")
    assert here("prune", link, "--in-place", *HALF).code == 0
    assert link.is_symlink()
    assert sparsity(model) == 0.5


@pytest.mark.parametrize("words", [("-o", "out.pt", "--in-place"), ()])
def test_where_to_must_be_said_once(words: tuple[str, ...], model: Path) -> None:
    done = here("prune", model, *words, *HALF)
    assert done.code == 2


def test_a_folder_that_is_not_there_is_not_made(model: Path, tmp_path: Path) -> None:
    done = here("prune", model, "-o", tmp_path / "nowhere" / "out.pt", *HALF)
    assert done.code == 2
    assert "mkdir" in done.err


def test_no_folder_is_advised_where_a_file_is_in_the_way(model: Path) -> None:
    done = here("prune", model, "-o", model / "out.pt", *HALF)
    assert done.code == 2
    assert f"{model} is not a folder" in done.err
    assert "mkdir" not in done.err


@pytest.mark.parametrize("option", ["-o", "--html", "--manifest"])
def test_a_pipe_is_not_replaced_by_a_file(option: str, model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    where = () if option == "-o" else ("-o", tmp_path / "out.pt")
    done = here("prune", model, *where, option, pipe, *HALF, "--force")
    assert done.code == 2
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == sorted([model, pipe])


def test_a_link_to_an_open_file_is_taken_for_a_device(model: Path) -> None:
    with tempfile.TemporaryFile() as file:
        link = Path(f"/proc/self/fd/{file.fileno()}")
        assert link.is_file()
        # Nobody can make files in its folder either, which is not what stands in the way.
        done = here("prune", model, "-o", link, *HALF, "--force")
        assert (done.code, "is a device or a pipe: prunectl does not replace it" in done.err) == (2, True)


@pytest.mark.parametrize("option", ["--html", "--manifest"])
def test_what_is_written_beside_a_model_has_a_name(option: str, model: Path, tmp_path: Path) -> None:
    done = here("prune", model, "-o", tmp_path / "out.pt", option, "-", *HALF)
    assert done.code == 2
    assert "name a file" in done.err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_folder_that_takes_no_files_is_refused_before_any_work(
    is_in_place: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    target = Destination(model if is_in_place else tmp_path / "out.pt", is_in_place=is_in_place)
    with pytest.raises(WorkError, match="cannot be written to: Read-only file system"):
        check(open_model(model), target)


def test_a_page_for_which_there_is_no_room_does_not_deny_the_model(tmp_path: Path) -> None:
    with (
        pytest.raises(WorkError, match=r"has no space for the result: No space.*; page.html was not written"),
        atomic.atomic_replace(tmp_path / "page.html", may_replace=False),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_without_a_model_is_never_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("dear")
    for source in (model, FIXTURES / "digits_cnn_savedmodel", FIXTURES / "two_shards"):
        done = here("prune", source, "-o", tmp_path / "photos", *HALF, "--force")
        assert done.code == 2
        assert "is a folder without a model: prunectl does not replace it" in done.err
    assert (tmp_path / "photos" / "one.jpg").read_text() == "dear"


def test_a_read_only_folder_is_said_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(WorkError, match="cannot be written to: Permission denied") as caught:
        run(model, PruneRequest(sparsity=0.5), Destination(tmp_path / "out.pt"))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "name",
    [
        "digits_cnn.pt",
        "digits_cnn.h5",
        "digits_cnn.onnx",
        "digits_cnn_savedmodel",
        "chunked_and_gzipped.h5",
        "deflated.keras",
    ],
)
@pytest.mark.parametrize("limit", [100, 9_000])
def test_a_disk_that_is_full_half_way_leaves_nothing(name: str, limit: int, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Python would cut the bytecode that it keeps at the same limit, and every later run would fail over it.
            sys.dont_write_bytecode = True
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            done = here("prune", FIXTURES / name, "-o", tmp_path / "out", *HALF)
            os.write(writer, done.err.encode())
            os._exit(done.code)
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
            raise
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5, said
    assert "File too large; nothing was written" in said
    assert "ulimit -f" in said
    assert list(tmp_path.iterdir()) == []


def test_files_that_name_each_other_have_names_in_utf_8(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "external_data", tmp_path / "model")
    source = next((tmp_path / "model").glob("*.onnx"))
    done = here("prune", source, *HALF, "-o", tmp_path / "out\udcff.onnx")
    assert done.code == 2, done.err
    assert "is not UTF-8, in which the files of this model name each other" in done.err
    assert os.listdir(tmp_path) == ["model"]
    # An export puts all of it into one file.
    assert here("export", source, "-o", tmp_path / "out\udcff.onnx").code == 0


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "m.safetensors"
    numbers = np.random.default_rng(0)
    save_file({f"{i}.weight": numbers.standard_normal((512, 2048)).astype(np.float32) for i in range(4)}, path)
    return path


def wait_for_work(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Return when a run has begun to write."""
    while not list(folder.iterdir()) and process.poll() is None:
        time.sleep(0.002)


def test_whatever_the_moment_of_its_death_the_target_is_absent_or_whole(big: Path, tmp_path: Path) -> None:
    before, out = digest(big), tmp_path / "out.safetensors"
    words = [*COMMAND, "prune", str(big), "-o", str(out), *HALF, "-q"]
    began = time.monotonic()
    subprocess.run(words, check=True, capture_output=True, env=clean(PYTHONPATH=str(ROOT)))
    seconds, whole = time.monotonic() - began, digest(out)
    out.unlink()
    moments = random.Random(1)
    stale = 0
    for turn in range(7):
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean(PYTHONPATH=str(ROOT))
        )
        if turn == 0:
            wait_for_work(process, tmp_path)
        else:
            time.sleep(moments.uniform(0.2, 1.1) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = [file.name for file in tmp_path.iterdir() if file != out]
        assert all(name.startswith(scratch.HIDDEN) for name in left)
        assert len(left) <= 1  # each run clears what the one before it left
        stale += len(left)
        if out.exists():
            assert digest(out) == whole
            out.unlink()
    assert stale
    assert digest(big) == before
    subprocess.run(words, check=True, capture_output=True, env=clean(PYTHONPATH=str(ROOT)))
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_cleans_up(end: signal.Signals, big: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "prune", str(big), "-o", str(tmp_path / "out.safetensors"), *HALF]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean(PYTHONPATH=str(ROOT))
    )
    wait_for_work(process, tmp_path)
    process.send_signal(end)
    # In its last moments, when all is done, Python takes its handlers away, and a signal ends it as any process.
    assert process.wait(30) in {128 + end, 0, -end}
    assert [file.name for file in tmp_path.iterdir()] in ([], ["out.safetensors"])


def test_of_two_runs_at_once_one_wins_and_the_other_says_so(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    pair = [
        subprocess.Popen(
            [*COMMAND, "prune", str(big), "-o", str(out), *HALF],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=clean(PYTHONPATH=str(ROOT)),
        )
        for _ in range(3)
    ]
    said = [process.communicate()[1] for process in pair]
    codes = sorted(process.returncode for process in pair)
    assert codes[0] == 0
    assert set(codes[1:]) <= {2, 5}, said
    assert sparsity(out) == 0.5
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_a_scratch_folder_that_is_taken_for_stale_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = os.mkdir, []

    def robbed(path: Path, mode: int = 0o777) -> None:
        real(path, mode)
        made.append(path)
        if len(made) == 1:
            scratch.clear_stale(tmp_path, scratch.HIDDEN)

    monkeypatch.setattr(os, "mkdir", robbed)
    with atomic.atomic_replace(tmp_path / "out", may_replace=False) as folder:
        (folder / "out").write_text("done")
    robbed_one, second, inside = made
    assert robbed_one != second == inside.parent
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_scratch_folder_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, robbed = fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not robbed:
            robbed.append(lock)
            scratch.clear_stale(tmp_path, scratch.HIDDEN)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic.atomic_replace(tmp_path / "out", may_replace=False) as folder:
        (folder / "out").write_text("done")
    assert robbed
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_living_run_keeps_its_scratch_folder(tmp_path: Path) -> None:
    with atomic.atomic_replace(tmp_path / "out", may_replace=False) as folder:
        scratch.clear_stale(tmp_path, scratch.HIDDEN)
        (folder / "out").write_text("done")
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize("name", ["digits_cnn_savedmodel", "every_variable_twice"])
def test_a_folder_comes_out_as_a_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert here("prune", FIXTURES / name, "-o", out, *HALF).code == 0
    names = {file.relative_to(FIXTURES / name) for file in (FIXTURES / name).rglob("*") if file.is_file()}
    assert {file.relative_to(out) for file in out.rglob("*") if file.is_file()} == names
    assert stock.load(out)
    assert here("prune", FIXTURES / name, "-o", out, "-s", "0.8").code == 2
    assert here("prune", FIXTURES / name, "-o", out, "-s", "0.8", "--force").code == 0
    assert sparsity(out) == pytest.approx(0.8, abs=1e-3)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_in_place(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(exchanging, "swap_atomically", lambda *_: False)
    own = copy_of("digits_cnn_savedmodel", tmp_path / "sm")
    (own / "notes.txt").write_text("kept")
    run(own, PruneRequest(sparsity=0.5), Destination(own, is_in_place=True))
    assert sparsity(own) == 0.5
    assert (own / "notes.txt").read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["sm"]


def test_two_paths_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchanging.swap_atomically(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]
    assert not exchanging.swap_atomically(tmp_path / "a", tmp_path / "nothing")


def test_shards_come_out_in_a_folder_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = here("prune", FIXTURES / "two_shards", "-o", out, *HALF)
    assert done.code == 0, done.err
    assert {file.name for file in out.iterdir()} == {file.name for file in (FIXTURES / "two_shards").iterdir()}
    assert sparsity(out) == 0.5


@pytest.mark.parametrize("named", ["folder", "index"])
def test_shards_in_place_leave_their_neighbours_alone(named: str, tmp_path: Path) -> None:
    own = copy_of("two_shards", tmp_path / "own")
    (own / "config.json").write_text("{}")
    names = {file.name for file in own.iterdir()}
    path = own if named == "folder" else own / "model.safetensors.index.json"
    done = here("prune", path, "--in-place", *HALF)
    assert done.code == 0, done.err
    assert sparsity(own) == 0.5
    assert {file.name for file in own.iterdir()} == names


@pytest.mark.parametrize("named", ["digits_cnn_checkpoint", "digits_cnn_checkpoint.index"])
@pytest.mark.parametrize("out", ["new", "new.index"])
def test_a_checkpoint_is_named_by_its_prefix(named: str, out: str, tmp_path: Path) -> None:
    done = here("prune", FIXTURES / named, "-o", tmp_path / out, *HALF)
    assert done.code == 0, done.err
    assert {file.name for file in tmp_path.iterdir()} == {"new.index", "new.data-00000-of-00001"}
    assert stock.load(tmp_path / "new.index")
    assert sparsity(tmp_path / "new.index") == 0.5


@pytest.mark.parametrize("there", ["new.index", "new.data-00000-of-00001"])
def test_no_part_of_a_checkpoint_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    done = here("prune", FIXTURES / "digits_cnn_checkpoint", "-o", tmp_path / "new", *HALF)
    assert done.code == 2
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(there, "mine")]


def test_a_checkpoint_is_replaced_in_place_under_its_prefix(tmp_path: Path) -> None:
    for file in FIXTURES.glob("digits_cnn_checkpoint.*"):
        shutil.copy(file, tmp_path)
    assert here("prune", tmp_path / "digits_cnn_checkpoint", "--in-place", *HALF).code == 0
    assert sparsity(tmp_path / "digits_cnn_checkpoint") == 0.5
    assert len(list(tmp_path.iterdir())) == 2


def test_external_data_is_named_after_its_graph(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert here("prune", FIXTURES / "external_data" / "model.onnx", "-o", out / "small.onnx", *HALF).code == 0
    assert {file.name for file in out.iterdir()} == {"small.onnx", "small.onnx.data"}
    assert stock.load(out / "small.onnx")
    assert sparsity(out / "small.onnx") == 0.5


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "-s", "0.5", "--pack"),
        ("prune", "-s", "0.5"),
        ("strip", "--pack"),
        ("strip",),
        ("export", "--int8", "--data", "random:16"),
    ],
)
def test_a_graph_with_external_data_is_written_into_its_own_folder(words: tuple[str, ...], tmp_path: Path) -> None:
    own = copy_of("external_data", tmp_path / "own")
    before = digest(own)
    done = here(words[0], own / "model.onnx", "-o", own / "small.onnx", *words[1:])
    assert done.code == 0, done.err
    assert stock.load(own / "small.onnx")
    if words[0] == "prune":
        assert sparsity(own / "small.onnx") == 0.5
    for name in ("small.onnx", "small.onnx.data"):
        (own / name).unlink(missing_ok=words[0] == "export")
    assert digest(own) == before


def test_a_second_output_in_a_folder_leaves_the_data_of_the_first_alone(tmp_path: Path) -> None:
    for share in ("0.5", "0.8"):
        words = ("prune", FIXTURES / "external_data" / "model.onnx", "-o", tmp_path / f"{share}.onnx", "-s", share)
        assert here(*words, "--force").code == 0
    assert sparsity(tmp_path / "0.5.onnx") == 0.5
    assert sparsity(tmp_path / "0.8.onnx") > 0.75


def test_data_that_is_the_inputs_own_is_never_overwritten(tmp_path: Path) -> None:
    own = copy_of("external_data", tmp_path / "own")
    graph = onnx.load(own / "model.onnx")
    onnx.save(graph, own / "model.onnx", save_as_external_data=True, location="small.onnx.data", size_threshold=0)
    before = digest(own)
    for more in ((), ("--force",)):
        done = here("prune", own / "model.onnx", "-o", own / "small.onnx", *HALF, *more)
        assert done.code == 2
        assert "small.onnx.data is part of the input" in done.err
    assert digest(own) == before


def in_many_files(folder: Path) -> Path:
    """A graph whose tensors, of which some stand in a branch and in a constant, lie in a file each."""
    numbers = np.random.default_rng(0)
    weights = {name: numbers.standard_normal((8, 8)).astype(np.float32) for name in ("first", "second", "third")}
    held = {name: onnx.numpy_helper.from_array(array, name) for name, array in weights.items()}
    for name, tensor in held.items():
        onnx.external_data_helper.set_external_data(tensor, f"{name}.bin")
    (value, floats) = (onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT)
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["hidden", "second"], ["inside"])],
        "branch",
        [],
        [value("inside", floats, [1, 8])],
        [held["second"]],
    )
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        onnx.helper.make_node("If", ["so"], ["chosen"], then_branch=branch, else_branch=branch),
        onnx.helper.make_node("Constant", [], ["third"], value=held["third"]),
        onnx.helper.make_node("MatMul", ["chosen", "third"], ["y"]),
    ]
    ports = [value("x", floats, [1, 8]), value("so", onnx.TensorProto.BOOL, [])]
    graph = onnx.helper.make_graph(nodes, "g", ports, [value("y", floats, [1, 8])], [held["first"]])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    for name, tensor in held.items():
        (folder / f"{name}.bin").write_bytes(tensor.raw_data)
    for tensor in (graph.initializer[0], *(one for one in onnx_tensors(model) if one.external_data)):
        tensor.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def onnx_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return list(onnx.external_data_helper._get_all_tensors(model))


def test_tensors_in_files_of_their_own_get_names_of_their_own_wherever_they_stand(tmp_path: Path) -> None:
    source = in_many_files(tmp_path)
    assert here("prune", source, "-o", tmp_path / "out.onnx", *HALF, "--scope", "layer").code == 0
    names = {
        entry.value
        for tensor in onnx_tensors(onnx.load(tmp_path / "out.onnx", load_external_data=False))
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert names == {"out.onnx.data", "out.onnx.1.data", "out.onnx.2.data"}
    assert sparsity(tmp_path / "out.onnx") == 0.5
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 8), np.float32), "so": np.array(True)})[0].shape == (1, 8)


def test_shards_are_named_after_their_index(tmp_path: Path) -> None:
    own = copy_of("two_shards", tmp_path / "own")
    before = digest(own)
    for share in ("0.5", "0.75"):
        index = own / f"sparse_{share}.safetensors.index.json"
        done = here("prune", own, "-o", index, "-s", share, "--force")
        assert done.code == 0, done.err
    for share in ("0.5", "0.75"):
        index = own / f"sparse_{share}.safetensors.index.json"
        shards = [own / f"sparse_{share}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        said = json.loads(index.read_text())
        assert set(said["weight_map"].values()) == {shard.name for shard in shards}
        assert said["metadata"] == json.loads((own / "model.safetensors.index.json").read_text())["metadata"]
        held = {name: array for shard in shards for name, array in load_file(shard).items()}
        assert held.keys() == said["weight_map"].keys()
        zeros = np.concatenate([array.reshape(-1) for array in held.values() if array.ndim > 1]) == 0
        assert zeros.mean() == float(share)
        for path in (index, *shards):
            path.unlink()
    assert digest(own) == before


@pytest.mark.parametrize("is_in_place", [True, False])
def test_shards_that_a_search_has_made_take_the_names_of_where_they_go(is_in_place: bool, tmp_path: Path) -> None:
    own = copy_of("two_shards", tmp_path / "own")
    made = tmp_path / "made" / "other.safetensors.index.json"
    made.parent.mkdir()
    assert here("prune", own, "-o", made, *HALF).code == 0
    before = {file.name for file in own.iterdir()}
    index = own / ("model" if is_in_place else "new")
    target = index.with_name(f"{index.name}.safetensors.index.json")
    _copy_result(open_model(own), open_model(made), Destination(target, is_in_place=is_in_place))
    new = {"new.safetensors.index.json", "new-00001-of-00002.safetensors", "new-00002-of-00002.safetensors"}
    assert {file.name for file in own.iterdir()} == before | (set() if is_in_place else new)
    assert sparsity(target) == 0.5


def test_external_data_in_a_folder_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    own = copy_of("external_data", tmp_path / "own")
    graph = onnx.load(own / "model.onnx")
    shutil.rmtree(own)
    (own / "data").mkdir(parents=True)
    onnx.save(graph, own / "m.onnx", save_as_external_data=True, location="data/w.bin", size_threshold=0)
    (own / "data" / "other.bin").write_text("dear")
    assert here("prune", own / "m.onnx", "--in-place", *HALF).code == 0
    assert (own / "data" / "other.bin").read_text() == "dear"
    assert sparsity(own / "m.onnx") == 0.5
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    assert here("prune", own / "m.onnx", "-o", out / "m.onnx", *HALF).code == 0
    assert sparsity(out / "m.onnx") == 0.5


def test_a_failure_between_two_files_takes_the_first_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exchanging.move_if_free

    def second_fails(new: Path, target: Path) -> None:
        if target.suffix == ".index":
            raise OSError(errno.EIO, "Input/output error")
        real(new, target)

    monkeypatch.setattr(exchanging, "move_if_free", second_fails)
    with pytest.raises(WorkError, match="Input/output error"):
        run(FIXTURES / "digits_cnn_checkpoint.index", PruneRequest(sparsity=0.5), Destination(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_is_what_is_written_back_at_no_sparsity(model: Path, tmp_path: Path) -> None:
    assert here("prune", model, "-o", tmp_path / "out.pt", "-s", "0").code == 0
    assert digest(model) == digest(tmp_path / "out.pt")
    assert list(read_all(model)) == list(read_all(tmp_path / "out.pt"))


@pytest.mark.parametrize(
    "name", ["digits_cnn.onnx", "external_data/model.onnx", "digits_cnn.tflite", "digits_cnn.pt", "two_shards"]
)
def test_a_model_with_nothing_to_strip_is_copied_whatever_its_format(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{Path(name).suffix}"
    done = here("strip", FIXTURES / name, "-o", out)
    assert done.code == 0, done.err
    assert "There was nothing to strip" in done.err
    assert list(read_all(out)) == list(read_all(FIXTURES / name))


def test_a_copy_that_is_smaller_by_the_name_of_its_data_had_nothing_to_strip(tmp_path: Path) -> None:
    graph = onnx.load(FIXTURES / "external_data" / "model.onnx")
    source = tmp_path / "m.onnx"
    onnx.save(graph, source, save_as_external_data=True, location="of_a_longer_name.data", size_threshold=0)
    done = here("strip", source, "-o", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < source.stat().st_size
    assert "There was nothing to strip" in done.err


@pytest.mark.parametrize("name", ["digits_cnn.onnx", "digits_cnn.tflite", "two_shards"])
@pytest.mark.parametrize("more", [(), ("--pack",)])
def test_to_store_halves_is_refused_where_strip_writes_copies_alone(
    name: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    done = here("strip", FIXTURES / name, "-o", tmp_path / f"out{Path(name).suffix}", "--half", *more)
    assert done.code == 3
    assert ("no compression of its own" if more and "onnx" not in name else "16-bit floats") in done.err
    assert list(tmp_path.iterdir()) == []


def test_shards_with_masks_are_not_copied_as_if_there_was_nothing_to_strip(tmp_path: Path) -> None:
    arrays = {"fc.weight_orig": np.ones((4, 4), np.float32), "fc.weight_mask": np.eye(4, dtype=np.float32)}
    save_file(arrays, tmp_path / "a.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "a.safetensors")}))
    done = here("strip", index, "-o", tmp_path / "out")
    assert done.code == 3
    assert "can neither remove tensors" in done.err
    assert not (tmp_path / "out").exists()
