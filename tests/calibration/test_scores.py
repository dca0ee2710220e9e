"""What goes first by inputs and by gradients, held against PyTorch by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.calibration import statistics
from prunectl.calibration.prune import prune
from prunectl.calibration.session import Calibration
from prunectl.calibration.statistics import InputStatistics, sum_squares
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strategies import STRATEGIES, Requires
from prunectl.training.backend import DifferentiableModel, LoadOptions, TrainOptions, WeightUse
from prunectl.training.data.source import Batch
from prunectl.training.runtimes import load_trainable
from tests.calibration.by_hand import normal, of_outputs, shown
from tests.calibration.runs import TORCH_NETS, data, examples, numbers, saved
from tests.contract import Array
from tests.training.torch import nets

X = examples(40, 12)
Y = (X[:, :4].argmax(1)).astype("i8")
NAMES = ("one.weight", "two.weight")
GRADIENTS = [strategy.name for strategy in STRATEGIES if strategy.needs is Requires.GRADIENTS]


@pytest.fixture
def plain(tmp_path: Path) -> tuple[nets.Plain, Path]:
    torch.manual_seed(1)
    module = nets.Plain()
    return module, saved(module, tmp_path / "plain.pt")


def run(path: Path, *, has_targets: bool = False, **wish: object) -> dict[str, Array]:
    folder, arrays = path.parent, {"x": X, **({"y": Y} if has_targets else {})}
    said = {"data": data(folder / "data.npz", **arrays), "samples": 40, "model": f"{TORCH_NETS}:Plain", **wish}
    prune(path, PruneRequest(**said), Destination(folder / "out.pt"))  # type: ignore[arg-type]
    return numbers(folder / "out.pt")


def inputs(module: nets.Plain) -> dict[str, Array]:
    with torch.no_grad():
        inside = torch.relu(module.one(torch.from_numpy(X))).numpy()
    return {"one.weight": X.astype("f8"), "two.weight": inside.astype("f8")}


NORMS: dict[str, Callable[[Array], Array]] = {
    "2": lambda x: np.sqrt(np.square(x).mean(axis=0)),
    "1": lambda x: np.abs(x).mean(axis=0),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_by_inputs_each_output_loses_its_smallest_products(
    sparsity: float, norm: str, plain: tuple[nets.Plain, Path]
) -> None:
    module, path = plain
    found = run(path, sparsity=sparsity, strategy="activation-magnitude", params=(f"norm={norm}",))
    met = inputs(module)
    for name in NAMES:
        weights = module.state_dict()[name].numpy()
        products = np.abs(weights) * NORMS[norm](met[name])
        expected = weights.copy()
        for row, product in zip(expected, products, strict=True):
            row[np.argsort(product)[: round(sparsity * row.size)]] = 0
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.33, 0.8, 0.97])
def test_where_outputs_cannot_lose_alike_the_total_is_exact(sparsity: float, plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    found = run(path, sparsity=sparsity, strategy="activation-magnitude")
    met = inputs(module)
    for name in NAMES:
        weights = module.state_dict()[name].numpy()
        lost = (found[name] == 0).sum(axis=1)
        assert lost.sum() == round(sparsity * weights.size)
        assert lost.max() - lost.min() <= 1
        products = np.abs(weights) * NORMS["2"](met[name])
        for row, product, count in zip(found[name], products, lost, strict=True):
            assert set(np.flatnonzero(row == 0)) == set(np.argsort(product)[:count])


def test_over_all_layers_products_are_ranked_together(plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    found = run(path, sparsity=0.6, strategy="activation-magnitude", scope="global")
    met = inputs(module)
    products = np.concatenate(
        [(np.abs(module.state_dict()[name].numpy()) * NORMS["2"](met[name])).reshape(-1) for name in NAMES]
    )
    zeros = np.concatenate([(found[name] == 0).reshape(-1) for name in NAMES])
    drop = round(0.6 * products.size)
    assert zeros.sum() == drop
    np.testing.assert_array_equal(np.flatnonzero(zeros), np.sort(np.argsort(products, kind="stable")[:drop]))


def test_two_of_four_are_the_smallest_products_of_each_four(plain: tuple[nets.Plain, Path]) -> None:
    module, path = plain
    found = run(path, pattern="2:4", strategy="activation-magnitude")
    met = inputs(module)
    for name in NAMES:
        weights = module.state_dict()[name].numpy()
        products = (np.abs(weights) * NORMS["2"](met[name])).reshape(-1, 4)
        zeros = (found[name] == 0).reshape(-1, 4)
        np.testing.assert_array_equal(zeros, np.argsort(np.argsort(products, axis=1), axis=1) < 2)


def wanted(strategy: str, weights: Array, gradients: list[Array], shares: list[float]) -> Array:
    mean = sum(share * one for share, one in zip(shares, gradients, strict=True))
    size = sum(share * np.abs(one) for share, one in zip(shares, gradients, strict=True))
    square = sum(share * one**2 for share, one in zip(shares, gradients, strict=True))
    return np.asarray(
        {
            "gradient": size,
            "magnitude-gradient": np.abs(weights) * size,
            "snip": np.abs(weights * mean),
            "fisher": weights**2 * square,
        }[strategy]
    )


def by_autograd(module: nets.Plain, batches: list[Batch]) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {name: [] for name in NAMES}
    for batch in batches:
        assert isinstance(batch.x, np.ndarray)
        assert isinstance(batch.y, np.ndarray)
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(batch.x)), torch.from_numpy(batch.y)).backward()
        for name, weight in module.named_parameters():
            if name in found:
                assert weight.grad is not None
                found[name].append(weight.grad.numpy().astype("f8"))
    return found


@pytest.mark.parametrize("strategy", GRADIENTS)
@pytest.mark.parametrize("cuts", [[40], [10, 20, 30, 40], [32, 40]], ids=str)
def test_gradients_are_autograds_weighted_by_examples(
    cuts: list[int], strategy: str, plain: tuple[nets.Plain, Path]
) -> None:
    module, path = plain
    begins = [0, *cuts[:-1]]
    batches = [Batch(X[begin:end], Y[begin:end]) for begin, end in zip(begins, cuts, strict=True)]
    model = open_model(path)
    network = load_trainable(model, LoadOptions(f"{TORCH_NETS}:Plain"))
    assert isinstance(network, DifferentiableModel)
    network.prepare(TrainOptions(optimizer="sgd", lr=0.0, example=batches[0], device="cpu"))
    tensors = [tensor for tensor in model.tensors if tensor.name in NAMES]
    found = Calibration(network, tuple(batches)).gradients(tensors, statistics.gradient_reduction(strategy))
    shares = [len(batch.x) / len(X) for batch in batches]
    for name, gradients in by_autograd(module, batches).items():
        weights = module.state_dict()[name].numpy().astype("f8")
        score = statistics.gradient_scores(strategy, weights, found[name])
        np.testing.assert_allclose(score, wanted(strategy, weights, gradients, shares), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("strategy", GRADIENTS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_goes_by_gradients_are_the_lowest_scores(
    scope: str, strategy: str, plain: tuple[nets.Plain, Path]
) -> None:
    module, path = plain
    found = run(path, has_targets=True, sparsity=0.7, strategy=strategy, scope=scope, batch_size=40)
    gradients = by_autograd(module, [Batch(X, Y)])
    score = {name: wanted(strategy, module.state_dict()[name].numpy(), gradients[name], [1.0]) for name in NAMES}
    sets = [NAMES] if scope == "global" else [(name,) for name in NAMES]
    for names in sets:
        zeros = np.concatenate([(found[name] == 0).reshape(-1) for name in names])
        flat = np.concatenate([score[name].reshape(-1) for name in names])
        assert zeros.sum() == round(0.7 * zeros.size)
        assert flat[zeros].max() <= flat[~zeros].min() * (1 + 1e-4)


def test_ranks_within_outputs_count_from_the_smallest() -> None:
    score = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 4.0]])
    seen = InputStatistics()
    seen.add(shown(normal(4, 3), WeightUse(0, 1)), (2, 3), sum_squares)
    np.testing.assert_array_equal(statistics.rank_per_output(score, seen), [[2, 0, 1], [1, 2, 0]])
    turned = InputStatistics()
    turned.add(shown(normal(4, 3), WeightUse(1, 0)), (3, 2), sum_squares)
    np.testing.assert_array_equal(statistics.rank_per_output(score.T, turned), np.array([[2, 0, 1], [1, 2, 0]]).T)


def test_a_tensor_is_covered_once_all_its_outputs_were_seen() -> None:
    seen = InputStatistics()
    seen.add(shown(normal(4, 3), of_outputs(WeightUse(0, 1), 0, 2)), (5, 3), sum_squares)
    assert not statistics.covers_all_outputs((5, 3), seen)
    seen.add(shown(normal(4, 3), of_outputs(WeightUse(0, 1), 2, 5)), (5, 3), sum_squares)
    assert statistics.covers_all_outputs((5, 3), seen)


def test_each_part_of_a_tensor_counts_with_its_own_inputs() -> None:
    weights, seen = normal(5, 3), InputStatistics()
    for begin, end in ((0, 2), (2, 5)):
        seen.add(shown(normal(4, 3, seed=end), of_outputs(WeightUse(0, 1), begin, end)), (5, 3), sum_squares)
    found = statistics.wanda_scores(weights, seen)
    for begin, end in ((0, 2), (2, 5)):
        total = np.square(normal(4, 3, seed=end)).sum(axis=0)
        np.testing.assert_allclose(found[begin:end], np.abs(weights[begin:end]) * total)
