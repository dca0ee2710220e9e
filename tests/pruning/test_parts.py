"""A model folder pruned in parts: the bytes of one process, whoever does what, and however often one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prunectl
from prunectl.api.pruning import PartResult, PruneResult
from prunectl.errors import InputError, UntrustedError, UsageError
from prunectl.formats.remote_files import FsspecFolder
from prunectl.pruning.ledger import BucketLedger, shares
from tests.formats.test_folder import files_of
from tests.running import COMMAND, ROOT, clean, here

SHARDS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards with ties: few values, some of them in all shards, in 16 and in 32 bits."""
    source = tmp_path / "model"
    source.mkdir()
    draw, index = np.random.default_rng(0), {}
    for number in range(1, SHARDS + 1):
        name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        rough = draw.integers(-40, 40, (48, 8 * number)).astype(np.float16)
        tensors = {
            f"model.layers.{number}.mlp.up_proj.weight": rough,
            f"model.layers.{number}.mlp.down_proj.weight": draw.normal(0, 20, (32, 64)).astype(np.float32).round(),
            f"model.layers.{number}.input_layernorm.weight": np.ones(64, np.float32),
        }
        save_file(tensors, source / name)
        index |= dict.fromkeys(tensors, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "extra").mkdir()
    (source / "extra/tokenizer.json").write_text("{}")
    (source / "config.json").chmod(0o640)
    return source


def in_parts(folder: Path, count: int, *words: str) -> Path:
    """Prune in so many parts, in a mixed order, and join them."""
    output = folder.parent / "parts"
    for number in random.Random(count).sample(range(1, count + 1), count):
        done = here("prune", folder, "-o", output, *words, "--part", f"{number}/{count}")
        assert done.code == 0, done.err
    done = here("prune", folder, "-o", output, "--join")
    assert done.code == 0, done.err
    return output


@pytest.mark.parametrize(
    "words",
    [
        ("-s", "50%"),
        ("-s", "30%", "--scope", "global"),
        ("-s", "70%", "--scope", "global", "--strategy", "lamp", "--policy", "all"),
        ("-s", "50%", "--strategy", "random", "--seed", "3", "--cluster", "4"),
        ("--pattern", "2:4"),
        ("--compression", "2", "--scope", "erk"),
    ],
)
def test_parts_give_the_bytes_of_one_process(folder: Path, words: tuple[str, ...]) -> None:
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    parts = in_parts(folder, 4, *words)
    assert files_of(parts) == files_of(folder.parent / "whole")
    modes = [(parts.parent / name / "config.json").stat().st_mode for name in ("parts", "whole")]
    assert modes[0] == modes[1]
    assert sorted(os.listdir(folder.parent)) == ["model", "parts", "whole"]


def test_the_join_records_what_one_process_does(folder: Path) -> None:
    words, records = ("-s", "40%", "--scope", "global"), (folder.parent / "whole.json", folder.parent / "parts.json")
    assert here("prune", folder, "-o", folder.parent / "whole", *words, "--manifest", records[0]).code == 0
    output = folder.parent / "parts"
    for number in (1, 2):
        assert here("prune", folder, "-o", output, *words, "--part", f"{number}/2").code == 0
    assert here("prune", folder, "-o", output, *words, "--join", "--manifest", records[1]).code == 0
    assert records[0].read_bytes() == records[1].read_bytes()


def test_shares_are_even_and_decided_by_the_sizes() -> None:
    sizes = {f"shard-{number}": 100 * number for number in range(1, 11)}
    split = shares(sizes, 3)
    assert sorted(name for part in split for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in split]
    assert max(loads) - min(loads) <= 200
    assert split == shares(dict(reversed(sizes.items())), 3)


def test_until_the_join_the_output_is_no_model_and_a_missing_part_is_named(folder: Path) -> None:
    output = folder.parent / "parts"
    assert here("prune", folder, "-o", output, "-s", "50%", "--part", "1/3").code == 0
    seen = here("inspect", output)
    assert seen.code == 3
    assert "parts that are not joined" in seen.err
    done = here("prune", folder, "-o", output, "--join")
    assert done.code == 5
    assert "part 2/3 of" in done.err
    assert not (output / "model.safetensors.index.json").exists()
    assert not (output / "config.json").exists()


