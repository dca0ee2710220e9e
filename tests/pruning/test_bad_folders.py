"""Folders of shards that lie or change, and places that are full: a sentence, a hint, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prunectl.errors import SCRATCH
from prunectl.formats import patch
from prunectl.pruning import blocks
from tests.formats.test_folder import files_of
from tests.formats.test_remote import Server, fill, in_memory, memory, reply, server, upload
from tests.pruning.test_parts import SHARDS, folder, shards_of
from tests.running import here

__all__ = ["folder", "memory", "server"]
pytestmark = pytest.mark.usefixtures("temporary")
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-{number:05}-of-{SHARDS:05}.safetensors" for number in (1, 2))
GLOBAL, LAYER = (("-s", "50%", "--scope", scope) for scope in ("global", "layer"))


def check_nothing_written(folder: Path, before: dict[str, bytes]) -> None:
    """The input is as it was, and neither an output nor a file of ours is beside it, or in the temporary folder."""
    assert files_of(folder) == before
    assert sorted(os.listdir(folder.parent)) == ["model", "temporary"]
    assert not [path for path in (folder.parent / "temporary").rglob("*") if path.is_file()]


# An index or shards that lie.


def listed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A flaw of the index."""

    def make(folder: Path) -> None:
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return make


def names(shard: object) -> Callable[[Path], None]:
    """An index that names one more shard."""
    return listed(lambda document: document["weight_map"].update({"more.weight": shard}))


def without_a_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def with_a_folder_for_a_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    (folder / SECOND / "x").write_bytes(b"x")


def with_a_tensor_twice(folder: Path) -> None:
    twice = load_file(folder / FIRST).popitem()
    save_file({**load_file(folder / SECOND), twice[0]: twice[1]}, folder / SECOND)


def with_a_shorter_shard(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def with_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(text) and None


NO_MAP, OUTSIDE = "not the index of a sharded checkpoint: it has no weight_map", "it names a shard outside its folder"
AGAIN = "its index and its shards belong together"
FLAWS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a shard is missing": (without_a_shard, f"is incomplete: its shard {SECOND} is missing", AGAIN),
    "a shard is a folder": (with_a_folder_for_a_shard, f"is incomplete: its shard {SECOND} is missing", AGAIN),
    "a shard was cut off": (with_a_shorter_shard, f"{SECOND} is truncated or damaged", ""),
    "a tensor stands in two shards": (
        with_a_tensor_twice,
        f"stands in two of its shards, {FIRST} and {SECOND}",
        "save the model again",
    ),
    "a tensor is in no shard": (names(FIRST), f"it lists more.weight, but {FIRST} does not hold it", AGAIN),
    "the map is a list": (listed(lambda document: document.update(weight_map=[FIRST])), NO_MAP, ""),
    "there is no map": (listed(lambda document: document.pop("weight_map")), NO_MAP, ""),
    "the map is empty": (listed(lambda document: document["weight_map"].clear()), "names no tensors", AGAIN),
    "a shard is a number": (names(3), NO_MAP, ""),
    "a shard lies above": (names("../x.safetensors"), f"{OUTSIDE}: ../x.safetensors", "beside the index"),
    "a shard has a path": (names("/etc/x.safetensors"), f"{OUTSIDE}: /etc/x.safetensors", "beside the index"),
    "a shard has no name": (names(""), OUTSIDE, "beside the index"),
    "a name is too long": (names("n" * 5000), "is incomplete: its shard nnn", AGAIN),
    "a name that none can have": (names("a\0b"), "is incomplete: its shard a\\x00b is missing", AGAIN),
    "no JSON": (with_text('{"weight_map": '), "the index is not JSON", ""),
}
ON_DISK = {
    "one process": ("-o", "{parent}/out"),
    "a part": ("-o", "{parent}/out", "--part", "1/2"),
    "in place": ("--in-place",),
    "looking only": ("--dry-run",),
}


@pytest.mark.parametrize("way", ON_DISK)
@pytest.mark.parametrize("flaw", FLAWS)
def test_shards_that_lie_are_refused(folder: Path, flaw: str, way: str) -> None:
    make, sentence, hint = FLAWS[flaw]
    make(folder)
    before = files_of(folder)
    words = [word.format(parent=folder.parent) for word in ON_DISK[way]]
    done = here("prune", folder, *GLOBAL, *words)
    assert done.code == 3, done.err
    assert sentence in done.err.splitlines()[0]
    assert hint in done.err
    check_nothing_written(folder, before)


