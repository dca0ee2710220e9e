"""`prunectl verify`: is it what was made, of what it was made of?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from prunectl.checks.rules import Finding
from prunectl.checks.verify import verify as run
from prunectl.commands._command import make_command, resolve_stdin
from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.pruning.manifest import read_record
from prunectl.reporting.report import Column, Report, Section, Table, Unit
from prunectl.reporting.reporter import Reporter

_COLUMNS = (Column("verdict"), Column("what", title="check"), Column("differences", Unit.COUNT), Column("note"))
_SENTENCES = {
    "digest": "the file has the SHA-256 in the manifest",
    "zeros": "every tensor has as many zeros as the manifest records",
    "architecture": "tensors, configuration and graph equal the source's",
    "kept-weights": "every kept weight equals the source's, bit for bit",
    "kept-zeros": "every zero of the source is still zero",
    "other-tensors": "tensors that were not to be pruned have no new zeros",
    "source-digest": "the source has the SHA-256 in the manifest",
    "dropped": "no tensor has more new zeros than the manifest records",
}


def verify_report(path: str, findings: tuple[Finding, ...], *, has_gates: bool) -> Report:
    """The report on a file; only scripts get the gates as a list, since people see them in the table."""
    named = tuple(replace(finding, model=path) for finding in findings)
    failed = [finding for finding in named if finding.is_failure]
    checks = Table(
        "checks",
        _COLUMNS,
        tuple((finding.verdict, _SENTENCES[finding.id], int(finding.actual), finding.note) for finding in named),
    )
    title = f"{path}: {f'{len(failed)} of {len(named)} checks failed' if failed else 'all checks passed'}"
    return Report(
        models=(),
        table=Table(
            "checks",
            _COLUMNS,
            tuple((finding.verdict, finding.id, int(finding.actual), finding.note) for finding in named),
        ),
        sections=(Section(title, tables=(checks,)),),
        gates=named if has_gates else (),
        quiet_lines=tuple(f"{finding.id}: {finding.note}" for finding in failed),
        exit_code_override=int(bool(failed)),
    )


def verify(
    ctx: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Pruned model; - reads standard input.")],
    *,
    manifest: Annotated[Path | None, typer.Option(metavar="FILE", help="Manifest that prune --manifest wrote.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="Model that it was pruned from.")] = None,
) -> int:
    """Verify a pruned model against the manifest of its run, against its source, or both.

    Checks digests, zeros, kept weights and architecture. Exit code 1 if a check fails. Runs that change kept weights
    (--repair, obs, alps, --cluster) differ from the source.

    [dim]$[/] prunectl prune model.h5 -o out.h5 -s 80% --manifest out.json

    [dim]$[/] prunectl verify out.h5 --manifest out.json --against model.h5
    """
    reporter: Reporter = ctx.obj
    if manifest is None and against is None:
        raise UsageError(
            "there is nothing to compare the file with", hint="add --manifest FILE, --against SRC, or both"
        )
    record = read_record(manifest) if manifest is not None else None
    with resolve_stdin(out) as path:
        source = open_model(against) if against is not None else None
        findings = run(open_model(path), record, source, reporter.progress)
    return reporter.show(verify_report(out, findings, has_gates=reporter.is_json))


command = make_command(verify)
