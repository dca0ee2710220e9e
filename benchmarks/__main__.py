"""`python -m benchmarks [NAME...]`: every benchmark, or those named."""

from __future__ import annotations

import sys

from benchmarks import big_files, overhead, pruning, scripts, startup, training

ALL = {
    "startup": startup.run,
    "scripts": scripts.run,
    "big_files": big_files.run,
    "pruning": pruning.run,
    "overhead": overhead.run,
    "training": training.run,
}

for name in sys.argv[1:] or ALL:
    ALL[name]()
