"""Who uses a tensor of an ONNX model, followed through operations that only hand it on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from prunectl.formats.base import Role
from prunectl.formats.onnx.proto import Node
from prunectl.formats.onnx.roles import CALCULATING, CELLS, PARTS, PASSING, SPLICING, Part, axis_before
from prunectl.formats.onnx.scopes import Scope
from prunectl.formats.onnx.wire import Reader

MAX_STEPS = 4
"""Operations to follow a weight through: quantise, dequantise, transpose, reshape."""
MAX_USES = 8
"""Users of one tensor to look at: a tied weight has two, a shared constant hundreds."""
MAX_VISITS = 500_000
"""Uses to look at in one model, before weights are no longer followed."""
_BETWEEN = PASSING | {"Mul"}
"""What may stand between a product and its bias."""
_BIAS, _OTHER = Part(Role.BIAS), Part(Role.OTHER)


class Use(NamedTuple):
    """One input of one node."""

    node: Node
    place: int
    """Number of the input."""
    scope: Scope


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a tensor is for."""

    role: Role = Role.OTHER
    kind: str = ""
    layer: str = ""
    out_axis: int | None = None


class Uses:
    """The users of every value of a model."""

    def __init__(self, reader: Reader, scopes: tuple[Scope, ...]) -> None:
        self._reader = reader
        self._left = MAX_VISITS
        self._users: dict[tuple[int, str], list[Use]] = {}
        for scope in scopes:
            for node in scope.graph.nodes:
                for index, name in enumerate(node.inputs):
                    owner = scope.owner(name) if name else None
                    if owner is not None:
                        self._users.setdefault((id(owner), name), []).append(Use(node, index, scope))

    def of(self, scope: Scope, name: str) -> list[Use]:
        """Return the first users of a value that this graph owns."""
        return self._users.get((id(scope), name), [])[:MAX_USES]

    def purpose(self, scope: Scope, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Purpose:
        """Return what a tensor is for: the first use that tells, or the first of all."""
        found = list(self._purposes(scope, name, shape, dtype, MAX_STEPS))
        telling = (purpose for purpose in found if purpose.role is not Role.OTHER)
        return next(telling, found[0] if found else Purpose())

    def _purposes(
        self, scope: Scope, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], steps: int
    ) -> Iterator[Purpose]:
        for use in self.of(scope, name):
            # Concat joins what other nodes share, so that the ways through a crafted graph multiply.
            self._left -= 1
            steps = steps if self._left > 0 else 0
            node = use.node
            if steps and node.outputs and use.place == 0 and node.op in PASSING:
                for purpose in self._purposes(use.scope, node.outputs[0], shape, dtype, steps - 1):
                    axis = axis_before(node, purpose.out_axis, len(shape), self._order(node))
                    yield replace(purpose, out_axis=axis)
            elif steps and node.outputs and node.op in SPLICING:
                behind = self._purposes(use.scope, node.outputs[0], shape, dtype, steps - 1)
                yield from (replace(purpose, out_axis=None) for purpose in behind if purpose.kind in CELLS)
                yield Purpose(kind=node.op, layer=node.label)
            else:
                part = _part(use, shape, dtype) or (_BIAS if self._is_bias(use, shape) else _OTHER)
                yield Purpose(part.role, node.op, node.label, part.out_axis(node, len(shape)))

    def _order(self, node: Node) -> tuple[int, ...]:
        order = node.attributes.get("perm")
        return self._reader.numbers(order.ints) if order is not None else ()

    def _is_bias(self, use: Use, shape: tuple[int, ...]) -> bool:
        """Whether a vector is added to what a kernel made."""
        if use.node.op != "Add" or len(use.node.inputs) != 2 or not shape or math.prod(shape) != max(shape):
            return False
        value, scope = use.node.inputs[1 - use.place], use.scope
        for _ in range(MAX_STEPS):
            owner = scope.owner(value)
            maker = owner.makers[value] if owner is not None else None
            if owner is None or maker is None:
                return False
            if maker.op in CALCULATING:
                return True
            if maker.op not in _BETWEEN or not maker.inputs:
                return False
            scope, value = owner, maker.inputs[0]
        return False


def _part(use: Use, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Part | None:
    part = PARTS.get(use.node.op, {}).get(use.place)
    if part is None:
        return None
    if part.role in {Role.KERNEL, Role.RECURRENT, Role.EMBEDDING}:
        # Shapes and indices go through the same operations: they are whole numbers of 64 bits, or truth values.
        is_number = dtype.kind != "b" and not (dtype.kind in "iu" and dtype.itemsize > 2)
        is_deep = len(shape) >= 2 if part.role is not Role.KERNEL else len(shape) >= 1
        return part if is_number and is_deep else None
    return part
