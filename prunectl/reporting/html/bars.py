"""How sparse is each layer? A bar for each, in the order of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunectl.reporting.html.text import safe, short
from prunectl.units import count, percent

_MOST = 1000
_NAMES, _WIDTH, _LINE, _NUMBERS = 330, 400, 16, 70


def bars(layers: Sequence[dict[str, Any]]) -> str:
    """Return a picture of the sparsity of the prunable tensors; nothing if none was counted."""
    known = [layer for layer in layers if layer["is_prunable"] and layer["sparsity"] is not None]
    if not known:
        return ""
    shown = known[:_MOST]
    wide, tall = _NAMES + _WIDTH + _NUMBERS, _LINE * len(shown)
    rows = "".join(_bar(layer, at * _LINE) for at, layer in enumerate(shown))
    left = f"<p>{count(len(known) - _MOST)} more are in the table.</p>" if len(known) > _MOST else ""
    label = f"sparsity of {count(len(shown))} prunable tensors"
    picture = f'<svg viewBox="0 0 {wide} {tall}" width="{wide}" role="img" aria-label="{label}">{rows}</svg>'
    return f'<div class="tall" tabindex="0" role="group" aria-label="{label}">{picture}</div>{left}'


def _bar(layer: dict[str, Any], top: int) -> str:
    share = layer["sparsity"]
    length = round(share * _WIDTH, 1)
    told = f"{safe(layer['name'])}: {percent(share)} of {count(layer['params'])} are zero"
    return (
        f"<g><title>{told}</title>"
        f'<text x="{_NAMES - 6}" y="{top + 12}" text-anchor="end">{short(layer["name"])}</text>'
        f'<rect class="rest" x="{_NAMES}" y="{top + 2}" width="{_WIDTH}" height="12"/>'
        f'<rect class="bar" x="{_NAMES}" y="{top + 2}" width="{length:g}" height="12"/>'
        f'<text x="{_NAMES + _WIDTH + 6}" y="{top + 12}">{safe(percent(share))}</text></g>'
    )
