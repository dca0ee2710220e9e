"""The stack, the marks and the memo of pickle, with nothing behind them that could run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prunectl.formats.budgets import MAX_PICKLE_COPIES, MAX_PICKLE_NAME_CHARACTERS, MAX_STORAGE_TENSORS
from prunectl.formats.torch import plain
from prunectl.formats.torch.opcodes import Reader
from prunectl.formats.torch.values import Global, Made, Persistent, shown

MAX_THINGS = 500_000
MAX_NAMES = 20_000
"""Distinct functions and classes that a program may name."""
_TENSORS = "torch._utils._rebuild_tensor"


class Machine:
    """The stack, the marks and the memo of pickle."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Any] = []
        self.named: dict[Global, None] = {}
        self.deeds: dict[str, None] = {}
        self.things = 0
        self.copies = 0
        self.views: Counter[str] = Counter()
        """How many tensors see each storage."""

    def strangers(self) -> tuple[str, ...]:
        """Say what is called or made, then what is only named."""
        done = {deed.partition(" ")[2] for deed in self.deeds}
        imports = [f"imports {shown(name.path)}" for name in self.named if not plain.is_plain(name)]
        return (*self.deeds, *(line for line in imports if line.partition(" ")[2] not in done))

    def do(self, verb: str, function: Any, args: Any) -> None:
        """Push what a call would return, and remember the deed if it is a strange one."""
        # What is copied counts, not what is named: one list of the memo may be the argument of every call.
        self.copies += plain.copied(function, args)
        if self.copies > MAX_PICKLE_COPIES:
            raise ValueError("it copies more elements than any model needs")
        made = plain.call(function, args)
        called = made.function if isinstance(made, Made) else function
        if isinstance(called, Global) and not plain.is_plain(called):
            is_class = isinstance(made, Made) and called is not function
            self.deeds[f"{'class' if is_class else verb} {shown(called.path)}"] = None
        if isinstance(called, Global) and called.path.startswith(_TENSORS):
            self.count_view(args)
        self.keep(made)

    def count_view(self, args: Any) -> None:
        """Count a tensor to its storage."""
        place = args[0] if isinstance(args, tuple) and args else None
        names = place.id if isinstance(place, Persistent) and isinstance(place.id, tuple) else ()
        key = names[2] if len(names) > 2 else None  # ("storage", class, key, location, count)
        if isinstance(key, str):
            self.views[key] += 1
            if self.views[key] > MAX_STORAGE_TENSORS:
                raise ValueError("more tensors share one storage than in any model")

    def keep(self, thing: Any) -> None:
        """Push a thing that takes memory of its own."""
        self.things += 1
        if self.things > MAX_THINGS:
            raise ValueError("it makes more objects than any model needs")
        self.stack.append(thing)

    def name(self, module: Any, name: Any) -> None:
        """Push what an import would return."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if len(module) + len(name) > MAX_PICKLE_NAME_CHARACTERS:
            raise ValueError("it names a function by more letters than any has")
        found = Global(module, name)
        self.named[found] = None
        if len(self.named) > MAX_NAMES:
            raise ValueError("it names more functions than any model needs")
        self.stack.append(found)

    def since_mark(self) -> list[Any]:
        """Pop what was pushed since the last mark."""
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def persist(self, key: Any) -> None:
        """Push what the container would provide: a class stands for itself, the rest for a storage."""
        if not isinstance(key, tuple | str | int):
            raise TypeError
        if isinstance(key, tuple) and key:
            known = key[1] if key[0] == "module" and len(key) > 1 else key[0]
            if isinstance(known, Global):
                self.stack.append(known)
                return
        self.storages.append(key)
        self.keep(Persistent(key))
