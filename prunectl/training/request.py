"""What the user asks of `finetune`, in the words of the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.pruning.request import Request as Pruning
from prunectl.training.course import RATES
from prunectl.training.network import Means, Origin

DEFAULT_EPOCHS = 3


class MaskMode(StrEnum):
    """What becomes of zeros between two turns."""

    KEEP = "keep"
    REGROW = "regrow"


class Keep(StrEnum):
    """Whose weights are written."""

    BEST = "best"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Ramping:
    """A schedule whose points in time are still words."""

    name: str = ""
    """A curve; empty keeps the zeros that there are, or is polynomial where a sparsity is asked for."""
    initial: float = 0.0
    begin: str = "0"
    end: str = ""
    frequency: int | None = None
    params: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Every choice of a run."""

    data: str
    val: str = ""
    val_split: float = 0.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    means: Means = field(default_factory=Means)
    origin: Origin = field(default_factory=Origin)
    pruning: Pruning = field(default_factory=Pruning)
    ramping: Ramping = field(default_factory=Ramping)
    mask: MaskMode = MaskMode.KEEP
    keep: Keep = Keep.BEST
    rate: str = "constant"
    warmup: str = "0"
    early_stop: int | None = None
    frozen: tuple[str, ...] = ()
    """Selectors of what stays as it is."""
    distill: str = ""
    distill_model: str = ""
    """What builds the teacher, for one that holds weights alone; else what builds the model."""
    is_recalibrated: bool = False
    keeps_wrappers: bool = False
    workers: int = 1
    """Threads that read ahead."""
    checkpoint_dir: Path | None = None
    is_resumed: bool = False
    logdir: Path | None = None

    @property
    def prunes(self) -> bool:
        """Whether weights become zero in this run, beside those that are."""
        return self.pruning.sparsity is not None or bool(self.pruning.layers) or bool(self.pruning.pattern)

    @property
    def needs_targets(self) -> bool:
        """Whether anything is learned from targets: a teacher may be all that there is."""
        return not self.means.custom_step and not (self.distill and self.means.teacher_share == 1)

    @property
    def choices(self) -> dict[str, Any]:
        """What decides the numbers in the output; a run is resumed only with the same."""
        free = {"checkpoint_dir", "is_resumed", "logdir", "workers", "keeps_wrappers"}
        found = {name: value for name, value in asdict(self).items() if name not in free}
        known_later = {"example", "frozen"}
        means = {name: value for name, value in found["means"].items() if name not in known_later}
        plain: dict[str, Any] = json.loads(json.dumps({**found, "means": means}))
        return plain


def check(request: Request) -> None:
    """Refuse what contradicts itself, before a file is opened."""
    if request.val and request.val_split:
        raise UsageError("--val and --val-split exclude each other")
    if request.val_split and not 0 < request.val_split < 1:
        raise UsageError(f"--val-split takes a share between 0 and 1, not {request.val_split:g}")
    if request.rate not in RATES:
        raise UsageError(f"no learning-rate schedule is called {request.rate}", hint=f"known: {', '.join(RATES)}")
    if request.is_resumed and request.checkpoint_dir is None:
        raise UsageError("--resume needs the folder of the checkpoint", hint="--checkpoint-dir DIR --resume")
    if request.early_stop is not None and not (request.val or request.val_split):
        raise UsageError("--early-stop needs something to judge by", hint="add --val or --val-split")
    if request.distill_model and not request.distill:
        raise UsageError("--distill-model builds the teacher, and there is none", hint="--distill TEACHER")
    if not request.prunes:
        _check_unpruned(request)
    for option, value in (
        ("--epochs", request.epochs),
        ("--steps", request.steps),
        ("--early-stop", request.early_stop),
    ):
        if value is not None and value < 0:
            raise UsageError(f"{option} cannot be negative")


def _check_unpruned(request: Request) -> None:
    """Refuse what is about pruning where nothing is pruned."""
    ramping, pruning = request.ramping, request.pruning
    if request.mask is MaskMode.REGROW:
        # Which turns there are is said by the same word.
        ramping = replace(ramping, frequency=None)
    if ramping != Ramping():
        raise UsageError("a schedule needs a sparsity to end at", hint="add --sparsity 80%")
    if pruning.strategy != "magnitude" or pruning.params or pruning.scope != "layer":
        raise UsageError(
            "without a sparsity the zeros of the file are kept, and nothing is ranked",
            hint="add --sparsity 80%, or leave out --strategy, --param and --scope",
        )
