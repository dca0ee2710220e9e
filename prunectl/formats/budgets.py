"""The limits on what a stranger's file may cost, all in one place.

Every limit counts what would be *made* (objects, bytes, layers), and is asked before it is made: a file is refused in
less than 2 seconds and 300 MB, whatever stands in it. Beyond any real model, and little enough to refuse at once.
"""

from __future__ import annotations

MAX_GRAPH_FIELDS = 2_000_000
"""Fields of all nodes in the graph of a SavedModel, when its operations are held against what is allowed."""
