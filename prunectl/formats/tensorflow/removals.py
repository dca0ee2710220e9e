"""What went from a bundle, as it is told to the user."""

from __future__ import annotations

from collections.abc import Mapping

from prunectl.formats.stripping import Part, Removed
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.training_state import pieces
from prunectl.formats.tensorflow.variable_names import METRICS, VALUE_SUFFIX


def removed(bundle: Bundle, dead: Mapping[bytes, Part]) -> tuple[Removed, ...]:
    """Return entries that are gone, with the bytes that they had to themselves."""
    return tuple(Removed(_name(key), part, _own_bytes(bundle, bundle.entries[key])) for key, part in dead.items())


def emptied(bundle: Bundle, dead: Mapping[bytes, Part]) -> tuple[Removed, ...]:
    """Return entries that became zeros; in each shard the bytes of the longest stay, as the zeros of them all."""
    resting: dict[int, tuple[int, bytes]] = {}
    for key in dead:
        for piece in pieces(bundle, [key]):
            entry = bundle.entries[piece]
            resting[entry.shard] = max(resting.get(entry.shard, (0, b"")), (entry.nbytes, key))
    stays: dict[bytes, int] = {}
    for nbytes, key in resting.values():
        stays[key] = stays.get(key, 0) + nbytes
    return tuple(
        Removed(_name(key), part, max(_own_bytes(bundle, bundle.entries[key]) - stays.get(key, 0), 0))
        for key, part in dead.items()
    )


def _own_bytes(bundle: Bundle, entry: Entry) -> int:
    return sum(bundle.entries[key].nbytes for key in pieces(bundle, [entry.key]) if key not in bundle.shared)


def _name(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace").removesuffix(VALUE_SUFFIX)


def part_of(name: str) -> Part | None:
    """Return the part that a metric belongs to; nothing for what tells its part by its role."""
    return Part.TRAINING if name.startswith(METRICS) else None
