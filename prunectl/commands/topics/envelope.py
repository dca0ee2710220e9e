"""What scripts read."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned
from prunectl.reporting.envelope import SCHEMA
from prunectl.reporting.settings import Layout

KEYS = {
    "schema": SCHEMA,
    "tool": "name and version",
    "command": "what ran",
    "ok": "whether the exit code is 0",
    "exit_code": "prunectl help exit-codes",
    "models": "one for each input: path, format, bytes, params, layers ...",
    "gates": "limits: metric, limit, actual, ok",
    "artifacts": "what was written: path, bytes",
    "warnings": "sentences",
    "error": "code, kind, message, hint, did_you_mean; null if all went well",
}


def text() -> str:
    """Return the text."""
    return f"""
JSON, and what else scripts read

--json prints one object on standard output, also when a command fails:

{aligned(KEYS.items())}

Bytes and counts are whole numbers, ratios lie between 0 and 1, keys are sorted,
and keys are only ever added.

  prunectl inspect model.h5 --json | jq '.models[0].prunable_sparsity'

--format chooses among {", ".join(Layout)}. In a pipe it is
plain: rows with tabs between, without a head, never cropped. Notes, progress
and errors go to standard error. -q leaves notes out; size -q prints the
compressed bytes alone.
"""
