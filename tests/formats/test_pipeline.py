"""Pipelines of diffusers: their parts are pruned as one model, and all else is copied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.running import here


def numbers(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Two parts with weights, one of them in shards, and a scheduler."""
    home = tmp_path / "pipe"
    names = ("unet", "text_encoder", "scheduler")
    for name in names:
        (home / name).mkdir(parents=True)
        (home / name / "config.json").write_text(json.dumps({"part": name}))
    (home / "model_index.json").write_text(json.dumps({"_class_name": "P", **{name: ["a", "B"] for name in names}}))
    (home / "README.md").write_text("")
    save_file({"conv.weight": numbers(4, 4)}, home / "unet/diffusion_pytorch_model.safetensors")
    shards = {}
    for number in (1, 2):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({f"layers.{number}.weight": 100 * numbers(4, 4)}, home / "text_encoder" / shard)
        shards[f"layers.{number}.weight"] = shard
    (home / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return home


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_all_parts_are_pruned_and_all_else_is_copied(pipe: Path) -> None:
    out = pipe.parent / "out"
    done = here("prune", pipe, "-o", out, "-s", "25%", "--scope", "global")
    assert done.code == 0, done.err
    before, after = files(pipe), files(out)
    assert after.keys() == before.keys()
    assert all(before[name] == after[name] for name in before if not name.endswith(".safetensors"))
    # Ranked together, the weights of the unet are the smallest.
    assert np.count_nonzero(load_file(out / "unet/diffusion_pytorch_model.safetensors")["conv.weight"]) == 4
    assert here("verify", out, "--against", pipe).code == 0
    names = [row[1] for row in here("inspect", out).rows]
    assert names == ["unet.conv.weight", "text_encoder.layers.1.weight", "text_encoder.layers.2.weight"]


def test_strip_copies_it_and_in_place_the_weights_alone_change(pipe: Path) -> None:
    before = files(pipe)
    assert here("strip", pipe, "-o", pipe.parent / "copy").code == 0
    assert files(pipe.parent / "copy") == before
    assert here("prune", pipe, "--in-place", "-s", "50%", "--layers", "unet*").code == 0
    after = files(pipe)
    assert {name for name in before if before[name] != after[name]} == {"unet/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("pipe/sub", "pipe/sub lies in the input pipe"),
        ("pipe/text_encoder", "pipe/text_encoder lies in the input pipe"),
        ("../here", "holds the input pipe, and would be replaced"),
    ],
)
def test_an_output_that_would_hold_its_input_or_lie_in_it_is_refused(pipe: Path, output: str, message: str) -> None:
    here_folder = pipe.parent / "here"
    here_folder.mkdir()
    pipe = pipe.rename(here_folder / "pipe")
    before = files(here_folder)
    done = here("prune", "pipe", "-o", output, "-s", "50%", "--force", cwd=here_folder)
    assert done.code == 2
    assert message in done.err
    assert files(here_folder) == before


def test_one_file_may_be_exported_into_the_folder_that_it_is_made_from(pipe: Path) -> None:
    before = files(pipe)
    done = here("export", pipe, "-o", pipe / "all.npz")
    assert done.code == 0, done.err
    assert files(pipe).items() > before.items()


def test_in_place_all_that_is_no_weight_stays_as_it_is(pipe: Path) -> None:
    (pipe.parent / "secret").write_text("mine")
    (pipe / "notes").symlink_to("../secret")
    for name in (".git/HEAD", ".cache/x", "unet/__pycache__/y"):
        (pipe / name).parent.mkdir()
        (pipe / name).write_text(name)
    (pipe / "empty").mkdir()
    (pipe / "README.md").chmod(0o600)
    before, was = files(pipe), (pipe / "README.md").stat()
    done = here("prune", pipe, "--in-place", "-s", "50%", "--scope", "layer")
    assert done.code == 0, done.err
    after = files(pipe)
    assert after.keys() == before.keys()
    assert all(name.endswith(".safetensors") for name in before if before[name] != after[name])
    assert (pipe / "README.md").stat() == was
    assert (pipe / "empty").is_dir()
    assert (pipe / "notes").is_symlink()
    assert "not copied" not in done.err
    assert sorted(path.name for path in pipe.parent.iterdir()) == ["pipe", "secret"]


def test_other_forms_of_the_weights_are_copied_and_said(pipe: Path) -> None:
    (pipe / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"dense")
    done = here("prune", pipe, "-o", pipe.parent / "out", "-s", "50%", "--scope", "layer")
    assert "diffusion_pytorch_model.fp16.safetensors in " in done.err
    assert files(pipe.parent / "out").keys() == files(pipe).keys()


def test_a_link_out_of_the_folder_is_not_copied(pipe: Path) -> None:
    (pipe.parent / "secret").write_text("mine")
    (pipe / "notes").symlink_to("../secret")
    done = here("prune", pipe, "-o", pipe.parent / "out", "-s", "50%", "--scope", "layer")
    assert done.code == 0
    assert not (pipe.parent / "out/notes").exists()
    assert f"notes in {pipe}: not copied, because links may not lead out of the folder." in done.err


def test_the_links_of_the_cache_of_hugging_face_become_files(pipe: Path) -> None:
    snapshot = pipe.parent / "models--x--pipe/snapshots/0a1b"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    names = files(pipe)
    for number, name in enumerate(names):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (pipe / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    done = here("prune", snapshot, "-o", pipe.parent / "out", "-s", "50%", "--scope", "layer")
    assert done.code == 0, done.err
    assert files(pipe.parent / "out").keys() == names.keys()
    assert "not copied" not in done.err


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.fp16.safetensors", "flax_model.msgpack", "saved_model.pb", "model.onnx"]
)
def test_a_part_of_which_no_weights_are_opened_is_not_passed_over(pipe: Path, name: str) -> None:
    (pipe / "unet/diffusion_pytorch_model.safetensors").rename(pipe / "unet" / name)
    done = here("prune", pipe, "-o", pipe.parent / "out", "-s", "50%", "--scope", "layer")
    assert done.code == 3
    assert f"unet has its weights in {name}, but a pipeline is pruned as a whole in safetensors alone" in done.err
    assert not (pipe.parent / "out").exists()


@pytest.mark.parametrize("is_in_shards", [False, True])
def test_a_pickle_by_the_name_of_safetensors_is_refused(pipe: Path, *, is_in_shards: bool) -> None:
    name = "text_encoder/model-00002-of-00002" if is_in_shards else "unet/diffusion_pytorch_model"
    torch.save({"layers.2.weight": torch.ones(2, 2)}, pipe / f"{name}.safetensors")
    done = here("inspect", pipe)
    assert done.code == 3
    assert f"{Path(name).name}.safetensors (PyTorch), but a pipeline is pruned" in done.err


def test_parts_in_pickles_and_indexes_that_name_none_are_sentences(pipe: Path) -> None:
    (pipe / "unet/diffusion_pytorch_model.safetensors").rename(pipe / "unet/gone")
    torch.save({"a": torch.ones(2, 2)}, pipe / "unet/pytorch_model.bin")
    done = here("prune", pipe, "-o", pipe.parent / "out", "-s", "50%", "--scope", "layer")
    assert done.code == 3
    assert "pruned as a whole in safetensors alone" in done.err
    (pipe / "model_index.json").write_text('{"../unet": [], "_x": 1, "scheduler": []}')
    assert "without weights in safetensors" in here("inspect", pipe).err
    (pipe / "model_index.json").write_text("[]")
    assert "is damaged" in here("inspect", pipe).err
    assert not (pipe.parent / "out").exists()
