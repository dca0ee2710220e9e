"""What a converter is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.exporting.live import Flow
from prunectl.exporting.request import Request
from prunectl.exporting.samples import Samples
from prunectl.formats.base import ModelFile


@dataclass(frozen=True, slots=True)
class Job:
    """A model on its way to another format."""

    file: ModelFile
    """The source, without what pruning has put around its weights."""
    request: Request
    flows: tuple[Flow, ...] = ()
    """What goes into the result."""
    samples: Samples | None = None
    live: Any = None
    """The source in its runtime, as the opener of the pair has made it."""
    scratch: Path = Path()

    @property
    def inputs(self) -> Samples:
        """The inputs that there are for whatever runs."""
        if self.samples is None:
            raise ValueError("only what runs has inputs")
        return self.samples


Writer = Callable[[Job, Path], tuple[str, ...]]
"""Writes the result, and returns what the user should know of it."""
