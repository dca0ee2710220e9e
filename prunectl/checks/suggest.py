"""Suggested budgets for existing models, with a margin."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.checks.baseline import BaselineEntry, snapshot
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.errors import InputError, PrunectlError, attempt
from prunectl.formats.registry import SUFFIXES, recognise

_DIGITS = 3
_SPARSE = 0.05
"""A smaller share of zeros is taken for chance, and gets no limit."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Limits for one model."""

    path: str
    max_raw: int
    max_gzip: int
    max_params: int
    min_sparsity: float | None
    key: str
    """The model's path in the baseline."""
    entry: BaselineEntry
    """The current sizes, to record in the baseline."""


FIRST_SIZES = "first sizes"
"""Reason that is recorded in a baseline written together with the budgets."""


def propose(stats: LazyModelStats, key: str, margin: float) -> Proposal:
    """Limits that a model meets now, and exceeds if it grows by more than the margin."""
    if not key.isprintable():
        raise InputError(f"{key!r} has a name that TOML cannot hold")
    sparsity = stats.zeros.prunable_sparsity or 0.0
    return Proposal(
        path=glob.escape(key),
        max_raw=_rounded_up(stats.raw, margin),
        max_gzip=_rounded_up(stats.gzip, margin),
        max_params=_rounded_up(stats.metadata_stats.params.total, margin),
        # Rounded down to whole percents, so that the current sparsity is enough.
        min_sparsity=math.floor(sparsity * 100) / 100 if sparsity >= _SPARSE else None,
        key=key,
        entry=snapshot(stats, FIRST_SIZES),
    )


def as_toml(proposals: Iterable[Proposal], baseline: str) -> str:
    """The file of budgets."""
    lines = [
        "# Budgets of models: `prunectl check` exits with 1 if a model exceeds one of its limits.",
        f"baseline = {_toml_string(baseline)}",
        'on-missing = "warn"',
    ]
    for proposal in proposals:
        lines += ["", "[[budget]]", f"path = {_toml_string(proposal.path)}"]
        lines += [f'max-raw = "{_shortened(proposal.max_raw)}B"', f'max-gzip = "{_shortened(proposal.max_gzip)}B"']
        params = _shortened(proposal.max_params)
        lines.append(f"max-params = {params}" if params.isdecimal() else f'max-params = "{params}"')
        lines += [f'min-sparsity = "{proposal.min_sparsity:.0%}"'] if proposal.min_sparsity is not None else []
        lines.append('max-growth = {fail = "2%", warn = "0.5%"}')
    return "\n".join(lines) + "\n"


def _rounded_up(value: int, margin: float) -> int:
    """A number increased by the margin, rounded up to a few digits."""
    raised = math.ceil(value * (1 + margin))
    step: int = 10 ** max(len(str(raised)) - _DIGITS, 0)
    return -(-raised // step) * step


def _shortened(value: int) -> str:
    """The shortest exact text of a number with a unit: 896K, 1.23M."""
    texts = [str(value)]
    for power, letter in enumerate("KMGT", 1):
        whole, rest = divmod(value, 1000**power)
        if whole:
            decimals = f"{rest:0{3 * power}}".rstrip("0")
            texts.append(f"{whole}.{decimals}{letter}" if decimals else f"{whole}{letter}")
    return min(reversed(texts), key=len)


def _toml_string(value: str) -> str:
    # A JSON string is a TOML string if it is not escaped to ASCII: TOML has no surrogate pairs.
    return json.dumps(value, ensure_ascii=False)


_SAVED_MODEL = "saved_model.pb"
_INDEX = ".index.json"
_SHARDED = (".safetensors", ".bin")
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages"})


def discover_models(folder: Path) -> Iterator[Path]:
    """Yield files and folders that look like models, in the order of their names; hidden folders are left out."""
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_searched(Path(directory, name)))
        if _SAVED_MODEL in files:
            # Everything inside this folder belongs to the SavedModel.
            folders.clear()
            yield Path(directory)
            continue
        is_sharded = any(name.endswith(_INDEX) for name in files)
        for name in sorted(files):
            path = Path(directory, name)
            is_shard = is_sharded and path.suffix in _SHARDED
            if not name.startswith(".") and not is_shard and _is_model(path):
                yield path


def _is_searched(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.name not in _SKIPPED and not (folder / "pyvenv.cfg").exists()


def _is_model(path: Path) -> bool:
    if path.suffix.lower() not in SUFFIXES or (path.suffix == ".json" and not path.name.endswith(_INDEX)):
        return False
    return path.is_file() and not isinstance(attempt(recognise, path), PrunectlError)
