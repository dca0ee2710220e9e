"""Hears what the layers of a Keras model are called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from prunectl.training.keras.library import Library
from prunectl.training.keras.sights import kinds
from prunectl.training.keras.sights.contexts import functions, replaced
from prunectl.training.keras.sights.kinds import KERNELS
from prunectl.training.keras.sights.meeting import Call, Meeting, Tell, numbers_in, tree
from prunectl.training.keras.sights.steps import Steps, steps
from prunectl.training.network import Array
from prunectl.training.sights import See, Sight, Use


class Listener:
    """Listens to layers one by one, and shows what their variables meet."""

    def __init__(self, library: Library, variables: Mapping[str, Any], see: See) -> None:
        self._library, self._see = library, see
        self._names = {id(variable): name for name, variable in variables.items()}
        self._is_deaf = False
        self._kept: list[Meeting] | None = None
        """What is heard while a recurrent layer is gone through."""
        self.failure: Exception | None = None

    def listening(self, layer: Any) -> Any:
        """Return the context in which a layer is heard."""
        stack = ExitStack()
        tell = kinds.tell(layer)
        if tell is not None:
            stack.enter_context(replaced(layer, "call", self._heard(layer, tell)))
        elif kinds.is_stepping(layer) and any(map(self._is_wanted, layer._flatten_layers())):  # noqa: SLF001
            stack.enter_context(replaced(layer, "call", self._stepped(layer)))
            if hasattr(layer, "use_cudnn"):
                # Else two directions may run as one operation, past their layers.
                stack.enter_context(replaced(layer, "use_cudnn", False))
        return stack

    def _is_wanted(self, layer: Any) -> bool:
        return any(id(getattr(layer, name, None)) in self._names for name in KERNELS)

    def _heard(self, layer: Any, tell: Tell) -> Any:
        plain, is_wanted = layer.call, self._is_wanted(layer)

        def call(*words: Any, **more: Any) -> Any:
            found = self._run(plain, words, more)
            if is_wanted and not self._is_deaf:
                said = inspect.signature(plain).bind(*words, **more).arguments
                inputs = self._inputs(list(said.values())[:2])
                if inputs is not None:
                    out = tree(self._library).flatten(found)[0]
                    self._tell(tell(Call(self._library, layer, inputs, tuple(map(int, out.shape)))))
            return found

        return _signed(call, plain)

    def _run(self, plain: Any, words: Any, more: Any) -> Any:
        if not self._library.is_on_tensorflow:
            return plain(*words, **more)
        with functions(self._library, eagerly=False):
            # On a processor, TensorFlow has some convolutions in compiled functions alone.
            return plain(*words, **more)

    def _inputs(self, said: Any) -> tuple[Array, ...] | None:
        tensors = [one for one in tree(self._library).flatten(said) if hasattr(one, "shape")]
        found = [numbers_in(self._library, one) for one in tensors]
        complete = [one for one in found if one is not None]
        return tuple(complete) if complete and len(complete) == len(found) else None

    def _stepped(self, layer: Any) -> Any:
        plain = layer.call

        def call(*words: Any, **more: Any) -> Any:
            if not self._is_deaf:
                said = inspect.signature(plain).bind(*words, **more).arguments
                path = steps(self._library, layer, said)
                if path is not None:
                    self._walk(path)
            before, self._is_deaf = self._is_deaf, True
            try:
                return self._run(plain, words, more)
            finally:
                self._is_deaf = before

        return _signed(call, plain)

    def _walk(self, path: Steps) -> None:
        """Go through the steps, and tell all of them at once."""
        outer, found = self._kept, dict[tuple[int, Use], list[Meeting]]()
        try:
            self._kept = []
            for keep in path.run():
                for one in self._kept:
                    found.setdefault((id(one.variable), one.use), []).append(_counted(one, keep))
                self._kept = []
        finally:
            self._kept = outer
        self._tell(map(_joined, found.values()))

    def _tell(self, meetings: Iterable[Meeting]) -> None:
        for one in meetings:
            name = self._names.get(id(one.variable))
            if name is None:
                continue
            if self._kept is not None:
                self._kept.append(one)
                continue
            try:
                self._see(Sight(name, one.inputs, one.use))
            except Exception as error:
                self.failure = error
                raise


def _signed(call: Any, plain: Any) -> Any:
    """Let a function look like another, since layers look whether those within them take a mask."""
    call.__signature__ = inspect.signature(plain)
    return call


def _counted(meeting: Meeting, keep: Array | None) -> Meeting:
    return meeting if keep is None else Meeting(meeting.variable, meeting.inputs[keep], meeting.use)


def _joined(parts: list[Meeting]) -> Meeting:
    return Meeting(parts[0].variable, np.concatenate([one.inputs for one in parts]), parts[0].use)
