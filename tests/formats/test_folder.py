"""Model folders: what lies beside the weights goes with them, byte for byte, and nothing that was not meant to."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from prunectl.errors import InputError
from prunectl.formats import budgets, folder
from prunectl.formats.registry import open_model
from tests.running import FIXTURES, here

BESIDE = ("config.json", "tokenizer.json", "README.md", ".gitattributes", "1_Pooling/config.json", "modeling_llama.py")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder as Hugging Face lays models out."""
    source = tmp_path / "llama"
    source.mkdir()
    shutil.copy(FIXTURES / "digits_cnn.safetensors", source / "model.safetensors")
    for name in BESIDE:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"{{}} {name}")
    return source


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [("prune", "-s", "50%"), ("strip",), ("strip", "--half")])
def test_a_folder_goes_in_and_a_folder_comes_out_with_all_else_as_it_was(llama: Path, command: tuple[str, ...]) -> None:
    (llama / "config.json").chmod(0o600)
    (llama / "1_Pooling").chmod(0o700)
    before = files_of(llama)
    done = here(*command, "llama", "-o", "small", cwd=llama.parent)
    assert done.code == 0, done.err
    small = files_of(llama.parent / "small")
    assert small.keys() == before.keys()
    assert {name: small[name] for name in BESIDE} == {name: before[name] for name in BESIDE}
    assert stat.S_IMODE((llama.parent / "small/config.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((llama.parent / "small/1_Pooling").stat().st_mode) == 0o700
    assert files_of(llama) == before
    assert sorted(os.listdir(llama.parent)) == ["llama", "small"]


def test_the_weights_are_those_that_the_file_alone_would_get(llama: Path) -> None:
    assert here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent).code == 0
    assert here("prune", "llama/model.safetensors", "-o", "alone.safetensors", "-s", "50%", cwd=llama.parent).code == 0
    written = (llama.parent / "small/model.safetensors").read_bytes()
    assert written == (llama.parent / "alone.safetensors").read_bytes()


_COMMANDS = """
import sys
from prunectl.cli import main
for line in sys.stdin:
    sys.argv = ["prunectl", *line.split()]
    assert main() == 0, line
print(sorted({"transformers", "torch", "tensorflow", "keras", "safetensors"} & sys.modules.keys()))
"""


def test_no_framework_is_imported_for_what_needs_none(llama: Path) -> None:
    (llama / "config.json").write_text('{"model_type": "llama"}')
    lines = (
        *("inspect llama", "size llama", "prune llama -o half -s 50%", "prune llama -o pattern --pattern 2:4"),
        *(
            "strip llama -o plain --half",
            "export llama -o small --bf16",
            "diff llama half",
            "inspect half --json",
        ),
    )
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS],
        input="\n".join(lines),
        cwd=llama.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_shards_keep_their_names_and_their_index(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        save_file({name: weights[name] for name in part}, llama / f"model-{number:05}-of-00002.safetensors")
        index |= dict.fromkeys(part, f"model-{number:05}-of-00002.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert here("prune", "llama", "-o", "small", "-s", "50%", "--scope", "layer", cwd=llama.parent).code == 0
    before, after = files_of(llama), files_of(llama.parent / "small")
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == set(index.values())
    found = load_file(llama.parent / "small" / index["fc1.weight"])["fc1.weight"]
    assert np.count_nonzero(found) == found.size // 2


def test_shards_that_are_archives_of_pytorch_stay_whole_with_their_checksums(tmp_path: Path) -> None:
    index = {}
    for number in (1, 2):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        numbers = torch.arange(1.0, 17.0).reshape(4, 4)
        torch.save({f"fc{number}.weight": numbers}, tmp_path / shard)
        index[f"fc{number}.weight"] = shard
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    done = here("prune", tmp_path, "--in-place", "-s", "50%")
    assert done.code == 0, done.err
    for name, shard in index.items():
        with zipfile.ZipFile(tmp_path / shard) as archive:
            assert archive.testzip() is None
        assert torch.load(tmp_path / shard)[name].count_nonzero() == 8


def test_the_same_weights_in_other_formats_stay_behind_and_are_named(llama: Path) -> None:
    for name in ("pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors"):
        (llama / name).write_bytes(b"dense")
    done = here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent)
    assert "model.fp16.safetensors, pytorch_model.bin, tf_model.h5 in llama: the same weights, unpruned" in done.err
    assert files_of(llama.parent / "small").keys() == {*BESIDE, "model.safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        *("2_Dense/model.safetensors", "onnx/decoder.onnx_data", "original/consolidated.00.pth", "gguf/model-q4.gguf"),
        *("openvino/openvino_model.bin", "sub/last.pt"),
    ],
)
def test_weights_in_folders_inside_are_copied_as_they_were_and_named(name: str, llama: Path) -> None:
    for other in (name, "1_Pooling/config.json", "checkpoint-9/optimizer.pt", "checkpoint-9/rng_state.pth"):
        (llama / other).parent.mkdir(exist_ok=True)
        (llama / other).write_bytes(b"dense")
    done = here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent)
    assert f"note: {name} in llama: copied unchanged; to prune one, give its path." in done.err
    assert (llama.parent / "small" / name).read_bytes() == b"dense"


