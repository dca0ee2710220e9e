"""How a run is recorded, repeated and verified."""

from __future__ import annotations


def text() -> str:
    """Return the text."""
    return """
Recipes: how a run is recorded, repeated and verified

--manifest FILE keeps a record of a run of prune: every choice, the digests of
input and output, and what went from each tensor.

--recipe FILE takes all choices from such a record. The same input then gives
the same bytes, on any machine; only where to, and from what, is still said.

  prunectl prune model.h5 -o small.h5 -s 80% --manifest run.json
  prunectl prune model.h5 -o again.h5 --recipe run.json
  cmp small.h5 again.h5

verify holds a file against the record and against its source: digests, zeros of
every tensor, no weight changed that was to stay, no zero lost.

  prunectl verify small.h5 --manifest run.json --against model.h5

What a recipe names lies where it lay: data files and functions of your own are
not in it.
"""
