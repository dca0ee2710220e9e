"""Few distinct values a tensor: the first centroids are tfmot's, the last those of k-means, and zeros stay zeros."""

from __future__ import annotations

import gzip
import importlib
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prunectl.formats.registry import open_model
from prunectl.pruning.clustering import Clustering, Start, codebook, initial_centroids, nearest
from tests.contract import Array, read_all
from tests.pruning import stock
from tests.running import FIXTURES, here

pytestmark = pytest.mark.filterwarnings("ignore")
STARTS = [str(start) for start in Start]
FLOAT = np.dtype(np.float32)


def weights(size: int, *, share: float = 0.0, seed: int = 0) -> Array:
    """Normal weights, a share of which is zero."""
    random = np.random.default_rng(seed)
    found = random.standard_normal(size).astype(np.float32)
    found[random.random(size) < share] = 0
    return found


def wide(values: Array) -> Array:
    return np.sort(values[values != 0]).astype(np.float64)


def by_tfmot(values: Array, count: int, start: str, *, has_zeros: bool) -> tuple[Array, Array]:
    """What tfmot begins with: its centroids, and which of them each weight is given."""
    stock.tensorflow()
    tf = importlib.import_module("tensorflow")
    keras = "tensorflow_model_optimization.python.core.clustering.keras"
    names = {"linear": "Linear", "density": "DensityBased"}
    kind = getattr(importlib.import_module(f"{keras}.clustering_centroids"), f"{names[start]}CentroidsInitialisation")
    centroids = kind(tf.constant(values), count, preserve_sparsity=has_zeros).get_cluster_centroids()
    algorithm = importlib.import_module(f"{keras}.clustering_algorithm").ClusteringAlgorithm(tf.Variable(centroids))
    return centroids.numpy(), algorithm.get_pulling_indices(tf.constant(values)).numpy()


@pytest.mark.parametrize("start", ["linear", "density"])
@pytest.mark.parametrize("count", [2, 7, 16])
def test_without_iterations_every_weight_gets_the_centroid_that_tfmot_gives_it(start: str, count: int) -> None:
    values = weights(500)
    asked = Clustering(count, Start(start))
    book = codebook(wide(values), asked, np.zeros(count), has_zeros=False, dtype=FLOAT, iterations=0)
    centroids, pulled = by_tfmot(values, count, start, has_zeros=False)
    np.testing.assert_allclose(book, np.sort(centroids), rtol=1e-5, atol=1e-6)
    ours = book[nearest(values.astype(np.float64), book)]
    np.testing.assert_allclose(ours, centroids[pulled], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["linear", "density"])
@pytest.mark.parametrize("count", [5, 16])
def test_beside_a_zero_the_others_are_shared_out_as_tfmot_does(start: str, count: int) -> None:
    values = weights(500, share=0.5, seed=2) + np.float32(0.2) * (weights(500, share=0.5, seed=2) != 0)
    book = initial_centroids(wide(values), Clustering(count, Start(start)), np.zeros(count), has_zeros=True)
    centroids, pulled = by_tfmot(values, count, start, has_zeros=True)
    np.testing.assert_allclose(np.sort(book), np.sort(centroids[centroids != 0]), rtol=1e-5, atol=1e-6)
    # What tfmot brings to zero stays what is nearest to it here; all else is the same.
    kept = centroids[pulled] != 0
    ours = np.sort(book)[nearest(values.astype(np.float64), np.sort(book))]
    np.testing.assert_allclose(ours[kept], centroids[pulled][kept], rtol=1e-5, atol=1e-6)


def by_loops(values: Array, centroids: Array) -> Array:
    """Lloyd's iterations as a textbook has them."""
    while True:
        owners = np.abs(values[:, None] - centroids[None, :]).argmin(1)
        means = np.array(
            [values[owners == at].mean() if (owners == at).any() else one for at, one in enumerate(centroids)]
        )
        if np.allclose(means, centroids, rtol=0, atol=1e-15):
            return np.sort(means)
        centroids = np.sort(means)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("has_zeros", [True, False])
def test_the_centroids_are_those_of_lloyds_iterations(start: str, has_zeros: bool) -> None:
    values, asked = wide(weights(400, seed=3)), Clustering(8, Start(start))
    chance = np.random.default_rng(1).random(8)
    begin = np.sort(initial_centroids(values, asked, chance, has_zeros=has_zeros))
    book = codebook(values, asked, chance, has_zeros=has_zeros, dtype=FLOAT)
    np.testing.assert_allclose(book, by_loops(values, begin), rtol=0, atol=1e-9)
    assert len(begin) == 8 - has_zeros
    assert (
        np.square(values - book[nearest(values, book)]).sum() <= np.square(values - begin[nearest(values, begin)]).sum()
    )


