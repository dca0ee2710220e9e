"""Formats that other packages bring: an example that is really installed, and some that misbehave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.running import FIXTURES, ROOT, Outcome, prunectl

EXAMPLE = ROOT / "examples" / "prunectl-npz"
RANDOM = np.random.default_rng(7)
KERNEL = np.maximum(RANDOM.standard_normal((8, 6), np.float32), 0)
BIAS = RANDOM.standard_normal(6).astype(">f8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example is installed."""
    target = tmp_path_factory.mktemp("installed")
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(EXAMPLE)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *words], check=True)
    return target


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "weights.npz"
    np.savez(path, **{"dense/kernel": KERNEL, "dense/bias": BIAS, "none": BIAS[:0], "classes": np.array(["cat"])})
    return path


def with_site(site: Path, *words: str | Path) -> Outcome:
    return prunectl(*words, PYTHONPATH=f"{ROOT}:{site}")


def package(folder: Path, text: str, format_name: str = "any") -> Path:
    """Write a package of one module as if it had been installed."""
    (folder / "grabber.py").write_text(
        "import os\nfrom pathlib import Path\nfrom prunectl.formats.base import Format, ModelFile, ModelInfo\n"
        f"Path({str(folder)!r}, 'imported').touch()\n{text}\n"
    )
    facts = folder / "grabber-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: grabber\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[prunectl.formats]\n{format_name} = grabber:ROW\n")
    return folder


OPENER = "ROW = Format('any', 'Any file', (), lambda probe: True, {})"


def test_an_installed_format_is_inspected(site: Path, archive: Path) -> None:
    report = with_site(site, "inspect", archive, "--json").json["models"][0]
    assert report["format"] == "npz"
    rows = {row["name"]: row for row in report["layers"]}
    assert rows.keys() == {"dense/kernel", "dense/bias", "none"}
    assert rows["dense/kernel"]["zeros"] == np.count_nonzero(KERNEL == 0)
    assert rows["dense/bias"]["dtype"] == "float64"


def test_an_installed_format_is_measured_and_compared(site: Path, archive: Path) -> None:
    pruned = archive.with_name("pruned.npz")
    np.savez_compressed(pruned, **{"dense/kernel": np.where(KERNEL > 1, 0, KERNEL), "dense/bias": BIAS.astype("<f8")})
    assert with_site(site, "size", archive, "--json").json["models"][0]["bytes"]["raw"] == archive.stat().st_size
    rows = {row[0]: row for row in with_site(site, "diff", archive, pruned).rows}
    assert rows["dense/kernel"][3] == "changed"
    assert int(rows["dense/kernel"][7]) == np.count_nonzero(KERNEL > 1)
    assert rows["dense/bias"][3] == "same"


def test_its_numbers_are_exported_as_they_are(site: Path, archive: Path, tmp_path: Path) -> None:
    done = with_site(site, "export", archive, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    arrays = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(arrays["dense/kernel"], KERNEL)
    np.testing.assert_array_equal(arrays["dense/bias"], BIAS)
    assert arrays["none"].shape == (0,)


@pytest.mark.parametrize("words", ["prune -s 50%", "prune -s 50% --dry-run", "strip", "strip --pack"])
def test_what_would_write_such_a_file_is_refused(words: str, site: Path, archive: Path) -> None:
    command, *options = words.split()
    output = [] if "--dry-run" in options else ["-o", archive.with_name("out.npz")]
    done = with_site(site, command, archive, *options, *output)
    assert (done.code, done.out) == (3, "")
    assert "which only reads it" in done.err
    assert list(archive.parent.iterdir()) == [archive]


def test_python_objects_are_refused_and_not_unpickled(site: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", o=np.array([{}], object))
    done = with_site(site, "inspect", tmp_path / "o.npz")
    assert done.code == 3
    assert "the plug-in prunectl-npz: " in done.err
    assert "o.npy holds Python objects" in done.err


def test_it_is_listed_with_its_package(site: Path) -> None:
    assert ["formats", "npz", "prunectl-npz", "-"] in with_site(site, "plugins", "formats").rows


def test_without_the_package_the_file_is_no_model(archive: Path) -> None:
    done = prunectl("inspect", archive)
    assert done.code == 3
    assert "is a NumPy archive (.npz), not a model" in done.err


def test_a_file_of_a_built_in_format_is_not_even_shown_to_it(tmp_path: Path) -> None:
    site, model = package(tmp_path, OPENER.format("lambda path: 1 / 0")), FIXTURES / "digits_cnn.pt"
    assert with_site(site, "inspect", model).out == prunectl("inspect", model).out != ""
    assert not (site / "imported").exists()


@pytest.mark.parametrize(
    ("text", "name", "code", "sentence"),
    [
        (OPENER.format("lambda path: 1 / 0"), "any", 3, "m.any is truncated or damaged: division by zero"),
        (OPENER.format("lambda path: None"), "any", 3, "m.any is truncated or damaged: 'NoneType' object"),
        (OPENER.format("lambda path: os.abort()"), "any", 3, "m.any crashes the library that reads it"),
        (OPENER.format("0").replace("True", "[][0]").replace(" 0)", " print)"), "any", 3, "list index out of range"),
        (OPENER.format("'grabber:open'"), "any", 5, "must name a prunectl.formats.base.Format"),
        ("ROW = 3", "any", 5, "must name a prunectl.formats.base.Format"),
        ("1 / 0", "any", 5, "cannot be imported: ZeroDivisionError"),
        (OPENER.format("lambda path: 0"), "onnx", 5, "calls its format onnx, which is the name of a built-in format"),
    ],
)
def test_a_plug_in_that_fails_is_named_in_a_sentence(
    text: str, name: str, code: int, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.any"
    path.write_bytes(b"\0 some bytes")
    done = with_site(package(tmp_path, text, name), "inspect", path)
    assert (done.code, done.out) == (code, "")
    assert "error: the plug-in grabber" in done.err
    assert sentence in done.err
    assert "Traceback" not in done.err
