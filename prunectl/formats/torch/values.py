"""What a pickle program makes when nothing is imported and nothing is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that the program names."""

    module: str
    name: str
    path: str = field(init=False, repr=False, compare=False)
    """The dotted path that Python would import; made once, since a program may call one function 500,000 times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """A long text or a run of bytes that lies in the pickle as it is."""

    at: int
    nbytes: int
    head: bytes
    """All of it when it is short, nothing when it is long."""


@dataclass(slots=True, eq=False)
class Persistent:
    """Something that the pickle leaves to the container, such as a storage."""

    id: Any


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary as the program fills it: hashing a stranger's keys could take for ever."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the entries whose keys are texts."""
        return {key: value for key, value in self.items if isinstance(key, str)}


@dataclass(slots=True, eq=False)
class Made:
    """What a call would have returned."""

    function: Any
    args: Any
    state: Any = None
    pairs: Pairs | None = None
    items: list[Any] | None = None

    @property
    def path(self) -> str:
        """The dotted path of what would have been called; nothing when it is itself the result of a call."""
        return self.function.path if isinstance(self.function, Global) else ""

    def arg(self, index: int) -> Any:
        """Return one positional argument, or None."""
        return self.args[index] if isinstance(self.args, tuple) and index < len(self.args) else None


def shown(text: str) -> str:
    """Return a stranger's text fit for one line."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SHOWN_CHARACTERS])
    return plain if len(text) <= MAX_SHOWN_CHARACTERS else f"{plain}..."
