"""The statistics and hints of `inspect`, and the order and folding of its rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any

from prunectl.analysis import sizes
from prunectl.analysis.copies import averaged_copies_hint
from prunectl.analysis.stats import ModelStats, TensorStats, histogram, measure_stats, with_macs
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.formats.base import PRUNABLE, QUANTISED, WEIGHTS, Capability, ModelFile, Role, Tensor, select_names
from prunectl.formats.registry import by_name, load, require

if TYPE_CHECKING:
    from prunectl.analysis.patterns import Pattern

_MANY_ZEROS = 0.3
_MENTIONED_SHARE = 0.01
_STRIPPABLE = {
    "masks": "The file still holds pruning wrappers, whose masks take {} of it. `prunectl strip` removes them.",
    "optimizer": "The optimizer state takes {} of the file and is not needed for inference. "
    "`prunectl strip` removes it.",
    "example inputs": "The example inputs of the export take {} of the file and are not needed for inference. "
    "`prunectl strip` removes them.",
}
"""Hint for each part of a file that only training needs; {} is its share of the file."""


def hints(stats: ModelStats) -> tuple[str, ...]:
    """Hints for the user, mostly about what makes the file larger than necessary."""
    shares = {part.name: part.bytes / stats.bytes.raw for part in stats.parts if stats.bytes.raw}
    sentences = [*stats.about.notes, *(stats.architecture.notes if stats.architecture is not None else ())]
    zeros = stats.prunable_sparsity
    if zeros is not None and zeros >= _MANY_ZEROS and not stats.about.is_compressed:
        sentences.append(
            f"{_percent(zeros)} of the prunable weights are zero, yet the file is no smaller: in this format "
            f"a zero takes as many bytes as any other number. {_suggestion(stats)}"
        )
    row = by_name(stats.format)
    is_only_read = not (Capability.WRITE & row.can or row.is_of_ranks)
    for part, sentence in _STRIPPABLE.items():
        if (share := shares.get(part, 0)) > _MENTIONED_SHARE:
            for_export = sentence.replace("`prunectl strip` removes it", "`prunectl export` leaves it out")
            sentences.append((for_export if is_only_read else sentence).format(_percent(share)))
    if kept := parts_without_masks(stats):
        sentences = [
            sentence.replace("`prunectl strip", f"`prunectl strip {kept}").replace(*_MASKS_STAY)
            for sentence in sentences
        ]
    return (*sentences, *quantised_hint(stats), *averaged_copies_hint(stats))


_MASKS_STAY = (
    "`prunectl strip --only optimizer,training` removes them.",
    "They cannot be removed, because the file does not describe the layers that they wrap.",
)


def parts_without_masks(stats: ModelStats) -> str:
    """The option with which `strip` leaves masks alone, if the file lacks the model that they belong to; else empty."""
    masks = [row.name for row in stats.layers if row.role is Role.MASK]
    # An old HDF5 weights file names its masks (`mask:0`) in groups of layers; newer ones and checkpoints do not.
    is_bare = stats.format in {"saved-model", "tf-checkpoint"} or (
        stats.format == "keras-h5" and not any(name.endswith(":0") for name in masks)
    )
    return "--only optimizer,training" if masks and is_bare and stats.about.keras is None else ""


def quantised_hint(stats: ModelStats) -> list[str]:
    """A hint that quantised kernels cannot be pruned, although their zeros are counted."""
    dtypes = sorted({row.dtype for row in stats.layers if row.role in PRUNABLE and row.dtype in QUANTISED})
    if not dtypes:
        return []
    return [f"Its kernels are quantised to {' and '.join(dtypes)} and cannot be pruned: prune before quantising."]


def _percent(share: float) -> str:
    """A share in whole percents, which are a hundred only when it is everything."""
    return f"{share:.0%}" if share == 1 else f"{min(round(share * 100), 99)}%"


def _suggestion(stats: ModelStats) -> str:
    """The command that turns zeros into a smaller file."""
    if Capability.PACK & by_name(stats.format).can:
        return "`prunectl strip --pack` compresses the file inside its container; it still loads as before."
    return "Compressed, it is smaller: `prunectl size` shows by how much."


class SortKey(StrEnum):
    """Order of the rows."""

    SIZE = "size"
    SPARSITY = "sparsity"
    PARAMS = "params"
    NAME = "name"


_KEYS: dict[SortKey, Callable[[TensorStats], Any]] = {
    SortKey.SIZE: lambda row: -row.bytes,
    SortKey.SPARSITY: lambda row: -(row.sparsity or 0.0),
    SortKey.PARAMS: lambda row: -row.params,
    SortKey.NAME: lambda row: row.name,
}


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """What `inspect` measures, and of which tensors."""

    layers: str = ""
    order: SortKey | None = None
    pattern: str = ""
    has_histogram: bool = False
    has_flops: bool = False
    has_zeros: bool = True
    has_digest: bool = False
    """Whether to hash the model, which reads every byte of it."""


def inspect_model(
    model: ModelFile, options: InspectOptions, pattern: Pattern | None = None, meter: ProgressFactory = no_progress
) -> ModelStats:
    """The statistics of a model that the options ask for, and hints."""
    if options.has_flops:
        require(model, Capability.FLOPS)
    selected = _selected(model, options)
    total = sum(tensor.storage.stored_bytes for tensor in selected)
    with meter(f"reading {model.path.name}", total) as bar:
        stats = measure_stats(model, selected, has_zeros=options.has_zeros, pattern=pattern, tick=bar.advance)
    if options.has_flops:
        stats = with_macs(stats, load(by_name(model.format).graph)(model))
    if options.has_histogram:
        stats = replace(stats, histogram=histogram(model, (tensor for tensor in selected if tensor.is_prunable)))
    if options.has_digest and options.has_zeros:
        stats = replace(stats, sha256=sizes.sha256(model))
    if model.folder is not None:
        stats = replace(stats, architecture=load("families:architecture")(model))
    if options.order:
        stats = replace(stats, layers=tuple(sorted(stats.layers, key=_KEYS[options.order])))
    return replace(stats, pattern=options.pattern, advice=hints(stats))


def _selected(model: ModelFile, options: InspectOptions) -> tuple[Tensor, ...]:
    return select_names(model, options.layers) if options.layers else model.tensors


def bytes_read(model: ModelFile, options: InspectOptions) -> int:
    """Bytes that are read to count zeros: those of the selected tensors, or whole files if these are hashed too."""
    if options.has_digest:
        return model.nbytes
    return sum({tensor.storage.key: tensor.storage.stored_bytes for tensor in _selected(model, options)}.values())


@dataclass(frozen=True, slots=True)
class FoldedTensors:
    """Tensors that the overview sums up in one line."""

    name: str
    """Number and kind of the tensors, such as `12 biases`."""
    bytes: int


_STATISTIC = re.compile(r"(^|[._/])(running_(mean|var)|num_batches_tracked|moving_(mean|variance))(:\d+)?($|/)")
_NOUNS = {
    Role.BIAS: ("bias", "biases"),
    Role.NORM: ("norm parameter", "norm parameters"),
    Role.STATE: ("other state tensor", "other state tensors"),
    Role.MASK: ("pruning mask", "pruning masks"),
    Role.SCHEDULE: ("variable of a pruning wrapper", "variables of pruning wrappers"),
    Role.OPTIMIZER: ("optimizer slot", "optimizer slots"),
}
_VECTORS = ("other vector or scalar", "other vectors and scalars")
_STATISTICS = ("batch-norm statistic", "batch-norm statistics")


def overview(stats: ModelStats, *, is_sorted: bool) -> tuple[tuple[TensorStats, ...], tuple[FoldedTensors, ...]]:
    """One row for each kernel, then one for each other matrix; the rest is summed up by kind.

    Rows that the user sorted (`is_sorted`) keep their order.
    """
    rows: list[TensorStats] = []
    folded: dict[tuple[str, str], list[TensorStats]] = {}
    for row in stats.layers:
        nouns = _folding_nouns(row)
        (rows if nouns is None else folded.setdefault(nouns, [])).append(row)
    if not rows:
        return in_natural_order(stats.layers), ()
    if not is_sorted:
        rows = [row for _, group in groupby(sorted(rows, key=_rank), key=_rank) for row in in_natural_order(group)]
    lines = (_fold(nouns, members, stats.bytes.raw) for nouns, members in folded.items())
    return tuple(rows), tuple(sorted(lines, key=lambda line: -line.bytes))


def _rank(row: TensorStats) -> int:
    """Kernels come first, those that can be pruned before those that are quantised."""
    return 0 if row.is_prunable else 1 if row.role in PRUNABLE else 2


def _folding_nouns(row: TensorStats) -> tuple[str, str] | None:
    if row.role is Role.OTHER:
        return _VECTORS if len(row.shape) < 2 else None
    is_statistic = row.role is Role.STATE and _STATISTIC.search(row.name)
    return _STATISTICS if is_statistic else _NOUNS.get(row.role)


def _fold(nouns: tuple[str, str], rows: list[TensorStats], file_bytes: int) -> FoldedTensors:
    # Views may share bytes, so their sum is limited to the size of the file.
    size = min(sum(row.bytes for row in rows if not row.tied_to), file_bytes)
    return FoldedTensors(f"{len(rows):,} {nouns[len(rows) != 1]}", size)


def in_natural_order(rows: Iterable[TensorStats]) -> tuple[TensorStats, ...]:
    """Rows in natural order (2 before 10) if the file has them in alphabetical order; else in the file's order."""
    return tuple(_natural(rows))


def _natural(rows: Iterable[TensorStats]) -> Iterator[TensorStats]:
    for _, group in groupby(rows, key=lambda row: row.role in WEIGHTS):
        listed = list(group)
        names = [row.name for row in listed]
        yield from sorted(listed, key=lambda row: _natural_key(row.name)) if names == sorted(names) else listed


_NUMBER = re.compile(r"(\d{1,18})")


def _natural_key(name: str) -> list[str | int]:
    # re.split with a group returns the numbers at odd indices.
    return [int(piece) if index % 2 else piece for index, piece in enumerate(_NUMBER.split(name))]