def test_a_part_is_not_done_twice(folder: Path) -> None:
    output, words = folder.parent / "parts", ("-s", "50%", "--scope", "global", "--part", "2/2")
    assert len(here("prune", folder, "-o", output, *words, "--json").json["artifacts"]) == SHARDS // 2
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir() if path.is_file()}
    # Copied elsewhere, as a bucket does, it is known by its digest.
    for name in before:
        os.utime(output / name)
    again = {path.name: path.stat().st_mtime_ns for path in output.iterdir() if path.is_file()}
    rows = here("prune", folder, "-o", output, *words, "--format", "csv").rows
    assert {row[0].rpartition(",")[2] for row in rows[1:]} == {"before"}
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir() if path.is_file()} == again
    # What is damaged is made again.
    next(path for path in output.iterdir() if path.suffix == ".safetensors").write_bytes(b"short")
    rows = here("prune", folder, "-o", output, *words, "--format", "csv").rows
    assert sorted(row[0].rpartition(",")[2] for row in rows[1:]) == ["before", "before", "now"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("-s", "60%", "--part", "2/2"), "sparsity is 0.6, but 0.5 in the parts of"),
        (("-s", "50%", "--scope", "layer", "--part", "2/2"), "scope is 'layer', but 'global' in"),
        (("-s", "50%", "--part", "2/3"), "run --part I/2"),
        (("-s", "50%", "--part", "3/2"), "--part cannot be '3/2'"),
        (("-s", "50%", "--part", f"1/{'9' * 5000}"), "--part cannot be '1/99"),
        (("-s", "50%", "--part", "1/10000000"), "--part cannot be '1/10000000'"),
        (("-s", "60%", "--join"), "sparsity is 0.6, but 0.5"),
        (("-s", "50%"), "exists"),
        (("-s", "50%", "--part", "2/2", "--manifest", "run.json"), "--manifest is written by --join"),
        (("--target-gzip", "1KB", "--part", "2/2"), "--target-gzip cannot be used with --part"),
        (("-s", "50%", "--part", "2/2", "--in-place"), "--in-place cannot be used with --part"),
        (("--pattern", "layers", "--strategy", "last", "--blocks", "1", "--part", "2/2"), "--part cannot be used with"),
    ],
)
def test_a_part_with_other_options_is_refused(folder: Path, words: tuple[str, ...], sentence: str) -> None:
    output = folder.parent / "parts"
    assert here("prune", folder, "-o", output, "-s", "50%", "--part", "1/2").code == 0
    before = files_of(output)
    done = here("prune", folder, "-o", output, *words, cwd=folder.parent)
    assert done.code == 2
    assert sentence in done.err
    assert files_of(output) == before


def test_a_shard_that_changed_between_two_parts_is_told(folder: Path) -> None:
    output, words = folder.parent / "parts", ("-s", "50%", "--scope", "global")
    assert here("prune", folder, "-o", output, *words, "--part", "1/2").code == 0
    shard = folder / f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for last in (("--part", "2/2"), ("--join",)):
        done = here("prune", folder, "-o", output, *words, *last)
        assert done.code == 3 if last[0] == "--part" else done.code in {3, 5}
    assert "was changed while the parts were pruned" in here("prune", folder, "-o", output, *words, "--part", "2/2").err


