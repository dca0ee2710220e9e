"""`--report FORMAT:PATH`: the same findings, written in several ways at once."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from prunectl.commands.inputs import STDIN
from prunectl.errors import PrunectlError, UsageError, attempt, writing
from prunectl.formats import outputs
from prunectl.formats.names import nearest
from prunectl.formats.table import recognise
from prunectl.gating.finding import Findings
from prunectl.reporting.check_report import check_report
from prunectl.reporting.gates.table import FORMATS
from prunectl.reporting.reporter import Reporter, complain

STDOUT = STDIN
_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The file that GitHub shows at the end of a step."""


@dataclass(frozen=True, slots=True)
class Reports:
    """Which reports go where."""

    wanted: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, words: list[str], *, is_json: bool) -> Reports:
        """Return what was typed, understood before any work begins."""
        wanted = tuple(map(_split, words))
        places = [place for _, place in wanted]
        for place in places:
            if places.count(place) > 1:
                raise UsageError(f"two reports go to {place}")
            if place != STDOUT and not Path(place).absolute().parent.is_dir():
                raise UsageError(f"{Path(place).parent} is not a folder", hint=f"mkdir -p {Path(place).parent}")
            if place != STDOUT and _is_precious(Path(place)):
                raise UsageError(f"{place} is no place for a report", hint="--report junit:check.xml")
        if is_json and STDOUT in places:
            raise UsageError("--json has standard output for itself", hint="--report json:FILE, or without --json")
        return cls(wanted)

    def spare(self, *paths: Path | None) -> None:
        """Refuse a report in the place of a file that is read."""
        taken = {path.resolve() for path in paths if path is not None}
        for _, place in self.wanted:
            if place != STDOUT and Path(place).resolve() in taken:
                raise UsageError(f"{place} is no place for a report", hint="--report json:check.json")

    def show(self, found: Findings, reporter: Reporter) -> int:
        """Write all reports; what is printed otherwise is left out if one of them goes to standard output."""
        poured = ""
        for name, place in self.wanted:
            text = FORMATS[name](found)
            if place == STDOUT:
                poured = text
            else:
                _write(Path(place), text)
            if name == "github" and os.environ.get(_SUMMARY):
                where = Path(os.environ[_SUMMARY])
                with writing(where), where.open("a", encoding="utf-8") as summary:
                    summary.write(FORMATS["markdown"](found))
        report = check_report(found, has_gates=reporter.is_json)
        if STDOUT not in {place for _, place in self.wanted}:
            return reporter.show(report)
        sys.stdout.write(poured)
        sys.stdout.flush()
        for failure in report.failures:
            complain(failure.error)
        return report.exit_code


def _split(word: str) -> tuple[str, str]:
    name, sign, place = word.partition(":")
    if name not in FORMATS:
        raise UsageError(
            f"there is no report {name!r}",
            did_you_mean=nearest(name, list(FORMATS)),
            hint=f"reports: {', '.join(FORMATS)}",
        )
    if not sign or not place:
        raise UsageError(f"where to? --report {name}:PATH", hint=f"--report {name}:- is standard output")
    return name, place


def _is_precious(path: Path) -> bool:
    """Whether something is there that no report should take the place of."""
    return (
        path.is_dir()
        or path.suffix == ".toml"
        or (path.is_file() and not isinstance(attempt(recognise, path), PrunectlError))
    )


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        # A pipe or a device has no place that could be taken.
        with writing(path):
            path.write_text(text, encoding="utf-8")
        return
    outputs.write_text(path, text, is_forced=True)
