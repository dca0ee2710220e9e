"""The journal of a sweep: one JSON line for each finished trial."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from prunectl.analysis import sizes
from prunectl.errors import InputError, PrunectlError, UsageError, attempt, writing
from prunectl.formats.atomic import check_parent
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import NO_LOCKS
from prunectl.sweeping.requests import training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult
from prunectl.training.data import registry

FILE = "sweep.jsonl"
_SCHEMA = "prunectl.sweep/2"
_PATIENCE_SECONDS = 5.0
"""Time that the processes of a killed sweep may take to end."""


@dataclass(frozen=True, slots=True)
class Journal:
    """Finished trials of a sweep, and the open file for more."""

    fd: int
    """Open file descriptor of the journal, which holds the lock on it."""
    threads: int
    """Threads of each process, as in the first run: with another number, floating-point sums would differ a little."""
    done: dict[Trial, TrialResult] = field(default_factory=dict)

    def add(self, trial: Trial, result: TrialResult) -> None:
        """Append a trial; it is on the disk when this returns."""
        _write(self.fd, {"point": asdict(trial), "outcome": result.as_json})
        self.done[trial] = result

    def discard(self, trials: Iterable[Trial]) -> None:
        """Forget trials that will run again: of several lines on a trial, the last one counts."""
        for trial in trials:
            del self.done[trial]


@contextmanager
def open_journal(
    folder: Path, choices: dict[str, Any], sha256: str, threads: int, files: Mapping[str, str]
) -> Generator[Journal]:
    """Open the journal in a folder, which is created if missing; refuse a journal of another sweep, and other files."""
    check_parent(folder)
    path = folder / FILE
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and holds no sweep", hint="name a folder that does not exist yet")
    with writing(folder):
        folder.mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _lock(fd, folder)
        yield _read(fd, path, {"schema": _SCHEMA, "sha256": sha256, "files": {**files}, "choices": choices}, threads)
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UsageError(f"another sweep is running in {folder}") from None
            time.sleep(0.05)
        except OSError as error:
            # On a file system without locks, another sweep cannot be detected.
            if error.errno not in NO_LOCKS:
                raise
            return
        else:
            return


def _read(fd: int, path: Path, header: dict[str, Any], threads: int) -> Journal:
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        # The last line is incomplete: its run was killed while it wrote.
        os.ftruncate(fd, sum(len(line) + 1 for line in lines))
    try:
        recorded: dict[str, Any]
        recorded, *trials = map(json.loads, lines) if lines else [{}]
        done = {Trial(**line["point"]): TrialResult.from_json(line["outcome"]) for line in trials}
        if header.items() <= recorded.items():
            return Journal(fd, int(recorded["threads"]), done)
        if done.keys() - {BASELINE}:
            _check_compatible(recorded, header, path.parent)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a journal of a sweep: {error}", hint="sweep into another folder") from error
    # No trial but the baseline has finished: the user may change the options.
    os.ftruncate(fd, 0)
    _write(fd, {**header, "threads": threads})
    return Journal(fd, threads)


def _check_compatible(recorded: dict[str, Any], header: dict[str, Any], folder: Path) -> NoReturn:
    """Raise an error that names what has changed since the sweep began."""
    if recorded["schema"] != header["schema"]:
        raise InputError(
            f"{folder / FILE} has the schema {recorded['schema']!r}, which this version of prunectl does not know",
            hint="sweep into another folder",
        )
    if recorded["sha256"] != header["sha256"]:
        raise UsageError(f"{folder} holds a sweep of another model", hint="sweep this one into another folder")
    then, now = recorded["choices"], header["choices"]
    if then == now:
        _compare_files(recorded["files"], header["files"], folder)
    name = next(name for name in {**now, **then} if then.get(name) != now.get(name))
    raise UsageError(
        f"{folder} holds a sweep with other options: {name.replace('_', ' ')} was {_format_value(then.get(name))}, "
        f"not {_format_value(now.get(name))}",
        hint="repeat the same options to resume it, or sweep into another folder",
    )


def _compare_files(then: dict[str, str], now: dict[str, str], folder: Path) -> NoReturn:
    """Raise an error that names a file that has changed."""
    name = next(name for name in {**now, **then} if then.get(name) != now.get(name))
    change = "is new" if name not in then else "is missing" if name not in now else "has changed"
    raise UsageError(
        f"{name} {change} since the sweep in {folder} began, so its results no longer apply",
        hint="sweep into another folder, or remove that one",
    )


def _format_value(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "nothing"


def _write(fd: int, line: dict[str, Any]) -> None:
    # The file is opened with O_APPEND: a line is complete, or it is the incomplete end of the file.
    data = json.dumps(line, sort_keys=True, allow_nan=False).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)


def digest(path: Path) -> str:
    """The hash of a model, with all its files."""
    return sizes.sha256(open_model(path))


def find_stale(folder: Path, done: Mapping[Trial, TrialResult]) -> dict[Trial, str]:
    """The trials whose model is missing or was changed, each with a note for the user."""
    stale: dict[Trial, str] = {}
    for trial, result in done.items():
        path = folder / result.path
        if not result.path:
            continue
        if not path.exists():
            stale[trial] = f"{path} was missing: the trial ran again."
        elif _changed(path, result):
            stale[trial] = f"{path} had changed since its trial: the trial ran again."
    return stale


def trial_dir(folder: Path, trial: Trial) -> Path:
    """The folder of a trial, which is created if missing."""
    path = folder / trial.name
    with writing(path):
        path.mkdir(exist_ok=True)
    return path


def _changed(path: Path, result: TrialResult) -> bool:
    now = attempt(digest, path)
    return isinstance(now, PrunectlError) or now != result.digest


def digests(*, specs: Iterable[str], functions: Iterable[Any], models: Iterable[str] = ()) -> dict[str, str]:
    """Hashes, by path, of all files of data, user functions and other models."""
    specs_and_functions = tuple(functions)
    paths = [
        *(file for spec in specs if spec for file in registry.files_of_spec(spec)),
        *registry.files_of_references(specs_and_functions),
        *_module_files((*(spec.partition("?")[0] for spec in specs), *specs_and_functions)),
        *(file for model in models if model for file in open_model(Path(model)).files),
    ]
    return {str(path): sizes.sha256_of(path) for path in dict.fromkeys(paths) if path.is_file()}


def files_of(config: SweepConfig) -> dict[str, str]:
    """Hashes of the files that a sweep reads besides its model."""
    means = training_of(config, BASELINE).means
    functions = (
        *config.strategies,
        config.policy,
        config.loss,
        config.model,
        config.custom_objects,
        *means.metrics,
    )
    return digests(specs=(config.data, config.val), functions=functions)


def _module_files(specs: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of modules in specs such as `package.module:name`, without importing them."""
    for spec in specs:
        module, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
        parts = module.split(".")
        if colon and name.isidentifier() and all(part.isidentifier() for part in parts):
            candidates = (Path(folder or ".").joinpath(*parts) for folder in sys.path)
            tried = (path for folder in candidates for path in (folder.with_suffix(".py"), folder / "__init__.py"))
            yield from (path for path in [next(filter(Path.is_file, tried), None)] if path is not None)
