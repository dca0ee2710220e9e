"""Pipelines of diffusers: their parts are pruned as one model, and all else is copied."""

from __future__ import annotations

import json
import shutil
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


@pytest.mark.parametrize(("scope", "is_layer_advised"), [("global", True), ("layer", False)])
def test_a_ranking_of_each_layer_is_advised_only_where_layers_were_ranked_together(
    scope: str, is_layer_advised: bool, pipe: Path
) -> None:
    sparsity = "31%" if scope == "global" else "90%"
    done = here("prune", pipe, "-o", pipe.parent / "out", "-s", sparsity, "--scope", scope)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert ("--scope layer" in said, "a lower --sparsity." in said) == (is_layer_advised, True), said


@pytest.mark.parametrize("name", ["out.onnx", "out.keras", "out"])
def test_its_networks_are_not_exported_together_whatever_the_target(name: str, pipe: Path) -> None:
    done = here("export", pipe, "-o", pipe.parent / name)
    assert (done.code, "whose networks are exported one by one" in done.err) == (2, True)
    assert f"prunectl export {pipe / 'unet'} -o OUT" in done.err


@pytest.mark.parametrize("words", [(), ("--bf16",)])
def test_its_parts_are_exported_one_by_one_as_the_hint_says(words: tuple[str, ...], pipe: Path) -> None:
    done = here("export", pipe, "-o", pipe.parent / "out", *words)
    assert done.code == 2
    assert "whose networks are exported one by one" in done.err
    assert f"prunectl export {pipe / 'unet'} -o OUT" in done.err
    done = here("export", pipe / "unet", "-o", pipe.parent / "out", *words)
    assert done.code == 0, done.err
    assert (pipe.parent / "out/config.json").read_bytes() == (pipe / "unet/config.json").read_bytes()


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


