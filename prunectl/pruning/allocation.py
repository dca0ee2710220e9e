"""How many weights go in each layer, when it is not the same share everywhere?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prunectl.formats.base import Tensor
from prunectl.pruning.hashing import hashed, mixed

Allocation = Callable[[Sequence[Tensor], int], Sequence[int]]
"""From the tensors and how many weights go in all to how many go in each."""

BIASES = ("late", "early", "uniform")
_ODDS = (0.3, 0.6)
"""Up to the first of these numbers late layers lose most, up to the second early ones."""


def share(sizes: Sequence[int], rates: Sequence[float], total: int) -> list[int]:
    """Return counts that go with size times rate, none above its size, that add up to the total exactly."""
    full: set[int] = set()
    while True:
        rest = [place for place in range(len(sizes)) if place not in full]
        left = total - sum(sizes[place] for place in full)
        mass = sum(sizes[place] * rates[place] for place in rest)
        above = {place for place in rest if rates[place] * left > mass}
        if not above:
            break
        full |= above
    ideal = {place: sizes[place] * rates[place] * left / mass for place in rest} if left else dict.fromkeys(rest, 0.0)
    counts = [sizes[place] if place in full else int(ideal[place]) for place in range(len(sizes))]
    # What rounding down left over goes to the largest remainders.
    for place in sorted(rest, key=lambda place: (int(ideal[place]) - ideal[place], place))[: total - sum(counts)]:
        counts[place] += 1
    return counts


def erk(tensors: Sequence[Tensor], drop: int) -> Sequence[int]:
    """Return counts by Erdos-Renyi-Kernel: a layer's density goes with the sum of its lengths over their product."""
    sizes = [tensor.size for tensor in tensors]
    densities = [(sum(tensor.shape) or 1) / tensor.size for tensor in tensors]
    kept = share(sizes, densities, sum(sizes) - drop)
    return [size - keep for size, keep in zip(sizes, kept, strict=True)]


def biased(tensors: Sequence[Tensor], drop: int, *, seed: int, bias: str = "") -> Sequence[int]:
    """Return counts that rise or fall evenly from the first layer to the last, or that are the same share of each."""
    layers = list(dict.fromkeys(tensor.layer for tensor in tensors))
    places = [layers.index(tensor.layer) for tensor in tensors]
    rates = {
        "late": [1.0 + place for place in places],
        "early": [float(len(layers) - place) for place in places],
        "uniform": [1.0] * len(places),
    }[bias or draw(seed)]
    return share([tensor.size for tensor in tensors], rates, drop)


def draw(seed: int) -> str:
    """Return the bias that a seed stands for: late or early with odds of 30 % each, else uniform."""
    number = float(mixed(hashed(f"{seed}/bias")) >> 11) / (1 << 53)
    return BIASES[sum(number >= odds for odds in _ODDS)]
