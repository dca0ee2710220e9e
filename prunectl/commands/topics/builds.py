"""How prunectl fits into make and CI."""

from __future__ import annotations

from prunectl.reporting.gates.table import FORMATS


def text() -> str:
    """Return the text."""
    return f"""
Builds: make and CI

prune, strip, finetune and export take:

  --depfile FILE  writes for make which files were read
  --if-changed    does nothing where the output is up to date

  %.p.h5: %.h5
          prunectl prune $< -o $@ -s 80% --if-changed --depfile $@.d
          @touch $@
  -include *.d

Up to date is an output that the same options of the same version made of files
with the same content, and that nobody has changed since. .OUT.prunectl, beside
the output, holds the digests: keep both in a cache, or neither. What prunectl
wrote it may replace; what somebody changed since needs --force. What a function
of --data reads cannot be known, and is refused with --if-changed. An output is
there whole or not at all, also where a build is killed.

prunectl init writes budgets, prunectl check holds models against them, and
--report FORMAT:PATH writes what your CI shows:

  {", ".join(FORMATS)}
"""