def test_a_link_out_of_the_folder_is_not_followed_but_one_within_it_is(llama: Path) -> None:
    (llama.parent / "secret").write_text("mine")
    (llama / "notes.txt").symlink_to("../secret")
    (llama / "all").symlink_to(llama.parent)
    (llama / "vocab.json").symlink_to("tokenizer.json")
    done = here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent)
    small = files_of(llama.parent / "small")
    assert "all, notes.txt in llama: not copied, because links may not lead out of the folder." in done.err
    assert small.keys() == {*BESIDE, "model.safetensors", "vocab.json"}
    assert small["vocab.json"] == small["tokenizer.json"]


def test_the_links_of_the_cache_of_hugging_face_become_files(llama: Path) -> None:
    snapshot = llama.parent / "models--x--llama/snapshots/0a1b"
    blobs = snapshot.parent.parent / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        shutil.copy(llama / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert here("prune", snapshot, "-o", "small", "-s", "50%", cwd=llama.parent).code == 0
    small = llama.parent / "small"
    assert (small / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert not any(path.is_symlink() for path in small.iterdir())


def test_what_is_no_part_of_a_model_is_not_copied(llama: Path) -> None:
    for name in (".git/config", ".cache/huggingface/x", "__pycache__/m.pyc", ".prunectl-0123456789abcdef/new"):
        (llama / name).parent.mkdir(parents=True)
        (llama / name).write_text("")
    os.mkfifo(llama / "pipe")
    assert here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent).code == 0
    assert files_of(llama.parent / "small").keys() == {*BESIDE, "model.safetensors"}


def test_a_folder_is_replaced_as_a_whole_and_only_when_that_is_asked_for(llama: Path) -> None:
    words = ("prune", "llama", "-o", "small")
    assert here(*words, "-s", "50%", cwd=llama.parent).code == 0
    first = files_of(llama.parent / "small")
    assert "small exists" in here(*words, "-s", "60%", cwd=llama.parent).err
    assert files_of(llama.parent / "small") == first
    (llama.parent / "small/old.json").write_text("")
    assert here(*words, "-s", "60%", "--force", cwd=llama.parent).code == 0
    second = files_of(llama.parent / "small")
    assert second.keys() == first.keys()
    assert second["model.safetensors"] != first["model.safetensors"]


def test_a_folder_of_other_things_is_never_replaced(llama: Path) -> None:
    (llama.parent / "photos").mkdir()
    (llama.parent / "photos/cat.jpg").write_text("")
    done = here("prune", "llama", "-o", "photos", "-s", "50%", "--force", cwd=llama.parent)
    assert done.code == 2
    assert "photos is a folder without a model" in done.err


@pytest.mark.parametrize("name", [".metadata", ".metadata/x", "model.safetensors/x"])
def test_a_folder_is_no_model_for_a_name_that_other_programs_use_too(llama: Path, name: str) -> None:
    kept = [llama.parent / "app" / name, llama.parent / "app/main.dart"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    done = here("prune", "llama", "-o", "app", "-s", "50%", "--force", cwd=llama.parent)
    assert done.code == 2
    assert "app is a folder without a model" in done.err
    assert all(path.read_text() == "mine" for path in kept)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("llama", "llama is the input itself"),
        ("llama/small", "llama/small lies in the input llama"),
        ("../here", "holds the input llama, and would be replaced"),
    ],
)
def test_an_output_that_would_hold_its_input_or_lie_in_it_is_refused(llama: Path, output: str, message: str) -> None:
    here_folder = llama.parent / "here"
    here_folder.mkdir()
    llama.rename(here_folder / "llama")
    done = here("prune", "llama", "-o", output, "-s", "50%", "--force", cwd=here_folder)
    assert done.code == 2
    assert message in done.err


