"""How long the axes are that a file leaves open: as the user says them, as data has them, or as is tried."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature

Shape = tuple[int, ...]
Shapes = Callable[[ModelSignature], Sequence[Shape] | None]
"""From what goes into a model to the shapes, without the batch, that some data has; None if they say nothing."""
TRIED_LENGTHS = (64, 224)
"""AxisLengths to try for axes other than the batch, where nobody says them."""
_SHAPE = re.compile(r"(?:(?P<name>.+):)?(?P<shape>\d+(?:,\d+)*)")


@dataclass(frozen=True, slots=True)
class AxisLengths:
    """What is known of open axes beside the file."""

    typed: tuple[str, ...] = ()
    """What was typed: `1,3,224,224`, or `name:1,3,224,224`."""
    data: Shapes | None = None

    def resolve(self, signature: ModelSignature) -> dict[str, Shape]:
        """The shape of each input without its batch, if anybody says them; refused where the file differs."""
        names = [port.name for port in signature.inputs]
        is_open = any(port.shape is None or None in port.shape for port in signature.inputs)
        shapes: Sequence[Shape] | None = None
        if self.typed:
            shapes = _parse_shapes(self.typed, names)
        elif self.data is not None and is_open:
            shapes = self.data(signature)
        if shapes is None:
            return {}
        for port, shape in zip(signature.inputs, shapes, strict=True):
            if port.shape is not None and not _fits(shape, port.shape):
                known = ",".join("?" if length is None else str(length) for length in ("?", *port.shape))
                wanted = ",".join(map(str, (1, *shape)))
                raise UsageError(
                    f"the input {port.name} of the model is {known}, and not {wanted}",
                    hint="an axis that the model fixes keeps its length",
                )
        return dict(zip(names, shapes, strict=True))


UNKNOWN_LENGTHS = AxisLengths()


def _parse_shapes(typed: Sequence[str], names: Sequence[str]) -> list[Shape]:
    """The shapes that were typed, in the order of the model's inputs."""
    shapes_by_name: list[tuple[str, Shape]] = []
    for text in typed:
        match = _SHAPE.fullmatch(text.replace(" ", ""))
        if match is None or "0" in match["shape"].split(","):
            raise UsageError(f"--input {text} is no shape", hint="such as --input 1,3,224,224 or name:1,3,224,224")
        lengths = tuple(map(int, match["shape"].split(",")))
        # The batch is tried one example at a time.
        shapes_by_name.append((match["name"] or "", lengths[1:]))
    if len(shapes_by_name) != len(names):
        raise UsageError(
            f"the model has {len(names)} inputs ({', '.join(names)}), and --input says {len(shapes_by_name)}"
        )
    by_name = dict(shapes_by_name)
    if unknown := sorted(by_name.keys() - {"", *names}):
        raise UsageError(f"the model has no input {unknown[0]}", hint=f"it has {', '.join(names)}")
    return [by_name[name] for name in names] if by_name.keys() == set(names) else [shape for _, shape in shapes_by_name]


def _fits(shape: Shape, known: Sequence[int | None]) -> bool:
    return len(shape) == len(known) and all(
        length is None or length == actual for actual, length in zip(shape, known, strict=True)
    )
