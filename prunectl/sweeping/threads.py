"""How many threads each process has, and what else it finds around it."""

from __future__ import annotations

import os
import sys

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def surroundings(threads: int) -> dict[str, str]:
    """Return the environment of a process that makes points."""
    return {
        **dict.fromkeys(_THREADS, str(threads)),
        "TF_NUM_INTEROP_THREADS": "1",
        # What can be imported here can be imported there.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def share(jobs: int) -> int:
    """Return how many threads each process may have, if nobody says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(said) if said.isdecimal() and int(said) else max(known // jobs, 1)