@pytest.mark.parametrize("command", ["inspect", "size", "strip", "export"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_no_command_takes_them(folder: Path, flaw: str, command: str) -> None:
    make, sentence, _ = FLAWS[flaw]
    make(folder)
    before = files_of(folder)
    done = here(command, folder, *(() if command in {"inspect", "size"} else ("-o", folder.parent / "out")))
    assert done.code == 3, done.err
    assert sentence in done.err.splitlines()[0]
    check_nothing_written(folder, before)


@pytest.mark.parametrize("more", [(), ("--part", "2/2")])
@pytest.mark.parametrize("flaw", FLAWS)
def test_in_a_store_they_are_refused_in_the_same_words(
    folder: Path, memory: Any, flaw: str, more: tuple[str, ...]
) -> None:
    make, sentence, hint = FLAWS[flaw]
    make(folder)
    upload(memory, folder, "/bucket/model")
    before = in_memory(memory, "/bucket")
    done = here("prune", "memory://bucket/model", "-o", "memory://bucket/out", *GLOBAL, *more)
    assert done.code == 3, done.err
    assert sentence in done.err.splitlines()[0]
    assert done.err.startswith("error: memory://bucket/model/")
    assert hint in done.err
    assert in_memory(memory, "/bucket") == before
    check_nothing_written(folder, files_of(folder))


OF_SERVER = {"a shard is missing", "a shard is a folder"}
"""What a web server says itself, which has no list to look a name up in."""
TOO_LONG = {"a name is too long", "a name that none can have"}


@pytest.mark.parametrize("flaw", [name for name in FLAWS if name not in TOO_LONG])
def test_on_a_web_server_they_are_refused(folder: Path, server: Server, flaw: str) -> None:
    make, sentence, hint = FLAWS[flaw]
    make(folder)
    done = here("prune", f"{server.url}/model", "-o", folder.parent / "out", *GLOBAL)
    assert done.code == 3, done.err
    if flaw in OF_SERVER:
        sentence, hint = f"{server.url}/model/{SECOND} does not exist", ""
    assert sentence in done.err
    assert hint in done.err
    assert not any("etc" in asked or ".." in asked for asked in server.asked)
    check_nothing_written(folder, files_of(folder))


# Shards that change.


def flip(shard: Path) -> None:
    """Change a number."""
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def retype(shard: Path) -> None:
    """Call all tensors of 16-bit floats integers, in a header of the same length."""
    content = shard.read_bytes()
    assert b'"F16"' in content
    shard.write_bytes(content.replace(b'"F16"', b'"I16"'))


def grow(shard: Path) -> None:
    """Write eight more spaces behind the header."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shard.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])


def shorten(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


CHANGES = {"a number": flip, "a type": retype, "a longer header": grow, "its end": shorten, "all of it": Path.unlink}
PASSES = {
    "all layers together": GLOBAL,
    "each layer": LAYER,
    "blocks": ("-s", "50%", "--pattern", "block:1x4"),
    "2:4": ("--pattern", "2:4"),
}


@pytest.mark.parametrize("output", [("-o", "out"), ("--in-place",), ("--dry-run",)])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_between_two_passes_is_told(
    folder: Path, change: str, passes: str, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, copied = folder / SECOND, patch.copy_with_patches
    changed: list[dict[str, bytes]] = []

    def late(source: Path, *given: Any, **named: Any) -> None:
        if not changed:
            CHANGES[change](shard)
            # In place, the new shards are written beside the old ones.
            changed.append({name: own for name, own in files_of(folder).items() if not name.startswith(".prunectl-")})
        copied(source, *given, **named)

    monkeypatch.setattr(patch, "copy_with_patches", late)
    done = here("prune", folder, *PASSES[passes], *output, cwd=folder.parent)
    assert done.code == 3, done.err
    assert f"{SECOND} was changed while prunectl was reading it; nothing was written" in done.err
    assert "run the same command again" in done.err
    check_nothing_written(folder, changed[0])


def test_what_copies_shards_tells_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {f"model.layers.{number}.mlp.up_proj.weight": np.ones((8, 8), np.float32) for number in range(4)}
    shards = {FIRST: dict(list(layers.items())[:2]), SECOND: dict(list(layers.items())[2:])}
    folder = shards_of(tmp_path / "model", shards)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    for module, name, words in (
        (patch, "copy_with_patches", ("strip", "model", "-o", "out")),
        (blocks, "write_entries", ("prune", "model", "-o", "out", "--pattern", "layers", "--blocks", "1")),
    ):
        written = getattr(module, name)

        def late(*given: Any, written: Callable[..., Any] = written, **named: Any) -> None:
            os.utime(folder / SECOND)
            written(*given, **named)

        with monkeypatch.context() as changing:
            changing.setattr(module, name, late)
            done = here(*words, cwd=tmp_path)
        assert done.code == 3, done.err
        assert f"{SECOND} was changed while prunectl was reading it; nothing was written" in done.err
        check_nothing_written(folder, files_of(folder))
        assert here(*words, "--dry-run", cwd=tmp_path).code == 0


OF_PARTS: dict[str, tuple[str, int, str]] = {
    "a number": (f"{SECOND} was changed while the parts were pruned", 3, "start all parts again"),
    "a type": ("is not what the parts of", 3, "and start again"),
    "a longer header": ("is not what the parts of", 3, "and start again"),
    "its end": (f"{SECOND} is truncated or damaged", 3, ""),
    "all of it": (f"is incomplete: its shard {SECOND} is missing", 3, AGAIN),
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_between_two_parts_is_told(folder: Path, change: str, scope: str) -> None:
    output, words = folder.parent / "out", ("-s", "50%", "--scope", scope)
    for number in (1, 2):
        assert here("prune", folder, "-o", output, *words, "--part", f"{number}/2").code == 0
    CHANGES[change](folder / SECOND)
    before, source = files_of(output), files_of(folder)
    sentence, code, hint = OF_PARTS[change]
    for more in (("--part", "1/2"), ("--part", "2/2"), ("--join",)):
        done = here("prune", folder, "-o", output, *words, *more)
        if done.code != 0:
            assert (done.code, sentence in done.err, hint in done.err) == (code, True, True), done.err
        else:
            # Each part looks at its own shards.
            assert change == "a number"
            assert more[0] == "--part"
        assert files_of(output) == before
        assert files_of(folder) == source
    assert done.code == code
    assert INDEX not in before
    assert not [path for path in (folder.parent / "temporary").rglob("*") if path.is_file()]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_a_part_is_pruned_is_told(
    folder: Path, change: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words = folder.parent / "out", ("-s", "50%", "--scope", scope, "--part", "1/1")
    copied = patch.copy_with_patches

    def late(source: Path, *given: Any, **named: Any) -> None:
        if source.name == SECOND:
            CHANGES[change](source)
        copied(source, *given, **named)

    monkeypatch.setattr(patch, "copy_with_patches", late)
    done = here("prune", folder, "-o", output, *words)
    assert done.code == 3, done.err
    assert f"{SECOND} was changed while the parts were pruned" in done.err
    assert "start all parts again" in done.err
    assert not (output / SECOND).exists()
    assert not (output / INDEX).exists()
    assert not list(output.glob(".prunectl-[0-9a-f]*"))
    assert not [path for path in (folder.parent / "temporary").rglob("*") if path.is_file()]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_in_a_store_that_changes_is_told(folder: Path, memory: Any, change: str, scope: str) -> None:
    upload(memory, folder, "/bucket/model")
    place = ("memory://bucket/model", "-o", "memory://bucket/out", "-s", "50%", "--scope", scope)
    assert here("prune", *place, "--part", "1/2").code == 0
    CHANGES[change](folder / SECOND)
    memory.rm(f"/bucket/model/{SECOND}")
    if (folder / SECOND).exists():
        memory.pipe_file(f"/bucket/model/{SECOND}", (folder / SECOND).read_bytes())
    before = in_memory(memory, "/bucket")
    sentence, code, hint = OF_PARTS[change]
    done = here("prune", *place, "--part", "2/2")
    if done.code:
        assert in_memory(memory, "/bucket") == before
        assert (done.code, sentence in done.err, hint in done.err) == (code, True, True), done.err
    else:
        # Nobody had looked at this shard before; the join finds out whose notes do not fit.
        assert (change, scope) == ("a number", "layer")
    assert INDEX not in in_memory(memory, "/bucket/out")


@pytest.mark.parametrize("passes", PASSES)
def test_a_shard_on_a_web_server_that_changes_is_told(folder: Path, server: Server, passes: str) -> None:
    asked: list[str] = []

    def changed(handler: Any, body: bytes, begin: int, size: int) -> bool:
        if not handler.path.endswith(SECOND):
            return False
        asked.append(handler.path)
        span = f"bytes {begin}-{begin + len(body) - 1}/{size}"
        reply(handler, 206, body, Content_Range=span, ETag='"1"' if len(asked) == 1 else '"2"')
        return True

    server.answer = changed
    done = here("prune", f"{server.url}/model", "-o", folder.parent / "out", *PASSES[passes])
    assert done.code == 3, done.err
    assert f"{SECOND} was changed while it was being read" in done.err
    assert len(asked) > 1
    assert not (folder.parent / "out" / INDEX).exists()


# Parts with other options, and places that are full.


@pytest.mark.parametrize(
    ("words", "code", "sentence", "hint"),
    [
        (
            ("-s", "60%", "--part", "2/2"),
            2,
            "sparsity is 0.6, but 0.5 in the parts of",
            "give all parts the same options",
        ),
        (
            ("-s", "50%", "--scope", "layer", "--part", "2/2"),
            2,
            "scope is 'layer', but 'global' in",
            "the same options",
        ),
        (("-s", "50%", "--part", "2/3"), 2, "is made of 2 parts, not of 3", "run --part I/2"),
        (("-s", "60%", "--join"), 2, "sparsity is 0.6, but 0.5", "give all parts the same options"),
        (("-s", "50%"), 2, "is made of 2 parts, not of 1", "start again"),
    ],
)
def test_parts_with_other_options_are_refused_in_a_store(
    folder: Path, memory: Any, words: tuple[str, ...], code: int, sentence: str, hint: str
) -> None:
    place = (folder, "-o", "memory://bucket/out")
    assert here("prune", *place, "-s", "50%", "--part", "1/2").code == 0
    before = in_memory(memory, "/bucket")
    done = here("prune", *place, *words)
    assert (done.code, sentence in done.err, hint in done.err) == (code, True, True), done.err
    assert "memory://bucket/out" in done.err.splitlines()[0]
    assert in_memory(memory, "/bucket") == before


@pytest.mark.parametrize(
    ("after", "scope"), [*((at, "global") for at in range(0, 30, 6)), *((at, "layer") for at in range(3, 30, 6))]
)
def test_a_bucket_that_is_full_at_any_time_holds_no_model_and_can_be_gone_on_with(
    folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, after: int, scope: str
) -> None:
    words, url = ("-s", "50%", "--scope", scope), "memory://bucket/out"
    steps = [("--part", "1/2"), ("--part", "2/2"), ("--join",)]
    with monkeypatch.context() as filling:
        fill(memory, filling, after=after)
        codes = []
        for step in steps:
            done = here("prune", folder, "-o", url, *words, *step)
            codes.append(done.code)
            if done.code:
                assert done.code == 5, done.err
                assert "cannot be written: [Errno 28] No space left" in done.err
                assert "run the same command again, which resumes" in done.err
                break
    if done.code:
        assert INDEX not in in_memory(memory, "/bucket/out")
        assert here("inspect", url).code == 3
        for step in steps[len(codes) - 1 :]:
            assert here("prune", folder, "-o", url, *words, *step).code == 0
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    assert in_memory(memory, "/bucket/out") == files_of(folder.parent / "whole")
    assert not [path for path in (folder.parent / "temporary").rglob("*") if path.is_file()]


@pytest.mark.parametrize("words", [("-o", "out"), ("--in-place",), ("-o", "out", "--part", "1/1")])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_disk_that_is_full_leaves_no_model(
    folder: Path, words: tuple[str, ...], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write, room = files_of(folder), os.pwrite, iter(range(after))

    def full(*given: Any) -> int:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*given)

    with monkeypatch.context() as filling:
        filling.setattr(os, "pwrite", full)
        done = here("prune", folder, *GLOBAL, *words, cwd=folder.parent)
    assert done.code == 5, done.err
    assert "no space" in done.err
    assert files_of(folder) == before
    assert not (folder.parent / "out" / INDEX).exists()
    assert not [path for path in folder.parent.rglob("*") if path.is_file() and SCRATCH.fullmatch(path.parent.name)]
    if "--part" in words:
        assert here("prune", folder, *GLOBAL, *words, cwd=folder.parent).code == 0
        assert here("prune", folder, "-o", "out", "--join", cwd=folder.parent).code == 0
        assert here("prune", folder, "-o", "whole", *GLOBAL, cwd=folder.parent).code == 0
        assert files_of(folder.parent / "out") == files_of(folder.parent / "whole")
    else:
        check_nothing_written(folder, before)
