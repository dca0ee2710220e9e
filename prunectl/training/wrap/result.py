"""Wrappers around the result of a training, for the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.table import open_model
from prunectl.training.keeper import Keeper
from prunectl.training.request import Request
from prunectl.training.wrap.kept import Kept
from prunectl.training.wrap.wrapping import Wrapping, check_stripped, wrap, wrapper_of


def check_wrappable(model: ModelFile, request: Request, keeper: Keeper) -> None:
    """Refuse, before training, what could not be wrapped after it."""
    if not request.keeps_wrappers:
        return
    wrapper_of(model, has_schedule=False)
    if not keeper.masks and keeper.rules.schedule is None:
        raise UsageError(
            f"{model.path} has no zeros that wrappers could keep",
            hint="add --sparsity 80%, or leave out --keep-wrappers",
        )


def wrapping_of(keeper: Keeper, request: Request, held: Kept | None, steps: int) -> Wrapping:
    """Return what the wrappers of a result say: its masks, and the schedule of the file if that is not at its end."""
    rules = keeper.rules
    wrapping = Wrapping(dict(keeper.masks), pattern=rules.wish.pattern, pool=rules.method.pool, origin=request.origin)
    if held is None or request.prunes or not held.is_open_after(steps):
        return wrapping
    schedules = {
        tensor.name: held.schedules[tensor.layer] for tensor in rules.choice.tensors if tensor.layer in held.schedules
    }
    return Wrapping(wrapping.masks, schedules, held.step + steps, held.block, held.pool, request.origin)


def wrap_in_place(written: Path, wrapping: Wrapping) -> tuple[str, ...]:
    """Put wrappers into a result that was just written, and return which tensors could get none."""
    plain = open_model(written)
    with tempfile.TemporaryDirectory(dir=written.parent, prefix=".wrapped-") as scratch:
        target = Path(scratch) / written.name
        bare = wrap(plain, wrapping, target)
        check_stripped(plain, target)
        if written.is_dir():
            shutil.rmtree(written)
        os.replace(target, written)
    return bare
