"""What a run leaves for the next one, written before anything is said of the output: a fragment for make, a stamp."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.commands import if_changed_stamp
from prunectl.commands.if_changed_making import Making
from prunectl.errors import PrunectlError, attempt
from prunectl.reporting.report import Report
from prunectl.reporting.reporter import Reporter


@dataclass(frozen=True)
class Leaving(Reporter):
    """Shows what a command made when all that comes with it is there, and says what could not be written."""

    leave: Callable[[], tuple[str, ...]] = tuple

    def show(self, report: Report) -> int:
        """Print what a command found, and return its exit code."""
        # The page is among what the stamp knows.
        if self.html is not None:
            report = self._paged(report, self.html)
        if report.exit_code == 0:
            report = replace(report, remarks=(*report.remarks, *self.leave()))
        return Reporter(self.settings, self.command).show(report)


def leave(making: Making, depfile: Path | None, imported: Iterable[Path], *, has_stamp: bool) -> tuple[str, ...]:
    """Write the fragment and the stamp, where they are wanted; return in words what was not written.

    The output is there by now, and whole: without them no more is lost than that it is made again.
    """
    code = tuple(imported)
    wanted: list[tuple[Path, Callable[[Path], None], str]] = []
    if depfile is not None:
        wanted.append((depfile, lambda path: making.leave_fragment(path, code), "make does not know what was read"))
    if has_stamp:
        place = if_changed_stamp.place_of(making.output)
        so = f"the next run needs --force to replace {making.output}"
        wanted.append((place, lambda _: making.leave_stamp(code), so))
    said = []
    for place, write, so in wanted if _is_chief() else ():
        failed = attempt(write, place)
        if isinstance(failed, PrunectlError):
            said.append(
                f"{place} could not be written, and {so}: {failed.message.removesuffix('; nothing was written')}"
            )
    return tuple(said)


def _is_chief() -> bool:
    """Whether this process writes, of several that train one model."""
    return os.environ.get("RANK", "0") == "0"
