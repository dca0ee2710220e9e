"""Writes what is expected anew; with names of cases, shows all that comes of them instead.

$ python -m tests.golden
$ python -m tests.golden prune/lamp-global
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.golden.cases import CASES
from tests.golden.running import EXPECTED, as_text, probe, result


def main() -> int:
    """Run the cases, and write or show what came of them."""
    names = sys.argv[1:]
    found = {}
    for case in CASES:
        if not names or case.name in names:
            with tempfile.TemporaryDirectory() as folder:
                found[case.name] = result(case, Path(folder), is_whole=bool(names))
    if names:
        sys.stdout.write(f"{as_text(found)}\n")
        return 0 if found.keys() == set(names) else 2
    EXPECTED.write_text(f"{as_text({'zlib': probe(), 'cases': found})}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
