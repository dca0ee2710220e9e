"""A SavedModel without its pruning wrappers: rebuilt in a process of its own, and held against the input."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, MissingExtraError, UntrustedError, UsageError, WorkError
from prunectl.formats import optional, trust
from prunectl.formats.base import ModelFile, Role
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.tensorflow import keras_metadata_write, removals, unwrapped_weights
from prunectl.formats.tensorflow.saved_model_graph import read_graph
from prunectl.formats.tensorflow.saved_model_rebuild import EXTRA, MODULES

WRAPPING = frozenset({Part.MASKS, Part.WRAPPERS})
"""Neither means anything without the other: they go together."""
_SIGNATURES = frozenset({"serving_default", "__saved_model_init_op"})
_SECONDS, _SECONDS_PER_MB = 300, 1
_MEMORY_BYTES, _MEMORY_PER_BYTE = 16 << 30, 16
_REST = "the rest can go: prunectl strip --only optimizer,training"
_OWN = ("saved_model.pb", "keras_metadata.pb", "fingerprint.pb", "variables")


def unwrap(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write the model as tfmot strips it, its weights times their masks, and return what went."""
    _refuse(model, wish)
    for module in MODULES:
        # Only looked for: imported, it would stay in this process.
        if importlib.util.find_spec(module) is None:
            optional.require(module, extra=EXTRA)
    target = targets[model.path / "saved_model.pb"].parent
    _rebuild(model, target)
    for source, place in targets.items():
        if source.relative_to(model.path).parts[0] not in _OWN:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
    unwrapped_weights.check(model, target)
    return _removed(model)


def _refuse(model: ModelFile, wish: Wish) -> None:
    """Say what stands in the way, before any work begins."""
    graph = read_graph(model.path / "saved_model.pb")
    needed = WRAPPING | ({Part.OPTIMIZER} if model.about.optimizer else set())
    needed |= {Part.TRAINING} if model.about.training else set()
    if not needed <= wish.parts:
        raise UsageError(
            f"{model.path} is rebuilt without its wrappers, and then has no {', no '.join(sorted(needed - WRAPPING))}",
            hint=f"--only {','.join(part for part in Part if part in needed)}",
        )
    if model.about.keras is None:
        raise InputError(f"{model.path} has wrappers, but no configuration to rebuild the model from", hint=_REST)
    if facts := trust.facts_in(model.about.keras):
        raise UntrustedError(
            f"{model.path} is not rebuilt without its wrappers, since that might run code: {trust.worded(facts)}",
            hint=_REST,
        )
    if strange := set(graph.signatures) - _SIGNATURES:
        raise InputError(f"{model.path} would lose its signatures {', '.join(sorted(strange))}", hint=_REST)
    if graph.assets or len(graph.graphs) > 1:
        lost = "the files that its graph reads" if graph.assets else "all of its graphs but one"
        raise InputError(f"{model.path} would lose {lost}", hint=_REST)


def _rebuild(model: ModelFile, target: Path) -> None:
    order = {
        "config": model.about.keras,
        "source": str(model.path.resolve()),
        "target": str(target.resolve()),
        "memory_bytes": _MEMORY_BYTES + _MEMORY_PER_BYTE * model.nbytes,
    }
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_USE_LEGACY_KERAS": "1"}
    # -P keeps the folder that prunectl is called in from lending its own tensorflow.py.
    command = [sys.executable, "-P", "-m", "prunectl.formats.tensorflow.saved_model_rebuild"]
    try:
        done = subprocess.run(  # noqa: S603 - this package's own module
            command,
            input=json.dumps(order).encode(),
            capture_output=True,
            env={**os.environ, **quiet},
            timeout=_SECONDS + _SECONDS_PER_MB * (model.nbytes >> 20),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{model.path} takes too long to rebuild without its wrappers", hint=_REST) from error
    _raise(model.path, done.stdout)


def _raise(path: Path, answer: bytes) -> None:
    """Raise what the other process said, or that it said nothing."""
    try:
        said: Any = json.loads(answer)
        kind, message, hint = said["kind"], said.get("message", ""), said.get("hint", "")
    except (ValueError, TypeError, KeyError) as error:
        raise WorkError(f"{path} cannot be rebuilt: Keras gave up", hint=_REST) from error
    if kind == MissingExtraError.kind:
        raise MissingExtraError(message, hint=hint)
    if kind != "done":
        raise InputError(f"{path} cannot be rebuilt without its wrappers: {message}", hint=hint or _REST)


def _removed(model: ModelFile) -> tuple[Removed, ...]:
    parts = {Role.MASK: Part.MASKS, Role.SCHEDULE: Part.WRAPPERS, Role.OPTIMIZER: Part.OPTIMIZER}
    gone = (
        Removed(tensor.name, removals.part_of(tensor.name) or parts[tensor.role], tensor.storage.stored_bytes)
        for tensor in model.tensors
        if tensor.role in parts
    )
    return (*gone, *keras_metadata_write.training_in(model.path)[1])
