"""All that a Keras model needs to go on training from where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.training import randomness
from prunectl.training.keras import numbers
from prunectl.training.keras.chance import Chance
from prunectl.training.keras.compiling import optimizer_variables
from prunectl.training.keras.kept import keep, take
from prunectl.training.keras.library import Library
from prunectl.training.keras.training import Training
from prunectl.training.network import Array

_FILE, _RANDOM = "keras.npz", "random.json"
_WEIGHT, _OPTIMIZER, _CHANCE, _EVIDENCE, _TORCH = "weight", "optimizer", "chance", "evidence", "torch"


def save(folder: Path, library: Library, training: Training, chance: Chance, evidence: Mapping[str, Array]) -> None:
    """Keep everything in a folder."""
    parts = {f"{kind}/{at}": numbers.read(library, one) for (kind, at), one in _variables(training).items()}
    parts.update({f"{_CHANCE}/{at}": one for at, one in enumerate(chance.states())})
    parts.update({f"{_EVIDENCE}/{name}": total for name, total in evidence.items()})
    parts.update({f"{_TORCH}/{kind}": module.get_rng_state().numpy() for kind, module in _of_torch(library).items()})
    keep(folder / _FILE, parts)
    (folder / _RANDOM).write_text(json.dumps(randomness.state()), encoding="utf-8")


def restore(folder: Path, library: Library, training: Training, chance: Chance) -> dict[str, Array]:
    """Take everything up again, and return the evidence that there was."""
    held = take(folder / _FILE)
    of_torch = {name: held.pop(name) for name in list(held) if name.startswith(f"{_TORCH}/")}
    wanted = _variables(training)
    generators = {name: array for name, array in held.items() if name.startswith(f"{_CHANCE}/")}
    evidence = {
        name.removeprefix(f"{_EVIDENCE}/"): array for name, array in held.items() if name.startswith(f"{_EVIDENCE}/")
    }
    names = {f"{kind}/{at}" for kind, at in wanted}
    if names != held.keys() - generators.keys() - {f"{_EVIDENCE}/{name}" for name in evidence}:
        raise InputError(
            f"{folder / _FILE} is of another model or another optimizer", hint="start again in another folder"
        )
    for (kind, at), variable in wanted.items():
        array = held[f"{kind}/{at}"]
        if array.shape != numbers.shape(variable):
            raise InputError(f"{folder / _FILE} is of another model: {kind} {at} has the shape {array.shape}")
        numbers.write(library, variable, array)
    try:
        chance.resume([generators[f"{_CHANCE}/{at}"] for at in range(len(generators))])
    except ValueError as error:
        raise InputError(
            f"{folder / _FILE} is of another model: {error}", hint="start again in another folder"
        ) from error
    for kind, module in _of_torch(library).items():
        # A run that goes on upon another kind of device cannot be the same to the bit.
        if f"{_TORCH}/{kind}" in of_torch:
            module.set_rng_state(library.torch.from_numpy(of_torch[f"{_TORCH}/{kind}"].copy()))
    if (folder / _RANDOM).is_file():
        randomness.restore(json.loads((folder / _RANDOM).read_text(encoding="utf-8")))
    training.begin_anew()
    return evidence


def _of_torch(library: Library) -> dict[str, Any]:
    """What of PyTorch has a random state: as a backend it drops out by that, and by no generator of Keras."""
    if library.backend != "torch":
        return {}
    torch = library.torch
    return {"cpu": torch, **({"cuda": torch.cuda} if torch.cuda.is_available() else {})}


def _variables(training: Training) -> dict[tuple[str, int], Any]:
    """Return all variables by what they are for, without masks and evidence."""
    model = training.model
    optimizer = [one for one in optimizer_variables(model) if not training.grip.owns(one)]
    weights = {(_WEIGHT, at): one for at, one in enumerate(model.weights)}
    return {**weights, **{(_OPTIMIZER, at): one for at, one in enumerate(optimizer)}}
