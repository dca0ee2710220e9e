"""Those who make points side by side: processes here, or on other machines."""

from __future__ import annotations

import importlib
import queue
from collections.abc import Sequence
from typing import Any, Protocol

from prunectl.errors import PrunectlError, UsageError
from prunectl.formats.optional import require
from prunectl.sweeping.point import Outcome, Point
from prunectl.sweeping.process import Process

RAY = "ray"


class Hand(Protocol):
    """One of them, who makes a point at a time."""

    def attempt(self, point: Point) -> Outcome | PrunectlError:
        """Have a point made."""

    def close(self) -> None:
        """End it, whatever it does."""


class Crew:
    """So many hands; safe to use from as many threads."""

    def __init__(self, hands: Sequence[Hand]) -> None:
        self._hands = hands
        self._free: queue.SimpleQueue[Hand] = queue.SimpleQueue()
        for hand in hands:
            self._free.put(hand)

    def attempt(self, point: Point) -> Outcome | PrunectlError:
        """Have a point made by whoever is free."""
        hand = self._free.get()
        try:
            return hand.attempt(point)
        finally:
            self._free.put(hand)

    def close(self) -> None:
        """End all of them, whatever they do."""
        for hand in self._hands:
            hand.close()


def check(place: str) -> None:
    """Refuse a place that is not known, or that cannot be used."""
    if place and place.partition(":")[0] != RAY:
        raise UsageError(f"{place!r} is no place to sweep on", hint="write --on ray, or --on ray:ADDRESS")
    if place:
        require(RAY, extra=RAY)


def hands(place: str, job: dict[str, Any], *, jobs: int, threads: int, lock: int) -> Sequence[Hand]:
    """Return those who work at a place: on this machine, or `ray`, or `ray:ADDRESS`."""
    if not place:
        return [Process(job, number, threads, lock) for number in range(jobs)]
    address = place.partition(":")[2]
    found: Sequence[Hand] = importlib.import_module("prunectl.sweeping.on_ray").hands(address, job, jobs, threads)
    return found