def test_in_place_the_weights_alone_change(llama: Path) -> None:
    before = files_of(llama)
    assert here("prune", "llama", "--in-place", "-s", "50%", cwd=llama.parent).code == 0
    after = files_of(llama)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_a_name_of_a_file_still_gets_the_weights_alone(llama: Path) -> None:
    assert here("prune", "llama", "-o", "out.safetensors", "-s", "50%", cwd=llama.parent).code == 0
    assert (llama.parent / "out.safetensors").is_file()


def test_a_folder_of_too_many_files_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_FILES", 3)
    with pytest.raises(InputError, match="more than 3 files"):
        folder.companions(open_model(llama))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_adapters_and_parts_of_pipelines_are_folders_too(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    assert here("prune", "llama", "-o", "small", "-s", "50%", cwd=llama.parent).code == 0
    assert files_of(llama.parent / "small").keys() == {*BESIDE, name}


def test_strip_leaves_out_what_training_would_go_on_from(llama: Path) -> None:
    state = {
        "optimizer.pt": "optimizer",
        "global_step12/zero_pp_rank_0_mp_rank_00_optim_states.pt": "optimizer",
        "scheduler.pt": "training",
        "rng_state_3.pth": "training",
        "trainer_state.json": "training",
        "training_args.bin": "training",
    }
    for name in state:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_bytes(bytes(100))
    done = here("strip", "llama", "-o", "small", cwd=llama.parent)
    assert sorted(done.out.splitlines()) == sorted(f"{name}\t{part}\t100" for name, part in state.items())
    assert files_of(llama.parent / "small").keys() == {*BESIDE, "model.safetensors"}
    assert here("strip", "llama", "-o", "some", "--only", "optimizer", cwd=llama.parent).code == 0
    kept = {name for name, part in state.items() if part == "training"}
    assert files_of(llama.parent / "some").keys() == {*BESIDE, "model.safetensors", *kept}
    assert here("prune", "llama", "-o", "all", "-s", "50%", cwd=llama.parent).code == 0
    assert files_of(llama.parent / "all").keys() == {*BESIDE, "model.safetensors", *state}


def test_of_a_folder_with_models_in_folders_one_of_them_is_named(llama: Path) -> None:
    (llama.parent / "sbert" / "1_Pooling").mkdir(parents=True)
    (llama.parent / "sbert" / "1_Pooling" / "config.json").write_text("{}")
    llama.rename(llama.parent / "sbert" / "2_Transformer")
    done = here("inspect", "sbert", cwd=llama.parent)
    assert done.code == 3
    named = done.err.splitlines()[0].rpartition(" ")[2]
    assert named == "sbert/2_Transformer"
    assert here("inspect", named, cwd=llama.parent).code == 0


@pytest.mark.parametrize("kind", ["model", "adapter_model"])
def test_of_the_checkpoints_of_a_training_the_last_is_named(llama: Path, kind: str) -> None:
    run = llama.parent / "run"
    for step in (5, 20, 100):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"a.weight": np.ones((2, 2), np.float32)}, run / f"checkpoint-{step}" / f"{kind}.safetensors")
    # Flutter has such a file.
    (run / "checkpoint-200").mkdir()
    (run / "checkpoint-200" / ".metadata").write_text("version:")
    named = here("inspect", run).err.splitlines()[0].rpartition(" ")[2]
    assert named == str(run / "checkpoint-100")
    assert here("inspect", named).code == 0
