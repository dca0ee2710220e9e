"""`python -m benchmarks [NAME...]`: every benchmark, or those named."""

from __future__ import annotations

import sys

from benchmarks import big_files, pruning, scripts, startup

ALL = {"startup": startup.run, "scripts": scripts.run, "big_files": big_files.run, "pruning": pruning.run}

for name in sys.argv[1:] or ALL:
    ALL[name]()
