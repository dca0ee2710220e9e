"""What is said of tensors that something could not be done with."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 5


def said(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence about some tensors; nothing without any."""
    if not names:
        return ()
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")
    return (f"{shown}: {what}.",)
