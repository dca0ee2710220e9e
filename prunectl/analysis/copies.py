"""Where a file seems to hold its weights twice: as they were trained, and averaged over the training (EMA, SWA)."""

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
MOST_ROOTS = 3
"""Entries around the weights whose names are looked at."""


def averaged_copies_hint(stats: ModelStats) -> tuple[str, ...]:
    """Say it where a file holds its weights twice: as they were trained, and averaged (EMA, SWA)."""
    copies = next(averaged_copies(stats.layers), None)
    if copies is None:
        return ()
    trained, average, count = copies
    names = f"{abbreviated(trained) or 'the top level'} and {abbreviated(average)}"
    sentence = f"The file holds the weights twice: {names}, their average ({count} tensors). "
    return (
        sentence
        + "Both copies are pruned, each by its own values; the code that loads the file decides which one it uses.",
    )


@lru_cache(maxsize=1024)
def is_average(part: str) -> bool:
    """Whether a part of a name says that what it holds is an average."""
    return _AVERAGE.search(part) is not None


def averaged_copies(tensors: Iterable[Tensor | TensorStats]) -> Iterator[tuple[str, str, int]]:
    """Yield where a file seems to hold weights twice, as trained and as an average (EMA, SWA), and how many.

    A copy is known by a part of its names, and by the rest of them: `ema_model_state_dict.ema_model.a.weight` beside
    `model_state_dict.a.weight`, `model_ema.aweight` beside `model.a.weight`.
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
        for i, part in enumerate(parts[:MOST_ROOTS]):
            if is_average(part):
                averages.setdefault(".".join(parts[: i + 1]), []).append(tensor)
                break
        else:
            # Pruning of PyTorch calls a weight so while its mask lies beside it.
            trained.append(([*parts[:-1], parts[-1].removesuffix("_orig")], tensor.shape))
    others: dict[tuple[str, tuple[int, ...]], str] = {}
    for parts, shape in trained if averages else ():
        for skip in range(min(MOST_ROOTS, len(parts))):
            key, place = ("".join(parts[skip:]), shape), ".".join(parts[:skip])
            # Of several places, what they have in common is known.
            others[key] = common_entry(others[key], place) or others[key] if key in others else place
    for copy, averaged in averages.items():
        originals = [other for tensor in averaged if (other := _other(tensor, copy, others)) is not None]
        if 2 * len(originals) >= len(averaged):
            yield Counter(originals).most_common(1)[0][0], copy, len(originals)


def common_entry(first: str, second: str) -> str:
    """The innermost entry that holds what two names stand for."""
    parts = zip(first.split("."), second.split("."), strict=False)
    return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _other(tensor: Tensor | TensorStats, place: str, others: Mapping[tuple[str, tuple[int, ...]], str]) -> str | None:
    parts = tensor.name.removeprefix(f"{place}.").removesuffix("_orig").split(".")
    keys = (("".join(parts[skip:]), tensor.shape) for skip in range(min(MOST_ROOTS, len(parts))))
    return next((others[key] for key in keys if key in others), None)
