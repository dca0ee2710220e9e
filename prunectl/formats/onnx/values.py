"""Short lists of whole numbers that a graph computes: old exporters compute the shapes they reshape to."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from prunectl.formats.onnx.step import Shape, Step, UnknownShapeError, wrapped

MAX_NUMBERS = 64


def value(step: Step) -> Shape | None:
    """Return the numbers that an operation makes, where they follow from what is known."""
    rule = _RULES.get(step.node.op)
    return rule(step) if rule is not None else None


def _shape(step: Step) -> Shape:
    return step.shape(0)


def _same(step: Step) -> Shape:
    return step.numbers(0)


def _gather(step: Step) -> Shape:
    numbers = step.numbers(0)
    return tuple(numbers[wrapped(place, len(numbers))] for place in step.numbers(1))


def _concat(step: Step) -> Shape:
    if len(step.inputs) > MAX_NUMBERS:
        raise UnknownShapeError
    return tuple(number for place in range(len(step.inputs)) for number in step.numbers(place))


def _slice(step: Step) -> Shape:
    numbers = step.numbers(0)
    starts, ends = step.setting("starts", 1), step.setting("ends", 2)
    (stride,) = step.setting("steps", 4, (1,))
    if len(starts) != 1 or len(ends) != 1 or stride == 0:
        raise UnknownShapeError
    return numbers[starts[0] : ends[0] : stride]


def _paired(calculate: Callable[[int, int], int]) -> Callable[[Step], Shape]:
    def rule(step: Step) -> Shape:
        left, right = step.numbers(0), step.numbers(1)
        length = max(len(left), len(right))
        if len(left) not in {1, length} or len(right) not in {1, length}:
            raise UnknownShapeError
        return tuple(calculate(left[at % len(left)], right[at % len(right)]) for at in range(length))

    return rule


def _quotient(left: int, right: int) -> int:
    if right == 0:
        raise UnknownShapeError
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


_RULES: dict[str, Callable[[Step], Shape]] = {
    "Shape": _shape,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "ReduceProd": lambda step: (math.prod(step.numbers(0)),),
    "Add": _paired(operator.add),
    "Sub": _paired(operator.sub),
    "Mul": _paired(operator.mul),
    "Div": _paired(_quotient),
    **dict.fromkeys(("Cast", "Identity", "Squeeze", "Unsqueeze", "Floor", "Ceil"), _same),
}
