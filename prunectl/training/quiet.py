"""Silences frameworks and converters, including output of their C++ code, which bypasses `sys.stderr`."""

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
    """Redirect file descriptors, by default those of standard output and error, to the null device."""
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
        # A program without a console has no such streams.
        if stream is not None:
            stream.flush()


LOGGERS = ("tensorflow", "absl", "jax")
VARIABLES = ("TF_CPP_MIN_LOG_LEVEL", "GRPC_VERBOSITY")


def raise_log_levels() -> None:
    """Let frameworks log only errors, for the rest of the process or until `host.host_settings` restores the levels."""
    for name, value in zip(VARIABLES, ("3", "ERROR"), strict=True):
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Silence PyTorch's exporters: warnings, loggers, and what C++ prints."""
    # The exporters warn about each operator of packages that are not installed.
    with ignore_warnings(), quiet_logging(), silence():
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Keep the Hugging Face libraries from downloading anything in this context, whatever a model folder refers to."""
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
    """Disable logging up to a level, and restore the previous level of the host program afterwards."""
    level = logging.root.manager.disable
    logging.disable(max(up_to, level))
    try:
        yield
    finally:
        logging.disable(level)
