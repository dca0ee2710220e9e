"""Models that others have published: pruned to half, looked at again, the count right, and never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunectl.analysis.inspect import InspectOptions, inspect_model
from prunectl.errors import PrunectlError, attempt
from prunectl.formats.registry import open_model
from prunectl.pruning import destination
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.pruning.request import PruneRequest
from tests.pruning.reference import arrays
from tests.running import ROOT

FOLDER = ROOT.parent / "shared" / "real-models"
SKIPPED = {"evil"}


def found() -> list[Path]:
    """Every file and SavedModel folder there."""
    if not FOLDER.is_dir():
        return []
    kinds = sorted(kind for kind in FOLDER.iterdir() if kind.is_dir() and kind.name not in SKIPPED)
    models = [path for kind in kinds for path in sorted(kind.iterdir())]
    # A folder is a model, or holds some.
    return [inner for path in models for inner in _in(path)]


def _in(path: Path) -> list[Path]:
    if path.is_file() or (path / "saved_model.pb").is_file():
        return [path]
    inside = [file for file in sorted(path.rglob("*")) if file.suffix in {".onnx", ".index", ".pb", ".json"}]
    return [file.parent if file.name == "saved_model.pb" else file for file in inside]


def zeros(path: Path) -> dict[str, int]:
    """How many zeros each tensor has, told by NumPy."""
    return {name: int((array == 0).sum()) for name, array in arrays(path).items() if array.dtype.kind not in "SUO"}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="there are no real models here")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("path", found(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_half_of_a_real_model_goes_or_a_sentence_says_why_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "BIG_BYTES", 0)  # how small it becomes when compressed is not asked
    out = tmp_path / path.name
    request = PruneRequest(sparsity=0.5, nan="keep")
    made = attempt(lambda place: prune(path, request, Destination(place)), out)
    if isinstance(made, PrunectlError):
        assert made.exit_code in {2, 3}
        assert path.name in made.message
        assert list(tmp_path.iterdir()) == []
        return
    before, after = zeros(path), zeros(out)
    assert list(before) == list(after)
    cut = {cut.tensor.name: cut.tensor.size for cut in made.plan.cuts}
    for name, size in cut.items():
        assert after[name] == max(round(0.5 * size), before[name])
    tied = {skip.name for skip in made.plan.skips if skip.reason.startswith(("tied to", "a second copy"))}
    same = before.keys() - cut.keys() - tied
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    seen = inspect_model(open_model(out), InspectOptions(), None)
    assert {row.name: row.zeros for row in seen.layers} | after == {row.name: row.zeros for row in seen.layers}
