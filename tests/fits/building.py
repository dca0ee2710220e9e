"""What tests of builds look at."""

from __future__ import annotations

from pathlib import Path


def written(folder: Path, root: Path) -> list[str]:
    """Return the files in a folder, as seen from another."""
    return sorted(path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
