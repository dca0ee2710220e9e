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
"""How long the processes of a sweep that was killed may take to end."""


@dataclass(frozen=True, slots=True)
class Journal:
    """Finished trials of a sweep, and the open file for more."""

    fd: int
    """Holds the lock on the file; whoever has it open may write points."""
    threads: int
    """Of each process, as in the first run: sums come out a little different with others."""
    done: dict[Trial, TrialResult] = field(default_factory=dict)

    def add(self, trial: Trial, result: TrialResult) -> None:
        """Append a trial, on the disk before this returns."""
        _write(self.fd, {"point": asdict(trial), "outcome": result.as_json})
        self.done[trial] = result

    def discard(self, trials: Iterable[Trial]) -> None:
        """Forget trials: the next line about one of them is what counts."""
        for trial in trials:
            del self.done[trial]


@contextmanager
def open_journal(
    folder: Path, choices: dict[str, Any], sha256: str, threads: int, files: Mapping[str, str]
) -> Generator[Journal]:
    """Yield the notes in a folder, which is made if it is not there; refuse those of another sweep, or other files."""
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
            # Where nobody can lock, nobody is known to be at work either.
            if error.errno not in NO_LOCKS:
                raise
            return
        else:
            return


def _read(fd: int, path: Path, head: dict[str, Any], threads: int) -> Journal:
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        # Of a run that was killed while it wrote.
        os.ftruncate(fd, sum(len(line) + 1 for line in lines))
    try:
        noted: dict[str, Any]
        noted, *trials = map(json.loads, lines) if lines else [{}]
        done = {Trial(**line["point"]): TrialResult.from_json(line["outcome"]) for line in trials}
        if head.items() <= noted.items():
            return Journal(fd, int(noted["threads"]), done)
        if done.keys() - {BASELINE}:
            _check_compatible(noted, head, path.parent)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a journal of a sweep: {error}", hint="sweep into another folder") from error
    # No trial has finished: the user may have changed the options.
    os.ftruncate(fd, 0)
    _write(fd, {**head, "threads": threads})
    return Journal(fd, threads)


def _check_compatible(noted: dict[str, Any], head: dict[str, Any], folder: Path) -> NoReturn:
    """Say what is not the same."""
    if noted["schema"] != head["schema"]:
        raise InputError(
            f"{folder / FILE} has the schema {noted['schema']!r}, which this version of prunectl does not know",
            hint="sweep into another folder",
        )
    if noted["sha256"] != head["sha256"]:
        raise UsageError(f"{folder} holds a sweep of another model", hint="sweep this one into another folder")
    then, now = noted["choices"], head["choices"]
    if then == now:
        _compare_files(noted["files"], head["files"], folder)
    name = next(name for name in {**now, **then} if then.get(name) != now.get(name))
    raise UsageError(
        f"{folder} holds a sweep with other options: {name.replace('_', ' ')} was {_format_value(then.get(name))}, "
        f"not {_format_value(now.get(name))}",
        hint="repeat the same options to resume it, or sweep into another folder",
    )


def _compare_files(then: dict[str, str], now: dict[str, str], folder: Path) -> NoReturn:
    """Say which file is not as it was."""
    name = next(name for name in {**now, **then} if then.get(name) != now.get(name))
    change = "is new" if name not in then else "is missing" if name not in now else "has changed"
    raise UsageError(
        f"{name} {change} since the sweep in {folder} began, so its results no longer apply",
        hint="sweep into another folder, or remove that one",
    )


def _format_value(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "nothing"


def _write(fd: int, line: dict[str, Any]) -> None:
    # In one go, at the end whatever happens: a line is there whole, or is the torn end of the file.
    data = json.dumps(line, sort_keys=True, allow_nan=False).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)


def digest(path: Path) -> str:
    """The hash of a model, with all its files."""
    return sizes.sha256(open_model(path))


def find_stale(folder: Path, done: Mapping[Trial, TrialResult]) -> dict[Trial, str]:
    """The points whose model is not what was noted, with what to say of each."""
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
    """The folder of a point, which is made if it is not there."""
    path = folder / trial.name
    with writing(path):
        path.mkdir(exist_ok=True)
    return path


def _changed(path: Path, result: TrialResult) -> bool:
    now = attempt(digest, path)
    return isinstance(now, PrunectlError) or now != result.digest


def digests(*, specs: Iterable[str], functions: Iterable[Any], models: Iterable[str] = ()) -> dict[str, str]:
    """The hash of every file that data, functions and other models lie in, by its path."""
    specs_and_functions = tuple(functions)
    paths = [
        *(file for spec in specs if spec for file in registry.files_of_spec(spec)),
        *registry.files_of_references(specs_and_functions),
        *_module_files((*(spec.partition("?")[0] for spec in specs), *specs_and_functions)),
        *(file for model in models if model for file in open_model(Path(model)).files),
    ]
    return {str(path): sizes.sha256_of(path) for path in dict.fromkeys(paths) if path.is_file()}


def files_of(config: SweepConfig) -> dict[str, str]:
    """The hashes of what a sweep reads beside its model."""
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
    """Yield the files of modules that words name as `package.module:name`, which are not imported for it."""
    for spec in specs:
        where, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
        parts = where.split(".")
        if colon and name.isidentifier() and all(part.isidentifier() for part in parts):
            candidates = (Path(folder or ".").joinpath(*parts) for folder in sys.path)
            tried = (path for folder in candidates for path in (folder.with_suffix(".py"), folder / "__init__.py"))
            yield from (path for path in [next(filter(Path.is_file, tried), None)] if path is not None)
