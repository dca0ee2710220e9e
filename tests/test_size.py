"""`prunectl size`, beside Python's own compressors."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

from tests.running import FIXTURES, at_terminal, here

FILES = ["digits_cnn.h5", "digits_cnn.keras", "digits_cnn.pt", "digits_cnn.onnx", "digits_cnn.tflite"]


def tarred(folder: Path) -> bytes:
    """Return a sorted tar of a folder without times, made by Python's tarfile."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size = path.stat().st_size
            archive.addfile(info, io.BytesIO(path.read_bytes()))
    return stream.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_gzip_is_to_the_byte_what_python_says(name: str) -> None:
    data = (FIXTURES / name).read_bytes()
    assert here("size", "-q", FIXTURES / name).out == f"{len(gzip.compress(data, 6, mtime=0))}\n"


def test_a_folder_is_a_sorted_tar_without_times() -> None:
    data = tarred(FIXTURES / "digits_cnn_savedmodel")
    (found,) = here("size", "--json", FIXTURES / "digits_cnn_savedmodel").json["models"]
    assert found["bytes"]["compressed"] == len(gzip.compress(data, 6, mtime=0))
    assert found["sha256"] == hashlib.sha256(data).hexdigest()


def test_other_codecs_and_levels_can_be_chosen() -> None:
    data = (FIXTURES / "digits_cnn.pt").read_bytes()
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    for words, nbytes in (
        (("--level", "9"), len(gzip.compress(data, 9, mtime=0))),
        (("--codec", "xz"), len(lzma.compress(data))),
        (("--codec", "none"), len(data)),
        (("--codec", "zstd"), len(stream.compress(data)) + len(stream.flush())),
    ):
        assert here("size", "-q", FIXTURES / "digits_cnn.pt", *words).out == f"{nbytes}\n"


def test_the_json_names_codec_level_and_library() -> None:
    (found,) = here("size", "--json", FIXTURES / "digits_cnn.pt").json["models"]
    assert found["codec"]["name"] == "gzip"
    assert found["codec"]["level"] == 6
    assert found["codec"]["library"].startswith("zlib ")
    assert found["sha256"] == hashlib.sha256((FIXTURES / "digits_cnn.pt").read_bytes()).hexdigest()


