"""`prunectl strip`: what is left over from training?"""

from __future__ import annotations

from typing import Annotated

import typer

from prunectl.commands.if_changed import Maker
from prunectl.commands.inputs import STDIN, local
from prunectl.commands.requests import destination, parts_of
from prunectl.commands.verb import verb
from prunectl.formats.stripping import Part, Wish
from prunectl.pruning.strip import strip as run
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.strip_report import strip_report


def strip(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="File or folder; - is standard input.")],
    *,
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Where to; - is standard output.")] = "",
    only: Annotated[str, typer.Option(metavar="PARTS", help=f"Of {','.join(Part)}.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Store weights as 16-bit floats.")] = False,
    pack: Annotated[bool, typer.Option("--pack", help="Compress the output inside its container.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would come of it; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the input.")] = False,
) -> int:
    """Drop pruning masks and wrappers, optimizer state, training configuration and example inputs from MODEL.

    Pruned weights come out as weight times mask. What is left loads as a model that was never pruned or compiled.

    [dim]$[/] prunectl strip model.h5 -o small.h5

    [dim]$[/] prunectl strip model.pt -o small.pt --only masks,optimizer --pack
    """
    reporter: Reporter = ctx.obj
    wish = Wish(parts_of(only), is_half=half)
    with local(model) as path, destination(path, output, force=force, in_place=in_place, dry_run=dry_run) as place:
        found = run(path, wish, place, is_packed=pack)
        if output == STDIN and place is not None:
            return reporter.pour(place.target)
        return reporter.show(strip_report(found, str(place.target) if place is not None else ""))


command = verb(strip, Maker)
