"""Names told apart: a second tensor of the same name gets a number."""

from __future__ import annotations

from collections import Counter


class Distinct:
    """Gives each name out once: `a`, `a#2`, `a#3`."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def name(self, wanted: str) -> str:
        """Return the name that was asked for, with a number if it is taken."""
        found = wanted
        while found in self._seen:
            self._seen[wanted] += 1
            found = f"{wanted}#{self._seen[wanted]}"
        self._seen[found] = 1
        return found
