"""Execution of trials (prune, finetune, evaluate) in this process, in child processes, or on a Ray cluster.

`python -m prunectl.sweeping.workers` is the child process: it reads trials from its standard input.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from prunectl.analysis.patterns import CHANNEL
from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.calibration.prune import prune as prune_with_data
from prunectl.channels.prune import prune_channels
from prunectl.errors import (
    InputError,
    MissingExtraError,
    PrunectlError,
    UntrustedError,
    UsageError,
    WorkError,
    translate,
)
from prunectl.formats.descriptors import take_stdout
from prunectl.formats.registry import open_model
from prunectl.formats.safe_json import require
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.workers import threads_from_env, usable_cores
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import prune
from prunectl.sweeping.journal import digest, trial_dir
from prunectl.sweeping.requests import is_one_shot, pruning_of, training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, diverged
from prunectl.training.config import DivergedError
from prunectl.training.evaluate import evaluate_baseline, evaluate_file
from prunectl.training.finetune import finetune
from prunectl.training.loop import retain_freed_memory
from prunectl.training.request import FinetuneRequest

_KINDS = {
    error_type.kind: error_type for error_type in (UsageError, InputError, UntrustedError, MissingExtraError, WorkError)
}


def encode_job(path: Path, config: SweepConfig, folder: Path) -> dict[str, Any]:
    """The job in JSON: what all trials share."""
    return {"model": str(path), "folder": str(folder), "choices": config.as_json}


def handle(job: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """Run a trial in this process; returns a reply for JSON."""
    config = SweepConfig.from_json(job["choices"])
    try:
        return {"outcome": run_trial(Path(job["model"]), config, Path(job["folder"]), Trial(**trial)).as_json}
    except Exception as error:  # noqa: BLE001 - a failed trial must not stop the others
        return encode_error(error)


def encode_error(error: Exception) -> dict[str, Any]:
    """An error as a reply for JSON."""
    failure = error if isinstance(error, PrunectlError) else translate(error)
    if failure is None:
        return {"bug": f"{type(error).__name__}: {error}", "trace": "".join(traceback.format_exception(error))}
    reply = {"message": failure.message, "hint": failure.hint, "did_you_mean": list(failure.did_you_mean)}
    return {"error": {"kind": failure.kind, **reply}}


def decode_reply(trial: Trial, reply: dict[str, Any]) -> TrialResult | PrunectlError:
    """The result or error of a reply."""
    if "outcome" in reply:
        return TrialResult.from_json(reply["outcome"])
    return decode_error(trial.name, reply)


def decode_error(name: str, reply: dict[str, Any]) -> PrunectlError:
    """The error of a reply; `name` is the trial or part that failed."""
    if "bug" in reply:
        sys.stderr.write(reply["trace"])
        return WorkError(f"{name}: {reply['bug']}", hint="please report it with the traceback above")
    error = reply["error"]
    kind = _KINDS.get(error["kind"], WorkError)
    return kind(error["message"], hint=error["hint"], did_you_mean=tuple(error["did_you_mean"]))


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def worker_env(threads: int) -> dict[str, str]:
    """Environment variables of a worker process."""
    return {
        **dict.fromkeys(_THREADS, str(threads)),
        "TF_NUM_INTEROP_THREADS": "1",
        # Workers can import the same modules as this process.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def threads_per_worker(jobs: int) -> int:
    """Number of threads of each worker: from the environment, or else an equal share of the cores."""
    return threads_from_env() or max(usable_cores() // jobs, 1)


class ProcessWorker:
    """Runs trials in a child process, which is started for the first trial."""

    def __init__(self, job: dict[str, Any], number: int, threads: int, lock: int) -> None:
        self._job, self._number, self._threads, self._lock = json.dumps(job), number, threads, lock
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False

    def attempt(self, trial: Trial) -> TrialResult | PrunectlError:
        """Run a trial."""
        job = f"{self._job}\n" if self._process is None else ""
        process = self._running_process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{job}{json.dumps(asdict(trial))}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._wait_and_close(process)
            return WorkError(
                f"{trial.name}: its process ended with {_describe_exit(code)}",
                hint="it may have run out of memory: use fewer --jobs",
            )
        return decode_reply(trial, json.loads(line))

    def close(self) -> None:
        """Kill the process, even during a trial."""
        self._is_closed = True
        # Read once: a thread that waits for the process may set it to None meanwhile.
        if (process := self._process) is not None:
            process.kill()
            self._wait_and_close(process)

    def _wait_and_close(self, process: subprocess.Popen[str]) -> int:
        """Wait for a process, close its pipes, and return its exit code."""
        code = process.wait()
        self._process = None
        for pipe in (process.stdin, process.stdout):
            # Closing flushes input that was not sent, which nobody reads any more.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return code

    def _running_process(self) -> subprocess.Popen[str]:
        if self._process is None:
            if self._is_closed:
                raise KeyboardInterrupt
            environment = {
                **os.environ,
                **worker_env(self._threads),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prunectl.sweeping.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                # The lock is held until the last child has ended, so that no other sweep runs trials meanwhile.
                pass_fds=(self._lock,),
                # Ctrl-C must only reach this process, which kills its children.
                start_new_session=True,
            )
            if hasattr(os, "sched_setaffinity"):
                # This also limits runtimes that ignore the environment variables for threads.
                os.sched_setaffinity(self._process.pid, self._processors())
        return self._process

    def _processors(self) -> set[int]:
        """A processor for each thread of this worker, different from those of other workers if there are enough."""
        processors = sorted(os.sched_getaffinity(0))
        first = self._number * self._threads
        return {processors[index % len(processors)] for index in range(first, first + self._threads)}


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


RAY = "ray"


class Worker(Protocol):
    """A worker that runs one trial at a time."""

    def attempt(self, trial: Trial) -> TrialResult | PrunectlError:
        """Run a trial."""

    def close(self) -> None:
        """End the worker, even during a trial."""


class WorkerPool:
    """A pool of workers, used by as many threads."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(worker)

    def attempt(self, trial: Trial) -> TrialResult | PrunectlError:
        """Run a trial on a free worker."""
        worker = self._free.get()
        try:
            return worker.attempt(trial)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End all workers, even during trials."""
        for worker in self._workers:
            worker.close()


def check(cluster: str) -> None:
    """Refuse an unknown value of --on, and Ray if it is not installed."""
    if cluster and cluster.partition(":")[0] != RAY:
        raise UsageError(f"--on {cluster!r} is not known", hint="write --on ray, or --on ray:ADDRESS")
    if cluster:
        require(RAY, extra=RAY)


def make_workers(cluster: str, job: dict[str, Any], *, jobs: int, threads: int, lock: int) -> Sequence[Worker]:
    """Workers on this machine, or on `ray` or `ray:ADDRESS`."""
    if not cluster:
        return [ProcessWorker(job, number, threads, lock) for number in range(jobs)]
    address = cluster.partition(":")[2]
    ray_workers: Sequence[Worker] = importlib.import_module("prunectl.sweeping.ray_workers").make_ray_workers(
        address, job, jobs, threads
    )
    return ray_workers


def evaluate(path: Path, request: FinetuneRequest, name: str) -> TrialResult:
    """Measure and evaluate a file; `name` is its path in the journal, and empty for the baseline."""
    stats = measure(open_model(path), get_codec(CodecName.GZIP, None))
    evaluation = evaluate_file(path, request) if name else evaluate_baseline(path, request)
    assert stats.bytes.compressed is not None
    logs = {key: value for key, value in evaluation.logs.items() if math.isfinite(value)}
    sparsity = stats.sparsity or 0.0
    return TrialResult(
        metric=evaluation.metric,
        value=evaluation.value if evaluation.is_finite else math.nan,
        logs=logs,
        sparsity=sparsity,
        raw=stats.bytes.raw,
        gzip=stats.bytes.compressed,
        path=name,
        notes=evaluation.notes,
        is_up=evaluation.higher_is_better,
        digest=digest(path),
    )


def run_trial(path: Path, config: SweepConfig, folder: Path, trial: Trial) -> TrialResult:
    """Run a trial of a sweep."""
    return make_trial(
        path, folder, trial, training_of(config, BASELINE), lambda output: _write_trial(path, config, trial, output)
    )


def make_trial(
    path: Path, folder: Path, trial: Trial, evaluation: FinetuneRequest, write: Callable[[Destination], None]
) -> TrialResult:
    """Write the model of a trial to its own folder and evaluate it; for the baseline, only evaluate the model."""
    if trial == BASELINE:
        return evaluate(path, evaluation, "")
    output = Destination(trial_dir(folder, trial) / f"model{''.join(path.suffixes[-1:])}", is_forced=True)
    try:
        write(output)
    except DivergedError as error:
        return diverged(trial, error)
    return evaluate(output.target, evaluation, output.target.relative_to(folder).as_posix())


def _write_trial(path: Path, config: SweepConfig, trial: Trial, output: Destination) -> None:
    retain_freed_memory()
    if not config.epochs:
        _write_pruned(path, config, trial, output)
    elif is_one_shot(trial):
        with temporary_folder() as scratch:
            between = Destination(scratch / path.name)
            _write_pruned(path, config, trial, between)
            finetune(between.target, training_of(config, trial), output)
    else:
        finetune(path, training_of(config, trial), output)


def _write_pruned(path: Path, config: SweepConfig, trial: Trial, output: Destination) -> None:
    request = pruning_of(config, trial)
    # A low sparsity may be less than one channel or weight, so a trial may prune nothing.
    if request.pattern == CHANNEL:
        prune_channels(path, request, output, is_trusted=config.is_trusted, allow_empty=True)
    elif request.data:
        prune_with_data(path, request, output, is_trusted=config.is_trusted, allow_empty=True)
    else:
        prune(path, request, output, allow_empty=True)


_PARENT_GONE = 1


def main() -> None:
    """Read lines of JSON from stdin, the job and then trials, and write a reply to each trial to stdout."""
    # Frameworks may print to stdout.
    replies = take_stdout()
    replies.reconfigure(encoding="utf-8")
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    job = json.loads(lines.get())
    while True:
        replies.write(json.dumps(handle(job, json.loads(lines.get()))) + "\n")
        replies.flush()


def _listen(lines: queue.SimpleQueue[str]) -> None:
    """Queue lines of stdin, and exit at once when the parent is gone: another sweep may run the same trial."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(_PARENT_GONE)


if __name__ == "__main__":
    main()
