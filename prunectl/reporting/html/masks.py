"""Where the zeros are: a picture of each of the largest pruned tensors, outputs from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunectl.measuring.shading import Shading
from prunectl.reporting.html.png import LEVELS, Color, data_uri
from prunectl.reporting.html.text import safe, short
from prunectl.units import count, percent

_PIXELS, _LEAST, _MOST = 4, 24, 256
"""Of the screen, for a field; and for a side."""
_KEPT, _ZERO = (11, 107, 203), (233, 237, 241)


def _mixed(share: float) -> Color:
    red, green, blue = (round(kept + (zero - kept) * share) for kept, zero in zip(_KEPT, _ZERO, strict=True))
    return red, green, blue


COLORS = tuple(_mixed(level / (LEVELS - 1)) for level in range(LEVELS))
"""From kept to zero."""


def masks(found: Sequence[Shading]) -> str:
    """Return the pictures; nothing of none."""
    if not found:
        return ""
    told = "Blue is kept, pale is zero; outputs from top to bottom, what they read from left to right."
    return f'<p>{told}</p><div class="masks">{"".join(map(_figure, found))}</div>'


def levels(found: Shading) -> NDArray[np.uint8]:
    """Return the share of zeros in each field, from 0 to 15; the ends are for none and for all."""
    share = np.rint(found.zeros * (LEVELS - 1) / found.sizes).astype(np.int64)
    inner = np.clip(share, 1, LEVELS - 2)
    return np.where(found.zeros == 0, 0, np.where(found.zeros == found.sizes, LEVELS - 1, inner)).astype(np.uint8)


def told(found: Shading) -> str:
    """Return in words what the picture shows."""
    rows = "row" if found.empty_rows == 1 else "rows"
    empty = f"; {count(found.empty_rows)} empty {rows}" if found.empty_rows else ""
    return f"{percent(found.share)} zero{empty}"


def _figure(found: Shading) -> str:
    shown = levels(found)
    tall, wide = (min(max(side * _PIXELS, _LEAST), _MOST) for side in shown.shape)
    alt = f"{found.name}, {count(found.rows)} x {count(found.columns)}: {told(found)}"
    image = f'<img src="{data_uri(shown, COLORS)}" width="{wide}" height="{tall}" alt="{safe(alt)}">'
    return f"<figure>{image}<figcaption>{short(found.name)}<br>{safe(told(found))}</figcaption></figure>"
