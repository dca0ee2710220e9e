"""Strategies, schedules and policies of your own."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned
from prunectl.plugins import group

_KINDS = {
    "strategy": "from weights to scores of their shape; the lowest go",
    "schedule": "from (done, initial, final) to a sparsity",
    "policy": "from a tensor to why it is left alone, or nothing",
    "channel strategy": "from rows of weights to a score for each row",
}


def text() -> str:
    """Return the text."""
    return f"""
Extending: strategies, schedules and policies of your own

Wherever a name is taken, so is a function: ./file.py:name, package.module:name,
or the name of an entry point of an installed package.

  # mine.py
  import numpy as np
  def small_squares(weights):
      return np.square(weights)

  prunectl prune model.h5 -o out.h5 -s 80% --strategy ./mine.py:small_squares

Entry points, and what stands behind them:

{aligned((group(kind), line) for kind, line in _KINDS.items())}

A function takes --param K=V (of a schedule, --schedule-param) as keyword
arguments. prunectl plugins lists what is built in, and what is installed by
which package.
"""
