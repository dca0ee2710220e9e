"""The training loop: it comes to its end whatever the number of examples, batches and processes."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.errors import InputError, UsageError
from prunectl.training.config import TrainConfig, resolve_steps
from prunectl.training.data.readers import IterableSource
from prunectl.training.data.source import Batch, Source, as_tuple
from prunectl.training.logger import TrainingLogger
from prunectl.training.loop import DataSplits, GracefulInterrupt, TrainingRun, TrainState, train
from tests.training.data.sources import numbered, streamed

TOO_MANY = 50


class Counting:
    """A network that learns nothing, and counts; it refuses to do so for ever."""

    is_chief = True

    def __init__(self, ranks: tuple[int, int] = (0, 1), others_have: int = 1 << 30) -> None:
        self.ranks = ranks
        self.sizes: list[int] = []
        self.seeds: list[int] = []
        self._epochs, self._others_have = 0, others_have

    def step(self, batch: Batch, _rate: float, _teacher_outputs: Any = None) -> None:
        self.sizes.append(len(as_tuple(batch.x)[0]))

    def logs(self) -> dict[str, float]:
        self._epochs += 1
        assert self._epochs < TOO_MANY, "the loop does not end"
        return {}

    def reseed(self, number: int) -> None:
        self.seeds.append(number)

    def is_true_everywhere(self, mine: bool) -> bool:
        self._others_have -= 1
        return mine and self._others_have >= 0


def trained(source: Source, network: Counting, steps: int, per_epoch: int, batch_size: int) -> TrainState:
    """Go through the loop with no masks."""
    keeper: Any = SimpleNamespace(begin=lambda _: None, maybe_update=lambda *_: None, sparsity=0.0)
    model: Any = network
    return train(
        TrainingRun(
            model, DataSplits(source, None), TrainConfig(steps, per_epoch, batch_size), keeper, TrainingLogger()
        ),
        GracefulInterrupt(),
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 12), st.integers(1, 4))
def test_every_process_makes_the_planned_steps_in_every_epoch(count: int, per_rank: int, ranks: int) -> None:
    batch_size = per_rank * ranks
    for source in (numbered(count), streamed(count, 5)):
        if count < ranks:
            with pytest.raises(UsageError, match="too few for"):
                resolve_steps(count, batch_size, epochs=2, steps=None, default_epochs=3, ranks=ranks)
            continue
        steps, per_epoch = resolve_steps(count, batch_size, epochs=2, steps=None, default_epochs=3, ranks=ranks)
        assert steps == 2 * per_epoch
        runs = [Counting((rank, ranks)) for rank in range(ranks)]
        for network in runs:
            progress = trained(source, network, steps, per_epoch, batch_size)
            assert [entry.step for entry in progress.history] == [per_epoch, steps]
            assert network.sizes == runs[0].sizes
            assert sum(network.sizes) == 2 * (count // ranks)


def test_a_batch_that_the_processes_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(UsageError, match="--batch-size 10 is not a multiple of the 4 processes") as caught:
        resolve_steps(100, 10, epochs=1, steps=None, default_epochs=3, ranks=4)
    assert caught.value.hint == "--batch-size 12"


def shrinking(*counts: int) -> IterableSource:
    """A stream that gives another number of examples each time that it is read."""
    left = itertools.chain(counts, itertools.repeat(counts[-1]))

    def read() -> Iterator[Batch]:
        numbers = np.arange(next(left))
        if numbers.size:
            yield Batch(numbers, -numbers)

    return IterableSource("shrinking", None, True, read)


def test_a_stream_that_gives_fewer_examples_later_ends_its_epochs_early_and_all_steps_are_made() -> None:
    network = Counting()
    progress = trained(shrinking(40, 20, 30), network, steps=12, per_epoch=4, batch_size=10)
    assert len(network.sizes) == progress.step == 12
    assert [entry.step for entry in progress.history] == [4, 6, 9, 12]
    assert network.seeds == [0, 1, 2, 3]


def test_a_stream_that_gives_more_examples_later_ends_its_epochs_where_they_were_planned() -> None:
    network = Counting()
    progress = trained(shrinking(40, 90), network, steps=8, per_epoch=4, batch_size=10)
    assert [entry.step for entry in progress.history] == [4, 8]
    assert network.sizes == [10] * 8


def test_a_stream_that_can_be_read_only_once_is_told_in_its_second_epoch() -> None:
    with pytest.raises(InputError, match="shrinking has no examples in epoch 2"):
        trained(shrinking(40, 0), Counting(), steps=8, per_epoch=4, batch_size=10)


def test_an_epoch_ends_in_every_process_when_the_stream_of_one_does() -> None:
    network = Counting((0, 2), others_have=3)
    with pytest.raises(InputError, match="no examples in epoch 2"):  # the other process never has any again
        trained(streamed(80, 10), network, steps=8, per_epoch=4, batch_size=20)
    assert network.sizes == [10] * 3


_STEPS = """
import resource, sys
import numpy as np
from prunectl.training.loop import retain_freed_memory
if sys.argv[1] == "kept":
    retain_freed_memory()
def step():
    for array in [np.empty(1_000_000) for _ in range(4)]:
        array.fill(1)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such option")
def test_a_step_of_training_takes_the_memory_that_the_last_one_freed() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = [
        int(
            subprocess.run([sys.executable, "-c", _STEPS, way], capture_output=True, check=True, env=environment).stdout
        )
        for way in ("kept", "given back")
    ]
    assert faults[0] * 10 < faults[1]
