"""`prunectl size`: how big is it, really, and is that small enough?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunectl.commands.inputs import survey_each
from prunectl.commands.limits import limits_of
from prunectl.commands.verb import verb
from prunectl.formats.table import open_model
from prunectl.measuring import codecs
from prunectl.measuring.codecs import CodecName
from prunectl.measuring.gates import judge
from prunectl.measuring.sizes import measure
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.size_report import size_report

_LIMITS = "Limits: with any of them, exit code 1 says that a model is over it"


def _limit(metavar: str, line: str) -> Any:
    return typer.Option(metavar=metavar, help=line, rich_help_panel=_LIMITS)


def size(
    ctx: typer.Context,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Model files or folders; - is standard input.")],
    *,
    max_raw: Annotated[str, _limit("SIZE", "As it is on disk.")] = "",
    max_packed: Annotated[str, _limit("SIZE", "Packed by its container's own compression.")] = "",
    max_gzip: Annotated[str, _limit("SIZE", "Compressed, by the codec chosen.")] = "",
    min_sparsity: Annotated[str, _limit("RATIO", "Zeros among the prunable weights.")] = "",
    baseline: Annotated[str, _limit("FILE", "A model to compare with.")] = "",
    max_growth: Annotated[str, _limit("SIZE|%", "How much bigger than the baseline, compressed.")] = "",
    codec: Annotated[CodecName, typer.Option(help="What to compress with.")] = CodecName.GZIP,
    level: Annotated[int | None, typer.Option(help="Its level; gzip's is 6.")] = None,
) -> int:
    """Show raw, packed and compressed size, and sparsity; with a limit, judge them.

    Gzip means stock zlib at level 6: what Python's gzip.compress(data, 6, mtime=0) makes of the file. A folder is
    measured as a sorted tar without times.

    [dim]$[/] prunectl size model.h5

    [dim]$[/] prunectl size model.h5 --max-gzip 2MB --min-sparsity 0%

    [dim]$[/] prunectl size -q model.pt
    """
    reporter: Reporter = ctx.obj
    chosen = codecs.pick(codec, level)
    limits = limits_of(
        raw=max_raw, packed=max_packed, compressed=max_gzip, sparsity=min_sparsity,
        baseline=baseline, growth=max_growth, codec=chosen,
    )  # fmt: skip
    surveys, failures = survey_each(paths, lambda path: measure(open_model(path), chosen, reporter.progress))
    gates = [gate for found in surveys for gate in judge(found, limits)]
    return reporter.show(size_report(surveys, gates, failures, chosen))


command = verb(size)
