"""A model, of which is measured what is asked for and nothing else, each once."""

from __future__ import annotations

from functools import cached_property

from prunectl.formats.base import Can, ModelFile
from prunectl.formats.table import by_name, load, require
from prunectl.measuring import archive
from prunectl.measuring.codecs import CodecName, compress, pick
from prunectl.measuring.patterns import parse
from prunectl.measuring.sizes import packed_bytes
from prunectl.measuring.survey import LayerRow, Survey, survey, with_macs


class Measured:
    """A model with its numbers, reckoned when they are first looked at."""

    def __init__(self, model: ModelFile, name: str) -> None:
        self.model = model
        self.name = name
        """As the report calls it."""
        self._patterned: dict[str, dict[str, LayerRow]] = {}

    @cached_property
    def raw(self) -> int:
        """Bytes on disk."""
        return self.model.nbytes

    @cached_property
    def gzip(self) -> int:
        """Bytes compressed, at the usual level."""
        return compress(archive.stream(self.model), pick(CodecName.GZIP, None)).nbytes

    @cached_property
    def packed(self) -> int:
        """Bytes packed by its container."""
        return packed_bytes(self.model, lambda _: None)

    @cached_property
    def facts(self) -> Survey:
        """What it holds, without a look at any weight."""
        return survey(self.model, self.model.tensors, has_zeros=False)

    @cached_property
    def zeros(self) -> Survey:
        """What it holds, zeros counted."""
        return survey(self.model, self.model.tensors, has_channels=False)

    @cached_property
    def operations(self) -> Survey:
        """What it holds, with the operations of its graph."""
        require(self.model, Can.FLOPS)
        return with_macs(self.facts, load(by_name(self.model.format).graph)(self.model))

    @cached_property
    def zeros_of(self) -> dict[str, LayerRow]:
        """Each tensor, its zeros counted."""
        return {row.name: row for row in self.zeros.layers}

    @cached_property
    def operations_of(self) -> dict[str, LayerRow]:
        """Each tensor, with the operations that use it."""
        return {row.name: row for row in self.operations.layers}

    def patterned(self, pattern: str) -> dict[str, LayerRow]:
        """Return each tensor, with how much of it follows a pattern."""
        if pattern not in self._patterned:
            found = survey(self.model, self.model.tensors, pattern=parse(pattern))
            self._patterned[pattern] = {row.name: row for row in found.layers}
        return self._patterned[pattern]
