"""Sparsity patterns, and how many of a tensor's groups follow one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import UsageError
from prunectl.formats.base import Tensor

Mask = NDArray[np.bool_]
GroupCounts = tuple[int, int]
"""How many groups follow the pattern, of how many."""

_NM = re.compile(r"([1-9]\d*):([1-9]\d*)")
_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class NMPattern:
    """`N:M`: at least N zeros in every M consecutive weights along the inputs."""

    zeros: int
    group: int

    @property
    def row_alignment(self) -> int:
        """Rows that belong together when a tensor is seen slab by slab."""
        return self.group

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:
        """Count groups; None where the inputs do not divide into them."""
        axis = tensor.reduction_axis
        if axis is None or tensor.shape[axis] % self.group:
            return None
        groups = np.moveaxis(kept, axis, -1).reshape(-1, self.group)
        return int(np.count_nonzero(groups.sum(axis=1) <= self.group - self.zeros)), len(groups)


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """`block:RxC`: zeros come in whole blocks of the kernel, seen as a matrix of inputs by outputs."""

    rows: int
    columns: int

    @property
    def row_alignment(self) -> int:
        """Rows that belong together when a tensor is seen slab by slab."""
        return math.lcm(self.rows, self.columns)

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:
        """Count blocks, those at the edges cut short; None where there is no matrix."""
        if tensor.out_axis is None:
            return None
        matrix = np.moveaxis(kept, tensor.out_axis, -1).reshape(-1, kept.shape[tensor.out_axis])
        height, width = (-size % step for size, step in zip(matrix.shape, (self.rows, self.columns), strict=True))
        padded = np.pad(matrix, ((0, height), (0, width)), mode="edge")
        filled = padded.reshape(len(padded) // self.rows, self.rows, -1, self.columns).mean(axis=(1, 3))
        return int(np.count_nonzero((filled == 0) | (filled == 1))), filled.size


@dataclass(frozen=True, slots=True)
class ChannelPattern:
    """`channel`: zeros come in whole output channels."""

    row_alignment = 1

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:  # noqa: ARG002 - channels are counted over all slabs
        """Leave it to the counts by channel, which a single slab does not know."""
        return None


Pattern = NMPattern | BlockPattern | ChannelPattern


CHANNEL = "channel"
"""The word for the pattern of whole channels."""


def parse(text: str) -> Pattern:
    """The pattern that `2:4`, `block:1x4` or `channel` names."""
    if text == CHANNEL:
        return ChannelPattern()
    if match := _BLOCK.fullmatch(text):
        return BlockPattern(int(match[1]), int(match[2]))
    match = _NM.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a pattern", hint="write 2:4, block:1x4 or channel")
    zeros, group = int(match[1]), int(match[2])
    if zeros > group:
        raise UsageError(f"{text} asks for {zeros} zeros in {group} weights", hint=f"write {group}:{zeros}")
    return NMPattern(zeros, group)
