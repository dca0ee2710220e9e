"""Statistics of a model that are measured once, when they are first needed."""

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
        """Path of the model in the report."""
        self._conforming: dict[str, dict[str, TensorStats]] = {}

    @cached_property
    def raw(self) -> int:
        """Bytes on disk."""
        return self.model.nbytes

    @cached_property
    def gzip(self) -> int:
        """Bytes compressed with gzip at its default level."""
        return compress(sizes.iter_model_bytes(self.model), get_codec(CodecName.GZIP, None)).nbytes

    @cached_property
    def packed(self) -> int:
        """Bytes packed with the container's own compression."""
        return packed_bytes(self.model, lambda _: None)

    @cached_property
    def metadata_stats(self) -> ModelStats:
        """Statistics for which no weight is read."""
        return measure_stats(self.model, self.model.tensors, has_zeros=False)

    @cached_property
    def zeros(self) -> ModelStats:
        """Statistics with counted zeros."""
        return measure_stats(self.model, self.model.tensors, has_channels=False)

    @cached_property
    def operations(self) -> ModelStats:
        """Statistics with the multiply-accumulates of the graph."""
        require(self.model, Capability.FLOPS)
        return with_macs(self.metadata_stats, load(by_name(self.model.format).graph)(self.model))

    @cached_property
    def zeros_of(self) -> dict[str, TensorStats]:
        """Statistics with counted zeros, by tensor name."""
        return {row.name: row for row in self.zeros.layers}

    @cached_property
    def operations_of(self) -> dict[str, TensorStats]:
        """Statistics with multiply-accumulates, by tensor name."""
        return {row.name: row for row in self.operations.layers}

    def conforming(self, pattern: str) -> dict[str, TensorStats]:
        """Statistics with the share of groups that conform to a pattern, by tensor name."""
        if pattern not in self._conforming:
            stats = measure_stats(self.model, self.model.tensors, pattern=parse(pattern))
            self._conforming[pattern] = {row.name: row for row in stats.layers}
        return self._conforming[pattern]