STATE = ("optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What the training scripts of diffusers save to go on from: a part, its average in shards, and no index."""
    home = tmp_path / "checkpoint-500"
    for name, settings in {"unet": {"layers": 2}, "unet_ema": {"layers": 2, "decay": 0.999}}.items():
        (home / name).mkdir(parents=True)
        (home / name / "config.json").write_text(json.dumps(settings))
    save_file({"a.weight": numbers(4, 4), "b.weight": numbers(2, 4)}, home / f"unet/{NETWORK}.safetensors")
    shards = {}
    for number, tensor in enumerate(({"a.weight": 2 * numbers(4, 4)}, {"b.weight": 2 * numbers(2, 4)}), 1):
        shard = f"{NETWORK}-{number:05}-of-00002.safetensors"
        save_file(tensor, home / "unet_ema" / shard)
        shards |= dict.fromkeys(tensor, shard)
    (home / f"unet_ema/{NETWORK}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in STATE:
        (home / name).write_bytes(name.encode())
    return home


NETWORK = "diffusion_pytorch_model"


def inside(found: dict[str, bytes], part: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{part}/"): data for name, data in found.items() if name.startswith(f"{part}/")}


def test_a_checkpoint_of_diffusers_keeps_the_trained_weights_or_their_average(checkpoint: Path) -> None:
    before = files(checkpoint)
    unet, average = inside(before, "unet"), inside(before, "unet_ema")
    asked = here("strip", checkpoint, "-o", checkpoint.parent / "out")
    assert asked.code == 2
    assert "holds the weights twice: unet as they were trained, and their average under unet_ema" in asked.err
    assert not (checkpoint.parent / "out").exists()
    done = here("strip", checkpoint, "-o", checkpoint.parent / "raw", "--keep", "raw")
    assert done.code == 0, done.err
    assert files(checkpoint.parent / "raw") == {f"unet/{name}": data for name, data in unet.items()}
    assert {row[0] for row in done.rows} >= {*STATE, "unet_ema/config.json"}
    done = here("strip", checkpoint, "-o", checkpoint.parent / "ema", "--keep", "ema")
    assert done.code == 0, done.err
    # The settings of averaging are none of the network's.
    average["config.json"] = unet["config.json"]
    assert files(checkpoint.parent / "ema") == {f"unet/{name}": data for name, data in average.items()}
    assert not (checkpoint.parent / "ema/unet_ema").exists()
    assert here("strip", checkpoint, "-o", checkpoint.parent / "ema", "--keep", "raw", "--force").code == 0
    assert files(checkpoint.parent / "ema") == files(checkpoint.parent / "raw")
    assert files(checkpoint) == before


def test_a_checkpoint_of_diffusers_is_one_model_and_both_copies_are_pruned(checkpoint: Path) -> None:
    seen = here("inspect", checkpoint)
    assert [row[1] for row in seen.rows] == [f"{part}.{name}.weight" for part in ("unet", "unet_ema") for name in "ab"]
    assert "The file holds the weights twice: unet and unet_ema, their average (2 tensors)." in seen.err
    assert here("prune", checkpoint, "-o", checkpoint.parent / "out", "-s", "50%", "--scope", "layer").code == 0
    after, before = files(checkpoint.parent / "out"), files(checkpoint)
    assert after.keys() == before.keys()
    assert all((before[name] == after[name]) != (NETWORK in name and "index" not in name) for name in before)


def test_only_what_is_named_leaves_a_checkpoint_of_diffusers(checkpoint: Path) -> None:
    before = files(checkpoint)
    assert here("strip", checkpoint, "-o", checkpoint.parent / "out", "--only", "optimizer").code == 0
    assert files(checkpoint.parent / "out") == {name: before[name] for name in before if name != "optimizer.bin"}


def test_the_average_of_a_part_takes_its_place_in_a_pipeline_that_names_no_averages(pipe: Path) -> None:
    (pipe / "unet_ema").mkdir()
    save_file({"conv.weight": 3 * numbers(4, 4)}, pipe / f"unet_ema/{NETWORK}.safetensors")
    # Another form of the trained weights would be loaded in the place of the average.
    (pipe / f"unet/{NETWORK}.fp16.safetensors").write_bytes(b"trained")
    before = files(pipe)
    done = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    assert "copied as they are" not in done.err
    average = before[f"unet_ema/{NETWORK}.safetensors"]
    gone = {f"unet_ema/{NETWORK}.safetensors", f"unet/{NETWORK}.fp16.safetensors"}
    expected = {name: data for name, data in before.items() if name not in gone}
    assert files(pipe.parent / "out") == {**expected, f"unet/{NETWORK}.safetensors": average}


def test_averages_of_several_parts_are_kept_together(pipe: Path) -> None:
    for part, shape in {"unet": "conv", "text_encoder": "layers.1"}.items():
        (pipe / f"{part}_ema").mkdir()
        save_file({f"{shape}.weight": 3 * numbers(4, 4)}, pipe / f"{part}_ema/model.safetensors")
    refused = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema")
    assert refused.code == 3
    assert "under text_encoder_ema have other names or shapes than those under text_encoder" in refused.err
    more = {f"layers.{number}.weight": 3 * numbers(4, 4) for number in (1, 2)}
    save_file(more, pipe / "text_encoder_ema/model.safetensors")
    assert "--keep ema for the averages" in here("strip", pipe, "-o", pipe.parent / "out").err
    assert here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema").code == 0
    assert sorted(files(pipe.parent / "out")) == [
        "README.md",
        "model_index.json",
        "scheduler/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/model.safetensors",
    ]


def test_a_checkpoint_of_diffusers_is_stripped_into_a_folder_of_its_own_alone(checkpoint: Path) -> None:
    before = files(checkpoint)
    for words, message in {
        ("--in-place", "--keep", "ema"): "would be left in",
        ("-o", "out", "--keep", "ema", "--half"): "can neither store 16-bit floats",
        ("-o", "out", "--keep", "ema", "--pack"): "no compression",
    }.items():
        done = here("strip", checkpoint, *words, cwd=checkpoint.parent)
        assert done.code in {2, 3}
        assert message in done.err
    assert files(checkpoint) == before
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint-500"]


def test_a_collection_of_models_is_not_taken_for_one_pipeline(checkpoint: Path) -> None:
    for part in ("unet", "unet_ema"):
        (checkpoint / part).rename(checkpoint / f"sd-{part}")
    assert f"name one, such as {checkpoint / 'sd-unet'}" in here("inspect", checkpoint).err.splitlines()[0]
    for part, name in {"unet": "canny", "unet_ema": "depth"}.items():
        (checkpoint / f"sd-{part}").rename(checkpoint / name)
    # What training would go on from shows that both networks are trained together.
    assert here("inspect", checkpoint).code == 0
    for name in STATE:
        (checkpoint / name).unlink()
    save_file({"lora": numbers(2, 2)}, checkpoint / "lora.safetensors")
    # DeepSpeed writes a file of that name.
    (checkpoint / "latest").mkdir()
    done = here("prune", checkpoint, "-o", checkpoint.parent / "out", "-s", "50%")
    assert done.code == 3
    assert "is a folder of files, of which none is known to be its model" in done.err
    assert not (checkpoint.parent / "out").exists()


def test_the_parts_that_strip_leaves_are_replaced_but_no_folder_with_other_files(checkpoint: Path) -> None:
    shutil.copytree(checkpoint / "unet", checkpoint / "controlnet")
    out = checkpoint.parent / "out"
    assert here("strip", checkpoint, "-o", out, "--keep", "raw").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["controlnet", "unet"]
    assert here("strip", checkpoint, "-o", out, "--keep", "ema", "--force").code == 0
    shutil.rmtree(out)
    shutil.copytree(checkpoint, out)
    assert here("strip", checkpoint, "-o", out, "--keep", "ema", "--force").code == 0
    for name in ("thesis.tex", "src/a.py", ".git/HEAD", "app/config.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = files(out)
        done = here("strip", checkpoint, "-o", out, "--keep", "ema", "--force")
        assert done.code == 2, name
        assert "out is a folder without a model: prunectl does not replace it" in done.err
        assert files(out) == before
        (out / name).unlink()
        if "/" in name:
            (out / name).parent.rmdir()
    assert here("strip", checkpoint, "-o", out, "--keep", "raw", "--force").code == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        "model.onnx_data",
        "openvino_model.bin",
        f"{NETWORK}.safetensors.index.fp16.json",
    ],
)
def test_no_form_of_the_trained_weights_stays_beside_the_average(checkpoint: Path, name: str) -> None:
    (checkpoint / "unet" / name).write_bytes(b"trained")
    done = here("strip", checkpoint, "-o", checkpoint.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    assert f"unet/{name}" not in files(checkpoint.parent / "out")
    assert f"unet/{name}" in {row[0] for row in done.rows}
    assert "copied as they are" not in done.err
    kept = here("strip", checkpoint, "-o", checkpoint.parent / "raw", "--keep", "raw")
    assert f"unet/{name}" in files(checkpoint.parent / "raw")
    assert f"{name} in unet: the same weights in another form, copied as they are." in " ".join(kept.err.split())


def test_no_empty_folder_stays_where_an_average_was(checkpoint: Path) -> None:
    (checkpoint / "unet_ema/a/b/c").mkdir(parents=True)
    (checkpoint / "unet_ema/a/b/c/log.txt").write_text("")
    (checkpoint / "unet_ema/a/b/log.txt").write_text("")
    done = here("strip", checkpoint, "-o", checkpoint.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    assert [path.name for path in checkpoint.parent.joinpath("out").iterdir()] == ["unet"]


def test_what_accelerate_keeps_of_other_objects_is_left_out(checkpoint: Path) -> None:
    (checkpoint / "custom_checkpoint_0.pkl").write_bytes(b"")
    assert here("strip", checkpoint, "-o", checkpoint.parent / "out", "--keep", "raw").code == 0
    assert not (checkpoint.parent / "out/custom_checkpoint_0.pkl").exists()


def test_strip_in_place_is_refused_before_anything_is_written(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        pytest.fail("written")

    monkeypatch.setattr("prunectl.formats.pipeline.patch_files", write)
    done = here("strip", checkpoint, "--in-place", "--keep", "ema")
    assert done.code == 2
    assert "would be left in" in done.err


def test_an_average_of_an_average_is_left_as_it_is(checkpoint: Path) -> None:
    shutil.copytree(checkpoint / "unet", checkpoint / "unet_ema_ema")
    before = files(checkpoint)
    done = here("strip", checkpoint, "-o", checkpoint.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    after = files(checkpoint.parent / "out")
    assert inside(after, "unet_ema_ema") == inside(before, "unet_ema_ema")
    average = {**inside(before, "unet_ema"), "config.json": before["unet/config.json"]}
    assert inside(after, "unet") == average


def test_an_index_that_takes_the_settings_for_weights_is_refused(checkpoint: Path) -> None:
    index = checkpoint / f"unet_ema/{NETWORK}.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    (checkpoint / "unet_ema/config.json").unlink()
    (checkpoint / "unet_ema" / shards["b.weight"]).rename(checkpoint / "unet_ema/config.json")
    index.write_text(json.dumps({"weight_map": {**shards, "b.weight": "config.json"}}))
    done = here("strip", checkpoint, "-o", checkpoint.parent / "out", "--keep", "ema")
    assert done.code == 3
    assert "unet_ema/config.json would take the place of " in done.err
    assert "unet/config.json" in done.err
    assert not (checkpoint.parent / "out").exists()


def test_a_part_whose_name_no_folder_can_have_is_passed_over(pipe: Path) -> None:
    index = json.loads((pipe / "model_index.json").read_text())
    (pipe / "model_index.json").write_text(json.dumps({**index, "u" * 5000: ["a", "B"], "v\0": ["a", "B"]}))
    done = here("inspect", pipe)
    assert done.code == 0, done.err
    assert len(done.rows) == 3


def with_state(
    folder: Path, shape: tuple[int, ...] = (4, 4)
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Give the network in a folder what training would go on from, as tensors; the weights alone are returned."""
    weights = load_file(folder / f"{NETWORK}.safetensors")
    state = {"optimizer.state.0.exp_avg": numbers(*shape), "optimizer.state.0.step": numbers(1)}
    state |= {f"{name}.grad": own for name, own in weights.items()}
    save_file({**weights, **state}, folder / f"{NETWORK}.safetensors")
    return weights


def test_optimizer_and_gradients_in_a_part_are_removed_and_all_else_is_copied(pipe: Path) -> None:
    clean = files(pipe)
    weights = with_state(pipe / "unet")
    before = files(pipe)
    done = here("strip", pipe, "-o", pipe.parent / "out")
    assert done.code == 0, done.err
    assert {row[0]: row[1] for row in done.rows} == {
        "unet.optimizer.state.0.exp_avg": "optimizer",
        "unet.optimizer.state.0.step": "optimizer",
        "unet.conv.weight.grad": "gradients",
    }
    after = files(pipe.parent / "out")
    assert after.keys() == before.keys() == clean.keys()
    assert {name for name in before if after[name] != before[name]} == {f"unet/{NETWORK}.safetensors"}
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], own) for name, own in weights.items())
    # As the part alone.
    assert here("strip", pipe / "unet", "-o", pipe.parent / "alone").code == 0
    assert files(pipe.parent / "alone") == inside(after, "unet")
    assert here("strip", pipe, "-o", pipe.parent / "gradients", "--only", "gradients").code == 0
    left = load_file(pipe.parent / f"gradients/unet/{NETWORK}.safetensors")
    assert set(left) == {"conv.weight", "optimizer.state.0.exp_avg", "optimizer.state.0.step"}
    assert files(pipe) == before
    assert here("strip", pipe, "--in-place").code == 0
    assert files(pipe) == after


def test_masks_in_a_part_are_applied(pipe: Path) -> None:
    mask = (numbers(4, 4) > 8).astype(np.float32)
    save_file({"conv.weight_orig": numbers(4, 4), "conv.weight_mask": mask}, pipe / f"unet/{NETWORK}.safetensors")
    done = here("strip", pipe, "-o", pipe.parent / "out")
    assert done.code == 0, done.err
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == {"conv.weight"}
    assert np.array_equal(found["conv.weight"], numbers(4, 4) * mask)


def test_parts_in_one_file_are_stored_as_16_bit_floats_and_of_shards_it_is_said_what_to_do(pipe: Path) -> None:
    before = files(pipe)
    done = here("strip", pipe, "-o", pipe.parent / "out", "--half")
    assert done.code == 3
    shards = pipe / "text_encoder"
    assert f"{shards} is in shards, in which strip can neither store 16-bit floats nor remove" in done.err
    assert f"prunectl export {shards} -o OUT --shard-size 1TB" in done.err
    assert not (pipe.parent / "out").exists()
    # What is advised works.
    assert here("export", shards, "-o", pipe.parent / "one", "--shard-size", "1TB").code == 0
    shutil.rmtree(shards)
    (pipe.parent / "one").rename(shards)
    done = here("strip", pipe, "-o", pipe.parent / "out", "--half")
    assert done.code == 0, done.err
    after = files(pipe.parent / "out")
    assert after.keys() == files(pipe).keys()
    for name in (name for name in after if name.endswith(".safetensors")):
        wide, narrow = load_file(pipe / name), load_file(pipe.parent / "out" / name)
        assert wide.keys() == narrow.keys()
        assert all(own.dtype == np.float16 for own in narrow.values())
        assert all(np.array_equal(narrow[key], own.astype(np.float16)) for key, own in wide.items())
    assert after["model_index.json"] == before["model_index.json"]


def test_the_average_of_a_part_is_stripped_of_what_only_training_needs(pipe: Path) -> None:
    shutil.copytree(pipe / "unet", pipe / "unet_ema")
    weights = with_state(pipe / "unet_ema")
    with_state(pipe / "unet")
    done = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    assert "unet_ema.optimizer.state.0.step" in {row[0] for row in done.rows}
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == weights.keys()
    assert not (pipe.parent / "out/unet_ema").exists()


def test_shards_of_a_part_that_hold_more_than_weights_are_refused_before_anything_is_written(pipe: Path) -> None:
    shard = pipe / "text_encoder/model-00002-of-00002.safetensors"
    save_file({**load_file(shard), "optimizer.state.0.step": numbers(1)}, shard)
    before = files(pipe)
    for words in (("-o", "out"), ("--in-place",)):
        done = here("strip", pipe, *words, cwd=pipe.parent)
        assert done.code == 3
        assert f"{pipe / 'text_encoder'} is in shards" in done.err
        assert files(pipe) == before
    assert sorted(path.name for path in pipe.parent.iterdir()) == ["pipe"]


def with_average_inside(folder: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Give the network in a folder an average of its weights in the same file, which is returned."""
    weights = load_file(folder / f"{NETWORK}.safetensors")
    average = {name: 5 * own for name, own in weights.items()}
    save_file({**weights, **{f"ema.{name}": own for name, own in average.items()}}, folder / f"{NETWORK}.safetensors")
    return average


@pytest.mark.parametrize(
    "words", [(), ("--half",), ("--in-place",), ("--dry-run",), ("--keep", "ema"), ("--keep", "raw")]
)
def test_an_average_inside_a_part_is_never_removed_unasked(pipe: Path, words: tuple[str, ...]) -> None:
    shutil.rmtree(pipe / "text_encoder")
    average = with_average_inside(pipe / "unet")
    before, unet = files(pipe), pipe / "unet"
    output = () if "--in-place" in words else ("-o", pipe.parent / "out")
    done = here("strip", pipe, *output, *words)
    assert done.code == 2
    assert (
        f"{unet} holds the weights twice: the top level as they were trained, and their average under ema" in done.err
    )
    assert f"prunectl strip {unet} -o OUT --keep ema, or --keep raw; --only without training leaves both" in done.err
    assert files(pipe) == before
    assert not (pipe.parent / "out").exists()
    # What is advised works.
    assert here("strip", unet, "-o", pipe.parent / "one", "--keep", "ema").code == 0
    shutil.rmtree(unet)
    (pipe.parent / "one").rename(unet)
    assert here("strip", pipe, "-o", pipe.parent / "out").code == 0
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == average.keys()
    assert all(np.array_equal(found[name], own) for name, own in average.items())


def test_an_average_inside_a_part_stays_where_only_other_things_are_removed(pipe: Path) -> None:
    average = with_average_inside(pipe / "unet")
    held = load_file(pipe / f"unet/{NETWORK}.safetensors")
    save_file({**held, "optimizer.state.0.step": numbers(1)}, pipe / f"unet/{NETWORK}.safetensors")
    done = here("strip", pipe, "-o", pipe.parent / "out", "--only", "optimizer")
    assert done.code == 0, done.err
    assert [row[0] for row in done.rows] == ["unet.optimizer.state.0.step"]
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == held.keys()
    assert all(np.array_equal(found[f"ema.{name}"], own) for name, own in average.items())


def test_a_tensor_that_is_called_an_average_by_itself_stays(pipe: Path) -> None:
    """One of another shape, of which it cannot be asked which copy is meant."""
    held = {"conv.weight": numbers(4, 4), "ema.conv.weight": numbers(3), "optimizer.state.0.step": numbers(1)}
    save_file(held, pipe / f"unet/{NETWORK}.safetensors")
    done = here("strip", pipe, "-o", pipe.parent / "out")
    assert done.code == 0, done.err
    assert set(load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")) == {"conv.weight", "ema.conv.weight"}


def test_the_inside_of_a_part_that_goes_is_not_asked_for(checkpoint: Path) -> None:
    with_average_inside(checkpoint / "unet")
    done = here("strip", checkpoint, "-o", checkpoint.parent / "raw", "--keep", "raw")
    assert done.code == 2
    assert f"{checkpoint / 'unet'} holds the weights twice" in done.err
    # Without its own average it no longer has what its average has.
    shutil.copytree(checkpoint / "unet", checkpoint / "unet_ema", dirs_exist_ok=True)
    (checkpoint / f"unet_ema/{NETWORK}.safetensors.index.json").unlink()
    weights = load_file(checkpoint / f"unet/{NETWORK}.safetensors")
    averaged = {name: 2 * own for name, own in weights.items() if not name.startswith("ema.")}
    save_file(averaged, checkpoint / f"unet_ema/{NETWORK}.safetensors")
    for shard in (checkpoint / "unet_ema").glob("*-of-*"):
        shard.unlink()
    done = here("strip", checkpoint, "-o", checkpoint.parent / "ema", "--keep", "ema")
    assert done.code == 0, done.err
    found = load_file(checkpoint.parent / f"ema/unet/{NETWORK}.safetensors")
    assert found.keys() == averaged.keys()
    assert all(np.array_equal(found[name], own) for name, own in averaged.items())


@pytest.mark.parametrize("masked", ["unet", "unet_ema", "both"])
@pytest.mark.parametrize("has_state", [False, True])
def test_copies_are_compared_by_the_weights_that_strip_leaves(pipe: Path, masked: str, *, has_state: bool) -> None:
    mask = (numbers(4, 4) > 8).astype(np.float32)
    expected: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for factor, part in enumerate(("unet", "unet_ema"), 1):
        (pipe / part).mkdir(exist_ok=True)
        tensors = {"conv.bias": factor * numbers(4)}
        if masked in {part, "both"}:
            tensors |= {"conv.weight_orig": factor * numbers(4, 4), "conv.weight_mask": mask}
            expected["conv.weight"] = factor * numbers(4, 4) * mask
        else:
            tensors["conv.weight"] = expected["conv.weight"] = factor * numbers(4, 4)
        expected["conv.bias"] = tensors["conv.bias"]
        if has_state and part == "unet":
            tensors |= {"optimizer.state.0.exp_avg": numbers(4, 4), "conv.bias.grad": numbers(4)}
        save_file(tensors, pipe / part / f"{NETWORK}.safetensors")
    done = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema")
    assert done.code == 0, done.err
    found = load_file(pipe.parent / f"out/unet/{NETWORK}.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], own) for name, own in expected.items())


@pytest.mark.parametrize("of", ["trained", "both"])
def test_the_file_of_the_average_takes_the_place_of_the_trained_one_with_what_stays_in_it(pipe: Path, of: str) -> None:
    shutil.copytree(pipe / "unet", pipe / "unet_ema")
    with_state(pipe / "unet")
    if of == "both":
        with_state(pipe / "unet_ema", (2, 2))
    average = (pipe / f"unet_ema/{NETWORK}.safetensors").read_bytes()
    done = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema", "--only", "training")
    assert done.code == 0, done.err
    assert (pipe.parent / f"out/unet/{NETWORK}.safetensors").read_bytes() == average


def test_parts_of_which_neither_copy_has_weights_are_no_copies(pipe: Path) -> None:
    for part in ("unet", "unet_ema"):
        (pipe / part).mkdir(exist_ok=True)
        save_file({"optimizer.state.0.exp_avg": numbers(4, 4)}, pipe / part / f"{NETWORK}.safetensors")
    done = here("strip", pipe, "-o", pipe.parent / "out", "--keep", "ema")
    assert done.code == 3
    assert "have other names or shapes" in done.err


def test_of_masks_in_shards_no_command_is_named_that_refuses_them(pipe: Path) -> None:
    part = pipe / "text_encoder"
    first, second = (part / f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
    # The state of an optimizer comes first, which the export of a part without masks would keep.
    save_file({**load_file(first), "optimizer.state.0.step": numbers(1)}, first)
    save_file({"layers.2.weight_orig": numbers(4, 4), "layers.2.weight_mask": numbers(4, 4)}, second)
    shards = {name: shard.name for shard in (first, second) for name in load_file(shard)}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for words in (("strip", pipe), ("export", part)):
        done = here(*words, "-o", pipe.parent / "out")
        assert done.code == 3
        assert "torch.nn.utils.prune.remove" in done.err
        assert "prunectl" not in done.err.partition("\n")[2]
    assert not (pipe.parent / "out").exists()
