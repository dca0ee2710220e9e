"""How far outputs are from a teacher's (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from prunectl.errors import UsageError
from prunectl.training.torch.losses import Chosen


def distilled(
    losses: Sequence[Chosen], outs: Sequence[torch.Tensor], guides: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """Return the divergence of classes at a temperature, or the squared distance of numbers."""
    parts = []
    for chosen, out, guide in zip(losses, outs, guides, strict=False):
        if out.shape != guide.shape:
            raise UsageError(f"the teacher gives {tuple(guide.shape)}, the model {tuple(out.shape)}")
        if chosen.classifies:
            student = functional.log_softmax(chosen.logits(out.float()) / temperature, 1)
            teacher = functional.log_softmax(_logits(guide) / temperature, 1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            parts.append(divergence * temperature**2)
        else:
            parts.append(functional.mse_loss(out.float(), guide))
    return torch.stack(parts).sum()


def _logits(guide: torch.Tensor) -> torch.Tensor:
    """Return a teacher's outputs as logits, also where they are shares."""
    is_share = bool((guide >= 0).all()) and bool(((guide.sum(1) - 1).abs() < 1e-3).all())
    return guide.clamp_min(torch.finfo(guide.dtype).tiny).log() if is_share else guide
