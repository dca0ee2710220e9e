"""A model card: what was made of what, how big it is, how far it is from its source."""

from __future__ import annotations

import os
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.exporting.request import Request
from prunectl.exporting.result import Exported
from prunectl.formats.outputs import write_text
from prunectl.measuring.survey import Survey
from prunectl.pruning.output import Output


def check(request: Request, output: Output) -> None:
    """Refuse a card that cannot be written, before any work begins."""
    card = request.card
    if card is None:
        return
    if not card.parent.is_dir():
        raise UsageError(f"{card.parent} is not a folder", hint=f"mkdir -p {card.parent}")
    if os.path.abspath(card) == os.path.abspath(output.target):
        raise UsageError("--card and --output name the same file")
    if card.is_dir() or (os.path.lexists(card) and not output.is_forced):
        raise UsageError(f"{card} exists", hint="write elsewhere, or replace it with --force")


def write(request: Request, content: str, output: Output) -> None:
    """Write the card, if one was asked for."""
    if request.card is not None:
        write_text(request.card, content, is_forced=output.is_forced)


def text(found: Exported) -> str:
    """Return a card in Markdown: the same run gives the same card."""
    name = Path(found.after.path).name
    rows = (("source", found.before, found.source), ("result", found.after, found.target))
    lines = [
        f"# {name}",
        "",
        f"{found.target}, made of {Path(found.before.path).name} ({found.source}) by prunectl.",
        "",
        "| | format | weights | zero | bytes | packed | gzip |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_row(title, survey, kind) for title, survey, kind in rows),
        "",
        *_parity(found),
        "",
        *(f"- {remark}" for remark in found.remarks),
        *([""] if found.remarks else []),
        "| | SHA-256 |",
        "| --- | --- |",
        *(f"| {title} | {survey.sha256 or '-'} |" for title, survey, _ in rows),
        "",
    ]
    return "\n".join(lines)


def _row(title: str, found: Survey, kind: str) -> str:
    sparsity = "-" if found.sparsity is None else f"{found.sparsity:.1%}"
    packed, compressed = (_count(size) for size in (found.bytes.packed, found.bytes.compressed))
    cells = (title, kind, _count(found.params.total), sparsity, _count(found.bytes.raw), packed, compressed)
    return f"| {' | '.join(cells)} |"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _parity(found: Exported) -> list[str]:
    parity = found.parity
    if parity is None:
        return ["The weights are the same to the bit."]
    what = "examples" if parity.is_data else "random inputs"
    apart = f"{parity.largest:.3g} at most, {parity.mean:.3g} on average"
    said = [f"On {parity.examples:,} {what} the outputs are apart by {apart}."]
    if parity.tolerance.noise is not None:
        said.append(f"By their root mean square the differences are {parity.noise:.2%} of the outputs.")
    if parity.top1 is not None:
        said.append(f"The largest answer is the same one for {parity.top1:.2%} of them.")
    return said
