"""What channels can be ranked by, as `prunectl plugins` lists it."""

from __future__ import annotations

from prunectl.channels.plugged import KIND
from prunectl.channels.scores import MEASURES, RANDOM
from prunectl.plugins import installed
from prunectl.training.choices import Choice

PLURAL = "channels"


def measures() -> tuple[Choice, ...]:
    """Return all names, and who brings them."""
    own = [Choice(PLURAL, one.name, "built in", one.line) for one in MEASURES]
    chance = Choice(PLURAL, RANDOM, "built in", "whatever the seed says")
    return (*own, chance, *(Choice(PLURAL, name, package, "") for name, package in installed(KIND).items()))
