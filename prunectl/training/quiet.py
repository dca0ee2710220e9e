"""Silence for frameworks and converters, what their C++ prints included, which knows no `sys.stderr`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def silence(*descriptors: int) -> Iterator[None]:
    """Redirect the file descriptors of standard output and error, or those that are named, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    saved = {number: os.dup(number) for number in descriptors or (1, 2)}
    _flush()
    try:
        for number in saved:
            os.dup2(null, number)
        yield
    finally:
        _flush()
        for number, original in saved.items():
            os.dup2(original, number)
            os.close(original)
        os.close(null)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A program without a console has none.
        if stream is not None:
            stream.flush()


LOGGERS = ("tensorflow", "absl", "jax")
VARIABLES = ("TF_CPP_MIN_LOG_LEVEL", "GRPC_VERBOSITY")


def raise_log_levels() -> None:
    """Let frameworks log errors alone, for the rest of the process, or of `host.host_settings`."""
    for name, value in zip(VARIABLES, ("3", "ERROR"), strict=True):
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Silence PyTorch's exporters: warnings, loggers, and what C++ prints."""
    # Its exporters tell of every operator of packages that are not installed.
    with ignore_warnings(), quiet_logging(), silence():
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Let the libraries of Hugging Face fetch nothing meanwhile, whatever a folder names; the host program may."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """Ignore the warnings of frameworks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet_logging(up_to: int = logging.WARNING) -> Iterator[None]:
    """Disable logging up to a level, and restore that of the host program."""
    level = logging.root.manager.disable
    logging.disable(max(up_to, level))
    try:
        yield
    finally:
        logging.disable(level)
