"""The same request gives the same bytes: from a manifest, in another folder, on another machine's settings."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prunectl.analysis import sizes
from prunectl.errors import UsageError
from prunectl.pruning import destination, engine
from prunectl.pruning import prune as pruning
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest, from_json
from tests.contract import digest
from tests.running import FIXTURES, ROOT, clean, here

DIGITS = FIXTURES / "digits_cnn.pt"

REQUESTS: tuple[tuple[str, ...], ...] = (
    ("-s", "0.8", "--scope", "global", "--pack"),
    ("-s", "50%", "--strategy", "random", "--seed", "7", "--exclude", "conv*", "--exclude", "re:bias"),
    ("-s", "0.5", "--strategy", "random-weighted", "--param", "bias=late"),
    ("--pattern", "2:4", "--layers", "fc*"),
    ("-s", "0.5", "--pattern", "block:2x2:max", "--nan", "keep"),
    ("--layer", "fc*=0.9", "--layer", "fc2=0.1", "--policy", "min-size:100"),
    ("--target-gzip", "30KB", "--strategy", "lamp"),
    ("--compression", "3", "--scope", "erk"),
)


@pytest.mark.parametrize("words", REQUESTS, ids=" ".join)
def test_a_manifest_replays_to_the_same_bytes(words: tuple[str, ...], tmp_path: Path) -> None:
    first, second, kept = tmp_path / "first.pt", tmp_path / "second.pt", tmp_path / "run.json"
    done = here("prune", DIGITS, "-o", first, *words, "--manifest", kept)
    assert done.code == 0, done.err
    again = here("prune", DIGITS, "-o", second, "--recipe", kept, "--manifest", tmp_path / "again.json")
    assert again.code == 0, again.err
    assert digest(first) == digest(second)
    assert kept.read_text() == (tmp_path / "again.json").read_text()


def test_a_manifest_names_what_was_done_and_to_what(tmp_path: Path) -> None:
    out, kept = tmp_path / "out.pt", tmp_path / "run.json"
    assert here("prune", DIGITS, "-o", out, "-s", "0.5", "--manifest", kept).code == 0
    said = json.loads(kept.read_text())
    assert said["schema"] == "prunectl.manifest/1"
    assert said["input"] == {"format": "torch", "sha256": hashlib.sha256(DIGITS.read_bytes()).hexdigest()}
    assert said["output"] == {"format": "torch", "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}
    assert [cut["name"] for cut in said["cuts"]] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert all(cut["dropped"] == cut["zeros"] for cut in said["cuts"])
    assert str(tmp_path) not in kept.read_text()


def test_a_manifest_of_a_run_in_place_names_the_input_as_it_was(tmp_path: Path) -> None:
    path, kept = tmp_path / "m.pt", tmp_path / "run.json"
    shutil.copy(DIGITS, path)
    assert here("prune", path, "--in-place", "-s", "0.5", "--manifest", kept).code == 0
    said = json.loads(kept.read_text())
    assert said["input"]["sha256"] == hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert said["output"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_big_model_is_hashed_for_its_manifest_though_it_is_not_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "BIG_BYTES", 0)
    found = prune(DIGITS, PruneRequest(sparsity=0.5), Destination(tmp_path / "out.pt"), has_digests=True)
    assert found.before.bytes.compressed is None
    assert found.before.sha256 == hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert found.after.sha256 == hashlib.sha256((tmp_path / "out.pt").read_bytes()).hexdigest()


ALL = "import json, sys; from prunectl import cli; sys.exit(max(map(cli._run, json.loads(sys.argv[1]))))"
"""Runs one command after the other in a process."""


def test_place_time_zone_hashes_and_threads_do_not_matter(tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    pairs, commands = list[tuple[Path, Path]](), list[list[str]]()
    for name in ("digits_cnn.pt", "digits_cnn.keras", "digits_cnn.h5", "digits_cnn_savedmodel", "deflated.keras"):
        path = FIXTURES / name
        own = elsewhere / f"my own {name}"
        (shutil.copytree if path.is_dir() else shutil.copy)(path, own)
        # A SavedModel has no compression of its own.
        for pack in ((), *([("--pack",)] if path.is_file() else [])):
            words = ("-s", "0.7", "--scope", "global", *pack)
            first, second = tmp_path / f"{len(pairs)}{path.suffix}", f"second{len(pairs)}"
            assert here("prune", path, "-o", first, *words).code == 0
            commands.append(["prune", own.name, "-o", second, *words])
            pairs.append((first, elsewhere / second))
    other = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(commands)],
        cwd=elsewhere,
        env=clean(
            PYTHONPATH=str(ROOT),
            TZ="Pacific/Kiritimati",
            PYTHONHASHSEED="123",
            OMP_NUM_THREADS="3",
            OPENBLAS_NUM_THREADS="2",
            LC_ALL="C",
        ),
        capture_output=True,
        check=False,
    )
    assert other.returncode == 0, other.stderr
    assert len(pairs) == 9
    for first, second in pairs:
        assert digest(first) == digest(second), first


def test_a_dry_run_writes_nothing_and_says_so(tmp_path: Path) -> None:
    model = tmp_path / "m.pt"
    shutil.copy(DIGITS, model)
    done = here("prune", model, "-s", "0.8", "--dry-run", "-o", tmp_path / "out.pt")
    assert done.code == 0
    assert "nothing was written" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]
    assert done.rows[0][0] == "conv1.weight"


@pytest.mark.parametrize("is_big", [False, True], ids=["small", "big"])
def test_a_dry_run_looks_at_no_more_than_the_run(is_big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def called(*words: Any, **named: Any) -> Any:
            looks.append(name)
            return real(*words, **named)

        monkeypatch.setattr(module, name, called)

    counted(pruning, "measure_stats")
    counted(engine, "measure_stats")
    for name in ("measure_stats", "compress", "packed_bytes"):
        counted(sizes, name)
    monkeypatch.setattr(destination, "BIG_BYTES", 0 if is_big else 1 << 24)
    found = [prune(DIGITS, PruneRequest(sparsity=0.5), where) for where in (None, Destination(tmp_path / "out.pt"))]
    half = len(looks) // 2
    assert Counter(looks[:half]) == Counter(looks[half:])
    # One before and one after.
    assert looks.count("measure_stats") == 4
    assert looks.count("compress") == looks.count("packed_bytes") == (0 if is_big else 4)
    assert found[0].after.bytes == found[1].after.bytes
    assert found[0].after.bytes.raw == (tmp_path / "out.pt").stat().st_size


def test_the_plan_of_a_dry_run_is_that_of_the_run(tmp_path: Path) -> None:
    words = ("prune", DIGITS, "-s", "0.8", "--scope", "erk", "--json")
    planned, made = here(*words, "--dry-run").json, here(*words, "-o", tmp_path / "out.pt").json
    before, after = planned["models"], made["models"]
    assert [row["zeros"] for row in before[1]["layers"]] == [row["zeros"] for row in after[1]["layers"]]
    assert before[1]["sha256"] == after[1]["sha256"] == hashlib.sha256((tmp_path / "out.pt").read_bytes()).hexdigest()
    assert not planned["artifacts"]


@pytest.mark.parametrize("name", ["digits_cnn.pt", "digits_cnn.h5", "digits_cnn.onnx", "digits_cnn.keras"])
def test_a_model_goes_through_pipes(name: str, tmp_path: Path) -> None:
    path, out, kept = FIXTURES / name, tmp_path / name, tmp_path / "run.json"
    assert here("prune", path, "-o", out, "-s", "0.8").code == 0
    words = ("-m", "prunectl", "prune", "-", "-o", "-", "-s", "0.8", "--manifest", str(kept))
    piped = through_pipes(words, path.read_bytes())
    assert piped == out.read_bytes()
    assert json.loads(kept.read_text())["output"]["sha256"] == hashlib.sha256(piped).hexdigest()


def through_pipes(words: tuple[str, ...], data: bytes) -> bytes:
    import subprocess  # noqa: PLC0415 - tests.running decodes what it reads, which a model is not
    import sys  # noqa: PLC0415

    return subprocess.run([sys.executable, *words], input=data, capture_output=True, check=True).stdout


def test_a_folder_does_not_fit_through_a_pipe() -> None:
    done = here("prune", FIXTURES / "digits_cnn_savedmodel", "-o", "-", "-s", "0.8")
    assert done.code == 2
    assert "cannot be written to standard output" in done.err
    assert not done.out


def test_what_is_wrong_with_standard_input_is_said_of_standard_input(tmp_path: Path) -> None:
    done = here("prune", "-", "-o", tmp_path / "out", "-s", "0.8", stdin=b"no model at all")
    assert done.code == 3
    assert done.err.startswith("error: standard input ")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", 3),
        ("{}", 3),
        ("[]", 3),
        ('{"request": {"sparsty": 0.5}}', 2),
        ('{"request": {"sparsity": "much"}}', 2),
        ('{"request": {"sparsity": 80}}', 2),
        ('{"request": {"sparsity": 0.5, "scope": "world"}}', 2),
        ('{"request": {"sparsity": 0.5, "nan": 1}}', 2),
        ('{"request": {"layers": [["a"]]}}', 2),
        ('{"request": {"sparsity": 0.5, "exclude": [1]}}', 2),
        ('{"request": {"sparsity": 0.5, "seed": true}}', 2),
        ('{"request": {"sparsity": 0.5, "strategy": ["magnitude"]}}', 2),
        ('{"request": {"sparsity": 0.5, "target_gzip": 0.5}}', 2),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(text: str, code: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(text)
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "--recipe", recipe)
    assert done.code == code
    assert done.err.startswith("error: ")


def test_a_recipe_leaves_no_room_for_other_words(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"request": {"sparsity": 0.5}}')
    done = here("prune", DIGITS, "-o", tmp_path / "out.pt", "--recipe", recipe, "--scope", "global")
    assert done.code == 2
    assert "leave out --scope" in done.err


def test_a_request_survives_json() -> None:
    request = PruneRequest(sparsity=0.5, exclude=("a", "b"), layers=(("c", 0.1), ("d", 1.0)), params=("x=1",))
    said: dict[str, Any] = json.loads(
        json.dumps({"exclude": ["a", "b"], "layers": [["c", 0.1], ["d", 1]], "params": ["x=1"], "sparsity": 0.5})
    )
    assert from_json(said) == request
    with pytest.raises(UsageError):
        from_json({"sparsity": float("nan"), "scope": []})
