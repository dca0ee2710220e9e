"""Folders at URLs whose files no index names: read as on the disk, or refused where nothing lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import prunectl
from prunectl.errors import InputError
from prunectl.formats import budgets, remote
from prunectl.formats.remote_files import HttpFile, HttpFolder
from tests.formats.test_folder import files_of
from tests.formats.test_pipeline import NETWORK, STATE, checkpoint, numbers, pipe
from tests.formats.test_remote import Server, in_memory, memory, server, upload
from tests.pruning.test_parts import SHARDS, folder
from tests.running import here

__all__ = ["checkpoint", "folder", "memory", "pipe", "server"]
URL = "memory://bucket/model"


def files_read(memory: Any, patching: pytest.MonkeyPatch) -> set[str]:
    """The names of the files that are read from now on."""
    read, cat = set[str](), type(memory).cat_file

    def noted(self: Any, path: str, **options: Any) -> Any:
        read.add(path.rpartition("/")[2])
        return cat(self, path, **options)

    patching.setattr(type(memory), "cat_file", noted)
    return read


@pytest.mark.parametrize("kind", ["pipe", "checkpoint"])
def test_pipelines_in_a_store_are_those_on_the_disk(kind: str, request: pytest.FixtureRequest, memory: Any) -> None:
    """With parts in shards, and with or without an index of the parts."""
    source: Path = request.getfixturevalue(kind)
    here_too = source.parent / "model"
    source.rename(here_too)
    upload(memory, here_too, "/bucket/model")
    for words in (("inspect", "--zeros"), ("size",)):
        found = here(words[0], URL, *words[1:], "--format", "csv")
        assert found.code == 0, found.err
        expected = here(words[0], here_too, *words[1:], "--format", "csv")
        assert [row[1:] for row in found.rows] == [row[1:] for row in expected.rows]
    words = ("-s", "50%", "--scope", "layer")
    assert here("prune", here_too, "-o", here_too.parent / "whole", *words).code == 0
    expected_files = files_of(here_too.parent / "whole")
    for output in ("memory://bucket/out", str(here_too.parent / "out")):
        done = here("prune", URL, "-o", output, *words)
        assert done.code == 0, done.err
        assert (in_memory(memory, "/bucket/out") if ":" in output else files_of(Path(output))) == expected_files
    keep = ("--keep", "ema") if kind == "checkpoint" else ()
    assert here("strip", here_too, "-o", here_too.parent / "stripped", *keep).code == 0
    done = here("strip", URL, "-o", here_too.parent / "same", *keep)
    assert done.code == 0, done.err
    assert files_of(here_too.parent / "same") == files_of(here_too.parent / "stripped")


def test_only_the_headers_and_indexes_of_a_checkpoint_are_read_to_look_at_it(
    checkpoint: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, checkpoint, "/bucket/model")
    read = files_read(memory, monkeypatch)
    assert here("inspect", URL).code == 0
    assert read & set(STATE) == set()
    assert f"{NETWORK}.safetensors.index.json" in read


def test_networks_beside_each_other_are_no_model_in_a_store_either(checkpoint: Path, memory: Any) -> None:
    for name in STATE:
        (checkpoint / name).unlink()
    (checkpoint / "unet_ema").rename(checkpoint / "canny")
    upload(memory, checkpoint, "/bucket/model")
    for place in (checkpoint, URL):
        done = here("inspect", place)
        assert done.code == 3
        named = done.err.splitlines()[0].removeprefix(
            f"error: {place} has no model of its own, but folders with models: "
        )
        assert named == f"name one, such as {place}/canny"
        assert here("inspect", f"{place}/canny").code == 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_one_pickle_is_fetched_and_pruned_as_on_the_disk(
    tmp_path: Path, memory: Any, server: Server, name: str
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    torch.save(
        {f"layers.{number}.weight": torch.arange(64.0).reshape(8, 8) + number for number in (1, 2)}, source / name
    )
    (source / "config.json").write_text('{"model_type": "llama"}')
    upload(memory, source, "/bucket/model")
    assert here("prune", source, "-o", tmp_path / "whole", "-s", "50%").code == 0
    for number, url in enumerate((URL, f"{server.url}/model")):
        assert here("size", url).code == 0
        done = here("prune", url, "-o", tmp_path / f"out{number}", "-s", "50%")
        assert done.code == 0, done.err
        assert f"{name} is fetched whole" in done.err
        assert files_of(tmp_path / f"out{number}") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("words", [("inspect",), ("size",), ("prune", "-s", "50%", "--dry-run")])
def test_shards_without_their_index_are_told(
    folder: Path, memory: Any, server: Server, suffix: str, words: tuple[str, ...]
) -> None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    (folder / "model.safetensors.index.json").unlink()
    for number in range(1, SHARDS + 1):
        shard = folder / f"model-{number:05}-of-{SHARDS:05}.safetensors"
        if suffix == "bin":
            torch.save({name: torch.tensor(own) for name, own in load_file(shard).items()}, folder / "x")
            shard.unlink()
            (folder / "x").rename(folder / f"{stem}-{number:05}-of-{SHARDS:05}.bin")
    first, index = f"{stem}-00001-of-{SHARDS:05}.{suffix}", f"{stem}.{suffix}.index.json"
    upload(memory, folder, "/bucket/model")
    for place in (folder, URL):
        done = here(words[0], place, *words[1:])
        assert done.code == 3
        assert f"{place} has shards of a model, such as {first}, but not their index, {index}" in done.err
        assert "fetched" not in done.err
    assert f"name a file: {first}" in done.err
    done = here(words[0], f"{server.url}/model", *words[1:])
    assert done.code == 3
    assert "has no model that is found without a list of its files" in done.err
    assert "name a file: the index, or the weights; or use hf://, s3:// or gs://" in done.err
    # What is advised works.
    for one in (folder / first, f"{URL}/{first}", f"{server.url}/model/{first}"):
        assert here(words[0], one, *words[1:]).code == 0


def test_a_pipeline_on_a_web_server_is_read_part_by_part(pipe: Path, server: Server) -> None:
    done = here("inspect", f"{server.url}/pipe")
    assert done.code == 3
    assert "is a pipeline of diffusers, of which a web server lists no files" in done.err
    assert "name the folder of one part; or use hf://" in done.err
    for part, tensors in {"unet": ["conv.weight"], "text_encoder": ["layers.1.weight", "layers.2.weight"]}.items():
        seen = here("inspect", f"{server.url}/pipe/{part}")
        assert [row[1] for row in seen.rows] == tensors
    out = pipe.parent / "out"
    assert here("prune", f"{server.url}/pipe/unet", "-o", out, "-s", "50%").code == 0
    assert np.count_nonzero(load_file(out / f"{NETWORK}.safetensors")["conv.weight"]) == numbers(4, 4).size // 2


def test_of_a_folder_on_the_hub_the_address_is_told_that_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: HttpFile, nbytes: int, whole: int = 0) -> bytes:
        raise InputError(f"{self.url} does not exist")

    monkeypatch.setattr(HttpFile, "head", none)
    done = here("inspect", "https://huggingface.co/org/name/resolve/main")
    assert done.code == 3
    assert "or use hf://org/name, where files are listed" in done.err
    with pytest.raises(InputError, match="has no model that is found"):
        remote._probed(HttpFolder("https://example.org/name"))


def test_what_training_would_go_on_from_is_not_fetched_to_be_left_out(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save_file({"layers.1.weight": numbers(8, 8)}, source / "model.safetensors")
    for name, nbytes in {"optimizer.pt": 5000, "rng_state_0.pth": 300, "config.json": 2, "vocab.txt": 40}.items():
        (source / name).write_bytes(b"{}" * (nbytes // 2))
    upload(memory, source, "/bucket/model")
    monkeypatch.setattr(budgets, "MAX_FETCHED_BYTES", 100)
    with monkeypatch.context() as reading:
        read = files_read(memory, reading)
        done = here("strip", URL, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "optimizer.pt" not in read
    assert "vocab.txt" in read
    expected = here("strip", source, "-o", tmp_path / "same")
    assert done.rows == expected.rows
    assert files_of(tmp_path / "out") == files_of(tmp_path / "same")
    assert not (tmp_path / "out/optimizer.pt").exists()
    # Where it stays, it is copied.
    for words in (("strip", "--only", "masks"), ("prune", "-s", "50%")):
        target = tmp_path / words[0]
        done = here(words[0], URL, "-o", target, *words[1:])
        assert done.code == 0, done.err
        assert (target / "optimizer.pt").read_bytes() == (source / "optimizer.pt").read_bytes()


@pytest.mark.parametrize("index", ["", "model_index.json"])
def test_of_a_checkpoint_of_diffusers_what_training_would_go_on_from_is_read_only_to_be_copied(
    checkpoint: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    source = checkpoint.rename(checkpoint.parent / "model")
    if index:
        (source / index).write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    (source / "optimizer.bin").write_bytes(bytes(range(256)) * 40)
    upload(memory, source, "/bucket/model")
    monkeypatch.setattr(budgets, "MAX_FETCHED_BYTES", 1000)
    with monkeypatch.context() as reading:
        read = files_read(memory, reading)
        # Of a small model all files are read to be compressed for the report.
        reading.setattr("prunectl.pruning.destination.BIG_BYTES", 100)
        done = here("strip", URL, "-o", source.parent / "out", "--keep", "ema")
        expected = here("strip", source, "-o", source.parent / "same", "--keep", "ema")
    assert done.code == 0, done.err
    assert read & set(STATE) == set()
    assert f"{NETWORK}.safetensors" in read
    assert done.rows == expected.rows
    assert files_of(source.parent / "out") == files_of(source.parent / "same")
    for number, words in enumerate((("strip", "--only", "masks"), ("prune", "-s", "50%", "--scope", "layer"))):
        whole, target = source.parent / f"whole{number}", source.parent / f"out{number}"
        assert here(words[0], source, "-o", whole, *words[1:]).code == 0
        done = here(words[0], URL, "-o", target, *words[1:])
        assert done.code == 0, done.err
        assert files_of(target) == files_of(whole)
        assert (target / "optimizer.bin").stat().st_size == 256 * 40


def test_an_estimate_counts_what_is_not_fetched(checkpoint: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "optimizer.bin").write_bytes(np.random.default_rng(0).bytes(1 << 20) + bytes(1 << 20))
    upload(memory, checkpoint, "/bucket/model")
    monkeypatch.setattr(budgets, "MAX_FETCHED_BYTES", 1000)
    monkeypatch.setattr("prunectl.analysis.estimate.EXACT_BYTES", 1 << 20)
    in_store, on_disk = (prunectl.size(place, estimate=True).bytes.compressed for place in (URL, checkpoint))
    assert in_store == on_disk
    assert in_store is not None
    assert in_store > 1 << 20


def test_weights_that_are_called_as_training_state_are_fetched(checkpoint: Path, memory: Any) -> None:
    source = checkpoint.rename(checkpoint.parent / "model")
    (source / "unet").rename(source / "optimizer_0")
    (source / "model_index.json").write_text('{"optimizer_0": ["a", "B"], "unet_ema": ["a", "B"]}')
    upload(memory, source, "/bucket/model")
    for number, place in enumerate((source, URL)):
        target = source.parent / f"out{number}"
        done = here("prune", place, "-o", target, "-s", "50%", "--scope", "layer")
        assert done.code == 0, done.err
    assert files_of(source.parent / "out0") == files_of(source.parent / "out1")


def test_what_is_to_be_exported_is_to_be_downloaded_first(pipe: Path, memory: Any) -> None:
    source = pipe.rename(pipe.parent / "model")
    upload(memory, source, "/bucket/model")
    done = here("strip", URL, "-o", source.parent / "out", "--half")
    assert done.code == 3
    assert f"{URL}/text_encoder is in shards" in done.err
    assert "download it, then prunectl export model/text_encoder -o OUT --shard-size 1TB" in done.err


def test_parts_in_pickles_in_a_store_are_told_by_their_names(pipe: Path, memory: Any) -> None:
    (pipe / f"unet/{NETWORK}.safetensors").unlink()
    torch.save({"conv.weight": torch.ones(4, 4)}, pipe / "unet/pytorch_model.bin")
    upload(memory, pipe, "/bucket/model")
    for place in (pipe, URL):
        done = here("prune", place, "-o", pipe.parent / "out", "-s", "50%")
        assert done.code == 3
        assert f"{place}/unet has its weights in pytorch_model.bin, but a pipeline is pruned as a whole" in done.err
        assert "unet -o OUT makes them" in done.err
    assert not (pipe.parent / "out").exists()


def test_a_folder_of_other_files_says_which_may_be_meant(tmp_path: Path, memory: Any) -> None:
    source = tmp_path / "runs"
    source.mkdir()
    torch.save({"state_dict": {"a.weight": torch.ones(4, 4)}}, source / "last.ckpt")
    (source / "config.json").write_text("{}")
    upload(memory, source, "/bucket/runs")
    on_disk, in_store = here("inspect", source), here("inspect", "memory://bucket/runs")
    assert (on_disk.code, in_store.code) == (3, 3)
    assert f"name one, such as {source / 'last.ckpt'}" in on_disk.err
    assert in_store.err.splitlines()[1].strip() == "name a file: last.ckpt"
    assert here("inspect", source / "last.ckpt").code == 0


def test_a_bucket_of_many_networks_is_not_read_without_end(
    checkpoint: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, checkpoint, "/bucket/model")
    monkeypatch.setattr(budgets, "MAX_HEADERS_BYTES", 100)
    done = here("inspect", URL)
    assert done.code == 3
    assert "its headers are longer than 100 bytes" in done.err
