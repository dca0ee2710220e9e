"""Detection of files that hold their weights twice: as trained, and as an average over training steps (EMA, SWA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import takewhile

from prunectl.analysis.stats import ModelStats, TensorStats
from prunectl.errors import abbreviated
from prunectl.formats.base import Role, Tensor

_AVERAGE_WORDS = ("ema", "swa", "averaged")
_AVERAGE = re.compile(rf"(^|_)({'|'.join(_AVERAGE_WORDS)})(_|$)", re.IGNORECASE)
MAX_ENTRY_DEPTH = 3
"""Number of leading parts of a tensor name that may be entries of a checkpoint around the weights."""


def averaged_copies_hint(stats: ModelStats) -> tuple[str, ...]:
    """A hint if the file holds its weights twice: as trained, and as an average (EMA, SWA)."""
    copies = next(averaged_copies(stats.layers), None)
    if copies is None:
        return ()
    trained, average, count = copies
    names = f"{abbreviated(trained) or 'the top level'} and {abbreviated(average)}"
    sentence = f"The file holds the weights twice: {names}, their average ({count} tensors). "
    return (
        sentence
        + "`prunectl prune` prunes both, each by its own values, unless --exclude leaves one out; the code that loads "
        "the file decides which one it uses.",
    )


@lru_cache(maxsize=1024)
def is_average(part: str) -> bool:
    """Whether a part of a tensor name marks an average, as `model_ema` does."""
    return _AVERAGE.search(part) is not None


def averaged_copies(tensors: Iterable[Tensor | TensorStats]) -> Iterator[tuple[str, str, int]]:
    """Yield each averaged copy (EMA, SWA): entry of the trained weights, entry of the average, number of tensors.

    A part of a copy's name marks an average. Without that part and all dots, the name is that of a trained weight, as
    `ema_model_state_dict.ema_model.a.weight` and `model_state_dict.a.weight`, `model_ema.aweight` and `model.a.weight`.
    """
    tensors = tuple(tensors)
    if not any(word in tensor.name.lower() for tensor in tensors for word in _AVERAGE_WORDS):
        return
    averages: dict[str, list[Tensor | TensorStats]] = {}
    trained: list[tuple[list[str], tuple[int, ...]]] = []
    for tensor in tensors:
        if tensor.role in {Role.OPTIMIZER, Role.MASK}:
            continue
        parts = tensor.name.split(".")
        for i, part in enumerate(parts[:MAX_ENTRY_DEPTH]):
            if is_average(part):
                averages.setdefault(".".join(parts[: i + 1]), []).append(tensor)
                break
        else:
            # torch.nn.utils.prune renames a weight to `_orig` as long as it has a mask.
            trained.append(([*parts[:-1], parts[-1].removesuffix("_orig")], tensor.shape))
    entries: dict[tuple[str, tuple[int, ...]], str] = {}
    for parts, shape in trained if averages else ():
        for skip in range(min(MAX_ENTRY_DEPTH, len(parts))):
            key, entry = ("".join(parts[skip:]), shape), ".".join(parts[:skip])
            # Of several entries with this name and shape, their common parent is used.
            entries[key] = common_entry(entries[key], entry) or entries[key] if key in entries else entry
    for copy, averaged in averages.items():
        originals = [other for tensor in averaged if (other := _entry(tensor, copy, entries)) is not None]
        if 2 * len(originals) >= len(averaged):
            yield Counter(originals).most_common(1)[0][0], copy, len(originals)


def common_entry(first: str, second: str) -> str:
    """The innermost entry that contains both names; empty if there is none."""
    parts = zip(first.split("."), second.split("."), strict=False)
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _entry(tensor: Tensor | TensorStats, copy: str, entries: Mapping[tuple[str, tuple[int, ...]], str]) -> str | None:
    parts = tensor.name.removeprefix(f"{copy}.").removesuffix("_orig").split(".")
    keys = (("".join(parts[skip:]), tensor.shape) for skip in range(min(MAX_ENTRY_DEPTH, len(parts))))
    return next((entries[key] for key in keys if key in entries), None)
