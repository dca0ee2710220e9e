"""What bash asks and is answered: it breaks words at = and :, and puts words back together by what comes after.

`--layer=fc1/kernel:0` arrives as `--layer = fc1/kernel : 0`, of which only the 0 is what it completes.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

BREAKS = frozenset("=:")


@dataclass(frozen=True, slots=True)
class Asked:
    """The words of a line up to the cursor, put together again."""

    words: tuple[str, ...]
    """The last of them is the one to complete."""
    head: str
    """What bash has of an answer already, and leaves where it is."""

    @classmethod
    def of(cls, line: str, cursor: int) -> Asked:
        """Return what COMP_WORDS and COMP_CWORD mean."""
        parts = _parts(line)[: cursor + 1]
        # A new word is empty, and gets lost between spaces.
        parts += [""] * (cursor + 1 - len(parts))
        words: list[str] = []
        for place, part in enumerate(parts):
            if place > 1 and part and (part in BREAKS or parts[place - 1] in BREAKS):
                words[-1] += part
            else:
                words.append(part)
        last = "" if parts[-1] in BREAKS else parts[-1]
        return cls(tuple(words), _value(words[-1]).removesuffix(last))

    @property
    def line(self) -> str:
        """The words as one line, which is taken apart as a shell does."""
        return shlex.join(self.words)

    @property
    def cursor(self) -> int:
        """Where among them the last word is."""
        return len(self.words) - 1

    def rest(self, answer: str) -> str:
        """Return what bash puts behind what it has."""
        return answer.removeprefix(self.head)


def _parts(line: str) -> list[str]:
    """Return words as a shell has them, also where a quotation has not ended yet."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[str] = []
    try:
        found.extend(lexer)
    except ValueError:
        found.append(lexer.token)
    return found


def _value(word: str) -> str:
    """Return what follows an option in one word with it, which is what answers are about."""
    name, sign, value = word.partition("=")
    return value if sign and name.startswith("-") else word
