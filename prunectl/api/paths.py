"""Paths of models as Python has them: on this machine, or at a URL where the function reads those."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prunectl.analysis.stats import ModelStats
from prunectl.api.keywords import AnyPath, check_type
from prunectl.errors import UsageError
from prunectl.formats.detect import URL, public


def local_path(name: str, path: AnyPath) -> Path:
    """A path on this machine."""
    check_type(name, path, AnyPath)
    if is_url(path):
        is_written = name in {"output", "tried"}
        to_read = "download it first; inspect, size, diff, prune and strip read a model at a URL"
        raise UsageError(
            f"{name} is a URL, where a file is needed",
            hint="write it to a path on this machine, and upload it afterwards" if is_written else to_read,
        )
    return Path(path)


def is_url(path: object) -> bool:
    """Whether a model is elsewhere."""
    return isinstance(path, str) and URL.match(path) is not None


@contextmanager
def model_path(name: str, path: AnyPath, *, is_read_whole: bool = False) -> Generator[Path]:
    """Yield a path to a model on this machine or at a URL, of which no more is read than is needed."""
    if not is_url(path):
        yield local_path(name, path)
        return
    remote = importlib.import_module("prunectl.formats.remote")
    with remote.mirrored(path, is_read_whole=is_read_whole) as mirror:
        yield mirror


def shown_path(path: AnyPath, stats: ModelStats) -> ModelStats:
    """Statistics under the URL that the model was named by, and not under what stood for it here."""
    return replace(stats, path=public(str(path))) if is_url(path) else stats
