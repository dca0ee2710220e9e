"""PyTorch's converters, without a word and without operators of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prunectl.exporting.silence import silence


@contextmanager
def converting() -> Iterator[None]:
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
def unfused() -> Iterator[None]:
    """Let encoders go through one operator after the other: all in one is an operator that no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
