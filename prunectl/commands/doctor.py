"""`prunectl doctor`: what works here?"""

from __future__ import annotations

import typer

from prunectl.commands.verb import verb
from prunectl.gating.installed import extras
from prunectl.reporting.doctor_report import doctor_report
from prunectl.reporting.reporter import Reporter


def doctor(ctx: typer.Context) -> int:
    """Show versions of what is installed, which commands and formats work, and what to install for the rest.

    Nothing is imported for it.

    [dim]$[/] prunectl doctor

    [dim]$[/] prunectl doctor --json
    """
    reporter: Reporter = ctx.obj
    return reporter.show(doctor_report(extras()))


command = verb(doctor)
