"""A survey as scripts read it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from prunectl.measuring.survey import LayerRow, Survey

_FACTS = tuple(field.name for field in fields(LayerRow))


def survey_json(found: Survey) -> dict[str, Any]:
    """Return a model's part of the envelope: integers for bytes and counts, ratios from 0 to 1."""
    about = found.about
    return {
        "path": found.path,
        "format": found.format,
        "sha256": found.sha256,
        "bytes": asdict(found.bytes),
        "params": asdict(found.params),
        "sparsity": found.sparsity,
        "prunable_sparsity": found.prunable_sparsity,
        "parts": [asdict(part) for part in found.parts],
        "layers": [_layer(row) for row in found.layers],
        "about": {
            "producer": about.producer,
            "wrappers": [asdict(wrapper) for wrapper in about.wrappers],
            "optimizer": about.optimizer,
            "training": list(about.training),
            "code": list(about.code),
            "notes": list(about.notes),
            "is_compressed": about.is_compressed,
        },
        "pattern": found.pattern or None,
        "macs": found.macs,
        "macs_unknown": list(found.macs_unknown),
        "histogram": asdict(found.histogram) if found.histogram else None,
        "advice": list(found.advice),
    }


def _layer(row: LayerRow) -> dict[str, Any]:
    # Not by asdict, which copies each value deeply: a model may have a hundred thousand tensors.
    facts = {name: getattr(row, name) for name in _FACTS}
    return {**facts, "shape": list(row.shape), "sparsity": row.sparsity, "tied_to": row.tied_to or None}
