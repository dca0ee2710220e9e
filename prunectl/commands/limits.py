"""The limits of a gate, as they are typed."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.table import open_model
from prunectl.measuring.codecs import Codec
from prunectl.measuring.gates import Limits
from prunectl.measuring.sizes import measure
from prunectl.units import parse_ratio, parse_size


def limits_of(
    *, raw: str, packed: str, compressed: str, sparsity: str, baseline: str, growth: str, codec: Codec
) -> Limits:
    """Return the limits, each understood before any work begins."""
    if bool(baseline) != bool(growth):
        raise UsageError("--baseline and --max-growth go together", hint="--baseline old.h5 --max-growth 2%")
    is_share = growth.endswith("%")
    return Limits(
        max_raw=parse_size(raw) if raw else None,
        max_packed=parse_size(packed) if packed else None,
        max_compressed=parse_size(compressed) if compressed else None,
        min_sparsity=parse_ratio(sparsity) if sparsity else None,
        max_growth_ratio=parse_ratio(growth) if is_share else None,
        max_growth_bytes=parse_size(growth) if growth and not is_share else None,
        baseline=measure(open_model(Path(baseline)), codec) if baseline else None,
    )
