"""The record of a cut, from which it can be repeated to the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunectl import __version__
from prunectl.channels.prune import ChannelPruneResult
from prunectl.channels.selection import removed_indices
from prunectl.errors import InputError
from prunectl.formats.safe_json import read_object
from prunectl.pruning.manifest import SCHEMA, write_json

LIMITS = frozenset({"min_channels", "round_to", "max_ratio", "params", "flops", "dead"})
"""Words about channels that a request does not have."""


def write(path: Path, found: ChannelPruneResult, limits: Mapping[str, Any]) -> None:
    """Write the manifest of a cut that has hashed what it read and what it wrote."""
    whole = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "request": asdict(found.request),
        "limits": {name: value for name, value in limits.items() if name in LIMITS},
        "input": {"format": found.before.format, "sha256": found.before.sha256},
        "output": {"format": found.after.format, "sha256": found.after.sha256},
        "channels": [
            {"name": loss.family.name, "channels": len(loss.family.groups), "dropped": list(loss.dropped)}
            for loss in found.losses
        ],
        "removed": [
            {"tensor": tensor, "axis": axis, "indices": indices.tolist()}
            for (tensor, axis), indices in sorted(removed_indices(found.losses).items())
        ],
    }
    write_json(path, whole)


def limits_in(path: Path) -> dict[str, Any]:
    """Return the words about channels in a manifest, whose request is known to be sound."""
    said = read_object(path, "it").get("limits", {})
    if not isinstance(said, dict) or not said.keys() <= LIMITS or not all(map(_is_plain, said.values())):
        raise InputError(f"{path} holds limits of channels that make no sense")
    return said


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
