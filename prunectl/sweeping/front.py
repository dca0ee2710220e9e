"""Which points does no other beat in both quality and size?"""

from __future__ import annotations

from collections.abc import Mapping

from prunectl.sweeping.point import BASE, Outcome, Point


def front(outcomes: Mapping[Point, Outcome]) -> list[Point]:
    """Return the Pareto front of the metric against the gzip size, from small to big."""
    sign = 1.0 if outcomes[BASE].is_more_better else -1.0
    known = {point: outcome for point, outcome in outcomes.items() if outcome.is_number}
    found: list[Point] = []
    best = float("-inf")
    # Of two that are as good, the smaller; of two alike, the one that comes first.
    for point, outcome in sorted(known.items(), key=lambda item: (item[1].gzip, -sign * item[1].value)):
        if sign * outcome.value > best:
            best = sign * outcome.value
            found.append(point)
    return found