def test_another_header_is_another_input(folder: Path) -> None:
    output = folder.parent / "parts"
    assert here("prune", folder, "-o", output, "-s", "50%", "--part", "1/2").code == 0
    shard = folder / f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors"
    save_file({f"model.layers.{SHARDS}.mlp.up_proj.weight": np.ones((2, 2), np.float32)}, shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != shard.name or "up_proj" in name
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = here("prune", folder, "-o", output, "-s", "50%", "--part", "2/2")
    assert done.code == 3
    assert "is not what the parts" in done.err


def test_a_single_file_has_no_parts(folder: Path) -> None:
    shard = folder / f"model-00001-of-{SHARDS:05}.safetensors"
    alone = folder.parent / "alone"
    alone.mkdir()
    shutil.copy(shard, alone / "model.safetensors")
    done = here("prune", alone, "-o", folder.parent / "out", "-s", "50%", "--part", "1/2")
    assert done.code == 2
    assert "--part divides the shards" in done.err
    assert not (folder.parent / "out").exists()


def test_a_ledger_that_lies_is_refused(folder: Path) -> None:
    output = folder.parent / "parts"
    for number in (1, 2):
        assert here("prune", folder, "-o", output, "-s", "50%", "--part", f"{number}/2").code == 0
    note = next((output / ".prunectl-parts").glob(f"done-*-00001-of-{SHARDS:05}.safetensors.json"))
    told = json.loads(note.read_text())
    for lie in ({**told, "output": {}, "tensors": {"a": [1]}}, {"output": {}, "tensors": {}}):
        note.write_text(json.dumps(lie))
        done = here("prune", folder, "-o", output, "--join")
        assert done.code == 3
        assert "is damaged" in done.err


def test_killed_at_any_time_and_run_again_it_gives_the_same_bytes(folder: Path) -> None:
    words = ("-s", "60%", "--scope", "global")
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    output, pause = folder.parent / "parts", random.Random(1)
    for number in (1, 2):
        command = [*COMMAND, "prune", str(folder), "-o", str(output), *words, "--part", f"{number}/2"]
        process = subprocess.Popen(command, env=clean(PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
        time.sleep(0.4 + 0.4 * pause.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert files_of(in_parts(folder, 2, *words)) == files_of(folder.parent / "whole")
    assert sorted(os.listdir(folder.parent)) == ["model", "parts", "whole"]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_killed_between_two_steps_no_shard_is_written_twice(
    folder: Path, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-s", "60%", "--scope", scope)
    output = folder.parent / "parts"
    write, placed = os.rename, os.replace

    def killed(moment: int, step: Callable[..., None], *, is_after: bool) -> Callable[..., None]:
        """A step that is the last one at its nth time."""
        left = iter(range(moment))

        def run(*given: Any, **named: Any) -> None:
            is_last = next(left, None) is None
            if not is_last or is_after:
                step(*given, **named)
            if is_last:
                raise KeyboardInterrupt

        return run

    times: dict[str, int] = {}
    for moment in range(12):
        for is_after in (False, True):
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(os, "rename", killed(moment, write, is_after=is_after))
                patch.setattr(os, "replace", killed(moment, placed, is_after=is_after))
                here("prune", folder, "-o", output, *words, "--part", "1/1")
            now = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
            assert now.items() >= times.items(), "a shard that was in its place was written once more"
            times = now
    assert here("prune", folder, "-o", output, *words, "--part", "1/1").code == 0
    assert {name: (output / name).stat().st_mtime_ns for name in times} == times
    assert here("prune", folder, "-o", output, "--join").code == 0
    assert here("prune", folder, "-o", folder.parent / "whole", *words).code == 0
    assert files_of(output) == files_of(folder.parent / "whole")


def test_python_prunes_parts_and_joins_them(folder: Path) -> None:
    output = folder.parent / "parts"
    first = prunectl.prune(folder, output, sparsity="50%", part="1/2")
    assert isinstance(first, PartResult)
    assert first.missing
    assert "part 1/2" in repr(first)
    prunectl.prune(folder, output, sparsity="50%", part="2/2")
    joined = prunectl.prune(folder, output, join=True)
    assert isinstance(joined, PruneResult)
    assert joined.after.prunable_sparsity == 0.5


SCORES = "import numpy as np\nfrom pathlib import Path\n\nPath(__file__).with_suffix('.ran').touch()\n"


def scorer(path: Path, score: str) -> str:
    """Write a strategy, which leaves a mark where it runs."""
    path.write_text(f"{SCORES}\n\ndef score(weights):\n    return {score}\n")
    return f"{path}:score"


def test_the_join_runs_no_code_that_only_the_notes_name(folder: Path) -> None:
    output, code = folder.parent / "parts", scorer(folder.parent / "stranger.py", "np.abs(weights)")
    words = ("-s", "50%", "--strategy", code)
    part = prunectl.prune(folder, output, sparsity="50%", strategy=code, part="1/1")
    assert isinstance(part, PartResult)
    assert part.report().next_step.endswith("--join --trust")
    assert "join=True, trust=True" in repr(part)
    (mark := folder.parent / "stranger.ran").unlink()
    os.utime(folder.parent / "stranger.py", (1, 1))
    done = here("prune", folder, "-o", output, "--join")
    assert done.code == 3
    assert "names code that prunectl would run" in done.err
    assert "--trust" in done.err
    assert not mark.exists()
    with pytest.raises(UntrustedError, match="names code"):
        prunectl.prune(folder, output, join=True)
    for name in ("copy", "python"):
        shutil.copytree(output, folder.parent / name)
    assert here("prune", folder, "-o", output, "--join", "--trust").code == 0
    prunectl.prune(folder, folder.parent / "python", join=True, trust=True)
    # Who types the same options has named the code.
    assert here("prune", folder, "-o", folder.parent / "copy", *words, "--join").code == 0
    assert mark.exists()


def test_parts_by_other_code_of_the_strategy_are_not_mixed(folder: Path) -> None:
    output, place = folder.parent / "parts", folder.parent / "own.py"
    words = ("-s", "50%", "--strategy", scorer(place, "np.abs(weights)"), "--part")
    assert here("prune", folder, "-o", output, *words, "1/2").code == 0
    before = files_of(output)
    scorer(place, "1000 - np.abs(weights)")
    done = here("prune", folder, "-o", output, *words, "2/2")
    assert done.code == 5
    assert "with other code of the strategy" in done.err
    assert files_of(output) == before


def test_shards_of_parts_with_other_options_count_as_missing(folder: Path) -> None:
    output, other = folder.parent / "parts", folder.parent / "other"
    for place, sparsity in ((output, "50%"), (other, "70%")):
        for number in (1, 2):
            assert here("prune", folder, "-o", place, "-s", sparsity, "--part", f"{number}/2").code == 0
    # As if both had begun at the same time in an object store, where the note of the last one stays.
    shutil.copy(other / ".prunectl-parts/task.json", output / ".prunectl-parts/task.json")
    done = here("prune", folder, "-o", output, "--join")
    assert done.code == 5
    assert "part 1/2 of" in done.err
    for number in (1, 2):
        assert here("prune", folder, "-o", output, "-s", "70%", "--part", f"{number}/2").code == 0
    for place in (output, other):
        assert here("prune", folder, "-o", place, "--join").code == 0
    assert files_of(output) == files_of(other)


def test_a_note_that_cannot_be_read_is_not_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    ledger = BucketLedger(tmp_path / "parts", FsspecFolder(memory, "/unread", "memory://unread"))
    assert not ledger.is_begun
    assert not ledger.has("a.safetensors", {"bytes": 1, "modified": ""})

    def slow_down(self: Any, path: str, **settings: Any) -> Any:
        raise PermissionError("SlowDown")

    monkeypatch.setattr(type(memory), "info", slow_down)
    with pytest.raises(InputError, match="SlowDown"):
        _ = ledger.is_begun
    with pytest.raises(InputError, match="SlowDown"):
        ledger.read("done-a.safetensors.json")
    with pytest.raises(InputError, match="SlowDown"):
        ledger.has("a.safetensors", {"bytes": 1, "modified": ""})


def shards_of(folder: Path, shards: dict[str, dict[str, np.ndarray[Any, Any]]]) -> Path:
    """Write a folder of these shards."""
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards_in_32_and_in_64_bits_are_ranked_together(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    tensors = [draw.normal(size=(32, 32)).astype(dtype) for dtype in (np.float32, np.float64)]
    shards = {f"model-0000{n}-of-00002.safetensors": {f"layers.{n}.weight": own} for n, own in enumerate(tensors, 1)}
    folder = shards_of(tmp_path / "model", shards)
    assert here("prune", folder, "-o", tmp_path / "whole", "-s", "50%").code == 0
    assert files_of(in_parts(folder, 2, "-s", "50%")) == files_of(tmp_path / "whole")


def test_a_shard_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weights = {f"layers.{n}.weight": draw.normal(size=(32, 32)).astype(np.float32) for n in (1, 2)}
    folder = shards_of(tmp_path / "model", {f"m:{name}.safetensors": {name: own} for name, own in weights.items()})
    pruned = load_shards(in_parts(folder, 2, "-s", "50%", "--scope", "layer"))
    for name, own in weights.items():
        kept = np.abs(own) > np.median(np.abs(own))
        assert np.array_equal(pruned[name], np.where(kept, own, 0))


def load_shards(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a folder."""
    return {name: own for shard in folder.glob("*.safetensors") for name, own in load_file(shard).items()}


@pytest.mark.parametrize(
    ("note", "change", "sentence"),
    [
        ("task", {"request": {"sparsity": 0.5}}, "task.json is damaged"),
        ("task", {"version": "0.0.1", "request": {"sparsity": 0.5}}, "was begun by prunectl 0.0.1"),
        ("task", {"parts": 10**9}, "task.json is damaged"),
        ("counts-*00001*", {"counts": [1], "digits": [5]}, "is damaged"),
        ("counts-*00001*", {"counts": [10**30], "digits": [5]}, "is damaged"),
        ("counts-*00001*", {"counts": "much"}, "is damaged"),
        ("counts-*00001*", {"shift": 10**9}, "is damaged"),
        ("counts-*00001*", {"shift": -1}, "is damaged"),
    ],
)
def test_a_note_that_says_what_cannot_be_is_refused(
    folder: Path, note: str, change: dict[str, Any], sentence: str
) -> None:
    output = folder.parent / "parts"
    assert here("prune", folder, "-o", output, "-s", "50%", "--part", "2/2").code == 0
    place = next((output / ".prunectl-parts").glob(f"{note}.json"))
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    done = here("prune", folder, "-o", output, "-s", "50%", "--part", "1/2")
    assert done.code in {3, 5}
    assert sentence in done.err


def test_a_recipe_goes_with_parts(folder: Path) -> None:
    whole, output, record = (folder.parent / name for name in ("whole", "parts", "run.json"))
    assert here("prune", folder, "-o", whole, "-s", "40%", "--manifest", record).code == 0
    for last in (("--part", "1/2"), ("--part", "2/2"), ("--join",)):
        done = here("prune", folder, "-o", output, "--recipe", record, *last)
        assert done.code == 0, done.err
    assert files_of(output) == files_of(whole)
    prunectl.prune(folder, folder.parent / "python", recipe=record, part="1/1")
    prunectl.prune(folder, folder.parent / "python", recipe=record, join=True)
    assert files_of(folder.parent / "python") == files_of(whole)


@pytest.mark.parametrize("choice", [{"is_packed": True}, {"target_gzip": 9000, "sparsity": None}, {"data": "a.npz"}])
def test_a_recipe_that_needs_the_whole_model_has_no_parts(folder: Path, choice: dict[str, Any]) -> None:
    record = folder.parent / "run.json"
    assert here("prune", folder, "-o", folder.parent / "whole", "-s", "40%", "--manifest", record).code == 0
    document = json.loads(record.read_text())
    document["request"] |= choice
    record.write_text(json.dumps(document))
    done = here("prune", folder, "-o", folder.parent / "parts", "--recipe", record, "--part", "1/2")
    assert done.code == 2
    assert "needs the whole model at once" in done.err
    assert not (folder.parent / "parts").exists()


def test_a_join_that_was_killed_at_its_end_leaves_a_whole_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder.parent / "parts"
    assert here("prune", folder, "-o", output, "-s", "50%", "--part", "1/1").code == 0

    remove = shutil.rmtree

    def killed(place: Path, **settings: Any) -> None:
        if not (place / "task.json").exists():
            remove(place, **settings)
            return
        (place / "task.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            here("prune", folder, "-o", output, "--join")
    assert not (output / ".prunectl-parts").exists()
    assert "has no parts to join, or is joined already" in here("prune", folder, "-o", output, "--join").err
    again = here("prune", folder, "-o", output, "-s", "50%", "--part", "1/1")
    assert again.code == 2
    assert "exists" in again.err
    # What is left of the notes is not taken for a part of the model.
    assert here("prune", output, "-o", folder.parent / "more", "-s", "70%").code == 0
    assert sorted(files_of(folder.parent / "more")) == sorted(files_of(folder))


def test_a_manifest_of_parts_that_are_joined_at_a_url_is_refused_at_once(folder: Path) -> None:
    for mode in ("--join", "--on=ray"):
        done = here("prune", folder, "-o", "memory://recorded/parts", mode, "--manifest", folder.parent / "run.json")
        assert done.code == 2
        assert "--manifest cannot be used with" in done.err
        assert "leave out --manifest" in done.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"part": "1/2", "manifest": "run.json"}, "manifest is written by join"),
        ({"part": "1/2", "force": True}, "force cannot be used with part"),
        ({"part": "1/2", "in_place": True}, "in_place cannot be used with part"),
        ({"wrap": True, "manifest": "run.json"}, "manifest cannot be used with wrappers"),
    ],
)
def test_python_refuses_what_the_command_refuses(folder: Path, options: dict[str, Any], sentence: str) -> None:
    output = folder if options.get("in_place") else folder.parent / "parts"
    with pytest.raises(UsageError, match=sentence):
        prunectl.prune(folder, output, sparsity="50%", **options)
    assert sorted(os.listdir(folder.parent)) == ["model"]


def test_python_says_where_it_takes_no_urls(folder: Path) -> None:
    for hint, call in (
        ("write it to a path on this machine", lambda: prunectl.prune(folder, "memory://b/out", sparsity="50%")),
        ("write it to a path on this machine", lambda: prunectl.strip(folder, "memory://b/out")),
        ("download it first", lambda: prunectl.evaluate("memory://b/model", "test.npz")),
        ("download it first", lambda: prunectl.bench("memory://b/model")),
    ):
        with pytest.raises(UsageError, match="is a URL, where a file is needed") as refusal:
            call()
        assert refusal.value.hint.startswith(hint)
    assert sorted(os.listdir(folder.parent)) == ["model"]
