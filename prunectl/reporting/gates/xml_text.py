"""Text as XML takes it."""

from __future__ import annotations

_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}


def element(tag: str, inner: str = "", **attributes: str | int) -> str:
    """Return an element, its attributes escaped; what is inside is XML already."""
    said = "".join(f' {name}="{escaped(str(value))}"' for name, value in attributes.items())
    return f"<{tag}{said}>{inner}</{tag}>" if inner else f"<{tag}{said}/>"


def escaped(text: str) -> str:
    """Return text that can stand anywhere in XML; what is not printable is marked as such."""
    return "".join(_NAMED.get(letter) or (letter if letter.isprintable() else "\ufffd") for letter in text)
