"""Workers on a Ray cluster, one trial at a time each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from prunectl.errors import InputError, PrunectlError, WorkError, first_line
from prunectl.sweeping.journal import FILE
from prunectl.sweeping.trial import Trial, TrialResult
from prunectl.sweeping.workers import decode_reply, handle, worker_env

_PATIENCE_SECONDS = 5.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Nobody is told that there is a sweep; what cards a worker without any sees stays as it is."""


class _RayTrial:
    """Lives in a process of the cluster."""

    def __init__(self, job: dict[str, Any], folder: str) -> None:
        # Paths are those of who asked.
        os.chdir(folder)
        self._job = job

    def attempt(self, trial: dict[str, Any]) -> dict[str, Any]:
        if not (Path(self._job["folder"]) / FILE).exists():
            message = f"{self._job['folder']} does not exist on {os.uname().nodename}"
            hint = "sweep into a folder that all machines of the cluster share"
            return {"error": {"kind": InputError.kind, "message": message, "hint": hint, "did_you_mean": []}}
        return handle(self._job, trial)


class _RayWorker:
    """Runs trials on a Ray actor that is created when it is first needed."""

    def __init__(self, job: dict[str, Any], threads: int, cluster: _Cluster) -> None:
        self._job, self._threads, self._cluster = job, threads, cluster
        self._maker: Any = None
        self._is_over = False

    def attempt(self, trial: Trial) -> TrialResult | PrunectlError:
        """Run a trial."""
        if self._is_over:
            raise KeyboardInterrupt
        if self._maker is None:
            self._cluster.connect()
            options = {"num_cpus": self._threads, "runtime_env": {"env_vars": worker_env(self._threads)}}
            self._maker = ray.remote(**options)(_RayTrial).remote(self._job, os.getcwd())
        try:
            reply: dict[str, Any] = ray.get(self._maker.attempt.remote(asdict(trial)))
        except ray.exceptions.RayError as error:
            self._maker = None
            return WorkError(
                f"{trial.name}: its worker ended: {first_line(error)}",
                hint="it may have run out of memory: use fewer --jobs",
            )
        return decode_reply(trial, reply)

    def close(self) -> None:
        """End the worker, whatever it does."""
        self._is_over = True
        # Taken once: a thread that waits for it may let go of it meanwhile.
        if (maker := self._maker) is not None and ray.is_initialized():
            ray.kill(maker)
            self._maker = None
        self._cluster.disconnect()


class _Cluster:
    """A cluster that runs, or one on this machine that is started for the sweep and stopped after it."""

    def __init__(self, address: str, threads: int, jobs: int) -> None:
        self._address, self._threads, self._hands, self._left = address, threads, jobs, jobs
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Be there, however often it is asked."""
        with self._lock:
            if ray.is_initialized():
                return
            os.environ.update(_QUIET)
            own = {} if self._address else {"num_cpus": self._threads * self._hands, "include_dashboard": False}
            try:
                _check_reachable(self._address)
                ray.init(address=self._address or "local", logging_level="error", log_to_driver=False, **own)
            except (OSError, RuntimeError, ValueError) as error:
                raise WorkError(
                    f"no Ray cluster answered at {self._address or 'this machine'}: {first_line(error)}",
                    hint="run ray start --head and use --on ray:ADDRESS, or use --on ray for this machine only",
                ) from error
            check_resources(ray.nodes(), self._threads, self._hands)

    def disconnect(self) -> None:
        """Stop when the last hand is gone."""
        with self._lock:
            self._left -= 1
            if not self._left and ray.is_initialized():
                ray.shutdown()


def check_resources(nodes: Sequence[Mapping[str, Any]], threads: int, jobs: int) -> None:
    """Refuse more workers than a cluster has processors for: some would wait for ever."""
    room = sum(int(node["Resources"].get("CPU", 0) // threads) for node in nodes if node["Alive"])
    if room < jobs:
        raise WorkError(
            f"the cluster has room for {room} workers with {threads} threads each, not for {jobs}",
            hint=f"--jobs {room}" if room else "set OMP_NUM_THREADS=1, and sweep into a new folder",
        )


def _check_reachable(address: str) -> None:
    """Fail at once where nobody listens, for which Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS).close()


def make_ray_workers(address: str, job: dict[str, Any], jobs: int, threads: int) -> Sequence[_RayWorker]:
    """So many workers of a cluster; without an address, of one on this machine."""
    cluster = _Cluster(address, threads, jobs)
    return [_RayWorker(job, threads, cluster) for _ in range(jobs)]
