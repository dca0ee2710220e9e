"""Text as XML takes it."""

from __future__ import annotations

import re

_NEVER = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write."""
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}


def element(tag: str, inner: str = "", **attributes: str | int) -> str:
    """Return an element, its attributes escaped; what is inside is XML already."""
    said = "".join(f' {name}="{escaped(str(value))}"' for name, value in attributes.items())
    return f"<{tag}{said}>{inner}</{tag}>" if inner else f"<{tag}{said}/>"


def escaped(text: str) -> str:
    """Return text that can stand anywhere in XML."""
    return "".join(_NAMED.get(letter, letter) for letter in _NEVER.sub("\ufffd", text))
