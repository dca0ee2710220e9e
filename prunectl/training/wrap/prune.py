"""Prune a model file behind the framework's own pruning wrappers, and write the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prunectl.analysis.patterns import BlockPattern
from prunectl.analysis.tensor_io import count_zeros
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile, Role
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import temporary_files
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import TensorCounts
from prunectl.pruning.masks import Mask
from prunectl.pruning.plan import TensorPlan
from prunectl.pruning.prune import Pruned, prune
from prunectl.pruning.request import PruneRequest, parse_pattern
from prunectl.pruning.schedules import Schedule, SparsitySchedule
from prunectl.pruning.strip import stats_for_report
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.keras.compile import read_training_config
from prunectl.training.wrap import WrapperSpec, verify_roundtrip, wrap, wrapper_format


@dataclass(frozen=True, slots=True)
class WrapResult:
    """The result of a run with wrappers, and the number of wrapped tensors."""

    pruned: Pruned
    wrapped: int
    bare: tuple[str, ...]
    """Tensors that the framework has no wrapper for."""
    ramp: SparsitySchedule | None
    """The schedule of later training; None if the weights are pruned now."""
    loses_compilation: bool
    """Whether the file has a training configuration (`compile`), but the result has none."""
    loses_optimizer: bool
    """Whether the file has optimizer state, but the result has none."""


def prune_wrapped(
    path: Path,
    request: PruneRequest,
    ramp: SparsitySchedule | None,
    origin: LoadOptions,
    output: Destination | None,
    *,
    allow_empty: bool = False,
) -> WrapResult:
    """Prune a model behind wrappers: now, or with a ramp, in later training."""
    model = open_model(path)
    wrapper_format(model, has_schedule=ramp is not None)
    outputs.check(model, output)
    user_code.check(model, origin)
    with temporary_files() as scratch:
        plain = scratch / path.resolve().name
        pruned = prune(path, replace(request, is_packed=False), Destination(plain), allow_empty=allow_empty)
        pruned_model = open_model(plain)
        with outputs.staging_dir(model, output) as (folder, target):
            wrapping = _wrapping(pruned_model, pruned, ramp, origin)
            written = folder / target.name
            bare = wrap(model, wrapping, written)
            verify_roundtrip(pruned_model if ramp is None else model, written)
            if request.is_packed:
                outputs.pack(written, folder)
            result = open_model(written)
            after, loses_optimizer = stats_for_report(result), _has_optimizer(model) and not _has_optimizer(result)
            loses_compilation = _is_compiled(model) and not _is_compiled(result)
    if ramp is not None:
        pruned = replace(pruned, counts=_untouched(model, pruned), lost={})
    shown = str(output.target if output is not None else "the result")
    pruned = replace(pruned, request=request, after=replace(after, path=shown))
    return WrapResult(pruned, len(wrapping.names) - len(bare), bare, ramp, loses_compilation, loses_optimizer)


def _wrapping(model: ModelFile, pruned: Pruned, ramp: SparsitySchedule | None, origin: LoadOptions) -> WrapperSpec:
    pattern, pool = parse_pattern(pruned.request)
    if ramp is None:
        return WrapperSpec(_masks(model, pruned), pattern=pattern, pool=pool, origin=origin)
    if not isinstance(pattern, BlockPattern | None):
        raise UsageError(
            f"--schedule cannot be used with the pattern {pruned.request.pattern}, which tfmot applies at once",
            hint="leave out --schedule",
        )
    shares = {cut.tensor.name: _share(cut, pruned) for cut in pruned.plan.cuts}
    schedules: dict[str, Schedule] = {
        name: replace(ramp, final=share, initial=min(ramp.initial, share)) for name, share in shares.items()
    }
    return WrapperSpec({}, schedules, pattern=pattern, pool=pool, origin=origin)


def _has_optimizer(model: ModelFile) -> bool:
    return any(tensor.role == Role.OPTIMIZER and tensor.size > 1 for tensor in model.tensors)


def _is_compiled(model: ModelFile) -> bool:
    return model.about.keras is not None and bool(read_training_config(model).get("loss"))


def _masks(model: ModelFile, pruned: Pruned) -> dict[str, Mask]:
    """Masks of the kept weights: all that are not +0.0 in the pruned file."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    return {cut.tensor.name: _bits(model.read(tensors[cut.tensor.name])) != 0 for cut in pruned.plan.cuts}


def _bits(array: Array) -> Array:
    # Compared as integers, so that -0.0 and NaN count as kept.
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _share(cut: TensorPlan, pruned: Pruned) -> float:
    """The sparsity of a tensor: the requested one if it gives the pruned count, else the share that was pruned."""
    dropped = pruned.counts[cut.tensor.name].dropped
    requested = (pruned.sparsity, *(ratio for _, ratio in pruned.request.layers))
    exact = (ratio for ratio in requested if round(ratio * cut.tensor.size) == dropped)
    return next(exact, dropped / cut.tensor.size)


def _untouched(model: ModelFile, pruned: Pruned) -> dict[str, TensorCounts]:
    """The counts of a file before anything is pruned: its zeros."""
    return {cut.tensor.name: TensorCounts(0, count_zeros(model, cut.tensor)) for cut in pruned.plan.cuts}
