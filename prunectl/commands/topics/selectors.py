"""Which tensors a selector means."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned, builtin


def text() -> str:
    """Return the text."""
    policies = aligned((choice.name, choice.line) for choice in builtin("policies"))
    return f"""
Selectors and policies

A selector is a glob over the names of tensors and of layers, or a regular
expression after re: that is sought anywhere in them. Quote it, or the shell
reads the stars. prunectl inspect MODEL lists all names.

  'conv*'           conv1 and everything in it
  fc1.weight        this tensor
  're:block[0-9]+'  by a regular expression

A selector that matches nothing is exit code 2, with the nearest names.

  --layer 'fc*=90%'   a ratio of their own; the last that matches wins
  --only 'conv*'      only these, whatever the policy says
  --exclude head      not these; may be repeated
  --policy NAME       which tensors there are to choose from:

{policies}

What is left alone is said in the report, with the reason.
"""
