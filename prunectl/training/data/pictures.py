"""One picture as an array of pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.optional import require

_MODES = {"grey": "L", "rgb": "RGB"}
COLORS = tuple(_MODES)


@dataclass(frozen=True, slots=True)
class Look:
    """How every picture is made to look."""

    color: str
    """One of COLORS."""
    size: tuple[int, int] | None
    """Height and width in pixels; None leaves each as it is."""
    is_channels_first: bool = False
    has_channels: bool = True
    """Whether there is an axis for channels, also if grey is the only one."""


def decode(picture: Path | bytes, look: Look, what: str) -> Array:
    """Return a picture's pixels as bytes; a size that is not asked for is resized to (bilinear)."""
    image = require("PIL.Image", extra="images")
    try:
        with image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            pixels = _upright(file).convert(_MODES[look.color])
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise InputError(f"{what} cannot be read as a picture: {error}") from error
    if look.size is not None and pixels.size != look.size[::-1]:
        pixels = pixels.resize(look.size[::-1], image.Resampling.BILINEAR)
    return _laid_out(np.array(pixels, np.uint8), look)


def _upright(picture: Any) -> Any:
    """Return a picture turned as its camera says it was held."""
    return require("PIL.ImageOps", extra="images").exif_transpose(picture)


def _laid_out(pixels: Array, look: Look) -> Array:
    if pixels.ndim == 2 and look.has_channels:
        pixels = pixels[:, :, None]
    return np.moveaxis(pixels, -1, 0) if look.is_channels_first and pixels.ndim == 3 else pixels
