"""`prunectl diff`: what became of every tensor?"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from prunectl.commands.inputs import local
from prunectl.commands.verb import verb
from prunectl.errors import UsageError
from prunectl.formats.table import open_model
from prunectl.gating.diff_gates import judge, parse
from prunectl.gating.difference import difference
from prunectl.gating.read import Words
from prunectl.measuring.shading import shadings
from prunectl.reporting.diff_report import diff_report
from prunectl.reporting.reporter import Reporter
from prunectl.units import parse_ratio, parse_size


def diff(
    ctx: typer.Context,
    new: Annotated[str, typer.Argument(metavar="NEW", help="File or folder; - is standard input.")],
    old: Annotated[str, typer.Argument(metavar="OLD", help="What it was; also in another format.")],
    *,
    fail_on: Annotated[
        str, typer.Option(metavar="WHAT", help="Exit code 1 for growth:2%, nonzero, shape, dtype or changed.")
    ] = "",
) -> int:
    """Compare two models tensor by tensor: what is new, gone or changed, zeros that came and went, sizes.

    Tensors are the same by name; across formats by layer and shape, with axes moved where only one way is possible.
    nonzero means a zero of a prunable weight that is none any more.

    [dim]$[/] prunectl diff sparse.h5 model.h5

    [dim]$[/] prunectl diff model.onnx model.pt

    [dim]$[/] prunectl diff sparse.h5 model.h5 --fail-on growth:2%,nonzero,shape
    """
    reporter: Reporter = ctx.obj
    forbidden = parse(fail_on, Words(parse_size, parse_ratio))
    if new == old == "-":
        raise UsageError("standard input holds one model", hint="prunectl diff - OLD < NEW")
    with local(new) as path, local(old) as other:
        models = (open_model(path), open_model(other))
        found = difference(*models, reporter.progress)
        # Only a page has pictures.
        pairs = zip((new, old), models, (found.new, found.old), strict=True) if reporter.html is not None else ()
        masks = {name: shadings(model, survey) for name, model, survey in pairs}
    found = replace(found, new=replace(found.new, path=new), old=replace(found.old, path=old))
    report = diff_report(found, judge(found, forbidden), has_gates=reporter.is_json)
    return reporter.show(replace(report, masks=masks))


command = verb(diff)
