"""Scores of weights, block by block, recomputed for each use or cached."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prunectl.analysis.tensor_io import blocks, is_contiguous, iter_blocks
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import BLOCK_BYTES
from prunectl.formats.patch import in_storage_order
from prunectl.formats.workers import check_stopped
from prunectl.pruning.masks import SAMPLE_STEP, Mask, magnitude_keys, rank_nonfinite
from prunectl.pruning.strategies import BlockContext, magnitude

if TYPE_CHECKING:
    from prunectl.pruning.engine import PruningMethod
    from prunectl.pruning.plan import Plan

KEPT_BYTES = 256 << 20
"""Most bytes of scores in memory; more are spilled to a file, since they may take twice the size of the model."""


class TensorScores:
    """Scores of the tensors of a plan, computed or cached.

    Elementwise scores are recomputed each time, block by block. Strategies that need whole tensors score each of them
    once: these scores are cached until the tensor is pruned, beyond `KEPT_BYTES` in an unnamed temporary file.
    """

    def __init__(
        self,
        model: ModelFile,
        method: PruningMethod,
        plan: Plan,
        scratch: Path | None,
        *,
        is_wide: bool,
        is_joint: bool,
    ) -> None:
        self.model = model
        self.method = method
        self._needs_float64 = is_wide
        self._is_global = is_joint
        self._decoded: dict[str, Array] = {}
        self._scratch = scratch
        self._cached: dict[str, Array] = {}
        self._cached_bytes = 0
        # Remaining uses of each tensor: one for itself, and one for each copy in the file.
        self._uses = {cut.tensor.name: 1 for cut in plan.cuts}
        for original in model.duplicates.values():
            if original in self._uses:
                self._uses[original] += 1
        self._locks = {name: threading.Lock() for name in self._uses}
        self._budget_lock = threading.Lock()

    def scores(self, tensor: Tensor) -> Iterator[Array]:
        """Yield the scores of a tensor (without NaN), or their sort keys, block by block in storage order."""
        if self.method.strategy.is_elementwise:
            begin = 0
            for block in self._weights(tensor):
                yield self._ranked_block(tensor, block, begin)[0]
                begin += block.size
        else:
            for scores in _iter_slices(self._all_scores(tensor)):
                yield self._ranked(tensor, scores)[0]

    def sample(self, tensor: Tensor) -> Iterator[Array]:
        """Yield an evenly spaced sample of a tensor's scores; elementwise strategies score only the sampled weights."""
        if self.method.strategy.is_elementwise:
            for block in self._weights(tensor):
                sampled = np.ascontiguousarray(block.reshape(-1)[::SAMPLE_STEP])
                yield self._ranked_block(tensor, sampled, 0)[0]
        else:
            for scores in _iter_slices(self._all_scores(tensor)):
                yield self._ranked(tensor, np.ascontiguousarray(scores[::SAMPLE_STEP]))[0]

    def blocks(self, tensor: Tensor) -> Iterator[tuple[Array, Array, Mask | None]]:
        """Yield blocks of weights in storage order, their scores, and the mask of what is zeroed whatever its score."""
        begin = 0
        if self.method.strategy.is_elementwise:
            for block in self._weights(tensor):
                yield block, *self._ranked_block(tensor, block, begin)
                begin += block.size
        else:
            all_scores = self._all_scores(tensor)
            for block in self._weights(tensor):
                scores = all_scores[begin : begin + block.size].reshape(block.shape)
                yield block, *self._ranked(tensor, scores)
                begin += block.size
        self._release(tensor)

    def _ranked_block(self, tensor: Tensor, block: Array, begin: int) -> tuple[Array, Mask | None]:
        """Elementwise scores of a block; for magnitudes their sort keys, straight from the bits of the weights."""
        has_score_width = block.dtype == np.float64 or (block.dtype == np.float32 and not self._needs_float64)
        if self.method.strategy.score is magnitude and has_score_width:
            return rank_nonfinite(magnitude_keys(block), self.method.not_finite, label(self.model, tensor))
        scores = self.method.strategy.score(block, BlockContext(tensor.name, begin, self.method.seed))
        return self._ranked(tensor, scores)

    def _ranked(self, tensor: Tensor, scores: Array) -> tuple[Array, Mask | None]:
        wide = scores.astype(np.float64) if self._needs_float64 else scores
        return rank_nonfinite(wide, self.method.not_finite, label(self.model, tensor))

    def _weights(self, tensor: Tensor) -> Iterator[Array]:
        """Yield the weights of a tensor block by block in storage order."""
        if tensor.storage.extent is None:
            yield from iter_blocks(in_storage_order(tensor, self._read(tensor)))
        else:
            flat = tensor if is_contiguous(tensor) else replace(tensor, shape=(tensor.size,), strides=None)
            yield from blocks(self.model, flat)

    def _read(self, tensor: Tensor) -> Array:
        """A whole tensor; one that must be decoded is cached, unless tensors are ranked together."""
        if tensor.storage.extent is not None or self._is_global:
            return self.model.read(tensor)
        if tensor.name not in self._decoded:
            array = self.model.read(tensor).view()
            # Read-only, so that pruning zeroes a copy: another copy in the file is pruned from the same weights.
            array.flags.writeable = False
            self._decoded[tensor.name] = array
        return self._decoded[tensor.name]

    def _all_scores(self, tensor: Tensor) -> Array:
        """All scores of a tensor in storage order, computed if they are not cached."""
        with self._locks[tensor.name]:
            if tensor.name not in self._cached:
                check_stopped()
                context = BlockContext(tensor.name, 0, self.method.seed)
                scores = self.method.strategy.score(self._read(tensor), context)
                self._cached[tensor.name] = self._cache(in_storage_order(tensor, scores))
            return self._cached[tensor.name]

    def _cache(self, scores: Array) -> Array:
        if self.method.strategy.is_precomputed:
            return scores.reshape(-1)
        with self._budget_lock:
            is_full = self._cached_bytes + scores.nbytes > KEPT_BYTES
            if not is_full:
                self._cached_bytes += scores.nbytes
        if not is_full:
            return np.ascontiguousarray(scores).reshape(-1)
        with tempfile.TemporaryFile(prefix="prunectl-", dir=self._scratch) as file:
            for piece in iter_blocks(scores):
                file.write(piece.reshape(-1).view(np.uint8).data)
            file.flush()
            return np.memmap(file, scores.dtype, "r", shape=(scores.size,))

    def _release(self, tensor: Tensor) -> None:
        """Release the scores of a tensor after its last use."""
        with self._locks[tensor.name]:
            self._uses[tensor.name] -= 1
            if self._uses[tensor.name] <= 0:
                self._decoded.pop(tensor.name, None)
                scores = self._cached.pop(tensor.name, None)
                if scores is not None and not (self.method.strategy.is_precomputed or isinstance(scores, np.memmap)):
                    with self._budget_lock:
                        self._cached_bytes -= scores.nbytes


def _iter_slices(scores: Array) -> Iterator[Array]:
    height = max(BLOCK_BYTES // scores.itemsize, 1)
    for begin in range(0, len(scores), height):
        check_stopped()
        yield scores[begin : begin + height]


def label(model: ModelFile, tensor: Tensor) -> str:
    """The name of a tensor in messages, with the path of its model."""
    return f"{model.path}: {tensor.name}"
