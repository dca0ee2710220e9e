"""`prunectl verify`: is it what was made, of what it was made of?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands.inputs import local
from prunectl.commands.verb import verb
from prunectl.errors import UsageError
from prunectl.formats.table import open_model
from prunectl.gating import record
from prunectl.gating.verify import verify as run
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.verify_report import verify_report


def verify(
    ctx: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A pruned model; - is standard input.")],
    *,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What prune --manifest wrote: digests and counts.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="SRC", help="What it was pruned from: zeros added, nothing else.")
    ] = None,
) -> int:
    """Hold a pruned file against the record of its making, and against its source; exit code 1 where it does not hold.

    A run that also changes the weights it keeps, such as one with --repair, does not hold against its source.

    [dim]$[/] prunectl prune model.h5 -o out.h5 --sparsity 80% --manifest out.json

    [dim]$[/] prunectl verify out.h5 --manifest out.json --against model.h5
    """
    reporter: Reporter = ctx.obj
    if manifest is None and against is None:
        raise UsageError("what is it to be held against?", hint="--manifest FILE, or --against SRC, or both")
    known = record.read(manifest) if manifest is not None else None
    with local(out) as path:
        source = open_model(against) if against is not None else None
        found = run(open_model(path), known, source, reporter.progress)
    return reporter.show(verify_report(out, found, has_gates=reporter.is_json))


command = verb(verify)
