"""`prunectl strip`: what is left over from training?"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import make_command, resolve_model
from prunectl.commands._requests import BuildCommand, ModelArgument, OutputOption, OutputOptions
from prunectl.errors import UsageError
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.detect import URL, without_secrets
from prunectl.pruning.averages import Keep
from prunectl.pruning.destination import Destination
from prunectl.pruning.strip import Stripped, strip
from prunectl.reporting.prune import before_after, output_report
from prunectl.reporting.report import Column, Report, Table, Unit
from prunectl.reporting.reporter import Reporter

_ITEMS = (Column("removed"), Column("part"), Column("bytes", Unit.BYTES))
_PARTS = (Column("part"), Column("removed", Unit.COUNT), Column("bytes", Unit.BYTES))


def strip_report(result: Stripped, output: str, *, is_rewritten: bool) -> Report:
    """The report on a run; without an output it was a dry run. `is_rewritten` is for --pack and --half."""
    rows = tuple((item.name, str(item.part), item.bytes) for item in result.removed)
    items = Table("removed", _ITEMS, rows, total=("all", "", sum(item.bytes for item in result.removed)))
    # A copy may be a few bytes smaller, as its external data has a shorter name.
    has_shrunk = is_rewritten and result.after.bytes.raw < result.before.bytes.raw
    notes = [*dict.fromkeys((*result.notes, *result.after.about.notes))]
    notes += [] if rows or has_shrunk else ["There was nothing to strip: the output holds the same data as the input."]
    tables = (*([_by_part(result)] if rows else []), before_after(result.before, result.after))
    return output_report(result, output, tables, rows=items, notes=notes)


def _by_part(result: Stripped) -> Table:
    kinds = [part for part in StripPart if any(item.part is part for item in result.removed)]
    of = {part: [item.bytes for item in result.removed if item.part is part] for part in kinds}
    rows = tuple((str(part), len(sizes), sum(sizes)) for part, sizes in of.items())
    total = ("all", len(result.removed), sum(item.bytes for item in result.removed))
    return Table("parts", _PARTS, rows, total=total)


@dataclass(frozen=True, kw_only=True)
class Strip(OutputOptions):
    """Remove what inference does not need: masks, optimizer state, training configuration.

    Masks are applied to the weights first. The result loads like a model that was never pruned or compiled.

    [dim]$[/] prunectl strip model.h5 -o small.h5

    [dim]$[/] prunectl strip model.pt -o small.pt --only masks,optimizer --pack
    """

    model: ModelArgument
    output: OutputOption = ""
    only: Annotated[str, typer.Option(metavar="PARTS", help=f"Remove only these parts: {', '.join(StripPart)}.")] = ""
    keep: Annotated[
        Keep | None, typer.Option(help="Which copy to keep: the moving average (EMA) or the trained weights.")
    ] = None
    half: Annotated[bool, typer.Option("--half", help="Store weights as 16-bit floats (float16).")] = False
    pack: Annotated[bool, typer.Option("--pack", help="Compress inside the file; it loads as before.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report the result, but write nothing.")] = False
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")] = False
    in_place: Annotated[bool, typer.Option("--in-place", help="Overwrite MODEL itself, instead of --output.")] = False

    def _source(self, reporter: Reporter) -> AbstractContextManager[Path]:
        if URL.match(self.model) and self.in_place:
            raise UsageError("--in-place cannot replace a model at a URL", hint="name another place with --output")
        return resolve_model(self.model, reporter.note, is_read_whole=True)

    def run(self, ctx: typer.Context) -> int:
        """Strip the model, and show what was removed."""
        strip_options = StripOptions(parse_parts(self.only), to_half=self.half)

        def work(path: Path, destination: Destination | None) -> Report:
            result = strip(
                path,
                strip_options,
                destination,
                is_packed=self.pack,
                keep=self.keep,
                is_asked=True,
                meter=ctx.obj.progress,
            )
            target = str(destination.target) if destination is not None else ""
            if URL.match(self.model):
                result = replace(result, before=replace(result.before, path=without_secrets(self.model)))
            return strip_report(result, target, is_rewritten=self.half or self.pack)

        return self.write(ctx.obj, work)


def parse_parts(text: str) -> frozenset[StripPart]:
    """The parts in a comma-separated list; all parts if it is empty."""
    known = {str(part): part for part in StripPart}
    for name in filter(None, text.split(",")):
        if name not in known:
            raise UsageError(
                f"{name!r} is not a part that strip can remove",
                did_you_mean=tuple(get_close_matches(name, known, n=2)),
                hint=f"parts: {', '.join(known)}",
            )
    return frozenset(known[name] for name in text.split(",")) if text else frozenset(StripPart)


command = make_command(Strip, BuildCommand)
