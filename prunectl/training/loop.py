"""The training loop, for models of every framework."""

from __future__ import annotations

import ctypes
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType, TracebackType
from typing import Any, Self

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.training.backend import Logs, TrainableModel
from prunectl.training.checkpoint import CheckpointManager
from prunectl.training.config import DivergedError, TrainConfig
from prunectl.training.data.readers import IndexedSource
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source
from prunectl.training.logger import LogEntry, TrainingLogger
from prunectl.training.mask_schedule import MaskScheduler
from prunectl.training.monitor import Monitor


@dataclass(slots=True)
class GracefulInterrupt:
    """Records the first Ctrl-C inside the context instead of raising, so that training can stop cleanly."""

    is_wanted: bool = False
    _before: Any = None

    def __enter__(self) -> Self:
        # Python lets only the main thread set signal handlers; in other threads the program must handle Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_wanted:
            raise KeyboardInterrupt
        self.is_wanted = True


TeacherFunction = Callable[[Arrays], Arrays]


@dataclass(frozen=True, slots=True)
class DataSplits:
    """The training data and the validation data."""

    train: Source
    val: Source | None
    workers: int = 0
    """Number of threads that read batches ahead."""


@dataclass(slots=True)
class TrainState:
    """The state of the training loop; saved with a checkpoint."""

    step: int = 0
    epochs_since_best: int = 0
    """Number of epochs since the best one."""
    best: float | None = None
    best_epoch: int | None = None
    best_tensors: dict[str, Array] = field(default_factory=dict)
    history: list[LogEntry] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return len(self.history)

    @property
    def epoch_began(self) -> int:
        """The first step of the current epoch: a stream may end an epoch earlier than its count suggests."""
        return self.history[-1].step if self.history else 0


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Everything that a training run consists of."""

    network: TrainableModel
    data: DataSplits
    config: TrainConfig
    scheduler: MaskScheduler
    logger: TrainingLogger
    checkpoints: CheckpointManager | None = None
    teacher: TeacherFunction | None = None
    monitor: Monitor | None = None
    """Decides which epoch is the best; None if nothing depends on that."""


def train(run: TrainingRun, stopping: GracefulInterrupt) -> TrainState:
    """Train to the end, starting from the last checkpoint if the run is resumed."""
    network, config, scheduler = run.network, run.config, run.scheduler
    progress = TrainState()
    scheduler.begin(network)
    if run.checkpoints is not None:
        run.checkpoints.resume(network, scheduler, progress)
    run.logger.begin(config, progress.step)
    while progress.step < config.steps and not _is_stopped_early(run, progress):
        done = progress.step - progress.epoch_began
        if not done:
            network.reseed(config.seed * 1_000_003 + progress.epoch)
        left = min(config.steps - progress.step, config.steps_per_epoch - done)
        for batch in islice(_batches(run, progress.epoch, done), left):
            if stopping.is_wanted:
                break
            scheduler.maybe_update(network, progress.step)
            teacher_outputs = run.teacher(batch.x) if run.teacher is not None else None
            network.step(batch, config.rate_at(progress.step), teacher_outputs)
            progress.step += 1
            run.logger.step(progress.step, scheduler.sparsity)
        if stopping.is_wanted:
            if run.checkpoints is not None:
                run.checkpoints.save(network, scheduler, progress)
            raise KeyboardInterrupt
        if progress.step == progress.epoch_began:
            raise InputError(
                f"{run.data.train.name} has no examples in epoch {progress.epoch + 1}",
                hint="the data function must return a new iterator at every call; or use --epochs 1",
            )
        _end_epoch(run, progress)
    scheduler.maybe_update(network, progress.step)
    if config.keeps_best and progress.best_tensors and progress.epochs_since_best:
        network.assign(progress.best_tensors)
    return progress


def _is_stopped_early(run: TrainingRun, progress: TrainState) -> bool:
    patience = run.config.patience
    return patience is not None and progress.epochs_since_best >= patience


def _batches(run: TrainingRun, epoch: int, done: int) -> Iterator[Batch]:
    rank, ranks = run.network.ranks
    config = run.config
    batch_size, workers = config.batch_size // ranks, run.data.workers
    order = EpochOrder(
        batch_size, config.seed, epoch, is_shuffled=True, skip=done, rank=rank, ranks=ranks, workers=workers
    )
    batches = run.data.train.batches(order)
    # Indexed data has the same number of examples in every process. A stream may end earlier in one process, and the
    # others would wait for it.
    return batches if ranks == 1 or isinstance(run.data.train, IndexedSource) else _until_any_ends(run, batches)


def _until_any_ends(run: TrainingRun, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches until the stream of any process ends."""
    while True:
        batch = next(batches, None)
        if not run.network.is_true_everywhere(batch is not None) or batch is None:
            return
        yield batch


def _end_epoch(run: TrainingRun, progress: TrainState) -> None:
    network, scheduler = run.network, run.scheduler
    if progress.step == run.config.steps:
        # If the schedule ends with training, its last update must come before the model is evaluated.
        scheduler.maybe_update(network, progress.step)
    logs = network.logs()
    if not math.isfinite(logs.get("loss", 0.0)):
        raise DivergedError(
            f"the loss is {logs['loss']:g} after epoch {progress.epoch + 1}",
            hint="try a lower --lr, --clip 1, or scaled data (?norm=unit)",
        )
    val_logs = evaluate(network, run.data.val, run.config.batch_size)
    entry = LogEntry(progress.epoch + 1, progress.step, scheduler.sparsity, dict(logs), dict(val_logs))
    progress.history.append(entry)
    run.logger.epoch(entry)
    _update_best(run, progress, entry)
    if run.checkpoints is not None:
        run.checkpoints.save(network, scheduler, progress)


def _update_best(run: TrainingRun, progress: TrainState, entry: LogEntry) -> None:
    """Remember the best epoch of those at the final sparsity."""
    monitor = run.monitor
    if monitor is None or not entry.val or _precedes_last_update(run.scheduler, entry.step):
        return
    value = entry.val[monitor.name]
    if monitor.is_better(value, progress.best):
        progress.best, progress.best_epoch, progress.epochs_since_best = value, entry.epoch, 0
        progress.best_tensors = run.network.tensors() if run.config.keeps_best else {}
    else:
        progress.epochs_since_best += 1


def _precedes_last_update(scheduler: MaskScheduler, step: int) -> bool:
    """Whether the last mask update is still to come; an update between two epochs belongs to the second."""
    schedule = scheduler.rules.schedule
    if schedule is None or step > schedule.last_update_step:
        return False
    return step < schedule.last_update_step or scheduler.last_updated != step


def evaluate(network: TrainableModel, source: Source | None, batch_size: int) -> Logs:
    """Loss and metrics over all of a source; empty if there is no source."""
    return network.evaluate(source.batches(EpochOrder(batch_size))) if source is not None else {}


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
_MAPPED_BYTES = 32 << 20
"""The largest mmap threshold that glibc accepts."""


def retain_freed_memory() -> None:
    """Let the allocator keep freed memory for the next step: memory from the system costs a page fault for each page.

    The setting holds for the rest of the process: commands and workers call it, but no library function does.
    """
    library = ctypes.CDLL(None)
    # Other C libraries, such as musl, have no such setting.
    if hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
