"""The sizes of a model: as it is, packed, compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from prunectl.formats.base import ModelFile
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.table import by_name, load
from prunectl.formats.workers import check_stopped, workers
from prunectl.measuring.archive import stream
from prunectl.measuring.codecs import Codec, compress
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.survey import Bytes, Survey, survey

Tick = Callable[[int], None]
_PASSES = 3
"""Each byte is counted, compressed and packed."""


def measure(model: ModelFile, codec: Codec, meter: Meter = unwatched, known: Survey | None = None) -> Survey:
    """Return a survey with every size in it, compressing and packing side by side; one that is known is not redone."""
    total = model.nbytes * (_PASSES if known is None else _PASSES - 1)
    with workers(2) as pool, meter(f"measuring {model.path.name}", total) as bar:

        def watched(nbytes: int) -> None:
            check_stopped()
            bar.advance(nbytes)

        compressing = pool.submit(compress, stream(model), codec, watched)
        packing = pool.submit(packed_bytes, model, watched)
        found = survey(model, model.tensors, tick=watched) if known is None else known
        compressed, packed = compressing.result(), packing.result()
    sizes = Bytes(raw=found.bytes.raw, packed=packed, compressed=compressed.nbytes)
    return replace(found, bytes=sizes, sha256=compressed.sha256)


def packed_bytes(model: ModelFile, tick: Tick) -> int:
    """Return the size that the container's own compression leaves, found by packing into a scratch file."""
    row = by_name(model.format)
    if not row.packer:
        return model.nbytes
    with temporary_folder() as scratch:
        target = scratch / model.path.name
        load(row.packer)(model, target, tick)
        # Files beside the model, such as weights of ONNX, are not packed.
        return model.nbytes - max(model.path.stat().st_size - target.stat().st_size, 0)
