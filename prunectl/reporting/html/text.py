"""Text that a page can show, whatever is in it."""

from __future__ import annotations

from html import escape

from prunectl.errors import abbreviated
from prunectl.units import printable

_LONGEST = 46
_LONGEST_TEXT = 2000


def safe(text: str) -> str:
    """Return text that is only ever text: nothing in it opens a tag, ends an attribute or turns around what follows."""
    return escape(printable(abbreviated(text, _LONGEST_TEXT)))


def short(text: str, longest: int = _LONGEST) -> str:
    """Return the end of a name, which tells it from the others, as text of a page."""
    shown = printable(text[-_LONGEST_TEXT:])
    return escape(shown if len(shown) <= longest else f"…{shown[1 - longest :]}")


def tag(name: str, inside: str = "", **attributes: str) -> str:
    """Return an element around what is escaped already."""
    said = "".join(f' {key}="{safe(value)}"' for key, value in attributes.items())
    return f"<{name}{said}>{inside}</{name}>"
