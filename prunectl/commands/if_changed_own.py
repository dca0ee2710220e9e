"""Is all that would be replaced what prunectl itself wrote?"""

from __future__ import annotations

import os
from pathlib import Path

from prunectl.commands import if_changed_stamp
from prunectl.commands.if_changed_making import Making
from prunectl.commands.if_changed_stamp import Stamp
from prunectl.errors import UsageError


def check_own(making: Making, old: Stamp, place: Path | None = None) -> None:
    """Refuse to replace what is not as it was written with a stamp: of the output, or of what is beside it.

    With a place, only what is there is looked at.
    """
    known = if_changed_stamp.paths(old.written, making.output)
    inputs = {path.resolve() for path in making.files}
    for path in (*making.whole(), *making.places(), *known):
        if not os.path.lexists(path) or path.resolve() in inputs:
            continue
        if place is not None and not path.absolute().is_relative_to(place.absolute()):
            continue
        ((name, digest),) = if_changed_stamp.digests([path], making.output).items()
        if digest != old.written.get(name):
            is_known = name in old.written
            what = "has changed since prunectl wrote it" if is_known else f"was not written with {making.output}"
            raise UsageError(f"{path} {what}", hint="write elsewhere, or replace it with --force")
