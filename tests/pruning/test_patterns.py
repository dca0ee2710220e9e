"""Groups and blocks, beside tfmot's own masks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import prunectl as prunectl_module
from prunectl.analysis.patterns import parse
from prunectl.errors import UsageError, WorkError
from prunectl.formats import extents
from prunectl.pruning.masks import Pooling, lowest_blocks, lowest_per_group
from prunectl.pruning.request import PruneRequest, check
from tests.contract import Array
from tests.networks import tf_keras
from tests.pruning import reference
from tests.pruning.reference import arrays, prune
from tests.running import FIXTURES, here

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(*shape: int) -> Array:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def tfmot(module: str) -> Any:
    tf_keras()
    return importlib.import_module(f"tensorflow_model_optimization.python.core.sparsity.keras.{module}")


def tfmot_groups(kernel: Array, zeros: int, group: int) -> Array:
    tf, utils = importlib.import_module("tensorflow"), tfmot("pruning_utils")
    mask = utils.generate_m_by_n_mask(utils.weights_rearrange(tf.constant(kernel)), (zeros, group))
    return np.asarray(utils.m_by_n_sparsity_mask_prepare(mask, tf.TensorShape(kernel.shape))) == 0


def tfmot_blocks(kernel: Array, sparsity: float, size: tuple[int, int], pool: str) -> Array:
    tf = importlib.import_module("tensorflow")
    schedule = tfmot("pruning_schedule").ConstantSparsity(sparsity, 0)
    pruning = tfmot("pruning_impl").Pruning(lambda: tf.constant(10), [], schedule, size, pool)
    return np.asarray(pruning._maybe_update_block_mask(tf.constant(kernel))[1]) == 0


@pytest.mark.parametrize("shape", [(12, 5), (16, 7), (10, 3), (13, 4), (3, 3, 8, 5), (1, 2, 6, 3)])
@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_groups_are_those_of_tfmot(shape: tuple[int, ...], zeros: int, group: int) -> None:
    kernel = weights(*shape)
    ours = lowest_per_group(np.abs(kernel), len(shape) - 2, zeros, group)
    np.testing.assert_array_equal(ours, tfmot_groups(kernel, zeros, group))


# Where blocks do not divide, tfmot pools over windows that lie half outside on both sides, and then
# expands them from the corner: what it drops there is not what it scored.
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (24, 16)])
@pytest.mark.parametrize("size", [(1, 4), (4, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("pool", Pooling)
def test_blocks_are_those_of_tfmot(shape: tuple[int, int], size: tuple[int, int], pool: Pooling) -> None:
    kernel = weights(*shape)
    ours = lowest_blocks(np.abs(kernel), 1, size, pool, 0.5)
    np.testing.assert_array_equal(ours, tfmot_blocks(kernel, 0.5, size, pool.upper()))


@pytest.mark.parametrize("pattern", ["2:4", "block:2x4", "block:4x1:max"])
def test_a_written_dense_kernel_has_the_mask_of_tfmot(pattern: str, tmp_path: Path) -> None:
    path = FIXTURES / "digits_cnn.h5"
    amount = {} if pattern == "2:4" else {"sparsity": 0.5}
    _, written = prune(path, tmp_path / "out", pattern=pattern, only="fc*/kernel:0", **amount)
    with h5py.File(path) as old, h5py.File(written) as new:
        for layer in ("fc1", "fc2"):
            kernel = old[f"model_weights/{layer}/{layer}/kernel:0"][()]
            found = new[f"model_weights/{layer}/{layer}/kernel:0"][()]
            rows, _, columns = pattern.removeprefix("block:").removesuffix(":max").partition("x")
            if pattern == "2:4":
                mask = tfmot_groups(kernel, 2, 4)
            elif kernel.shape[0] % int(rows) or kernel.shape[1] % int(columns):
                continue
            else:
                pool = "MAX" if pattern.endswith(":max") else "AVG"
                mask = tfmot_blocks(kernel, 0.5, (int(rows), int(columns)), pool)
            np.testing.assert_array_equal(found, np.where(mask, 0, kernel))


@pytest.mark.parametrize("pool", Pooling)
def test_a_block_at_the_edge_counts_what_it_has(pool: Pooling) -> None:
    kernel = weights(7, 5)
    ours = lowest_blocks(np.abs(kernel), 1, (2, 2), pool, 0.5)
    np.testing.assert_array_equal(ours, reference.in_blocks(kernel, 1, 2, 2, pool, 0.5))


def test_blocks_of_a_kernel_mean_the_same_in_every_layout(tmp_path: Path) -> None:
    kernel = weights(8, 6)
    keras_order = lowest_blocks(np.abs(kernel), 1, (1, 2), Pooling.AVG, 0.5)
    torch_order = lowest_blocks(np.abs(kernel.T), 0, (1, 2), Pooling.AVG, 0.5)
    np.testing.assert_array_equal(keras_order, torch_order.T)


def test_equal_scores_go_from_the_beginning() -> None:
    ones = np.ones((4, 2), np.float32)
    assert lowest_per_group(ones, 0, 2, 4).tolist() == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert lowest_blocks(ones, 1, (2, 2), Pooling.MAX, 0.5).tolist() == [
        [True] * 2,
        [True] * 2,
        [False] * 2,
        [False] * 2,
    ]


def test_a_group_too_wide_to_compare_pairwise_is_sorted() -> None:
    kernel = weights(64, 3)
    np.testing.assert_array_equal(lowest_per_group(np.abs(kernel), 0, 20, 32), reference.in_groups(kernel, 0, 20, 32))


@pytest.mark.parametrize("name", ["digits_cnn.h5", "digits_cnn.pt", "digits_cnn.tflite", "digits_cnn.keras"])
@pytest.mark.parametrize("strategy", ["magnitude", "random"])
def test_groups_do_not_depend_on_how_a_tensor_is_read(
    name: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FIXTURES / name
    prunectl_module.prune(path, tmp_path / "whole.bin", pattern="3:8", strategy=strategy)
    monkeypatch.setattr(extents, "BLOCK_BYTES", 64)
    prunectl_module.prune(path, tmp_path / "slabs.bin", pattern="3:8", strategy=strategy)
    assert (tmp_path / "slabs.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_a_written_pattern_is_seen_by_inspect(tmp_path: Path) -> None:
    done = here("prune", FIXTURES / "digits_cnn.pt", "-o", tmp_path / "out.pt", "--pattern", "2:4")
    assert done.code == 0, done.err
    layers = here("inspect", tmp_path / "out.pt", "--pattern", "2:4", "--json").json["models"][0]["layers"]
    # The first kernel has one input, which makes no group.
    assert [row["conforming"] for row in layers if row["role"] == "kernel"] == [None, 1.0, 1.0, 1.0]


def test_a_tensor_without_an_axis_of_inputs_is_left_alone_and_said(tmp_path: Path) -> None:
    words = ("--pattern", "2:4", "--policy", "all")
    done = here("prune", FIXTURES / "digits_cnn.safetensors", "-o", tmp_path / "out.safetensors", *words)
    assert done.code == 0, done.err
    assert "without an input axis for the pattern" in done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"pattern": "2:4", "sparsity": 0.8}, "fixes the sparsity"),
        ({"pattern": "2:4", "scope": "global"}, "the same in every layer"),
        ({"pattern": "2:4", "layers": (("fc*", 0.5),)}, "fixes the sparsity"),
        ({"pattern": "block:2x2", "sparsity": 0.8, "scope": "global"}, "within each layer"),
        ({"pattern": "channel", "sparsity": 0.5}, "the pattern channel cannot be used"),
        ({"pattern": "4:2"}, ""),
        ({"pattern": "block:0x2", "sparsity": 0.5}, ""),
        ({"pattern": "blocks"}, ""),
        ({"scope": "global", "layers": (("fc*", 0.5),)}, "--layer"),
        ({"scope": "erk", "sparsity": 0.5, "layers": (("fc*", 0.5),)}, "--layer"),
        ({"strategy": "random-weighted", "sparsity": 0.5, "scope": "global"}, "sets the sparsity of each layer itself"),
        ({"sparsity": 0.5, "compression": 2.0}, "only one of --sparsity, --compression"),
        ({"sparsity": 1.5}, "from 0 to 1"),
        ({}, "no sparsity is given"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_sentence(words: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(PruneRequest(**words))
    assert says in caught.value.message


def test_a_sparsity_that_says_what_the_pattern_says_is_fine() -> None:
    check(PruneRequest(pattern="2:4", sparsity=0.5))
    assert parse("2:4")


def test_nan_and_patterns_go_together(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    kernel = weights(8, 3)
    kernel[0, 0] = np.nan
    kernel[1, 1] = np.inf
    with h5py.File(path, "w") as file:
        file["fc/fc/kernel:0"] = kernel
        file.attrs["layer_names"] = [b"fc"]
        file["fc"].attrs["weight_names"] = [b"fc/kernel:0"]
    with pytest.raises(Exception, match="NaN or infinite"):
        prune(path, tmp_path / "error", pattern="2:4")
    (kept,) = arrays(prune(path, tmp_path / "keep", pattern="2:4", nan="keep")[1]).values()
    assert np.isnan(kept[0, 0])
    assert np.isinf(kept[1, 1])
    (zeroed,) = arrays(prune(path, tmp_path / "zero", pattern="2:4", nan="zero")[1]).values()
    assert (zeroed[[0, 1], [0, 1]] == 0).all()
    assert ((zeroed.reshape(2, 4, 3) == 0).sum(axis=1) == 2).all()


def test_what_came_out_without_the_pattern_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_half(scores: Array, axis: int, zeros: int, group: int) -> Array:
        dropped = np.zeros(scores.shape, np.bool_)
        np.moveaxis(dropped, axis, 0)[: scores.shape[axis] * zeros // group] = True
        return dropped

    monkeypatch.setattr("prunectl.pruning.engine.lowest_per_group", first_half)
    with pytest.raises(WorkError, match="does not follow the requested pattern"):
        prunectl_module.prune(FIXTURES / "digits_cnn.onnx", tmp_path / "o.onnx", pattern="2:4", exclude=["fc2"])
    assert not list(tmp_path.iterdir())
