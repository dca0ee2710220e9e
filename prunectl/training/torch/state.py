"""All that a PyTorch model needs to go on training from where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunectl.errors import InputError, UsageError
from prunectl.training import randomness
from prunectl.training.torch import processes, sharded
from prunectl.training.torch.processes import Place
from prunectl.training.torch.sharded import like

_FILE = "torch.pt"
_OWN = ("numpy", "python")
"""The random states that belong to no framework."""


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    place: Place
    evidence: Mapping[str, torch.Tensor]
    """What was added up, by tensor."""


def save(folder: Path | None, state: State) -> None:
    """Keep everything in a folder; without one, only give others this process's part."""
    parts = sharded.whole_all(
        {
            "module": state.module.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "random": processes.gathered(state.place, _random_states(state.place)),
            "evidence": state.evidence,
        }
    )
    if folder is not None:
        torch.save(parts, folder / _FILE)


def restore(folder: Path, state: State) -> None:
    """Take everything up again."""
    place = state.place
    parts = torch.load(folder / _FILE, map_location=place.device, weights_only=True)
    _check_version(folder / _FILE, parts)
    if len(parts["random"]) != place.ranks:
        raise UsageError(
            f"the run was made by {len(parts['random'])} processes, and is resumed by {place.ranks}",
            hint="start as many processes as before",
        )
    state.module.load_state_dict(sharded.all_like(parts["module"], state.module.state_dict()))
    state.optimizer.load_state_dict(_slots(parts["optimizer"], state.optimizer))
    state.scaler.load_state_dict(parts["scaler"])
    _resume_random(parts["random"][place.rank], place)
    for name, total in parts["evidence"].items():
        state.evidence[name].copy_(like(total, state.evidence[name]))


def _check_version(path: Path, parts: Any) -> None:
    """Refuse what another version kept: at first that was one random state, of the first process."""
    random = parts.get("random") if isinstance(parts, dict) else None
    if isinstance(random, list) and all(isinstance(one, dict) and one.keys() >= {"cpu", *_OWN} for one in random):
        return
    raise InputError(
        f"{path} was made by another version of prunectl, whose runs this one cannot resume",
        hint="end the run with that version, or start it again in another folder",
    )


def _random_states(place: Place) -> dict[str, Any]:
    """Where each generator of this process is: no two processes drop out the same."""
    found = {"cpu": torch.get_rng_state(), **randomness.state()}
    if place.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(place.device)
    elif place.device.type == "mps":
        found["mps"] = torch.mps.get_rng_state()
    return found


def _resume_random(found: Mapping[str, Any], place: Place) -> None:
    torch.set_rng_state(found["cpu"].cpu())
    randomness.restore(found)
    # A run that goes on upon another kind of device cannot be the same to the bit.
    if place.device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"].cpu(), place.device)
    elif place.device.type == "mps" and "mps" in found:
        torch.mps.set_rng_state(found["mps"].cpu())


def _slots(kept: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer kept, spread as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        at: {name: sharded.all_like(value, weights[at]) for name, value in slots.items()}
        for at, slots in kept["state"].items()
    }
    return {**kept, "state": parts}
