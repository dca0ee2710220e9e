"""How long the axes are that a file leaves open: as the user says them, as data has them, or as is tried."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.training.backend import Signature

Shape = tuple[int, ...]
Shapes = Callable[[Signature], Sequence[Shape] | None]
"""From what goes into a model to the shapes, without the batch, that some data has; None if they say nothing."""
TRIED = (64, 224)
"""Lengths to try for axes other than the batch, where nobody says them."""
_WORD = re.compile(r"(?:(?P<name>.+):)?(?P<shape>\d+(?:,\d+)*)")


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is known of open axes beside the file."""

    words: tuple[str, ...] = ()
    """What was typed: `1,3,224,224`, or `name:1,3,224,224`."""
    data: Shapes | None = None

    def of(self, signature: Signature) -> dict[str, Shape]:
        """Return the shape of each input without its batch, if anybody says them; refused where the file differs."""
        names = [port.name for port in signature.inputs]
        is_open = any(port.shape is None or None in port.shape for port in signature.inputs)
        shapes: Sequence[Shape] | None = None
        if self.words:
            shapes = _typed(self.words, names)
        elif self.data is not None and is_open:
            shapes = self.data(signature)
        if shapes is None:
            return {}
        for port, shape in zip(signature.inputs, shapes, strict=True):
            if port.shape is not None and not _fits(shape, port.shape):
                known = ",".join("?" if length is None else str(length) for length in ("?", *port.shape))
                said = ",".join(map(str, (1, *shape)))
                raise UsageError(
                    f"the input {port.name} of the model is {known}, and not {said}",
                    hint="an axis that the model fixes keeps its length",
                )
        return dict(zip(names, shapes, strict=True))


NOTHING = Lengths()


def _typed(words: Sequence[str], names: Sequence[str]) -> list[Shape]:
    """Return the shapes that were typed, in the order of the model's inputs."""
    found: list[tuple[str, Shape]] = []
    for word in words:
        parts = _WORD.fullmatch(word.replace(" ", ""))
        if parts is None or "0" in parts["shape"].split(","):
            raise UsageError(f"--input {word} is no shape", hint="such as --input 1,3,224,224 or name:1,3,224,224")
        lengths = tuple(map(int, parts["shape"].split(",")))
        # The batch is tried one example at a time.
        found.append((parts["name"] or "", lengths[1:]))
    if len(found) != len(names):
        raise UsageError(f"the model has {len(names)} inputs ({', '.join(names)}), and --input says {len(found)}")
    said = dict(found)
    if unknown := sorted(said.keys() - {"", *names}):
        raise UsageError(f"the model has no input {unknown[0]}", hint=f"it has {', '.join(names)}")
    return [said[name] for name in names] if said.keys() == set(names) else [shape for _, shape in found]


def _fits(shape: Shape, known: Sequence[int | None]) -> bool:
    return len(shape) == len(known) and all(
        length is None or length == one for one, length in zip(shape, known, strict=True)
    )
