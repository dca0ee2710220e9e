"""Numbers of every type and layout: narrow, wide, big-endian, transposed, tied, not finite."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from tests.contract import Array, raw
from tests.pruning import reference
from tests.pruning.reference import arrays, prune
from tests.running import here

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:invalid value")

DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_type_of_float_is_pruned_exactly(dtype: torch.dtype, scope: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    state = {"a.weight": normal(40, 30).to(dtype), "b.weight": normal(20, 40, seed=1).to(dtype)}
    (torch.save if suffix == ".pt" else save_file)(state, path)
    prune(path, tmp_path / "out", sparsity=0.7, scope=scope)
    before, after = arrays(path), arrays(tmp_path / "out" / path.name)
    weights = {name: before[name] for name in before}
    marks = (reference.layerwise if scope == "layer" else reference.together)(weights, 0.7)
    for name, mark in marks.items():
        assert raw(after[name]) == raw(np.where(mark, before[name].dtype.type(0), before[name]))


def test_types_of_different_width_are_ranked_together(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    state = {
        "a.weight": normal(40, 30).half(),
        "b.weight": normal(20, 40, seed=1).double(),
        "c.weight": normal(9, 9).bfloat16(),
    }
    save_file(state, path)
    prune(path, tmp_path / "out", sparsity=0.7, scope="global")
    before, after = arrays(path), arrays(tmp_path / "out" / path.name)
    for name, mark in reference.together(before, 0.7).items():
        np.testing.assert_array_equal(after[name], np.where(mark, before[name].dtype.type(0), before[name]))


def test_big_endian_numbers_are_read_and_written_as_such(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    weight = normal(6, 8)
    # What a big-endian machine would have written: the same zip, its bytes the other way round.
    swapped = torch.from_numpy(np.frombuffer(weight.numpy().byteswap().tobytes(), np.float32).reshape(6, 8).copy())
    torch.save({"fc.weight": swapped}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else content)
    prune(path, tmp_path / "out", sparsity=0.5)
    found = torch.load(tmp_path / "out" / "big.pt", weights_only=True)["fc.weight"].numpy()
    mark = reference.lowest(reference.magnitudes(weight.numpy()), 24)
    np.testing.assert_array_equal(found, np.where(mark, 0, weight.numpy()))


def test_a_transposed_view_is_pruned_where_it_lies(tmp_path: Path) -> None:
    base = normal(5, 8)
    torch.save({"fc.weight": base.t()}, tmp_path / "m.pt")
    prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5)
    found = torch.load(tmp_path / "out" / "m.pt", weights_only=True)["fc.weight"]
    assert found.stride() == base.t().stride()
    mark = reference.lowest(reference.magnitudes(base.numpy()), 20).T
    np.testing.assert_array_equal(found.numpy(), np.where(mark, 0, base.t().numpy()))


@pytest.mark.parametrize(
    "words",
    [{"pattern": "2:4"}, {"pattern": "block:2x2", "sparsity": 0.5}, {"strategy": "lamp", "sparsity": 0.5}],
    ids=str,
)
def test_a_transposed_view_is_judged_in_its_own_shape(words: dict[str, Any], tmp_path: Path) -> None:
    dense = normal(8, 12).t().contiguous()
    torch.save({"fc.weight": dense}, tmp_path / "dense.pt")
    torch.save({"fc.weight": dense.t().contiguous().t()}, tmp_path / "view.pt")
    found = [
        torch.load(prune(tmp_path / name, tmp_path / "out", **words)[1], weights_only=True)["fc.weight"]
        for name in ("dense.pt", "view.pt")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_tied_tensors_are_pruned_once(tmp_path: Path) -> None:
    shared = normal(10, 10)
    torch.save({"a.weight": shared, "b.weight": shared, "c.weight": shared.t()}, tmp_path / "m.pt")
    found, written = prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5)
    assert (len(found.plan.cuts), found.plan.drop) == (1, 50)
    assert any(skip.reason.startswith("tied to ") for skip in found.plan.skips)
    after = torch.load(written, weights_only=True)
    assert after["a.weight"].data_ptr() == after["b.weight"].data_ptr()
    assert int((after["c.weight"] == 0).sum()) == 50


def test_views_of_different_parts_of_one_storage_are_pruned_each(tmp_path: Path) -> None:
    whole = normal(100)
    state = {"a.weight": whole[:48].view(6, 8), "b.weight": whole[48:96].view(8, 6)}
    torch.save(state, tmp_path / "m.pt")
    found, written = prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5)
    assert [cut.drop for cut in found.plan.cuts] == [24, 24]
    after = torch.load(written, weights_only=True)
    for name, tensor in state.items():
        mark = reference.lowest(reference.magnitudes(tensor.numpy()), 24)
        np.testing.assert_array_equal(after[name].numpy(), np.where(mark, 0, tensor.numpy()))
    np.testing.assert_array_equal(after["b.weight"].untyped_storage()[-16:], list(whole[96:].numpy().tobytes()))


@pytest.mark.parametrize("base", [normal(8).expand(6, 8), normal(6, 16)[:, ::2]], ids=["expanded", "with gaps"])
def test_a_view_with_gaps_or_repeats_is_left_alone_and_said(base: Any, tmp_path: Path) -> None:
    torch.save({"a.weight": base, "b.weight": normal(4, 4)}, tmp_path / "m.pt")
    found, written = prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5)
    assert [cut.tensor.name for cut in found.plan.cuts] == ["b.weight"]
    assert [skip.reason for skip in found.plan.skips] == ["a view with gaps or repeats"]
    torch.testing.assert_close(torch.load(written, weights_only=True)["a.weight"], base, rtol=0, atol=0)


def with_strangers() -> Array:
    weights = normal(6, 10).numpy()
    weights[0, 0], weights[1, 1], weights[2, 2] = np.nan, np.inf, -np.inf
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_numbers_that_are_not_finite_are_refused_zeroed_or_kept(dtype: torch.dtype, scope: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"fc.weight": torch.from_numpy(with_strangers()).to(dtype)}, path)
    with pytest.raises(InputError, match=r"fc\.weight"):
        prune(path, tmp_path / "error", sparsity=0.5, scope=scope)
    assert not (tmp_path / "error" / "m.pt").exists()
    before = arrays(path)["fc.weight"]
    strange = ~np.isfinite(before.astype(np.float32))
    found, written = prune(path, tmp_path / "keep", sparsity=0.5, scope=scope, nan="keep")
    kept = arrays(written)["fc.weight"]
    assert raw(kept[strange]) == raw(before[strange])
    assert (found.plan.drop, int((kept.astype(np.float32) == 0).sum())) == (30, 30)
    found, written = prune(path, tmp_path / "zero", sparsity=0.5, scope=scope, nan="zero")
    zeroed = arrays(written)["fc.weight"].astype(np.float32)
    assert not zeroed[strange].any()
    assert np.isfinite(zeroed).all()
    assert int((zeroed == 0).sum()) == 30


def test_more_strangers_than_weights_to_go_are_zeroed_all(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"fc.weight": torch.from_numpy(with_strangers())}, path)
    found, written = prune(path, tmp_path / "out", sparsity=0.0, nan="zero")
    assert found.counts["fc.weight"].zeros == 3
    assert int((arrays(written)["fc.weight"] == 0).sum()) == 3


def test_keeping_more_strangers_than_may_stay_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"fc.weight": torch.full((4, 4), float("nan"))}, path)
    done = here("prune", path, "-o", tmp_path / "out.pt", "-s", "0.5", "--nan", "keep")
    assert done.code == 3
    assert done.err.startswith(f"error: {path}: fc.weight has more NaN or infinite weights than can be kept")
    assert not (tmp_path / "out.pt").exists()


def test_minus_zero_and_zeros_that_were_there_go_first(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"fc.weight": torch.tensor([[1.0, -0.0, 0.0, -2.0], [3.0, -0.5, 0.0, 4.0]])}, path)
    found, written = prune(path, tmp_path / "out", sparsity=0.5)
    after = arrays(written)["fc.weight"]
    assert after.tolist() == [[1.0, 0.0, 0.0, -2.0], [3.0, 0.0, 0.0, 4.0]]
    assert found.counts["fc.weight"].zeros == 4


def test_integers_are_left_alone_and_said(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 4, dtype=torch.int8), "b.weight": normal(4, 4)}, tmp_path / "m.pt")
    found, _ = prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5, policy="all")
    assert {skip.name: skip.reason for skip in found.plan.skips} == {
        "a.weight": "quantised to int8: prune before quantising"
    }
    assert len(open_model(tmp_path / "out" / "m.pt").tensors) == 2