def test_a_model_in_several_files_is_measured_as_one() -> None:
    folder = FIXTURES / "two_shards"
    (found,) = here("size", "--json", folder).json["models"]
    assert found["bytes"]["raw"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["bytes"]["compressed"] == len(gzip.compress(tarred(folder), 6, mtime=0))


def test_two_models_get_a_ratio_against_the_first() -> None:
    rows = here("size", FIXTURES / "digits_cnn.h5", FIXTURES / "digits_cnn.pt").rows
    assert float(rows[0][-1]) == 1
    assert float(rows[1][-1]) == pytest.approx(int(rows[0][3]) / int(rows[1][3]), rel=1e-5)


@pytest.mark.parametrize(
    ("limit", "metric"),
    [("--max-raw", "raw"), ("--max-packed", "packed"), ("--max-gzip", "compressed")],
)
def test_a_limit_holds_at_the_size_itself_and_not_a_byte_below(limit: str, metric: str) -> None:
    path = FIXTURES / "digits_cnn.keras"
    size = here("size", "--json", path).json["models"][0]["bytes"][metric]
    assert here("size", path, limit, str(size)).code == 0
    found = here("size", path, "--json", limit, str(size - 1))
    assert found.code == 1
    (gate,) = found.json["gates"]
    assert (gate["ok"], gate["limit"], gate["actual"]) == (False, size - 1, size)


def test_a_sparsity_that_is_too_low_fails_its_gate() -> None:
    path = FIXTURES / "two_of_four_zero.safetensors"
    assert here("size", path, "--min-sparsity", "50%").code == 0
    assert here("size", path, "--min-sparsity", "0.51").code == 1


def test_growth_over_a_baseline_is_a_gate() -> None:
    small, big = FIXTURES / "digits_cnn.safetensors", FIXTURES / "masks_of_torch_prune.pt"
    sizes = [int(here("size", "-q", path).out) for path in (small, big)]
    growth = sizes[1] - sizes[0]
    assert here("size", big, "--against", small, "--max-growth", str(growth)).code == 0
    assert here("size", big, "--against", small, "--max-growth", str(growth - 1)).code == 1
    assert here("size", small, "--against", big, "--max-growth", "0%").code == 0


def test_growth_names_the_tensors_that_grew_or_lost_zeros(tmp_path: Path) -> None:
    ones, zeros = np.ones((64, 64), np.float32), np.zeros((64, 64), np.float32)
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    models = {
        "old": {"a": zeros, "b": zeros},
        "wider": {"a": zeros, "b": np.concatenate([noise, noise]), "new": ones[:4]},
        "denser": {"a": noise, "b": zeros},
    }
    for name, tensors in models.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for name, words in (
        ("wider", "The tensors that grew most: b (+16.4 kB), new (+1.02 kB)."),
        ("denser", "The tensors that lost most zeros: a (4,096 fewer)."),
    ):
        model, old = tmp_path / f"{name}.safetensors", tmp_path / "old.safetensors"
        told = here("size", model, "--against", old, "--max-growth", "1%")
        assert told.code == 1
        assert f"note: {model}: {words}\n" in told.err
        assert "The tensors" not in here("size", old, "--against", model, "--max-growth", "1%").err


def test_every_model_meets_every_gate() -> None:
    found = here("size", "--json", *(FIXTURES / name for name in FILES), "--max-raw", "1MB", "--max-gzip", "1KB")
    assert len(found.json["gates"]) == 2 * len(FILES)
    assert found.code == 1


def test_a_terminal_shows_the_verdict() -> None:
    shown = at_terminal("size", FIXTURES / "digits_cnn.h5", "--max-gzip", "1KB", "--color", "never").out
    assert "FAIL  " in shown
    assert "is 39.6 kB gzipped, 38.6 kB over the limit of 1.00 kB (max-gzip)" in shown


@pytest.mark.parametrize(
    ("codec", "words"), [("gzip", "gzipped"), ("xz", "compressed with xz"), ("none", "uncompressed")]
)
def test_a_verdict_names_the_compression(codec: str, words: str) -> None:
    told = here("size", FIXTURES / "digits_cnn.h5", "--max-compressed", "1MB", "--codec", codec)
    name = "max-gzip" if codec == "gzip" else "max-compressed"
    assert f" kB {words}, within the limit of 1.00 MB ({name})" in told.err


def test_a_model_that_shrank_keeps_within_a_limit_on_bytes() -> None:
    small, big = FIXTURES / "digits_cnn.safetensors", FIXTURES / "masks_of_torch_prune.pt"
    told = here("size", small, "--against", big, "--max-growth", "1KB")
    assert told.code == 0
    assert "shrank by " in told.err


def test_a_floor_is_told_in_percentage_points() -> None:
    told = here("size", FIXTURES / "digits_cnn.h5", "--min-sparsity", "50%")
    assert "0.0 % of the prunable weights of " in told.err
    assert " are zero, 50 pp below the limit of 50.0 % (min-sparsity)" in told.err


def test_an_estimate_says_that_it_is_one_and_judges_no_limit_that_is_too_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.random.default_rng(0).standard_normal(1 << 20, np.float32)}, path)
    for name, value in (("EXACT_BYTES", 1 << 20), ("_PIECES", 4), ("_PROBES", 20), ("_MOST", 1.0)):
        monkeypatch.setattr(f"prunectl.analysis.estimate.{name}", value)
    found = here("size", path, "--estimate", "--json").json
    (model,) = found["models"]
    size, estimate = model["bytes"]["compressed"], model["estimate"]
    assert 0 < estimate["error"] <= 0.01
    assert estimate["sampled"] < path.stat().st_size
    assert (model["bytes"]["packed"], model["sparsity"]) == (None, None)
    assert "gzip is an estimate from" in found["warnings"][0]
    assert here("size", path, "--estimate", "--max-gzip", str(round(size * 1.1))).code == 0
    assert here("size", path, "--estimate", "--max-gzip", str(round(size * 0.9))).code == 1
    near = here("size", path, "--estimate", "--max-gzip", str(size))
    assert near.code == 5
    assert "cannot be judged: gzip is" in near.err
    assert "estimate" not in here("size", path, "--json").json["models"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--codec", "xz"), "--estimate works with gzip only, not with xz"),
        (("--max-packed", "1MB"), "--max-packed needs every byte of the model"),
        (("--min-sparsity", "50%"), "--min-sparsity needs every byte of the model"),
    ],
)
def test_an_estimate_is_of_gzip_alone(words: tuple[str, ...], said: str) -> None:
    found = here("size", FIXTURES / "digits_cnn.h5", "--estimate", *words)
    assert found.code == 2
    assert said in found.err