@pytest.mark.parametrize(
    "name",
    [
        *("digits_cnn.h5", "digits_cnn.keras", "digits_cnn.pt", "digits_cnn.pt2", "digits_cnn.onnx"),
        *("digits_cnn.safetensors", "digits_cnn.tflite", "digits_cnn_savedmodel", "digits_cnn_checkpoint.index"),
        *("chunked_and_gzipped.h5", "two_shards", "external_data/model.onnx", "tied_and_views.pt"),
    ],
)
def test_files_of_every_kind_keep_few_values_and_all_of_their_zeros(name: str, tmp_path: Path) -> None:
    suffix = Path(name).suffix
    plain, few = tmp_path / "plain" / f"m{suffix}", tmp_path / "few" / f"m{suffix}"
    for output, words in ((plain, ()), (few, ("--cluster", "8"))):
        output.parent.mkdir()
        done = here("prune", FIXTURES / name, "-o", output, "-s", "0.5", *words)
        assert done.code == 0, done.err
    before, after = read_all(plain), read_all(few)
    pruned = {tensor.name for tensor in open_model(plain).tensors if tensor.is_prunable}
    for one, array in before.items():
        if one not in pruned:
            assert array.tobytes() == after[one].tobytes()
            continue
        assert np.array_equal(array == 0, after[one] == 0)
        assert len(np.unique(after[one])) <= 8
        assert np.abs(array - after[one]).max() < np.abs(array).max()
    index = few / "model.safetensors.index.json"
    assert stock.load(index if index.is_file() else few)


def test_clusters_alone_prune_nothing_and_shrink_what_is_compressed(tmp_path: Path) -> None:
    kernel = weights(40_000, seed=4).reshape(200, 200)
    save_file({"line.weight": kernel, "line.bias": kernel[0].copy()}, tmp_path / "m.safetensors")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "few.safetensors", "--cluster", "16")
    assert done.code == 0, done.err
    found = load_file(tmp_path / "few.safetensors")
    assert len(np.unique(found["line.weight"])) == 16
    assert np.count_nonzero(found["line.weight"]) == kernel.size
    assert found["line.bias"].tobytes() == kernel[0].tobytes()
    sizes = [len(gzip.compress((tmp_path / f"{name}.safetensors").read_bytes())) for name in ("m", "few")]
    assert sizes[1] * 4 < sizes[0]


def test_a_pattern_stays_one(tmp_path: Path) -> None:
    words = ("--pattern", "2:4", "--cluster", "4:density")
    assert here("prune", FIXTURES / "digits_cnn.pt", "-o", tmp_path / "m.pt", *words).code == 0
    found = here("inspect", tmp_path / "m.pt", "--pattern", "2:4", "--json").json
    assert all(row["conforming"] in {None, 1.0} for row in found["models"][0]["layers"] if row["name"] == "fc1.weight")


@pytest.mark.parametrize("start", STARTS)
def test_the_same_request_gives_the_same_bytes_also_from_a_recipe(start: str, tmp_path: Path) -> None:
    words = ("-s", "0.3", "--cluster", f"6:{start}", "--seed", "5")
    model, record = FIXTURES / "digits_cnn.safetensors", tmp_path / "run.json"
    made = [tmp_path / f"{name}.safetensors" for name in "abc"]
    assert here("prune", model, "-o", made[0], *words, "--manifest", record).code == 0
    assert here("prune", model, "-o", made[1], *words).code == 0
    assert here("prune", model, "-o", made[2], "--recipe", record).code == 0
    assert len({path.read_bytes() for path in made}) == 1
    assert here("verify", made[0], "--manifest", record).code == 0


def test_small_floats_and_what_is_no_number_stay_what_they_are(tmp_path: Path) -> None:
    values = weights(900, share=0.3, seed=6).reshape(30, 30)
    values[0, :3] = np.nan, np.inf, -np.inf
    held = {"half.weight": values.astype(np.float16), "brain.weight": values.astype(ml_dtypes.bfloat16)}
    held["tiny.weight"] = np.tile(np.array([6e-8, -6e-8, 1e-7, -1e-7], np.float16), (4, 1))
    save_file(held, tmp_path / "m.safetensors")
    words = ("--cluster", "4", "--nan", "keep")
    done = here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "few.safetensors", *words)
    assert done.code == 0, done.err
    found: dict[str, Any] = load_file(tmp_path / "few.safetensors")
    for name, array in held.items():
        now = found[name]
        assert np.array_equal(now == 0, array == 0)
        assert np.array_equal(np.isnan(now), np.isnan(array))
        assert len(np.unique(now[np.isfinite(now)].astype(np.float64))) <= 4


def test_a_tensor_of_few_values_keeps_them(tmp_path: Path) -> None:
    kernel = np.tile(np.array([0.5, -1.5, 0.0, 2.0], np.float32), (8, 4))
    save_file({"line.weight": kernel}, tmp_path / "m.safetensors")
    assert here("prune", tmp_path / "m.safetensors", "-o", tmp_path / "o.safetensors", "--cluster", "4").code == 0
    assert load_file(tmp_path / "o.safetensors")["line.weight"].tobytes() == kernel.tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cluster", "1"), "from 2 to 65536"),
        (("--cluster", "many"), "is not a number of clusters"),
        (("--cluster", "16:best"), "linear, random, density, kmeans++"),
        (("--cluster", "16", "--pattern", "channel", "-s", "0.5"), "--cluster cannot be used with --pattern channel"),
        (("--cluster", "16", "--wrap", "-s", "0.5"), "--cluster cannot be used with wrappers"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    model = Path(shutil.copy(FIXTURES / "digits_cnn.h5", tmp_path / "m.h5"))
    done = here("prune", model, "-o", tmp_path / "o.h5", *words)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "o.h5").exists()
