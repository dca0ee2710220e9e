"""Lazy statistics of a model, each measured once when it is first needed."""

from __future__ import annotations

from functools import cached_property

from prunectl.analysis import sizes
from prunectl.analysis.patterns import parse
from prunectl.analysis.sizes import CodecName, compress, get_codec, packed_bytes
from prunectl.analysis.stats import ModelStats, TensorStats, measure_stats, with_macs
from prunectl.formats.base import Capability, ModelFile
from prunectl.formats.registry import by_name, load, require


class LazyModelStats:
    """A model with statistics that are measured on first access."""

    def __init__(self, model: ModelFile, name: str) -> None:
        self.model = model
        self.name = name
        """As the report calls it."""
        self._conforming: dict[str, dict[str, TensorStats]] = {}

    @cached_property
    def raw(self) -> int:
        """Bytes on disk."""
        return self.model.nbytes

    @cached_property
    def gzip(self) -> int:
        """Bytes compressed, at the usual level."""
        return compress(sizes.iter_model_bytes(self.model), get_codec(CodecName.GZIP, None)).nbytes

    @cached_property
    def packed(self) -> int:
        """Bytes packed by its container."""
        return packed_bytes(self.model, lambda _: None)

    @cached_property
    def facts(self) -> ModelStats:
        """What it holds, without a look at any weight."""
        return measure_stats(self.model, self.model.tensors, has_zeros=False)

    @cached_property
    def zeros(self) -> ModelStats:
        """What it holds, zeros counted."""
        return measure_stats(self.model, self.model.tensors, has_channels=False)

    @cached_property
    def operations(self) -> ModelStats:
        """What it holds, with the operations of its graph."""
        require(self.model, Capability.FLOPS)
        return with_macs(self.facts, load(by_name(self.model.format).graph)(self.model))

    @cached_property
    def zeros_of(self) -> dict[str, TensorStats]:
        """Each tensor, its zeros counted."""
        return {row.name: row for row in self.zeros.layers}

    @cached_property
    def operations_of(self) -> dict[str, TensorStats]:
        """Each tensor, with the operations that use it."""
        return {row.name: row for row in self.operations.layers}

    def conforming(self, pattern: str) -> dict[str, TensorStats]:
        """Each tensor, with the share of its groups that conform to a pattern."""
        if pattern not in self._conforming:
            stats = measure_stats(self.model, self.model.tensors, pattern=parse(pattern))
            self._conforming[pattern] = {row.name: row for row in stats.layers}
        return self._conforming[pattern]
