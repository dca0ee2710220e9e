"""All that a PyTorch model needs to go on training from where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunectl.training.torch import sharded
from prunectl.training.torch.sharded import like

_FILE = "torch.pt"


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    evidence: Mapping[str, torch.Tensor]
    """What was added up, by tensor."""


def save(folder: Path | None, state: State) -> None:
    """Keep everything in a folder; without one, only give others this process's part."""
    parts = sharded.whole_all(
        {
            "module": state.module.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "evidence": state.evidence,
        }
    )
    if folder is not None:
        torch.save(parts, folder / _FILE)


def restore(folder: Path, state: State, device: torch.device) -> None:
    """Take everything up again."""
    parts = torch.load(folder / _FILE, map_location=device, weights_only=True)
    state.module.load_state_dict(sharded.all_like(parts["module"], state.module.state_dict()))
    state.optimizer.load_state_dict(_slots(parts["optimizer"], state.optimizer))
    state.scaler.load_state_dict(parts["scaler"])
    torch.set_rng_state(parts["random"].cpu())
    for name, total in parts["evidence"].items():
        state.evidence[name].copy_(like(total, state.evidence[name]))


def _slots(kept: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer kept, spread as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        at: {name: sharded.all_like(value, weights[at]) for name, value in slots.items()}
        for at, slots in kept["state"].items()
    }
    return {**kept, "state": parts}
