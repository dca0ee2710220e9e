"""Workers on a Ray cluster: each runs one trial of a sweep at a time, or prunes a part of a folder."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from prunectl.errors import InputError, PrunectlError, WorkError, first_line
from prunectl.formats.detect import URL
from prunectl.formats.remote import mirrored, uploading
from prunectl.pruning.destination import Destination
from prunectl.pruning.ledger import BEGUN, parse_part
from prunectl.pruning.parts import prune_part
from prunectl.pruning.request import from_json
from prunectl.sweeping.journal import FILE
from prunectl.sweeping.trial import Trial, TrialResult
from prunectl.sweeping.workers import decode_error, decode_reply, encode_error, handle, threads_per_worker, worker_env

_PATIENCE_SECONDS = 5.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No usage statistics are sent, and Ray does not hide GPUs from workers that request none."""
_REFUSED = "if it was started with a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to it"
"""Ray's error does not mention that a token is missing."""


class _RayTrial:
    """Actor that runs trials in a process of the cluster."""

    def __init__(self, job: dict[str, Any], folder: str) -> None:
        # Paths are relative to the working directory of the command.
        os.chdir(folder)
        self._job = job

    def attempt(self, trial: dict[str, Any]) -> dict[str, Any]:
        if not (Path(self._job["folder"]) / FILE).exists():
            message = f"{self._job['folder']} does not exist on {os.uname().nodename}"
            hint = "sweep into a folder that all machines of the cluster share"
            return {"error": {"kind": InputError.kind, "message": message, "hint": hint, "did_you_mean": []}}
        return handle(self._job, trial)


class _RayWorker:
    """Runs trials on a Ray actor, which is created for the first trial."""

    def __init__(self, job: dict[str, Any], threads: int, cluster: _Cluster) -> None:
        self._job, self._threads, self._cluster = job, threads, cluster
        self._actor: Any = None
        self._is_closed = False

    def attempt(self, trial: Trial) -> TrialResult | PrunectlError:
        if self._is_closed:
            raise KeyboardInterrupt
        if self._actor is None:
            self._cluster.connect()
            options = {"num_cpus": self._threads, "runtime_env": {"env_vars": worker_env(self._threads)}}
            self._actor = ray.remote(**options)(_RayTrial).remote(self._job, os.getcwd())
        try:
            reply: dict[str, Any] = ray.get(self._actor.attempt.remote(asdict(trial)))
        except ray.exceptions.RayError as error:
            self._actor = None
            return WorkError(
                f"{trial.name}: its worker ended: {first_line(error)}",
                hint="it may have run out of memory: use fewer --jobs",
            )
        return decode_reply(trial, reply)

    def close(self) -> None:
        self._is_closed = True
        # Read once: a thread that waits for the actor may set it to None meanwhile.
        if (actor := self._actor) is not None and ray.is_initialized():
            ray.kill(actor)
            self._actor = None
        self._cluster.disconnect()


class _Cluster:
    """A running cluster, or one on this machine that is started for the command and stopped after it."""

    def __init__(self, address: str, threads: int, jobs: int) -> None:
        self._address, self._threads, self._jobs, self._open_workers = address, threads, jobs, jobs
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Connect to the cluster or start it, unless this is done already."""
        with self._lock:
            if ray.is_initialized():
                return
            os.environ.update(_QUIET)
            own = {} if self._address else {"num_cpus": self._threads * self._jobs, "include_dashboard": False}
            hint = "run ray start --head and use --on ray:ADDRESS, or use --on ray for this machine only"
            try:
                if _is_listening(self._address):
                    hint = _REFUSED
                ray.init(address=self._address or "local", logging_level="error", log_to_driver=False, **own)
            except Exception as error:  # a node that does not start in time raises a plain Exception
                raise WorkError(
                    f"no Ray cluster answered at {self._address or 'this machine'}: {first_line(error)}",
                    hint=hint,
                ) from error
            check_resources(ray.nodes(), self._threads, self._jobs)

    def disconnect(self) -> None:
        """Stop the cluster when its last worker disconnects."""
        with self._lock:
            self._open_workers -= 1
            if not self._open_workers:
                self.stop()

    def stop(self) -> None:
        """Stop a cluster of this command, or disconnect from one that others run."""
        if ray.is_initialized():
            ray.shutdown()


def check_resources(nodes: Sequence[Mapping[str, Any]], threads: int, jobs: int) -> None:
    """Refuse more workers than a cluster has processors for: some would wait forever."""
    room = sum(int(node["Resources"].get("CPU", 0) // threads) for node in nodes if node["Alive"])
    if room < jobs:
        raise WorkError(
            f"the cluster has room for {room} workers with {threads} threads each, not for {jobs}",
            hint=f"--jobs {room}" if room else "set OMP_NUM_THREADS=1, and sweep into a new folder",
        )


def _is_listening(address: str) -> bool:
    """Whether an address is a host and port that accepts connections; OSError at once if not (Ray waits minutes)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return False
    socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS).close()
    return True


def make_ray_workers(address: str, job: dict[str, Any], jobs: int, threads: int) -> Sequence[_RayWorker]:
    """Workers on a cluster; without an address, on one that is started on this machine."""
    cluster = _Cluster(address, threads, jobs)
    return [_RayWorker(job, threads, cluster) for _ in range(jobs)]


def _prune_part(job: dict[str, Any], folder: str, part: str) -> dict[str, Any]:
    """Prune a part of the shards in a process of the cluster; an empty reply, or an error in JSON."""
    try:
        # Paths are relative to the working directory of the command.
        os.chdir(folder)
        with ExitStack() as scope:
            model, output = Path(job["model"]), Path(job["output"])
            if URL.match(job["model"]):
                model = scope.enter_context(mirrored(job["model"]))
            elif not model.exists():
                return encode_error(InputError(f"{model} does not exist on {os.uname().nodename}", hint=_SHARED))
            if URL.match(job["output"]):
                output = scope.enter_context(uploading(job["output"], is_forced=False, begun=BEGUN))
            request, destination = from_json(job["request"]), Destination(output)
            prune_part(model, request, destination, parse_part(part), allow_empty=job["allow_empty"])
    except Exception as error:  # noqa: BLE001 - any error is reported by the command
        return encode_error(error)
    return {}


_SHARED = "use a folder that all machines of the cluster share, or a URL"


def prune_parts(address: str, job: dict[str, Any], count: int | None) -> None:
    """Prune a folder on a cluster in `count` parts, or one for each of its processors."""
    cluster = _Cluster(address, 1, 1 if address else threads_per_worker(1))
    cluster.connect()
    try:
        processors = sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        count = count or max(processors, 1)
        options = {"num_cpus": 1, "runtime_env": {"env_vars": worker_env(1)}}
        task = ray.remote(**options)(_prune_part)
        names = [f"{number}/{count}" for number in range(1, count + 1)]
        waiting = {task.remote(job, os.getcwd(), name): name for name in names}
        while waiting:
            # The first failure ends all parts: the others would fail as well, or are resumed by the next run.
            (done, *_), _ = ray.wait(list(waiting))
            name = waiting.pop(done)
            if reply := ray.get(done):
                raise decode_error(f"part {name}", reply)
    except ray.exceptions.RayError as error:
        raise WorkError(f"a worker ended: {first_line(error)}", hint="run the same command again") from error
    finally:
        cluster.stop()
