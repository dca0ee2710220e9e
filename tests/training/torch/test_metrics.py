"""Metrics of PyTorch: those that fit outputs and targets, and a sentence where one does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunectl.errors import UsageError
from prunectl.training.torch.losses import METRICS, MetricAverager, TorchLoss, resolve_metrics
from tests.running import here

OUT = torch.tensor([[0.1, 0.7, 0.2, 0.0, 0.0, 0.0], [0.3, 0.1, 0.05, 0.2, 0.25, 0.1]])
LABELS = torch.tensor([1, 2])
OWN = TorchLoss("f.py:loss", lambda out, y: out.sum() * y.sum())


@pytest.mark.parametrize(
    ("metric", "out", "y", "shapes"),
    [
        ("mse", OUT, LABELS, "outputs of 6 and targets of one number"),
        ("mae", OUT, LABELS, "outputs of 6 and targets of one number"),
        ("mae", OUT, torch.zeros(2, 3), "outputs of 6 and targets of 3"),
        ("accuracy", OUT, torch.zeros(2, 3), "outputs of 6 and targets of 3"),
        ("accuracy", OUT, torch.tensor([0.5, 0.2]), "the targets are not labels"),
        ("top5", OUT, torch.zeros(2, 3), "outputs of 6 and targets of 3"),
    ],
)
def test_a_metric_that_does_not_fit_the_targets_says_so(
    metric: str, out: torch.Tensor, y: torch.Tensor, shapes: str
) -> None:
    (measure,) = resolve_metrics((metric,), OWN, out, y)
    with pytest.raises(UsageError, match=f"the metric {metric} does not fit") as refused:
        measure.mean(out, y)
    assert shapes in refused.value.message
    assert refused.value.hint


def test_the_best_five_take_labels_and_one_hot_alike() -> None:
    hot = torch.nn.functional.one_hot(LABELS, 6)
    # The second label has the least of its row.
    assert METRICS["top5"](OUT, LABELS) == METRICS["top5"](OUT, hot) == METRICS["top5"](OUT, hot.float()) == 0.5


def test_a_metric_of_the_users_that_gives_many_numbers_is_told(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text("def score(out, y):\n    return out[:, 0]\ndef good(out, y):\n    return 0.25\n")
    name = f"{tmp_path / 'many.py'}:score"
    with pytest.raises(UsageError, match="it returns 2 numbers instead of one"):
        resolve_metrics((name,), OWN, OUT, LABELS)[0].mean(OUT, LABELS)
    good = f"{tmp_path / 'many.py'}:good"
    assert resolve_metrics((good,), OWN, OUT, LABELS)[0].mean(OUT, LABELS).item() == 0.25


@pytest.mark.parametrize(
    ("out", "y", "names"),
    [
        (OUT, LABELS, ["accuracy"]),
        (torch.zeros(2, 5, 6), torch.zeros(2, 5, dtype=torch.int64), ["accuracy"]),
        (OUT, torch.zeros(2, 6), ["mae"]),
        (OUT[:, :1], LABELS, ["mae"]),
        (OUT, torch.eye(6)[LABELS], ["accuracy"]),
        (OUT, torch.zeros(2, 3), []),
        (OUT, None, []),
    ],
)
def test_a_loss_of_the_users_gets_a_metric_that_fits_or_none(
    out: torch.Tensor, y: torch.Tensor | None, names: list[str]
) -> None:
    assert [metric.name for metric in resolve_metrics((), OWN, out, y)] == names


F1 = """
def f1(out, y):
    chosen, y = (out.reshape(-1) > 0), y.reshape(-1) > 0
    return 2 * (chosen & y).sum() / (chosen.sum() + y.sum())


class F1:
    def __init__(self):
        self.both = self.each = 0

    def update(self, out, y):
        chosen, y = (out.reshape(-1) > 0), y.reshape(-1) > 0
        self.both, self.each = self.both + (chosen & y).sum(), self.each + chosen.sum() + y.sum()

    def compute(self):
        return 2 * self.both / self.each


READY = F1()
"""


@pytest.mark.parametrize("name", ["f1", "F1", "READY"])
def test_what_is_no_mean_of_batches_is_measured_over_all_examples(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(F1)
    random = torch.Generator().manual_seed(0)
    out, y = torch.randn(50, 1, generator=random), (torch.randn(50, generator=random) > 0.8).long()
    metrics = resolve_metrics((f"{tmp_path / 'own.py'}:{name}",), OWN, out, y)
    averager = MetricAverager(metrics, is_training=False)

    def f1(out: torch.Tensor, y: torch.Tensor) -> float:
        both = float(((out[:, 0] > 0) & (y > 0)).sum())
        return 2 * both / float((out > 0).sum() + (y > 0).sum())

    batches = list(zip(out.split(7), y.split(7), strict=True))
    for _ in range(2):
        for some, targets in batches:
            averager.update([(torch.zeros(()), len(some))], (some, targets), len(some))
        found = averager.compute()[metrics[0].name]
        assert found == pytest.approx(f1(out, y))
    batchwise = sum(f1(some, targets) * len(some) for some, targets in batches) / 50
    assert abs(found - batchwise) > 0.01


def test_a_metric_of_the_users_that_fails_is_told(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "class Failing:\n    def update(self, out, y):\n        raise KeyError(3)\n    compute = update\n"
        "class Wanting(Failing):\n    def __init__(self, task):\n        pass\n"
    )
    averager = MetricAverager(resolve_metrics((f"{path}:Failing",), OWN, OUT, LABELS), is_training=True)
    with pytest.raises(UsageError, match=r"the metric .*:Failing does not fit outputs of 6"):
        averager.update([(torch.zeros(()), 2)], (OUT, LABELS), 2)
    with pytest.raises(UsageError, match=r"the metric .*:Wanting cannot be created without arguments"):
        MetricAverager(resolve_metrics((f"{path}:Wanting",), OWN, OUT, LABELS), is_training=True)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize("ignored", [(0, 1), (1, 0)])
def test_the_loss_of_each_output_is_the_mean_of_the_labels_that_count_for_it(
    ignored: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, x = Two(), torch.randn(24, 4)
    y, z = torch.randint(3, (24,)), torch.randint(5, (24,))
    # All of a batch of 8, and some of another.
    for labels, is_ignored in ((y, ignored[0]), (z, ignored[1])):
        if is_ignored:
            labels[:13] = -100
    torch.save(network.state_dict(), tmp_path / "m.pt")
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy(), z=z.numpy())
    words = ("--builder", "tests.training.torch.test_metrics:Two", "--data", f"{tmp_path / 'd.npz'}[x,y+z]")
    done = here("eval", tmp_path / "m.pt", *words, "--batch-size", "8", "--json")
    assert done.code == 0, done.err
    with torch.no_grad():
        outs = network(x)
    logs = done.json["evaluations"][0]["logs"]
    expected = sum(
        torch.nn.functional.cross_entropy(out, labels).item() for out, labels in zip(outs, (y, z), strict=True)
    )
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    right = (outs[0].argmax(1) == y)[y != -100].float().mean().item()
    assert logs["accuracy"] == pytest.approx(right, rel=1e-6)
