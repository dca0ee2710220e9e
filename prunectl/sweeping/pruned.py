"""One pruned file: by weights alone, by what data does in it, or with channels cut out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunectl.calibrating import prune as calibrating
from prunectl.channels import prune as cutting
from prunectl.channels.cutting import cutting_of
from prunectl.channels.scores import Needs as Sees
from prunectl.measuring.patterns import CHANNELS
from prunectl.pruning import prune as pruning
from prunectl.pruning.output import Output
from prunectl.pruning.request import Request, method_of
from prunectl.pruning.strategies import Needs


def looks(request: Request) -> bool:
    """Whether weights or channels go, or are fitted anew, by what data does in the model."""
    if request.pattern == CHANNELS:
        measure = cutting_of(request).measure
        return measure is not None and measure.needs is not Sees.NOTHING
    return request.is_repaired or method_of(request).strategy.needs not in {Needs.NOTHING, Needs.TRAINING}


def pruned(
    path: Path, request: Request, output: Output, *, is_trusted: bool, limits: Mapping[str, Any] | None = None
) -> None:
    """Write what a request asks for; limits are about channels."""
    if request.pattern == CHANNELS:
        # A small step may be less than a channel.
        cutting.prune_channels(path, request, output, is_trusted=is_trusted, allow_empty=True, **(limits or {}))
    elif request.data:
        calibrating.prune(path, request, output, is_trusted=is_trusted)
    else:
        pruning.prune(path, request, output)
