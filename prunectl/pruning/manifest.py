"""The record of a run, from which the run can be repeated to the same bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from prunectl import __version__
from prunectl.errors import InputError
from prunectl.formats.json_text import parse_object
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import Request, from_json

SCHEMA = "prunectl.manifest/1"


def write(path: Path, found: Pruned) -> None:
    """Write the manifest of a run that has hashed what it read and what it wrote."""
    whole = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "request": asdict(found.request),
        "sparsity": found.sparsity,
        "input": {"format": found.before.format, "sha256": found.before.sha256},
        "output": {"format": found.after.format, "sha256": found.after.sha256},
        "cuts": [
            {
                "name": cut.tensor.name,
                "shape": list(cut.tensor.shape),
                "dropped": found.tallies[cut.tensor.name].dropped,
                "zeros": found.tallies[cut.tensor.name].zeros,
            }
            for cut in found.plan.cuts
        ],
    }
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def read(path: Path) -> Request:
    """Return the request in a manifest."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    said = parse_object(path.read_bytes(), path, "it").get("request")
    if not isinstance(said, dict):
        raise InputError(f"{path} is JSON, but not a manifest of prunectl: it has no request")
    return from_json(said)
