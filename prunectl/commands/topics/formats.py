"""Which files are read and written."""

from __future__ import annotations

from textwrap import fill, indent

from prunectl.commands.topics.table import WIDTH, aligned
from prunectl.exporting.targets import TARGETS
from prunectl.formats.table import FORMATS


def text() -> str:
    """Return the text."""
    read = aligned((row.title, " ".join(filter(None, row.suffixes)) or "(a folder)") for row in FORMATS)
    written = indent(fill(", ".join(target.name for target in TARGETS), WIDTH - 2), "  ")
    return f"""
Formats

Read without a framework:

{read}

A file is judged by its content; its name only breaks ties. A folder of Hugging
Face and the prefix of a TensorFlow checkpoint stand for what is in them.

Written by prunectl export, which runs the result beside its source:

{written}
"""
