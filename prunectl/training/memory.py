"""Memory of the C library, which training asks for and frees in the same pieces at every step."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
_MAPPED_BYTES = 32 << 20
"""As many as glibc lets a block have that does not come from the system each time."""


def keep_freed() -> None:
    """Have freed memory kept for the next step: given back, every page of it costs a fault when it is wanted again."""
    library = ctypes.CDLL(None)
    # A library without such a knob, as musl, does what it does.
    if hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
