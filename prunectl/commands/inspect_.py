"""`prunectl inspect`: what is in this file?"""

from __future__ import annotations

from typing import Annotated

import typer

from prunectl.commands.inputs import survey_each
from prunectl.commands.verb import verb
from prunectl.formats.table import open_model
from prunectl.measuring import patterns
from prunectl.measuring.looking import Look, Order, look
from prunectl.reporting.inspect_report import inspect_report
from prunectl.reporting.reporter import Reporter


def inspect(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Files or folders; - is standard input.")],
    *,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Only these tensors; re:… is a regular expression.")] = "",
    sort: Annotated[Order | None, typer.Option(help="Biggest, sparsest or first name on top.")] = None,
    pattern: Annotated[str, typer.Option(metavar="PATTERN", help="How much follows 2:4, block:1x4 or channel.")] = "",
    hist: Annotated[bool, typer.Option("--hist", help="A histogram of the weights' magnitudes.")] = False,
    flops: Annotated[bool, typer.Option("--flops", help="Floating-point operations for one input.")] = False,
    zeros: Annotated[bool, typer.Option("--zeros/--no-zeros", help="Count zeros, or read no weight.")] = True,
) -> int:
    """Show what is in a model file: layers, sparsity, dead weight.

    No framework is loaded, and no code from the file runs.

    [dim]$[/] prunectl inspect model.h5

    [dim]$[/] prunectl inspect model.pt --sort sparsity --pattern 2:4

    [dim]$[/] prunectl inspect model.onnx --flops --json
    """
    reporter: Reporter = ctx.obj
    parsed = patterns.parse(pattern) if pattern else None
    wanted = Look(layers, sort, pattern, hist, flops, zeros, has_digest=reporter.is_json)
    surveys, failures = survey_each(models, lambda path: look(open_model(path), wanted, parsed, reporter.progress))
    return reporter.show(inspect_report(surveys, failures, has_flops=flops))


command = verb(inspect)
