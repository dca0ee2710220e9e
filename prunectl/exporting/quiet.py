"""Quiet for what is written in C++, which knows no sys.stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing through to the files of standard output and error, whoever writes."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    kept = {number: os.dup(number) for number in (1, 2)}
    _flush()
    try:
        for number in kept:
            os.dup2(nothing, number)
        yield
    finally:
        _flush()
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)
        os.close(nothing)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Let PyTorch convert without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        # Its exporters tell of every operator of packages that are not installed.
        logging.disable(logging.WARNING)
        try:
            with silence():
                yield
        finally:
            logging.disable(before)


@contextmanager
def without_mha_fastpath() -> Iterator[None]:
    """Let encoders go through one operator after the other: all in one is an operator that no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
