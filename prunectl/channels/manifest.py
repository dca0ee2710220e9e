"""The manifest of channel pruning, from which it can be repeated to the same bytes."""

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


def write(path: Path, result: ChannelPruneResult, limits: Mapping[str, Any]) -> None:
    """Write the manifest of a cut that has hashed what it read and what it wrote."""
    record = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "request": asdict(result.request),
        "limits": {name: value for name, value in limits.items() if name in LIMITS},
        "input": {"format": result.before.format, "sha256": result.before.sha256},
        "output": {"format": result.after.format, "sha256": result.after.sha256},
        "channels": [
            {"name": loss.group.name, "channels": len(loss.group), "dropped": list(loss.dropped)}
            for loss in result.pruned_groups
        ],
        "removed": [
            {"tensor": tensor, "axis": axis, "indices": indices.tolist()}
            for (tensor, axis), indices in sorted(removed_indices(result.pruned_groups).items())
        ],
    }
    write_json(path, record)


def limits_in(path: Path) -> dict[str, Any]:
    """The words about channels in a manifest, whose request is known to be sound."""
    limits = read_object(path, "it").get("limits", {})
    if not isinstance(limits, dict) or not limits.keys() <= LIMITS or not all(map(_is_plain, limits.values())):
        raise InputError(f"{path} holds limits of channels that make no sense")
    return limits


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
